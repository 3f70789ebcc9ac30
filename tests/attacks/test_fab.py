from __future__ import annotations

import math

import pytest
import torch
from attack_samples import Counting, Linear, build, images, labels_for, mixture, pixels_for
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from phalanx.attacks import FAB, PGD, Target
from phalanx.attacks.fab import boundary
from phalanx.rng import SampleRng
from phalanx.threat import NORMS, ThreatModel

DUAL = {"Linf": 1.0, "L2": 2.0, "L1": math.inf}
RADII = {"Linf": 0.05, "L2": 0.3, "L1": 1.0}


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.1), ("L2", 0.2), ("L1", 0.3)])
@pytest.mark.parametrize("targets", [0, 9])
def test_of_a_linear_model_the_nearest_error_is_found(norm, eps: float, targets: int) -> None:
    generator = torch.Generator().manual_seed(2)
    w = torch.randn(12, generator=generator, dtype=torch.float64)
    x = 0.4 + 0.2 * torch.rand(1, 12, generator=generator, dtype=torch.float64)
    reach = eps * float(w.norm(p=DUAL[norm]))
    attack = FAB(eps=eps, norm=norm, steps=40, targets=targets)
    for share in (0.5, 0.9, 0.99, 1.01, 1.1):
        model = Linear([w.tolist(), [0.0] * 12], [share * reach - float(x @ w), 0.0])
        assert bool(attack.run(model, x, torch.tensor([0])).broken) == (share < 1)
        # without a verdict it goes on to the least perturbation
        found = attack.search(model, x, torch.tensor([0]))
        assert bool(found.first_success >= 0) == (share < 1)
        distance = float(attack.threat.distance(found.x_adv, x))
        assert distance == pytest.approx(min(share, 1) * eps, rel=0.02)


def test_a_step_by_hand() -> None:
    # logits [x - 1/2, 0] at x = .7: the boundary is .2 away, and 1.05 times .2 past it lies .49; both moves are the
    # same, so that their mean is too
    model, x, y = Linear([[1.0], [0.0]], [-0.5, 0.0]), torch.tensor([[0.7]]).double(), torch.tensor([0])
    seen: list[float] = []

    def watched(images: Tensor) -> Tensor:
        seen.extend(images.detach().flatten().tolist())
        return model(images)

    result = FAB(eps=0.205, norm="Linf", steps=3, targets=0).run(watched, x, y)
    # .49 is an error outside the ball: back to .7 - .9 * .21 = .511. From there the boundary is .011 away, from the
    # clean image .2: alpha = .011 / .211, and the step ends at .95 ... of .49945 and .05 ... of .49
    alpha = 0.011 / 0.211
    second = (1 - alpha) * (0.511 - 1.05 * 0.011) + alpha * 0.49
    assert seen == pytest.approx([0.7, 0.7, 0.49, 0.511, second, second])
    assert bool(result.broken) and int(result.first_success) == 2 and int(result.queries) == 2 + 4


def test_queries_are_the_images_sent() -> None:
    model, x = build("callable"), images(12)
    y = labels_for(model, x)
    for surface in ("whole", "dense"):
        counted = Counting(model)
        result = FAB(eps=0.05, steps=6, surface=surface).run(counted, x, y)
        # the pass on the clean images ranks the targets
        assert sum(counted.sizes) == int(result.queries.sum()) and 0 < int(result.broken.sum()) < 12


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("targets", [0, 2])
def test_the_boundary_is_the_nearest_and_its_gradient_autograd_s(norm, targets: int) -> None:
    model, x = build("float64"), images(6, torch.float64)
    y = model(x).argmax(1)
    aim = Target(model, model, "whole", "margin", x, y, wanted=(y + 1) % 3 if targets else None)
    value, slope = boundary(aim, x, norm)
    for row in range(6):
        leaf = x[row : row + 1].clone().requires_grad_()
        logits = model(leaf)[0]
        leads = {k: logits[k] - logits[y[row]] for k in range(3) if k != int(y[row])}
        gradients = {k: torch.autograd.grad(lead, leaf, retain_graph=True)[0] for k, lead in leads.items()}
        distances = {k: float(lead.detach().abs() / gradients[k].norm(p=DUAL[norm])) for k, lead in leads.items()}
        chosen = int((y[row] + 1) % 3) if targets else min(distances, key=lambda k: distances[k])
        torch.testing.assert_close(value[row], leads[chosen].detach())
        torch.testing.assert_close(slope[row], gradients[chosen][0])


