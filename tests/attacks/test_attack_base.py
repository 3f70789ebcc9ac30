from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from attack_samples import Counting, Linear, answers, build, images, labels_for
from torch import Tensor, nn

import phalanx.attacks.base as base
from phalanx.attacks import (
    APGD,
    FAB,
    FGSM,
    PGD,
    SURFACES,
    APGDTargeted,
    Attack,
    Found,
    ReleasedPGD,
    Square,
    Target,
)
from phalanx.errors import InputError
from phalanx.rng import SampleRng
from phalanx.routing import Routed, pin, routed

ATTACK = PGD(eps=0.1, steps=3)
WALK = PGD(eps=0.1, steps=10, random_start=False)


def two_classes(x: Tensor) -> Tensor:
    """Class 0 where the mean pixel is above one half."""
    mean = x.flatten(1).mean(1) - 0.5
    return torch.stack([mean, -mean], 1)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (
            torch.full((2, 3), 1.5),
            "pixels must lie in [0, 1], got 1.5 to 1.5; undo any normalisation (it belongs",
        ),
        (torch.tensor([[-0.25, 0.5]] * 2), "pixels must lie in [0, 1], got -0.25 to 0.5; undo any normalisation"),
        (torch.tensor([[0.2, float("nan")]] * 2), "pixels must lie in [0, 1], got nan to nan; undo any normalisation"),
        (
            torch.zeros(2, 3, dtype=torch.uint8),
            "images must be a float tensor (B, ...) in [0, 1], got torch.uint8 of shape (2, 3); divide uint8",
        ),
        (torch.zeros(2), "got torch.float32 of shape (2,)"),
        ([[0.1], [0.2]], "images must be a float tensor (B, ...) in [0, 1], got list"),
    ],
)
@pytest.mark.parametrize("call", ["run", "search", "__call__"])
def test_images_that_are_none(x: Any, message: str, call: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        getattr(ATTACK, call)(two_classes, x, torch.tensor([0, 0]))


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (
            torch.zeros(3, dtype=torch.int64),
            "labels must be integers of shape (2,), one for each image, got torch.int64",
        ),
        (torch.zeros(2, 2, dtype=torch.int64), "got torch.int64 of shape (2, 2)"),
        (torch.zeros(2), "labels must be integers of shape (2,), one for each image, got torch.float32 of shape (2,)"),
        ([0, 0], "got list"),
    ],
)
def test_labels_that_are_none(y: Any, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        ATTACK.run(two_classes, torch.full((2, 3), 0.5), y)


def test_labels_beyond_the_models_classes() -> None:
    message = "labels must be in 0..1, the model's classes, got 0..2; count classes from 0"
    with pytest.raises(InputError, match=re.escape(message)):
        ATTACK.run(two_classes, torch.full((2, 3), 0.5), torch.tensor([0, 2]))


@pytest.mark.parametrize("call", ["run", "search", "__call__"])
def test_negative_labels_would_be_ignored_by_the_cross_entropy(call: str) -> None:
    with pytest.raises(InputError, match=re.escape("labels must be at least 0, got -100; count classes from 0")):
        getattr(ATTACK, call)(two_classes, torch.full((2, 3), 0.5), torch.tensor([0, -100]))


@pytest.mark.parametrize(
    "attack",
    [
        ATTACK,
        FGSM(eps=0.1),
        APGD(eps=0.1, steps=2),
        APGDTargeted(eps=0.1, steps=2),
        FAB(eps=0.1, steps=2),
        PGD(eps=0.1, targeted=True),
        PGD(eps=0.1, objective="kl"),
        ReleasedPGD(eps=0.1),
        Square(eps=0.1, queries=3),
    ],
    ids=lambda attack: f"{attack.name}-{attack.objective}",
)
def test_a_search_knows_the_models_classes_from_its_first_answer(attack: Attack) -> None:
    x, y = torch.full((2, 3, 1, 1), 0.5), torch.tensor([0, 700])
    message = "labels must be in 0..1, the model's classes, got 700; count classes from 0"
    with pytest.raises(InputError, match=re.escape(message)):
        attack.search(two_classes, x, y)


def test_the_last_of_many_classes_is_known_in_half_precision() -> None:
    # bfloat16 rounds 999 to 1000
    wide = Linear(torch.eye(1000, 3).tolist()).bfloat16()
    ATTACK.search(wide, torch.full((2, 3), 0.5, dtype=torch.bfloat16), torch.tensor([0, 999]))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda x: x.flatten(1).sum(1), "the model must answer with logits (2, C), got shape (2,); wrap it"),
        (lambda x: x.flatten(1)[:1], "the model must answer with logits (2, C), got shape (1, 3); wrap it"),
        (lambda x: x[:, :, None], "got shape (2, 3, 1); wrap it"),
        (lambda x: (x, x), "the model must answer with logits (2, C), got tuple; wrap it"),
    ],
)
def test_answers_that_are_no_logits(model: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        ATTACK.run(model, torch.full((2, 3), 0.5), torch.tensor([0, 0]))


@pytest.mark.parametrize(
    ("targeted", "target", "message"),
    [
        (False, [1, 1], "target classes were given, but PGD has targeted=False; set it"),
        (True, [1], "target must hold one integer class for each of 2 images, got torch.int64 of shape (1,); give"),
        (True, [1.0, 1.0], "got torch.float32 of shape (2,); give a tensor shaped like the labels"),
        (True, [1, 5], "target must be in 0..1, the model's classes, got 1..5; count classes from 0"),
    ],
)
def test_targets_that_do_not_fit(targeted: bool, target: list[float], message: str) -> None:
    attack = PGD(eps=0.1, targeted=targeted)
    with pytest.raises(InputError, match=re.escape(message)):
        attack.run(two_classes, torch.full((2, 3), 0.5), torch.tensor([0, 0]), target=torch.tensor(target))


def test_a_radius_must_come_from_somewhere() -> None:
    with pytest.raises(ValueError, match=re.escape("eps must be given, for example PGD(eps='8/255'), got None")):
        PGD().run(two_classes, torch.full((1, 3), 0.7), torch.tensor([0]))


def test_streams_of_another_batch() -> None:
    x, y = torch.full((2, 3), 0.7), torch.tensor([0, 0])
    message = "rng must hold one key for each of 2 images, got 3; index it like the batch"
    with pytest.raises(InputError, match=re.escape(message)):
        ATTACK.run(two_classes, x, y, rng=SampleRng.for_batch(3))


@pytest.mark.parametrize("call", ["run", "search"])
def test_inference_mode_would_hide_every_gradient(call: str) -> None:
    message = "an attack needs gradients, got torch.inference_mode(); call it outside"
    with torch.inference_mode(), pytest.raises(InputError, match=re.escape(message)):
        getattr(ATTACK, call)(two_classes, torch.full((2, 3), 0.7), torch.tensor([0, 0]))


def on_the_grid(x: Tensor) -> Tensor:
    """(B,) pixels that are multiples of 1/4: the clean images of the tests below."""
    return ((x.detach() * 4) % 1 == 0).flatten(1).all(1)


GRID = torch.tensor([[0.75, 0.5], [0.5, 0.75], [0.25, 0.25]])  # classes 0, 0, 1


@pytest.mark.parametrize("attack", [ATTACK, WALK, FGSM(eps=0.1), PGD(eps=0.1, steps=2, keep="last", early_drop=False)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_model_that_fails_off_the_clean_points_is_invalid_never_robust(attack: Attack, value: float) -> None:
    def model(x: Tensor) -> Tensor:
        return torch.where(on_the_grid(x)[:, None], two_classes(x), value)

    result = attack.run(model, GRID, torch.tensor([0, 0, 0]))
    assert result.invalid.tolist() == [True, True, False] and result.broken.tolist() == [False, False, True]
    assert (result.first_success >= 0).all() and int(result.first_success[2]) == 0


def test_a_model_that_fails_on_the_clean_image_is_invalid_and_not_searched() -> None:
    def model(x: Tensor) -> Tensor:
        return two_classes(x) + torch.where(x[:, :1] == 0.5, float("nan"), 0.0)

    counted = Counting(model)
    result = WALK.run(counted, GRID, torch.tensor([0, 0, 1]))
    assert result.invalid.tolist() == [False, True, False] and not result.broken[1]
    assert torch.equal(result.x_adv[1], GRID[1]) and result.queries.tolist() == [13, 2, 13]
    assert result.first_success.tolist() == [-1, 0, -1]


def test_a_clean_answer_that_was_invalid_once_stays_invalid() -> None:
    calls: list[int] = []

    def moody(x: Tensor) -> Tensor:
        calls.append(len(x))
        return two_classes(x) + (float("nan") if len(calls) == 1 else 0.0)

    result = WALK.run(moody, GRID[:1], torch.tensor([1]))
    assert result.invalid.tolist() == [True] and result.broken.tolist() == [False]


@pytest.mark.parametrize(
    "model",
    [
        lambda x: torch.tensor([[1.0, 0.0]]).expand(len(x), 2),
        lambda x: two_classes(x.detach() + 0.5),
        lambda x: two_classes(x.round() + 0.4),
        lambda x: two_classes(0 * x + 0.9),
    ],
    ids=["constant", "detached", "rounded", "multiplied by zero"],
)
@pytest.mark.parametrize("attack", [ATTACK, WALK, FGSM(eps=0.1), PGD(eps=0.1, norm="L2"), PGD(eps=0.1, norm="L1")])
def test_a_model_without_gradient_is_reported(model: Callable[[Tensor], Tensor], attack: Attack) -> None:
    result = attack.run(model, torch.full((3, 2), 0.7), torch.tensor([0, 0, 1]))
    assert result.zero_gradient.tolist() == [True, True, False]  # the third is wrong already
    assert result.broken.tolist() == [False, False, True]


def test_a_model_with_gradient_is_not_reported() -> None:
    model, x = build("top-1"), images(9)
    assert not ATTACK.run(model, x, labels_for(model, x)).zero_gradient.any()


class Folded(nn.Module):
    """Stands for a folded copy that rounds differently, to the point of being another model."""

    def __init__(self, logits: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(x)


def folding_to(logits: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "fold_batchnorm", lambda model, **certain: Folded(logits))


REAL = Linear([[1.0], [0.0]], [-0.5, 0.0])  # without a chain: its folded copy is not asked
ONE_PIXEL = torch.tensor([[0.75]], dtype=torch.float64)
STEPS = {"eps": "3/16", "step_size": "1/16", "steps": 3, "random_start": False}


def test_an_error_of_the_folded_copy_alone_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    folding_to(lambda x: torch.cat([x - 0.7, 0 * x], 1), monkeypatch)
    result = PGD(**STEPS).run(REAL, ONE_PIXEL, torch.tensor([0]))
    # the copy is wrong from the first step (.6875) on, the real model never (.5625 at the end)
    assert result.broken.tolist() == [False] and result.first_success.tolist() == [-1]
    assert float(result.x_adv) == 0.5625
    # verdicts 2, the two points until the copy's error, then all four again on the model itself
    assert result.queries.tolist() == [2 + 2 + 4]


def test_an_error_that_the_folded_copy_misses_is_found_by_the_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    folding_to(lambda x: torch.cat([x + 1, 0 * x], 1), monkeypatch)
    result = PGD(**STEPS).run(REAL, ONE_PIXEL - 0.125, torch.tensor([0]))
    assert float(result.x_adv) == 0.4375 and result.broken.tolist() == [True]
    assert result.first_success.tolist() == [3] and result.queries.tolist() == [2 + 4]


def test_an_early_error_of_the_folded_copy_does_not_end_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    folding_to(lambda x: torch.cat([x - 0.5625, 0 * x], 1), monkeypatch)
    result = PGD(**{**STEPS, "steps": 9}).run(REAL, ONE_PIXEL - 0.125, torch.tensor([0]))
    # the copy errs at its third point, .5, a tie that the model still gets right; the model itself at its fourth, .4375
    assert float(result.x_adv) == 0.4375 and result.first_success.tolist() == [3]
    assert result.queries.tolist() == [2 + 3 + 4]


@pytest.fixture
def own_surface(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Registers a surface for the length of one test."""
    functions, clean = dict(SURFACES._functions), set(SURFACES._with_clean_pass)
    monkeypatch.setattr(SURFACES, "_functions", functions)
    monkeypatch.setattr(SURFACES, "_with_clean_pass", clean)

    def register(name: str, function: Callable[..., Routed], *, clean_pass: bool = False) -> None:
        SURFACES.register(name, clean_pass=clean_pass)(function)

    return register


def test_another_surface_is_judged_on_the_real_model(own_surface: Callable[..., None]) -> None:
    # the surface is wrong everywhere, the model nowhere
    own_surface("decoy", lambda model, x_adv, x, clean: Routed(torch.cat([-x_adv, 0 * x_adv], 1), None))
    real = Counting(lambda x: torch.cat([x + 1, 0 * x], 1))
    attack = PGD(eps=0.1, steps=10, random_start=False, surface="decoy")
    result = attack.run(real, ONE_PIXEL, torch.tensor([0]))
    assert not result.broken.any() and result.first_success.tolist() == [-1]
    # the real model is asked twice for the verdicts, and at steps 0, 1, 2, 4, 8 and 10
    assert len(real.sizes) == 2 + 6 and result.queries.tolist() == [2 + 11 + 6]


def test_a_surface_that_never_errs_still_finds_what_breaks_the_model(own_surface: Callable[..., None]) -> None:
    own_surface("harmless", lambda model, x_adv, x, clean: Routed(torch.cat([x_adv + 1, 0 * x_adv], 1), None))
    attack = PGD(eps="3/4", step_size="1/16", steps=20, random_start=False, surface="harmless")
    result = attack.run(REAL, ONE_PIXEL, torch.tensor([0]))
    # wrong from step 5 on (.4375), seen when the judge is asked at step 8 (.25)
    assert result.broken.all() and result.first_success.tolist() == [8] and float(result.x_adv) == 0.25


def test_the_clean_pass_follows_the_samples(own_surface: Callable[..., None]) -> None:
    model, x = build("top-1"), images(30)
    y = labels_for(model, x)
    sizes = []

    def experts(model: Any, x_adv: Tensor, x: Tensor, clean: Routed | None) -> Routed:
        assert clean is not None and clean.route is not None
        torch.testing.assert_close(clean.logits, routed(model, x).logits)
        assert torch.equal(clean.route.experts, model.gate(x).experts)
        sizes.append(len(x))
        return model.routed(x_adv, pin(clean.route))

    own_surface("held experts", experts, clean_pass=True)
    attack = PGD(eps=0.06, steps=6, surface="held experts", random_start=False)
    result = attack.run(model, x, y)
    assert sizes[0] == 24 and sizes[-1] < sizes[0]
    assert torch.equal(result.broken, answers(model, result.x_adv) != y)
    held = ~result.broken
    # verdicts 2, points 0 to 6, the judge at 0, 1, 2, 4 and 6, and the clean pass
    assert (result.queries[held] == 2 + 7 + 5 + 1).all()


@dataclass(frozen=True, kw_only=True)
class Careless(Attack):
    """Leaves the ball, claims success, and returns what needs a gradient."""

    @property
    def gradient_steps(self) -> int:
        return 1

    def perturb(self, target: Target, rng: SampleRng) -> Found:
        size = len(target)
        ones = torch.ones(size, dtype=torch.int64)
        far = (target.x + 5).requires_grad_()
        return Found(far, ones.double(), ones, ones, ones, ones.bool())


def test_a_careless_attack_can_neither_leave_the_ball_nor_flatter_itself() -> None:
    x, y = torch.full((2, 3), 0.7), torch.tensor([0, 0])
    attack = Careless(eps=0.1)
    result = attack.run(two_classes, x, y)
    torch.testing.assert_close(result.x_adv, torch.full((2, 3), 0.8))
    assert not result.broken.any() and result.first_success.tolist() == [-1, -1]
    assert not result.x_adv.requires_grad and not attack(two_classes, x, y).requires_grad
    torch.testing.assert_close(attack(two_classes, x, y), torch.full((2, 3), 0.8))


def test_search_gives_a_row_to_every_image_wrong_or_not() -> None:
    x, y = GRID.clone(), torch.tensor([0, 0, 0])
    found = PGD(eps=0.1, steps=2, random_start=False).search(two_classes, x, y)
    torch.testing.assert_close(found.x_adv, GRID - 0.05)  # two steps of eps / 4, also for the image that is wrong
    assert found.queries.tolist() == [2, 2, 2] and found.loss.isnan().all()
    assert torch.equal(PGD(eps=0.1, steps=2, random_start=False)(two_classes, x, y), found.x_adv)
