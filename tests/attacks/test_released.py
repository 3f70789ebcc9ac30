"""The released attacks: each of their defects, shown on models where the arithmetic is known."""

from __future__ import annotations

import math
import re

import pytest
import torch
from attack_samples import Counting, Linear, build, images, labels_for
from torch import Tensor, nn

from phalanx.attacks import FGSM, OBJECTIVES, PGD, Attack, ReleasedAdvMoE, ReleasedAPGD, ReleasedPGD, RouteSteering
from phalanx.errors import InputError
from phalanx.rng import SampleRng
from phalanx.routing import Route, Routed

EPS = 8 / 255


def corner(x: Tensor, eps: float) -> Tensor:
    """Every pixel darker by eps, or black."""
    return (x - eps).clamp_min(0)


@pytest.mark.parametrize("eps", [EPS, 0.2])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_first_step_ends_in_the_same_corner_whatever_the_seed(eps: float, seed: int) -> None:
    model, x = build("top-1"), images(30)
    assert ((x < eps) & (x > 0)).any()
    y = labels_for(model, x)
    one = ReleasedPGD(eps=eps, steps=1)(model, x, y, rng=SampleRng.for_batch(30, seed))
    torch.testing.assert_close(one, corner(x, eps), rtol=0, atol=1e-6)


def test_no_seed_changes_anything() -> None:
    model, x = build("top-1"), images(30)
    y = labels_for(model, x)
    walks = [ReleasedPGD(eps=EPS, steps=5).run(model, x, y, rng=SampleRng.for_batch(30, seed)) for seed in (0, 1)]
    assert torch.equal(walks[0].x_adv, walks[1].x_adv)
    ours = [PGD(eps=EPS, steps=5)(model, x, y, rng=SampleRng.for_batch(30, seed)) for seed in (0, 1)]
    assert not torch.equal(*ours)


def test_the_first_gradient_is_taken_far_outside_the_ball() -> None:
    x = torch.full((3, 4), 0.75, dtype=torch.float64)
    seen: list[Tensor] = []

    def model(x: Tensor) -> Tensor:
        seen.append(x.detach())
        return torch.stack([x.sum(1), 0 * x.sum(1)], 1)

    two = ReleasedPGD(eps=EPS, steps=2)(model, x, torch.zeros(3, dtype=torch.int64))
    assert ((seen[0] - (x - 0.4734)).abs() <= EPS).all() and len(seen) == 2
    torch.testing.assert_close(seen[1], x - EPS, rtol=0, atol=1e-6)
    # brighter pixels are what the model wants: up to there it is one step of a quarter, if away from the label
    assert torch.equal(two, seen[1])
    upwards = ReleasedPGD(eps=EPS, steps=2)(model, x, torch.ones(3, dtype=torch.int64))
    torch.testing.assert_close(upwards, x - 0.75 * EPS, rtol=0, atol=1e-6)


def confident(gap: float) -> Linear:
    """Class 0 leads by `gap` nats wherever the images' pixels are about the same."""
    return Linear([[1.0, -1.0], [-1.0, 1.0]], [gap, 0.0])


# 1 - p = e^-9 = 1.2e-4, / 512 = 2.4e-7 can be held in fp16; e^-14 = 8.3e-7, / 512 = 1.6e-9 cannot, summed it can
@pytest.mark.parametrize(
    ("attack", "gap", "frozen"),
    [
        (ReleasedPGD(eps=EPS), 9.0, False),
        (ReleasedPGD(eps=EPS), 14.0, True),
        (ReleasedPGD(eps=EPS, batch=1), 14.0, False),
        (ReleasedAPGD(eps=EPS), 14.0, False),
        # e^-18 = 1.5e-8 is below fp16 even in a sum
        (ReleasedAPGD(eps=EPS), 18.0, True),
        (PGD(eps=EPS, keep="last", random_start=False), 18.0, False),
        (FGSM(eps=EPS), 18.0, False),
    ],
)
def test_half_precision_loses_the_gradient_of_a_confident_image(attack: Attack, gap: float, frozen: bool) -> None:
    x, y = torch.full((5, 2), 0.5, dtype=torch.float64), torch.zeros(5, dtype=torch.int64)
    result = attack.run(confident(gap), x, y)
    assert (result.zero_gradient == frozen).all()
    stuck_at = [-EPS, -EPS] if isinstance(attack, ReleasedPGD) else [0.0, 0.0]
    expected = torch.tensor(stuck_at if frozen else [-EPS, EPS], dtype=torch.float64)
    torch.testing.assert_close(result.x_adv[0] - 0.5, expected, rtol=0, atol=1e-6)


def test_the_gradient_of_the_image_is_rounded_too() -> None:
    # (p - 1) / 512 is 2.4e-7 at the logits and 1000 times less at the pixels
    x, y = torch.full((1, 2), 0.5, dtype=torch.float64), torch.tensor([0])
    model = Linear([[1e-3, -1e-3], [-1e-3, 1e-3]], [9.0, 0.0])
    assert ReleasedPGD(eps=EPS).run(model, x, y).zero_gradient.all()


def test_the_rounded_loss_by_hand() -> None:
    # 2049 is no fp16 number: it rounds to 2048, like the other
    logits = torch.tensor([[2049.0, 2048.0]], requires_grad=True)
    gain = OBJECTIVES["cross_entropy_fp16-4"](Routed(logits, None), None, torch.tensor([0]))
    torch.testing.assert_close(gain.detach(), torch.tensor([math.log(2) / 4]))
    (gradient,) = torch.autograd.grad(gain.sum(), logits)
    assert gradient.tolist() == [[-0.125, 0.125]]
    with pytest.raises(InputError, match="'cross_entropy_fp16-N' divides by N, at least 1, got 0; 1 is the sum"):
        OBJECTIVES["cross_entropy_fp16-0"]


