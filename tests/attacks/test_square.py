from __future__ import annotations

import math

import pytest
import torch
from attack_samples import Counting, Linear, build, images, labels_for, mixture, pixels_for
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from phalanx.attacks import PGD, Square, Target
from phalanx.attacks.square_proposals import Corners, windows
from phalanx.errors import InputError
from phalanx.rng import SampleRng
from phalanx.threat import NORMS, ThreatModel

RADII = {"Linf": 0.06, "L2": 0.4, "L1": 1.5}


def test_the_published_schedule() -> None:
    # p = .8 on 32 x 32, of 10,000 queries
    sides = Square(eps=0.1, queries=10_000).sides(32, 32)
    share = {0: 1, 10: 1, 11: 2, 51: 4, 201: 8, 501: 16, 1001: 32, 2001: 64, 4001: 128, 6001: 256, 8001: 512}
    for step, divisor in share.items():
        assert sides[step] == max(round((0.8 * 1024 / divisor) ** 0.5), 1)
    assert sides == sorted(sides, reverse=True) and sides[-1] == 1 and len(sides) == 10_000
    # of 1,000 the same, ten times as fast
    assert Square(eps=0.1, queries=1000).sides(32, 32)[::10] == sides[::100]
    windowed = Square(eps=0.1, norm="L2", queries=10_000).sides(32, 32)
    assert windowed[-1] == 3 and all(side % 2 for side in windowed)
    assert set(Square(eps=0.1, norm="L1", queries=50).sides(2, 7)) == {2}


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (2, 1, 1), (1, 4, 9), (3, 13, 6)])
@pytest.mark.parametrize("norm", NORMS)
def test_proposals_stay_in_the_ball_and_change_their_windows_alone(norm, shape: tuple[int, int, int]) -> None:
    threat, rng = ThreatModel(norm, RADII[norm]), SampleRng.for_batch(6)
    x = torch.rand(6, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = (x * 1.4 - 0.2).clamp(0, 1)
    sides = Square(eps=0.1, norm=norm, queries=40).sides(*shape[1:])
    proposals = Corners(threat) if norm == "Linf" else windows(threat, x, sides)
    best = proposals.start(x, rng.uniform("start", (proposals.start_draws(shape),)))
    assert best.shape == x.shape and threat.contains(best, x).all()
    for step, side in enumerate(sides):
        new = proposals.moved(best, x, side, rng.uniform("step", (proposals.draws(shape),), step=step))
        assert threat.contains(new, x).all() and new.isfinite().all()
        changed = (new != best).any(1).flatten(1).sum(1)
        assert norm != "Linf" or (changed <= side**2).all()
        best = new


def test_linf_starts_in_stripes_and_moves_squares_to_corners() -> None:
    threat, x = ThreatModel("Linf", 0.1), torch.full((200, 2, 6, 6), 0.5, dtype=torch.float64)
    proposals, rng = Corners(threat), SampleRng.for_batch(200)
    start = proposals.start(x, rng.uniform("a", (12,)))
    assert torch.equal(start, start[:, :, :1].expand_as(start)) and set(
        (start - x).abs().round(decimals=9).unique().tolist()
    ) == {0.1}
    new = proposals.moved(x, x, 2, rng.uniform("b", (4,)))
    delta = (new - x).round(decimals=9)
    assert (delta != 0).any(1).flatten(1).sum(1).eq(4).all()
    # one sign for each channel, and every place is reached, the last row and column too
    assert all(len(set(row[row != 0].tolist())) == 1 for row in delta.flatten(0, 1))
    assert set(delta.unique().tolist()) == {-0.1, 0.0, 0.1}
    assert {tuple(d[0].nonzero()[0].tolist()) for d in delta} == {(r, c) for r in range(5) for c in range(5)}


@pytest.mark.parametrize(("norm", "order"), [("L2", 2), ("L1", 1)])
def test_a_window_takes_over_what_another_held(norm, order: int) -> None:
    # far from the ends of the pixel range and with the whole radius in use, nothing is lost
    threat, x = ThreatModel(norm, 0.3), torch.full((50, 1, 9, 9), 0.5, dtype=torch.float64)
    proposals, rng = windows(threat, x, [3]), SampleRng.for_batch(50)
    start = proposals.start(x, rng.uniform("a", (proposals.start_draws((1, 9, 9)),)))
    torch.testing.assert_close(threat.distance(start, x), torch.full((50,), 0.3).double())
    new = proposals.moved(start, x, 3, rng.uniform("b", (6,)))
    torch.testing.assert_close(threat.distance(new, x), torch.full((50,), 0.3).double())
    # outside both windows the image is as it was, and one window has been emptied where the other does not cover it
    changed = (new - start).abs() > 1e-9
    assert changed.flatten(1).sum(1).le(18).all() and ((new == x) & (start != x)).any()


def test_an_l1_window_gets_more_than_the_ball_holds_and_is_projected() -> None:
    # nothing is used yet: each of two channels gets 2 (eps / 2 + 0), together twice the radius
    threat, x = ThreatModel("L1", 0.3), torch.full((60, 2, 9, 9), 0.5, dtype=torch.float64)
    proposals = windows(threat, x, [9])
    bump = proposals.bumps[9]
    new = proposals.moved(x, x, 9, SampleRng.for_batch(60).uniform("b", (7,)))
    signs = [torch.tensor([a, b]).double()[:, None, None] for a in (-1.0, 1.0) for b in (-1.0, 1.0)]
    options = torch.stack([0.3 * sign * shape for sign in signs for shape in (bump, bump.T)])
    expected = threat.project(x[:1] + options, x[:1].expand(8, -1, -1, -1))
    found = {int((expected - image).flatten(1).abs().amax(1).argmin()) for image in new}
    assert all((expected - image).flatten(1).abs().amax(1).min() < 1e-9 for image in new) and len(found) == 8


@pytest.mark.parametrize(("norm", "order", "decay"), [("L2", 2, 2), ("L1", 1, 4)])
def test_the_bump_by_hand(norm, order: int, decay: int) -> None:
    threat, x = ThreatModel(norm, 0.3), torch.zeros(1, 1, 5, 5, dtype=torch.float64)
    bump = windows(threat, x, [5]).bumps[5]
    a, b, c = 1.0, 2.0**-decay, 3.0**-decay
    full, ring, rim = a + b + c, b + c, c
    # two rows around (1, 2), then three rows around (1, 2) of their own
    upper = torch.tensor([[rim, ring, ring, ring, rim], [rim, ring, full, ring, rim]]).double()
    lower = torch.tensor(
        [[rim, ring, ring, ring, rim], [rim, ring, full, ring, rim], [rim, ring, ring, ring, rim]]
    ).double()
    parts = torch.cat([upper / upper.norm(p=order), -lower / lower.norm(p=order)])
    torch.testing.assert_close(bump, parts / parts.norm(p=order))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("surface", ["whole", "dense"])
def test_queries_are_the_images_sent(norm, surface: str) -> None:
    model, x = build("callable"), images(20)
    y = labels_for(model, x)
    counted = Counting(model)
    result = Square(eps=RADII[norm], norm=norm, queries=50, restarts=2, surface=surface).run(counted, x, y)
    assert sum(counted.sizes) == int(result.queries.sum())
    held = ~result.broken
    assert held.any() and result.broken.sum() > 4
    # dense is not the deployed surface: at 0, 1, 2, 4, 8, 16, 32 and the end the model itself is asked as well
    assert (result.queries[held] == 2 + 2 * 50 + (2 * 8 if surface == "dense" else 0)).all()
    assert (result.queries[result.broken & (result.first_success >= 0)] <= 2 + 2 * (50 + 8)).all()


@pytest.mark.parametrize("norm", NORMS)
def test_no_gradient_is_used(norm) -> None:
    model, x = build("float64"), images(20, torch.float64)
    y = labels_for(model, x)

    def masked(x: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        return model(x.detach())

    attack = Square(eps=RADII[norm], norm=norm, queries=100)
    result = attack.run(masked, x, y)
    assert torch.equal(result.broken, attack.run(model, x, y).broken) and int(result.broken.sum()) > 5
    by_pgd = PGD(eps=RADII[norm], norm=norm, steps=40, objective="margin").run(model, x, y).broken
    assert int((by_pgd & ~result.broken).sum()) <= 5


@given(st.sampled_from(["top-1", "soft", "float64"]), st.sampled_from(NORMS), st.integers(0, 50), st.integers(1, 40))
@settings(max_examples=25, deadline=None)
def test_more_restarts_never_break_fewer_and_the_loss_never_falls(name: str, norm, seed: int, queries: int) -> None:
    model, x = build(name), pixels_for(name, 8)
    y, rng = labels_for(model, x), SampleRng.for_batch(8, seed)
    once, more = (
        Square(eps=RADII[norm] / 2, norm=norm, queries=queries, restarts=restarts).run(model, x, y, rng=rng)
        for restarts in (1, 3)
    )
    assert not (once.broken & ~more.broken).any() and (more.restart[once.broken] == 0).all()
    held = ~more.broken
    assert (more.loss[held] >= once.loss[held]).all()
    start = Square(eps=RADII[norm] / 2, norm=norm, queries=1).run(model, x, y, rng=rng)
    assert (once.loss[held] >= start.loss[held]).all() and not (start.broken & ~once.broken).any()


def test_what_is_kept_is_the_best_of_what_was_sent() -> None:
    model, x = build("float64"), images(6, torch.float64)
    y = model(x).argmax(1)
    sent: list[Tensor] = []

    def watched(images: Tensor) -> Tensor:
        sent.append(images.clone())
        return model(images)

    target = Target(watched, watched, "whole", "margin", x, y)
    found = Square(eps=0.02, queries=150).perturb(target, SampleRng.for_batch(6))
    logits = torch.stack([model(images) for images in sent])
    own = logits.gather(-1, y.expand(150, -1)[..., None])
    margins = logits.scatter(-1, y.expand(150, -1)[..., None], -math.inf).amax(-1, keepdim=True) - own
    wrong = margins.squeeze(-1) > 0
    assert torch.equal(found.loss, margins.squeeze(-1).amax(0)) and torch.equal(found.first_success >= 0, wrong.any(0))
    # a proposal starts from the best so far: it differs from that in one square
    best, gain = sent[0], margins[0, :, 0]
    for step, side in enumerate(Square(eps=0.02, queries=150).sides(4, 4)):
        assert step == 0 or ((sent[step] != best).flatten(1).sum(1) <= side**2).all()
        better = margins[step, :, 0] > gain
        best, gain = torch.where(better[:, None, None, None], sent[step], best), gain.maximum(margins[step, :, 0])


@pytest.mark.parametrize("name", ["callable", "top-1", "batchnorm-in-training", "float64"])
@pytest.mark.parametrize("norm", NORMS)
def test_nothing_breaks_at_radius_zero(name: str, norm) -> None:
    model, x = build(name), pixels_for(name, 10)
    y = labels_for(model, x)
    result = Square(eps=0, norm=norm, queries=6).run(model, x, y)
    assert torch.equal(result.x_adv, x) and torch.equal(result.broken, result.clean_predicted != y)


def test_no_random_number_is_used_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int, int]] = []
    uniform = SampleRng.uniform

    def spied(self: SampleRng, purpose: str, shape: tuple[int, ...] = (), *, restart: int = 0, step: int = 0) -> Tensor:
        asked.append((purpose, restart, step))
        return uniform(self, purpose, shape, restart=restart, step=step)

    monkeypatch.setattr(SampleRng, "uniform", spied)
    x, y = images(2), torch.zeros(2, dtype=torch.int64)
    Square(eps=0.1, queries=130, restarts=2).run(constant, x, y)
    assert len(asked) == len(set(asked)) == 2 * (1 + 3)


