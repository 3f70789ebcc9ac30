# B batch

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from phalanx.attacks import FGSM, PGD
from phalanx.data import Batch
from phalanx.errors import InputError
from phalanx.experts import build_expert
from phalanx.methods import AT, DWF
from phalanx.methods.base import Method
from phalanx.methods.units import in_pixels, pixels_per_unit
from phalanx.rng import Rng
from phalanx.routing import LinearRouter, MixtureOfExperts
from phalanx.threat import ThreatModel

STD = (0.1, 0.2, 0.6)
"""Their mean is 0.3."""


def _model(*stds: tuple[float, ...] | None) -> MixtureOfExperts:
    """One expert for each; the router has the first one's."""
    torch.manual_seed(0)
    own: dict[str, Any] = {"num_classes": 3, "image_size": 4, "channels": 3, "hidden": [8]}
    experts = [build_expert("mlp", **own, std=None if std is None else list(std)) for std in stds]
    router = LinearRouter((3, 4, 4), len(stds), std=None if stds[0] is None else list(stds[0]))
    return MixtureOfExperts(router, experts, "all").double()


def _batch() -> Batch:
    x = torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Batch(x * 0.4 + 0.3, torch.arange(8) % 3, torch.arange(8))


def _shown(method: Method, model: MixtureOfExperts) -> Tensor:
    """What the gate is shown last: the images of the loss."""
    shown: list[Tensor] = []
    assert isinstance(model.router, nn.Module)
    handle = model.router.register_forward_pre_hook(lambda _, given: shown.append(given[0]))
    (update,) = method.updates(model, {"train": _batch()}, Rng(3))
    update.loss()
    handle.remove()
    return shown[-1]


def test_the_scale_is_the_mean_deviation() -> None:
    assert pixels_per_unit("pixel", _model(STD, STD)) == 1.0
    assert pixels_per_unit("normalised", _model(STD, STD)) == pytest.approx(0.3)


def test_radius_and_step_size_are_scaled_where_they_are_set() -> None:
    assert in_pixels(PGD(eps="1/2", step_size="1/8"), 0.5) == PGD(eps=0.25, step_size=0.0625)
    assert in_pixels(PGD(eps="1/2"), 0.5) == PGD(eps=0.25)
    assert in_pixels(FGSM(eps="1/2"), 0.5) == FGSM(eps=0.25)
    assert in_pixels(PGD(eps="1/2"), 1.0).eps == "1/2"


@pytest.mark.parametrize(
    ("method", "same"),
    [
        (AT(attack=PGD(steps=3, step_size=0.04)), AT(attack=PGD(steps=3, step_size=0.04 * 0.3))),
        (AT(draw_eps=(0.2,)), AT(draw_eps=(0.2 * 0.3,))),
        (
            AT(attack=PGD(random_start=False), draw_step_size=(0.01,)),
            AT(attack=PGD(random_start=False), draw_step_size=(0.01 * 0.3,)),
        ),
        (
            DWF(fgsm_eps=(0.2,), pgd_steps=(3,), pgd_step_size=0.03),
            DWF(fgsm_eps=(0.2 * 0.3,), pgd_steps=(3,), pgd_step_size=0.03 * 0.3),
        ),
        (
            DWF(fgsm_eps=(0.2,), pgd_steps=(3,), pgd_step_sizes=(0.03,), random_start=True),
            DWF(fgsm_eps=(0.2 * 0.3,), pgd_steps=(3,), pgd_step_sizes=(0.03 * 0.3,), random_start=True),
        ),
    ],
)
def test_normalised_units_are_smaller_pixels(method: Any, same: Any) -> None:
    # the threat's radius is scaled too
    model, threat, smaller = _model(STD, STD), ThreatModel("Linf", 0.1), ThreatModel("Linf", 0.1 * 0.3)
    normalised = replace(method, units="normalised").within(threat)
    expected = _shown(same.within(smaller), model)
    torch.testing.assert_close(_shown(normalised, model), expected)
    assert not torch.allclose(_shown(method.within(threat), model), expected)


@pytest.mark.parametrize("method", [AT(units="normalised"), DWF(units="normalised")])
def test_a_model_without_one_scale_is_refused(method: Any) -> None:
    method.check(_model(STD, STD), 10)
    with pytest.raises(InputError, match="the model's parts divide by 2 different deviations; use units pixel"):
        method.check(_model(STD, (0.2, 0.2, 0.2)), 10)
    bare = MixtureOfExperts(None, [nn.Sequential(nn.Flatten(), nn.Linear(48, 3))])
    with pytest.raises(InputError, match="no part of the model normalises its images"):
        method.check(bare, 3)
    replace(method, units="pixel").check(bare, 3)


def test_evaluation_stays_in_pixels() -> None:
    # the threat of the recipe, which evaluation measures in, is not touched
    method = AT(units="normalised").within(tiny.THREAT)
    assert method.attack.threat == tiny.THREAT
