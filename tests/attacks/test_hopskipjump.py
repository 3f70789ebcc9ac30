"""HopSkipJump against a boundary that is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attack_samples import Linear, images, labels_for, mixture
from torch import Tensor

from phalanx.attacks import HopSkipJump, Target
from phalanx.attacks.black_box import LabelSearch
from phalanx.rng import SampleRng
from phalanx.threat import ThreatModel


def linear() -> tuple[Linear, Tensor, Tensor, Tensor]:
    """A model, images away from the ends of the range, labels, and the weights' difference."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(2, 16, generator=generator, dtype=torch.float64)
    model = Linear(weight.tolist())
    x = 0.5 + 0.05 * torch.randn(10, 16, generator=generator, dtype=torch.float64)
    y = model(x).argmax(1)
    return model, x, y, (weight[0] - weight[1])


def found_by(attack: HopSkipJump, model: Linear, x: Tensor, y: Tensor) -> Tensor:
    return attack.perturb(Target(model, model, "whole", "margin", x, y), SampleRng.for_batch(len(x))).x_adv


@pytest.mark.parametrize(("norm", "dual", "slack"), [("L2", 2, 1.06), ("Linf", 1, 1.25)])
def test_it_finds_the_nearest_error_of_a_linear_model(norm, dual: int, slack: float) -> None:
    model, x, y, weight = linear()
    exact = (x @ weight).abs() / weight.norm(p=dual)
    distance = ThreatModel(norm, 0.5).distance(found_by(HopSkipJump(eps=0.0, norm=norm, queries=800), model, x, y), x)
    assert (distance >= exact - 1e-9).all() and (distance <= slack * exact).all()
    wide = replace(HopSkipJump(norm=norm, queries=800), eps=float(slack * exact.max()))
    assert wide.run(model, x, y).broken.all()
    assert not replace(wide, eps=float(0.99 * exact.min())).run(model, x, y).broken.any()


@pytest.mark.parametrize("norm", ["L2", "Linf"])
def test_the_estimate_points_along_the_boundary_s_normal(norm) -> None:
    model, x, y, weight = linear()
    search = LabelSearch(Target(model, model, "whole", "margin", x, y), ThreatModel(norm, 0.0), 10_000)
    # onto the boundary
    at = x - (x @ weight / weight.square().sum())[:, None] * weight
    rng = SampleRng.for_batch(len(x))
    normal = HopSkipJump(norm=norm, eps=0.0, evaluations=500)._normal(search, at, torch.full((10,), 0.01), rng, 1)
    true = -weight * torch.where(y == 0, 1.0, -1.0)[:, None]
    if norm == "Linf":
        assert ((normal == true.sign()).double().mean(1) > 0.8).all() and (normal.abs() <= 1).all()
    else:
        assert (torch.cosine_similarity(normal, true) > 0.9).all()
        torch.testing.assert_close(normal.norm(dim=1), torch.ones(10).double())


def test_where_all_labels_agree_it_goes_on_or_back() -> None:
    model, x, y, weight = linear()
    search = LabelSearch(Target(model, model, "whole", "margin", x, y), ThreatModel("L2", 0.0), 10_000)
    away = torch.where(y == 0, -1.0, 1.0)[:, None] * weight / weight.norm()
    rng = SampleRng.for_batch(len(x))
    attack = HopSkipJump(norm="L2", eps=0.0, evaluations=8)
    inside, outside = (attack._normal(search, x + far * away, torch.full((10,), 1e-3), rng, 1) for far in (0.0, 0.4))
    # the same points: the mean of their directions if all err, its opposite if none does
    torch.testing.assert_close(inside, -outside, atol=1e-6, rtol=0)


def test_a_step_is_halved_until_it_errs() -> None:
    def band(x: Tensor) -> Tensor:
        """Errors from 0.5 to 0.6."""
        inside = ((x > 0.5) & (x < 0.6)).to(x.dtype)
        return torch.cat([torch.full_like(inside, 0.5), inside], 1)

    x = torch.tensor([[0.3], [0.5]]).double()
    target = Target(band, band, "whole", "margin", x, torch.zeros(2, dtype=torch.int64))
    search = LabelSearch(target, ThreatModel("L2", 0.0), 100)
    moved, went = HopSkipJump(norm="L2", eps=0.0)._stepped(search, x + torch.tensor([[0.22], [0.02]]), x / x, 1)
    # .74 and .63 are past the band, .575 is not; .54 is none at once
    assert moved.squeeze(1).tolist() == pytest.approx([0.575, 0.54]) and went.all()
    assert search.found.queries.tolist() == [3, 1]


@pytest.mark.parametrize("norm", ["L2", "Linf"])
def test_how_many_are_asked_together_changes_nothing(norm) -> None:
    model = mixture(1).double().eval()
    x = images(12, torch.float64)
    y = labels_for(model, x)
    attack, rng = HopSkipJump(eps=0.05, norm=norm, queries=160, evaluations=10), SampleRng.for_batch(12)
    whole = attack.run(model, x, y, rng=rng)
    alone = [attack.run(model, x[i : i + 1], y[i : i + 1], rng=rng[i : i + 1]) for i in range(12)]
    assert torch.equal(whole.x_adv, torch.cat([result.x_adv for result in alone]))
    assert torch.equal(whole.queries, torch.cat([result.queries for result in alone]))
    assert (whole.queries > 100).any()


def test_a_start_in_one_colour_where_noise_has_one_class() -> None:
    def flat(x: Tensor) -> Tensor:
        """Class 1 for images that are nearly of one colour and not mid-grey."""
        smooth = x.flatten(1).std(1) < 0.05
        far = (x.flatten(1).mean(1) - 0.5).abs() > 0.2
        return torch.stack([torch.full_like(far, 0.5, dtype=x.dtype), (smooth & far).to(x.dtype)], 1)

    x = images(6, torch.float64)
    y = torch.zeros(6, dtype=torch.int64)
    found = HopSkipJump(eps=1.0, queries=40).run(flat, x, y)
    assert found.broken.all()
    # without such a start there is nothing to go on from, and the budget is not spent
    without = HopSkipJump(eps=1.0, queries=40, starts=1).run(flat, x, y)
    assert not without.broken.any() and torch.equal(without.x_adv, x) and (without.queries == 3).all()