def test_the_last_iterate_after_all_steps() -> None:
    counted = Counting(build("callable"))
    x = images(6)
    result = ReleasedPGD(eps=EPS, steps=7).run(counted, x, counted(x).argmax(-1))
    # two verdicts and seven gradients: no sample is dropped, no end is looked at
    assert (result.queries == 2 + 7).all() and (result.restart == 0).all() and result.loss.isnan().all()
    assert set(result.first_success.tolist()) <= {-1, 7}
    assert ReleasedPGD().gradient_steps == 50 and ReleasedAPGD().gradient_steps == 10


def test_one_run_of_auto_pgd() -> None:
    counted = Counting(build("callable"))
    x = images(6)
    y = counted(x).argmax(-1)
    attack = ReleasedAPGD(eps=0.06, steps=10)
    result = attack.run(counted, x, y)
    assert (result.queries == 2 + 11).all()
    assert torch.equal(result.x_adv, attack.run(counted, x, y, rng=SampleRng.for_batch(6, 9)).x_adv)
    # it climbs: what it returns is the largest loss
    loss = torch.nn.functional.cross_entropy(counted(result.x_adv), y, reduction="none")
    torch.testing.assert_close(result.loss, loss, rtol=1e-3, atol=1e-3)
    assert (loss > torch.nn.functional.cross_entropy(counted(x), y, reduction="none")).all()


class _Sorted(nn.Module):
    """Two experts; a router whose confidence in expert 0 is the first pixel, logits that are the second."""

    def gate(self, x: Tensor) -> Route:
        scores = torch.stack([10 * x[:, 0], 5 * torch.ones_like(x[:, 0])], 1)
        return Route(scores, scores.argmax(-1, keepdim=True), torch.ones_like(scores[:, :1]))

    def routed(self, x: Tensor, route: Route | None = None) -> Routed:
        return Routed(torch.stack([x[:, 1], 1 - x[:, 1]], 1), self.gate(x) if route is None else route)

    def forward(self, x: Tensor) -> Tensor:
        return self.routed(x).logits

    def players(self) -> dict[str, list[nn.Parameter]]:
        return {}


def test_advmoes_attack_spends_its_steps_on_the_router() -> None:
    x, y = torch.full((6, 2), 0.52, dtype=torch.float64), torch.tensor([0] * 6)
    result = ReleasedAdvMoE(eps=EPS).run(_Sorted(), x, y)
    # PGD on the classes has no gradient at the first pixel, which alone moves the route
    ours = PGD(eps=EPS, keep="last", early_drop=False).run(_Sorted(), x, y)
    torch.testing.assert_close(result.x_adv[:, 0], torch.full((6,), 0.52 - EPS, dtype=torch.float64))
    assert (ours.x_adv[:, 0] > 0.52 - EPS).all()
    assert result.flipped is not None and result.flipped.all()


def test_advmoes_start_is_uniform_and_not_clipped() -> None:
    seen: list[Tensor] = []
    x = torch.zeros(500, 4, dtype=torch.float64)

    def model(images: Tensor) -> Tensor:
        seen.append(images.detach())
        return torch.stack([images.sum(1), 1 - images.sum(1)], 1)

    ReleasedAdvMoE(eps=EPS, steps=1)(model, x, torch.zeros(500, dtype=torch.int64))
    start = seen[0] / EPS
    assert start.min() >= -1 and start.max() <= 1 and (start < -0.9).any() and (start > 0.9).any()
    assert abs(start.mean().item()) < 0.05
    assert ReleasedAdvMoE().gradient_steps == 10


def test_what_they_are_is_said_in_the_spec() -> None:
    for attack in (ReleasedPGD(eps=EPS), ReleasedAPGD(eps=EPS), ReleasedAdvMoE(eps=EPS)):
        assert attack.reproduction and attack.spec()["reproduction"] is True
    for attack in (PGD(eps=EPS), FGSM(eps=EPS), RouteSteering(eps=EPS)):
        assert not attack.reproduction and "reproduction" not in attack.spec()
    assert ReleasedPGD(eps="8/255", norm="Linf").spec() == {
        "attack": "ReleasedPGD", "eps": "8/255", "norm": "Linf", "objective": "cross_entropy", "surface": "whole",
        "targeted": False, "name": "pgd_released", "steps": 50, "batch": 512, "reproduction": True,
    }  # fmt: skip


@pytest.mark.parametrize("kind", [ReleasedPGD, ReleasedAPGD, ReleasedAdvMoE])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm": "L2"}, "norm of a released attack must be Linf, got L2; use pgd"),
        ({"objective": "margin"}, "objective of a released attack is fixed, got 'margin'; leave it out"),
        ({"targeted": True}, "targeted of a released attack is fixed, got True"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
    ],
)
def test_mistakes(kind: type[Attack], arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        kind(eps=EPS, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("batch", [0, 10_000])
def test_a_batch_that_no_loss_is_divided_by(batch: int) -> None:
    with pytest.raises(ValueError, match=re.escape(f"batch must be in 1..9999, got {batch}")):
        ReleasedPGD(eps=EPS, batch=batch)