@given(st.sampled_from(["top-1", "soft", "float64"]), st.sampled_from(NORMS), st.integers(0, 50), st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_more_effort_never_loses_an_error_seen(name: str, norm, seed: int, steps: int) -> None:
    model, x = build(name), pixels_for(name, 8)
    y = labels_for(model, x)
    target = Target(model, model, "whole", "margin", x, y, judged=True)

    def seen(**settings: int) -> Tensor:
        attack = FAB(eps=RADII[norm] / 2, norm=norm, targets=0, **settings)
        found = attack.perturb(target, SampleRng.for_batch(8, seed))
        # the final search at the end starts elsewhere when more was tried
        return (found.first_success >= 0) & (found.first_success < attack.gradient_steps)

    base = seen(steps=steps)
    assert not (base & ~seen(steps=steps + 4)).any() and not (base & ~seen(steps=steps, restarts=3)).any()


@pytest.mark.parametrize("name", ["callable", "top-1", "soft", "batchnorm-in-training", "float64"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("targets", [0, 9])
def test_nothing_breaks_at_radius_zero(name: str, norm, targets: int) -> None:
    model, x = build(name), pixels_for(name, 10)
    y = labels_for(model, x)
    result = FAB(eps=0, norm=norm, steps=3, restarts=2, targets=targets).run(model, x, y)
    assert torch.equal(result.x_adv, x) and torch.equal(result.broken, result.clean_predicted != y)


@pytest.mark.parametrize("norm", NORMS)
def test_as_strong_as_pgd_on_small_networks(norm) -> None:
    model, x = build("float64"), images(60, torch.float64)
    y = labels_for(model, x)
    by_pgd = int(PGD(eps=RADII[norm], norm=norm, steps=50, objective="margin").run(model, x, y).broken.sum())
    for targets in (0, 9):
        result = FAB(eps=RADII[norm], norm=norm, steps=30, targets=targets).run(model, x, y)
        assert 12 < by_pgd < 60 and abs(int(result.broken.sum()) - by_pgd) <= 2
        # and no further than needed without a verdict
        found = FAB(eps=RADII[norm], norm=norm, steps=30, targets=targets).search(model, x, y)
        assert (ThreatModel(norm, RADII[norm]).distance(found.x_adv, x)[result.broken] <= RADII[norm] * 1.001).all()


def test_two_classes_and_one() -> None:
    model, x = Linear([[1.0] * 4, [-1.0] * 4], [0.0, 4.2]), torch.full((1, 4), 0.55, dtype=torch.float64)
    for targets in (0, 9):
        assert FAB(eps=0.05, steps=3, targets=targets).run(model, x, torch.tensor([0])).broken.all()
    alone = Linear([[1.0] * 4])
    for targets in (0, 9):
        result = FAB(eps=0.5, steps=2, targets=targets).run(alone, x, torch.tensor([0]))
        assert not result.broken.any() and torch.equal(result.x_adv, x)


def constant(x: Tensor) -> Tensor:
    return torch.tensor([[1.0, 0.0, 0.0]]).expand(len(x), 3)


def flat(x: Tensor) -> Tensor:
    """As constant, but with a gradient of zeros."""
    return constant(x) + 0 * x.flatten(1).sum(1, keepdim=True)


@pytest.mark.parametrize("model", [constant, flat])
@pytest.mark.parametrize("targets", [0, 9])
def test_a_constant_model_holds_and_says_that_it_has_no_gradient(model, targets: int) -> None:
    x, y = images(4), torch.zeros(4, dtype=torch.int64)
    result = FAB(eps=0.1, steps=3, targets=targets).run(model, x, y)
    assert not result.broken.any() and result.zero_gradient.all() and torch.equal(result.x_adv, x)


@pytest.mark.parametrize("targets", [0, 9])
def test_what_is_not_finite_is_invalid(targets: int) -> None:
    model = Linear([[1.0] * 16, [-1.0] * 16], [0.0, 0.0])

    def fails_nearby(x: Tensor) -> Tensor:
        off = (x - 0.5).abs().flatten(1).amax(1, keepdim=True) > 1e-3
        return torch.where(off, float("nan"), model(x))

    x = torch.full((3, 1, 4, 4), 0.5, dtype=torch.float64)
    result = FAB(eps=0.1, steps=3, targets=targets).run(fails_nearby, x, torch.zeros(3, dtype=torch.int64))
    assert result.invalid.all() or not result.broken.any()
    nan = FAB(eps=0.1, steps=3, targets=targets).run(lambda x: model(x) * math.nan, x, torch.zeros(3).long())
    assert nan.invalid.all() and not nan.broken.any()


def test_restarts_start_in_the_ball_of_half_the_radius() -> None:
    model, x, y = Linear([[1.0] * 9, [0.0] * 9], [0.0, 0.0]), torch.full((2, 9), 0.5).double(), torch.zeros(2).long()
    seen: list[Tensor] = []

    def watched(images: Tensor) -> Tensor:
        seen.append(images.detach().clone())
        return model(images)

    attack, rng = FAB(eps=0.2, norm="L2", steps=1, restarts=3, targets=0), SampleRng.for_batch(2, 5)
    attack.run(watched, x, y, rng=rng)
    half = ThreatModel("L2", 0.1)
    # the clean image; of each restart the point of the gradient and the one looked at
    assert torch.equal(seen[1], x)
    for restart in (1, 2):
        assert torch.equal(seen[1 + 2 * restart], half.random_start(x, rng, restart=restart))


@pytest.mark.parametrize("surface", ["experts", "dense", "expert-1", "router"])
def test_an_error_of_a_surface_counts_when_the_model_makes_it(surface: str) -> None:
    torch.manual_seed(0)
    model, x = mixture(1).double().eval(), images(40, torch.float64)
    y = labels_for(model, x)
    attack = FAB(eps=0.08, steps=8, surface=surface)
    found = attack.search(model, x, y)
    result = attack.run(model, x, y)
    assert torch.equal(result.predicted != y, result.broken) and int(result.broken.sum()) > 8
    # in the ball, the surface errs more often than the model
    assert int((found.first_success >= 0).sum()) >= int(result.broken.sum()) - 8


def test_no_gradient_of_a_weight_is_computed() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    wanted: list[bool] = []
    model.register_forward_hook(lambda *_: wanted.append(model[1].weight.requires_grad))
    x = images(4)
    FAB(eps=0.1, steps=2).run(model, x, labels_for(model, x))
    assert wanted and not any(wanted[1:]) and all(p.grad is None and p.requires_grad for p in model.parameters())


def test_the_final_search_comes_nearer_than_the_walk() -> None:
    # logits [c + c^2 / 2, 0] of c = x - 1/2: one step of eta = 2 from .7 leads to .7 - 2 * .22 / 1.2 = .333, an error
    def bent(x: Tensor) -> Tensor:
        c = x - 0.5
        return torch.cat([c + c**2 / 2, 0 * c], 1)

    x, y = torch.tensor([[0.7]]).double(), torch.tensor([0])
    result = FAB(eps=0.4, steps=1, eta=2, targets=0).search(bent, x, y)
    # three times to where a straight line between the ends of the bracket would be a hundredth of
    # the first error's; all are errors
    error, margin = 0.7 - 0.44 / 1.2, lambda x: (x - 0.5) + (x - 0.5) ** 2 / 2
    left_over = 0.01 * margin(error)
    for _ in range(3):
        error += (0.7 - error) * (left_over - margin(error)) / (0.22 - margin(error))
    assert 0.49 < error < 0.5 and float(result.x_adv) == pytest.approx(error, abs=1e-9)
    # a gradient, a look, the clean image, three points
    assert int(result.queries) == 2 + 1 + 3


@pytest.mark.parametrize("norm", NORMS)
def test_without_a_verdict_the_nearest_error_sent_is_returned(norm) -> None:
    model, x = build("float64"), images(6, torch.float64)
    y = model(x).argmax(1)
    sent: list[Tensor] = []

    def watched(images: Tensor) -> Tensor:
        sent.append(images.detach().clone())
        return model(images)

    threat = ThreatModel(norm, {"Linf": 1.0, "L2": 4.0, "L1": 16.0}[norm])
    found = FAB(eps=threat.eps, norm=norm, steps=8, restarts=2, targets=2).search(watched, x, y)
    distances = torch.stack([threat.distance(z, x).where(model(z).argmax(1) != y, math.inf) for z in sent])
    assert distances.isfinite().any(0).all()
    # an error by less than rounding is none
    torch.testing.assert_close(threat.distance(found.x_adv, x), distances.amin(0), rtol=1e-3, atol=0)


def test_bad_settings_are_named() -> None:
    for settings_, message in (
        ({"steps": 0}, "steps must be at least 1"),
        ({"restarts": 0}, "restarts must be at least 1"),
        ({"targets": -1}, "targets must be at least 0"),
        ({"eta": 0.9}, "eta must be from 1 to 2"),
        ({"beta": 1.5}, "beta must be from 0 to 1"),
        ({"targeted": True}, "targeted of FAB is fixed"),
        ({"objective": "dlr"}, "objective of FAB is fixed"),
    ):
        with pytest.raises(ValueError, match=message):
            FAB(eps=0.1, **settings_)
    assert FAB(steps=10, restarts=2, targets=9).gradient_steps == 180
    assert FAB(targets=9).for_classes(4).targets == 3 and FAB(targets=0).for_classes(4).targets == 0
