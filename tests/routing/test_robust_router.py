"""The robust router: what the fit reaches, what it refuses, and that it is the same when it is read again."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from phalanx.data import load_data
from phalanx.errors import InputError
from phalanx.models import build
from phalanx.nn import spec_of
from phalanx.routing import RobustRouter, fit_robust_router, fit_rows
from phalanx.routing.clusters import cluster
from phalanx.routing.feature_maps import feature_map
from phalanx.routing.robust_router import Quality, measured
from phalanx.threat import ThreatModel

THREAT = tiny.THREAT


def _blobs(size: int = 120) -> Tensor:
    """Two kinds of images, 0.2 and 0.8 bright."""
    noise = 0.05 * torch.rand(size, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    return noise + torch.where(torch.arange(size) % 2 == 0, 0.2, 0.7)[:, None, None, None]


@pytest.mark.parametrize("layout", ["flat", "tree"])
@pytest.mark.parametrize("features", ["pixels", "low_pass", "pooled"])
def test_two_kinds_of_images_are_told_apart_beyond_reach(features: Any, layout: Any) -> None:
    router = fit_robust_router(_blobs(), 2, ThreatModel("Linf", 0.1), features=features, layout=layout, attempts=2)
    experts = router(_blobs()).argmax(1)
    assert torch.equal(experts == experts[0], torch.arange(120) % 2 == 0)
    assert router.fitted["load"] == [0.5, 0.5] and router.fitted["reach"] == 1 and router.fitted["unflippable"] == 1


@pytest.mark.parametrize(("experts", "reach"), [(2, 1.35), (4, 1.75)])
def test_digits_reach(experts: int, reach: float) -> None:
    data = load_data("digits", train_limit=500)
    router = fit_robust_router(data.train.images(slice(None)), experts, THREAT, attempts=6)
    on_test = measured(router, data.test.images(slice(None)), THREAT)
    assert max(on_test.reach, router.fitted["reach"]) < reach
    assert min(on_test.load) > 0.3 / experts
    # an untrained one is reached nearly everywhere
    torch.manual_seed(0)
    assert measured(RobustRouter((1, 8, 8), experts), data.test.images(slice(None)), THREAT).reach > 0.9 * experts


def test_the_other_norms_have_routers_too() -> None:
    images = load_data("digits", train_limit=300).train.images(slice(None))
    for threat in (ThreatModel("L2", 0.5), ThreatModel("L1", 2)):
        router = fit_robust_router(images, 2, threat, attempts=2)
        assert router.threat == threat and router.fitted["reach"] < 1.5


def test_the_seed_says_all() -> None:
    images = _digits()
    first, again, other = (fit_robust_router(images, 2, THREAT, attempts=2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.linear.weight, again.linear.weight)
    assert not torch.equal(first.linear.weight, other.linear.weight)


def test_it_is_recorded_and_read_again() -> None:
    router = fit_robust_router(_digits(), 3, THREAT, attempts=2, features="low_pass")
    spec = spec_of(router)
    assert spec is not None
    plain = json.loads(json.dumps(spec.to_json()))
    assert {"load", "reach", "unflippable", "features", "images"} <= plain["arguments"]["fitted"].keys()
    read = build(plain)
    read.load_state_dict(router.state_dict())
    assert isinstance(read, RobustRouter) and read.threat == THREAT
    assert torch.equal(read(_digits()), router(_digits()))
    assert torch.equal(read.reachable(_digits(), THREAT), router.reachable(_digits(), THREAT))
    assert not any(parameter.requires_grad for parameter in read.parameters())


def test_more_regions_than_the_images_have_are_refused() -> None:
    with pytest.raises(
        InputError, match=r"2 regions that hold at least 35% of 60 .* \(Linf\): only [01] held; .* \(4; model.exp"
    ):
        fit_robust_router(torch.cat([_blobs()[::2] * 0 + 0.2, _blobs()[1::2]]), 4, ThreatModel("Linf", 0.1), attempts=2)


def test_a_radius_that_reaches_everything_is_refused() -> None:
    with pytest.raises(InputError, match=r"at eps 0.9 \(Linf\).* model.experts=1"):
        fit_robust_router(_digits(), 2, ThreatModel("Linf", 0.9), attempts=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layout": "ring"}, "layout must be one of flat, tree"),
        ({"features": "edges"}, "features must be one of pixels"),
        ({"num_experts": 1}, "num_experts must be at least 2, got 1; a single network has nothing to route"),
        ({"num_experts": 1, "layout": "flat"}, "num_experts must be at least 2, got 1"),
    ],
)
def test_what_cannot_be_fitted_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        fit_robust_router(_digits(), **{"num_experts": 2, "threat": THREAT, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_experts": 1}, "num_experts must be at least 2, got 1"),
        ({"num_experts": 3, "layout": "tree", "sides": [[[0], [1]]]}, "sides must hold 2 splits .*, got 1"),
        ({"num_experts": 2, "sides": [[[0], [1]]]}, "sides must hold 1 splits for a tree and none otherwise, got 1"),
    ],
)
def test_a_router_that_cannot_be_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RobustRouter((1, 2, 2), **arguments)


def test_quality_by_hand() -> None:
    assert Quality((0.5, 0.5), 1.2, 0.8).objective == pytest.approx(0.8)
    assert Quality((1.0, 0.0), 1.0, 1.0).objective == 0


def test_features_are_orthonormal_and_keep_what_is_smooth() -> None:
    for kind in ("low_pass", "pooled"):
        matrix = feature_map(kind, (3, 16, 16)).matrix  # type: ignore[arg-type]
        assert matrix is not None and matrix.shape == (192, 768)
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(192), rtol=0, atol=1e-5)
        even = torch.full((1, 768), 0.3)
        torch.testing.assert_close(even @ matrix.T @ matrix, even)
    assert feature_map("pixels", (1, 2, 2)).count == 4


def test_clusters_are_the_nearest_centres() -> None:
    labels = cluster(_blobs().flatten(1), 2, seed=3)
    assert len(labels) == 120 and set(labels.tolist()) <= {0, 1}
    assert torch.equal(labels, cluster(_blobs().flatten(1), 2, seed=3))


def test_of_many_images_so_many_are_drawn() -> None:
    assert torch.equal(fit_rows(7, 0), torch.arange(7))
    drawn = fit_rows(50_010, 0)
    assert len(drawn.unique()) == 50_000 and not torch.equal(drawn, fit_rows(50_010, 1))


def test_autocast_does_not_move_a_boundary() -> None:
    router = fit_robust_router(_digits(), 2, THREAT, attempts=1)
    with torch.autocast("cpu", torch.bfloat16):
        scores = router(_digits())
    assert torch.equal(scores, router(_digits()))


def _digits() -> Tensor:
    return tiny.digits().train.images(slice(None))
