from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from phalanx.attacks import FGSM, PGD, ReleasedPGD
from phalanx.config import load_run
from phalanx.data import Batch
from phalanx.errors import InputError
from phalanx.loading import RecipeErrors, to_plain
from phalanx.methods import AT, DWF, Update
from phalanx.methods.draws import draw
from phalanx.rng import Rng, derive_seed
from phalanx.threat import ThreatModel

EPS = tuple(i / 100 for i in range(1, 10))
STEPS = (10, 20, 30, 40, 50)
CPU = torch.device("cpu")


def _step(index: int, seed: int = 0) -> Rng:
    """What the training loop hands to a method in step `index`."""
    return Rng(derive_seed(seed, "step", index))


def _drawn(index: int, seed: int = 0) -> tuple[Any, Any]:
    attack, _ = draw(PGD(), {"eps": EPS, "steps": STEPS}, _step(index, seed), CPU)
    return attack.eps, attack.steps


def _chi_square(counts: Counter[Any], categories: int, n: int) -> float:
    expected = n / categories
    return sum((counts[key] - expected) ** 2 / expected for key in counts) + (categories - len(counts)) * expected


def test_draws_are_uniform_and_of_each_other_independent() -> None:
    n = 4500
    pairs = [_drawn(step) for step in range(n)]
    # 99.9 % quantiles of chi-square with 8, 4 and 44 degrees of freedom
    assert _chi_square(Counter(eps for eps, _ in pairs), 9, n) < 26.12
    assert _chi_square(Counter(steps for _, steps in pairs), 5, n) < 18.47
    assert _chi_square(Counter(pairs), 45, n) < 78.75
    # a step says nothing about the next one: 81 pairs, 80 degrees of freedom
    following = Counter((one[0], other[0]) for one, other in zip(pairs[::2], pairs[1::2], strict=True))
    assert _chi_square(following, 81, n // 2) < 124.84


def test_a_draw_is_a_function_of_seed_and_step_alone() -> None:
    first = [_drawn(step) for step in range(20)]
    assert [_drawn(step) for step in reversed(range(20))] == first[::-1]
    assert [_drawn(step, seed=1) for step in range(20)] != first
    # and so not of the batch
    method = AT(attack=PGD(), draw_eps=EPS, draw_steps=STEPS).within(tiny.THREAT)
    whole = next(tiny.digits().train.batches(16))
    for batch in (whole, Batch(*(part[:5] for part in whole))):
        (update,) = method.updates(tiny.mixture(), {"train": batch}, _step(3))
        eps, steps = first[3]
        assert update.logs["drawn_eps"].item() == pytest.approx(eps)
        assert update.logs["drawn_steps"].item() == steps


def _update(method: AT, step: int) -> tuple[Tensor, list[Tensor], Update]:
    """The clean images, everything that the router is shown in a step, its loss last, and the update."""
    batch = next(tiny.digits().train.batches(16))
    model, shown = tiny.mixture(), []
    model.router.register_forward_pre_hook(lambda _, given: shown.append(given[0]))
    (update,) = method.within(tiny.THREAT).updates(model, {"train": batch}, _step(step))
    update.loss()
    return batch.x, shown, update


@pytest.mark.parametrize("attack", [FGSM(), PGD(random_start=False)])
def test_the_drawn_radius_is_the_one_attacked_with(attack: Any) -> None:
    seen = set()
    for step in range(8):
        x, shown, update = _update(AT(attack=attack, draw_eps=("1/64", 0.25)), step)
        eps = update.logs["drawn_eps"].item()
        # some pixel can move by the whole radius: PGD's steps follow it, eps / 4 each
        assert float((shown[-1] - x).abs().max()) == pytest.approx(eps)
        seen.add(eps)
    assert seen == {1 / 64, 0.25}


def test_the_drawn_step_count_is_the_one_attacked_with() -> None:
    seen = set()
    for step in range(8):
        _, shown, update = _update(AT(draw_steps=(2, 5)), step)
        steps = sum(images.requires_grad for images in shown)
        assert steps == update.logs["drawn_steps"].item()
        seen.add(steps)
    assert seen == {2, 5}


def test_the_drawn_step_size_is_the_one_attacked_with() -> None:
    seen = set()
    for step in range(8):
        method = AT(attack=PGD(steps=1, random_start=False), draw_step_size=("1/64", 0.05))
        x, shown, update = _update(method, step)
        size = update.logs["drawn_step_size"].item()
        assert float((shown[-1] - x).abs().max()) == pytest.approx(size)
        seen.add(size)
    assert len(seen) == 2


def test_one_value_is_no_draw_and_none_leaves_the_attack_alone() -> None:
    fixed = AT(attack=PGD(), draw_steps=(3,), draw_eps=("1/8",)).within(tiny.THREAT)
    plain = AT(attack=PGD(steps=3, eps="1/8")).within(tiny.THREAT)
    batch = next(tiny.digits().train.batches(16))
    model = tiny.mixture()
    (drawn,), (given,) = (method.updates(model, {"train": batch}, _step(0)) for method in (fixed, plain))
    assert torch.equal(drawn.loss().value, given.loss().value)
    assert set(given.logs) == {"zero_gradient"}
    assert set(drawn.logs) == {"zero_gradient", "drawn_eps", "drawn_steps"}


def test_draws_stay_absolute_in_another_threat() -> None:
    method = AT(attack=FGSM(), draw_eps=("1/64",)).within(ThreatModel("Linf", "1/2"))
    assert method.draw_eps == ("1/64",) and method.attack.eps == "1/2"
    assert DWF(fgsm_eps=("1/64",)).within(ThreatModel("Linf", "1/2")).fgsm_eps == ("1/64",)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: AT(draw_eps=()), "draw_eps must hold at least one value to draw from, got none"),
        (lambda: AT(draw_steps=()), "draw_steps must hold at least one value"),
        (lambda: AT(attack=FGSM(), draw_steps=(1, 2)), "draw_steps needs an attack with steps, got fgsm; use pgd, or"),
        (lambda: AT(draw_steps=(10, 0)), "draw_steps: steps must be at least 1, got 0"),
        (lambda: AT(draw_eps=(0.1, -0.1)), "draw_eps: eps must be at least 0, got -0.1"),
        (lambda: AT(draw_eps=("1/x",)), "draw_eps: eps must be a number or a fraction such as '8/255', got '1/x'"),
        (lambda: AT(attack=PGD(norm="Linf"), draw_eps=(8,)), "draw_eps: eps must be at most 1 for Linf"),
        (lambda: AT(draw_eps=(8,)).within(tiny.THREAT), "draw_eps: eps must be at most 1 for Linf"),
        (lambda: AT(attack=FGSM(), draw_step_size=(0.1,)), "draw_step_size needs an attack with step_size, got fgsm"),
        (lambda: DWF(fgsm_eps=()), "fgsm_eps must hold at least one value"),
        (lambda: DWF(pgd_steps=()), "pgd_steps must hold at least one value"),
        (lambda: DWF(pgd_steps=(0,)), "pgd_steps: steps must be at least 1, got 0"),
        (lambda: DWF(fgsm_eps=(8,)).within(tiny.THREAT), "fgsm_eps: eps must be at most 1 for Linf"),
    ],
)
def test_a_bad_set_is_refused(build: Any, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        build()


def test_what_may_be_drawn() -> None:
    # an L2 radius may exceed 1
    assert AT(draw_eps=(8,)).within(ThreatModel("L2", 1.0)).draw_eps == (8,)
    for attack in (PGD(), ReleasedPGD()):
        assert AT(attack=attack, draw_steps=(3, 5)).draw_steps == (3, 5)


RECIPE = """\
extends: digits-at
method:
  name: {method}
"""


def test_a_recipe_can_name_them(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        RECIPE.format(method="at") + "  attack: {name: pgd}\n  draw_eps: [0.01, 8/255]\n  draw_steps: [10, 20]\n"
    )
    method = load_run(str(path)).value.method
    assert isinstance(method, AT) and (method.draw_eps, method.draw_steps) == ((0.01, "8/255"), (10, 20))
    path.write_text(RECIPE.format(method="dwf") + "  fgsm_eps: [0.05]\n  random_start: true\n")
    method = load_run(str(path)).value.method
    assert method == DWF(fgsm_eps=(0.05,), random_start=True)
    assert to_plain(method)["pgd_steps"] == [10, 20, 30, 40, 50]
    path.write_text(RECIPE.format(method="at") + "  attack: {name: fgsm}\n  draw_steps: [10, 20]\n")
    with pytest.raises(RecipeErrors, match=r"method\.draw_steps: needs an attack with steps, got fgsm"):
        load_run(str(path))
