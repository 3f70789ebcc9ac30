"""When an expert can be reached, all its rivals together: never later than it truly is, never earlier than pairwise."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from plane_samples import flip_distance, plane, points
from scipy.optimize import linprog, minimize  # type: ignore[import-untyped]
from torch import Tensor

from phalanx.bounds import pairwise_lipschitz
from phalanx.certification import certify, entry_radii, lower_margins
from phalanx.certification.moe import Cells
from phalanx.certification.reach import earliest, exact_entries
from phalanx.errors import InputError
from phalanx.routing import MLPRouter, RobustRouter
from phalanx.threat import NORMS, Norm
from tiny import digits, mixture


def _router(seed: int, *, experts: int = 4, pixels: int = 3, n: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(experts, pixels, dtype=torch.float64, generator=generator)
    return torch.randn(n, experts, dtype=torch.float64, generator=generator), weights


def _true(gap: np.ndarray[Any, Any], directions: np.ndarray[Any, Any], norm: Norm) -> float:
    """The least ||d|| with directions . d >= gap: a linear or quadratic programme."""
    conditions, pixels = directions.shape
    if norm == "L2":
        far = 1e3 * np.ones(pixels)
        found = minimize(
            lambda d: d @ d,
            np.linalg.lstsq(directions, np.maximum(gap, 0) + 1, rcond=None)[0],
            jac=lambda d: 2 * d,
            constraints={"type": "ineq", "fun": lambda d: directions @ d - gap, "jac": lambda _: directions},
            bounds=list(zip(-far, far, strict=True)),
            options={"ftol": 1e-14, "maxiter": 500},
        )
        return math.sqrt(found.fun) if found.success else math.inf
    if norm == "L1":
        found = linprog(np.ones(2 * pixels), np.hstack([-directions, directions]), -gap, bounds=(0, None))
        return float(found.fun) if found.status == 0 else math.inf
    eye, one = np.eye(pixels), np.ones((pixels, 1))
    sides = np.block([[-directions, np.zeros((conditions, 1))], [eye, -one], [-eye, -one]])
    found = linprog(
        np.r_[np.zeros(pixels), 1],
        sides,
        np.r_[-gap, np.zeros(2 * pixels)],
        bounds=[(None, None)] * pixels + [(0, None)],
    )
    return float(found.fun) if found.status == 0 else math.inf


@pytest.mark.parametrize("norm", NORMS)
def test_it_is_the_programme_s_optimum(norm: Norm) -> None:
    compared = 0
    for seed in range(6):
        scores, weights = _router(seed)
        found = exact_entries(scores, weights, torch.zeros(len(scores)).double(), norm)
        for index in range(len(scores)):
            for expert in range(4):
                rivals = [j for j in range(4) if j != expert]
                gap = (scores[index, rivals] - scores[index, expert]).numpy()
                true = _true(gap, (weights[expert] - weights[rivals]).numpy(), norm)
                assert float(found[index, expert]) <= true * (1 + 1e-6) + 1e-6
                if math.isfinite(true) and true > 1e-3:
                    compared += 1
                    assert float(found[index, expert]) >= true * (1 - 1e-4)
    assert compared > 80


@pytest.mark.parametrize("norm", NORMS)
def test_it_is_never_earlier_than_pairwise_and_sometimes_later(norm: Norm) -> None:
    later = 0
    for seed in range(6):
        scores, weights = _router(seed, pixels=6)
        slack = torch.full((len(scores),), 0.01, dtype=torch.float64)
        pairwise = entry_radii(scores, pairwise_lipschitz(weights, norm), slack)
        exact = exact_entries(scores, weights, slack, norm)
        assert bool((exact >= pairwise * (1 - 1e-12)).all())
        later += int((exact > pairwise * 1.01).sum())
    assert later > 5


@pytest.mark.parametrize("norm", NORMS)
def test_nobody_enters_before(norm: Norm) -> None:
    """Dense sampling of the ball just below each entry."""
    scores, weights = _router(3, pixels=2)
    exact = exact_entries(scores, weights, torch.zeros(len(scores)).double(), norm)
    order = {"Linf": math.inf, "L2": 2.0, "L1": 1.0}[norm]
    angle = torch.linspace(0, 2 * math.pi, 2000, dtype=torch.float64)
    circle = torch.stack([angle.cos(), angle.sin()], 1)
    circle = circle / circle.norm(p=order, dim=1, keepdim=True)
    for index in range(len(scores)):
        for expert in range(4):
            for share in (0.3, 0.7, 0.999):
                radius = min(float(exact[index, expert]), 1e3) * share
                moved = scores[index] + radius * circle @ weights.T
                assert not radius or not bool((moved.argmax(1) == expert).any())


def test_conditions_that_exclude_each_other_are_never_met() -> None:
    directions = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    gaps = torch.tensor([[1.0, 1.0], [1.0, -2.0], [-1.0, -1.0]], dtype=torch.float64)
    found = earliest(gaps, directions, "L2")
    assert found[0] > 1e6 and float(found[1]) == pytest.approx(1) and found[2] == 0


@pytest.mark.parametrize("norm", NORMS)
def test_no_region_of_a_tree_is_nearer(norm: Norm) -> None:
    """Over the whole plane of two pixels."""
    torch.manual_seed(5)
    router = RobustRouter((1, 1, 2), 4, layout="tree", sides=[[[0, 1], [2, 3]], [[0], [1]], [[2], [3]]]).double().eval()
    torch.nn.init.normal_(router.linear.weight, std=2)
    router.linear.bias.data = 0.3 * torch.randn(len(router.linear.bias), dtype=torch.float64)
    cells = Cells(router.regions, norm)
    x = points(1, 12)
    exact, pairwise = cells.exact_entries(x), cells.entries(x)
    assert bool((exact >= pairwise * (1 - 1e-12)).all()) and bool((exact > pairwise + 1e-3).any())
    routed = router(plane()).argmax(1)
    assert len(routed.unique()) > 2
    for expert in routed.unique().tolist():
        distance = flip_distance(x, torch.full((len(x),), -1), torch.where(routed == expert, 0, -1), norm)
        assert bool((exact[:, expert] <= distance + 1e-9).all())
        # the plane's grid is that fine
        assert bool((exact[:, expert] >= distance - 0.05)[exact[:, expert] > 0].any())


@pytest.mark.parametrize("layout", ["linear", "tree"])
def test_certificates_grow_and_hold(layout: str) -> None:
    model = mixture(4, 1, seed=3)
    if layout == "tree":
        torch.manual_seed(1)
        model.router = RobustRouter((1, 8, 8), 4, layout="tree", sides=[[[0], [1, 2, 3]], [[1], [2, 3]], [[2], [3]]])
    model = model.eval()
    torch.nn.init.normal_(model.router[2].weight if layout == "linear" else model.router.linear.weight, std=0.2)
    images = digits().test
    batch = next(iter(images.batches(40)))
    y = model(batch.x).argmax(1)
    for eps in (0.02, 0.1):
        pairwise, exact = (
            lower_margins(model, batch.x, y, "L2", eps, method="lipschitz", reachable=rule)
            for rule in ("pairwise", "exact")
        )
        assert bool((exact >= pairwise).all())
    found = {rule: certify(model, images, method="lipschitz", reachable=rule) for rule in ("pairwise", "exact")}
    assert found["exact"].reachable == "exact"
    assert bool((found["exact"].radius >= found["pairwise"].radius * (1 - 1e-9)).all())


def test_the_exact_rule_wants_a_gate_that_it_knows() -> None:
    soft, narrow = mixture(3, "all").eval(), mixture(3, 1).eval()
    narrow.router = MLPRouter((1, 8, 8), 3, hidden=(4,)).eval()
    for model in (soft, narrow, copy.deepcopy(narrow).experts[0]):
        with pytest.raises(InputError, match="exact reachable rule is for top-1 gates"):
            certify(model, digits().test.first(3), reachable="exact")
    with pytest.raises(InputError, match="reachable must be one of pairwise, exact"):
        certify(soft, digits().test.first(3), reachable="all")