def constant(x: Tensor) -> Tensor:
    return torch.tensor([[1.0, 0.0, 0.0]]).expand(len(x), 3)


def test_constant_and_not_finite_models() -> None:
    x, y = images(4), torch.zeros(4, dtype=torch.int64)
    held = Square(eps=0.1, queries=5).run(constant, x, y)
    assert not held.broken.any() and not held.invalid.any() and (held.queries == 7).all()
    nan = Square(eps=0.1, queries=5).run(lambda x: constant(x) * math.nan, x, y)
    assert nan.invalid.all() and not nan.broken.any()
    # a number only at the clean image: never robust
    poisoned = Square(eps=0.1, queries=5).run(
        lambda z: torch.where((z == x).flatten(1).all(1, keepdim=True), constant(z), math.nan), x, y
    )
    assert poisoned.invalid.all()


@pytest.mark.parametrize("surface", ["experts", "dense", "expert-1", "router", "pinned"])
def test_every_surface_is_judged_by_the_model(surface: str) -> None:
    torch.manual_seed(0)
    model, x = mixture(1).double().eval(), images(30, torch.float64)
    y = labels_for(model, x)
    result = Square(eps=0.1, queries=40, surface=surface).run(model, x, y)
    assert torch.equal(result.predicted != y, result.broken) and int(result.broken.sum()) > 6


def test_bad_settings_and_shapes_are_named() -> None:
    for settings_, message in (
        ({"queries": 0}, "queries must be at least 1"),
        ({"restarts": 0}, "restarts must be at least 1"),
        ({"p_init": 0.0}, "p_init must be above 0"),
        ({"p_init": 1.2}, "p_init must be above 0"),
        ({"targeted": True}, "targeted of Square is fixed"),
    ):
        with pytest.raises(ValueError, match=message):
            Square(eps=0.1, **settings_)
    with pytest.raises(InputError, match=r"Square needs images \(B, C, H, W\), got shape \(1, 4\)"):
        Square(eps=0.1, queries=3).run(
            Linear([[1.0] * 4, [0.0] * 4]), torch.full((1, 4), 0.5).double(), torch.tensor([0])
        )
