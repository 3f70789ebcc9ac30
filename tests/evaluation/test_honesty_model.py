"""M1 to M12: each check has a model that it passes and one that it objects to."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from honesty_samples import (
    SOUND,
    WEAK,
    Wrapped,
    answer,
    bright_and_dark,
    edited,
    margin_of,
    mixture,
    probed,
    result,
    status,
)
from torch import Tensor, nn

from phalanx.attacks import PGD, Target
from phalanx.data import ImageSet
from phalanx.evaluation.honesty import CHECKS, look
from phalanx.evaluation.honesty.planted import Oracle, SideRouter, fragile, hard_routing
from phalanx.routing import MixtureOfExperts


def test_a_sound_model_passes_them_all() -> None:
    found = look(probed(), CHECKS)
    assert {check.status for check in found} == {"pass", "info", "skipped"}
    assert [check.id for check in found if check.status == "info"] == ["E13"]
    assert all("could not be run" not in check.sentence for check in found)


class _Stuck(nn.Identity):
    """A part that says it is training, whatever it is told."""

    @property
    def training(self) -> bool:  # type: ignore[override]
        return True

    @training.setter
    def training(self, mode: bool) -> None:
        pass


def test_m1_evaluation_mode() -> None:
    assert status("M1", probed()) == "pass"
    assert status("M1", probed(nn.Sequential(_Stuck(), SOUND))) == "fail"


def _noisy(scale: float) -> nn.Module:
    return Wrapped(lambda x: SOUND(x) + scale * torch.randn(len(x), 10))


def test_m2_determinism() -> None:
    assert status("M2", probed(_noisy(1e-7))) == "pass"
    assert status("M2", probed(_noisy(0.1))) == "warn"
    assert status("M2", probed(_noisy(0.1), "pgd-5-eot:2")) == "info"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_random_answers_are_seen_whatever_the_callers_seed(seed: int) -> None:
    torch.manual_seed(seed)
    assert status("M3", probed(_noisy(0.1))) == "skipped"


def test_m3_batch_independence() -> None:
    assert status("M3", probed()) == "pass"
    assert status("M3", probed(fragile("capacity"))) == "fail"
    assert status("M3", probed(Wrapped(lambda x: SOUND(x) * (1 + 1e-4 * len(x))))) == "fail"
    assert status("M3", probed(Wrapped(lambda x: SOUND(x) * (1 + 1e-6 * len(x))))) == "warn"
    assert status("M3", probed(_noisy(0.1))) == "skipped"


def test_m4_logits() -> None:
    assert status("M4", probed()) == "pass"
    assert status("M4", probed(Wrapped(lambda x: SOUND(x).log_softmax(-1)))) == "pass"
    assert status("M4", probed(fragile("probabilities"))) == "warn"
    large = Wrapped(lambda x: 20 * SOUND(x))
    assert status("M4", probed(large)) == "warn"
    assert status("M4", probed(large, "pgd-20,apgd-dlr-5")) == "info"


def test_m5_zero_gradients() -> None:
    assert status("M5", probed()) == "pass"
    for kind in ("saturated", "not finite", "quantised"):
        assert status("M5", probed(fragile(kind))) == "fail", kind
    few = Wrapped(lambda x: torch.where(x.flatten(1)[:, 5:6] > 0.5, SOUND(x).detach(), SOUND(x)))
    assert status("M5", probed(few)) == "warn"


class _BlindScores(SideRouter):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.round())


def test_m5_sees_a_router_without_gradient() -> None:
    sound, blind = mixture(True, True), mixture(True, True)
    blind.router = _BlindScores(blind.router.weights, 0.5)  # type: ignore[union-attr, arg-type]
    assert "router" not in result("M5", probed()).evidence
    assert result("M5", probed(sound, data=bright_and_dark())).evidence["router"] == 0
    found = result("M5", probed(blind, data=bright_and_dark()))
    assert found.status == "fail" and found.evidence["router"] == 1


def test_m6_gradient_of_the_route() -> None:
    hard = hard_routing()
    soft = MixtureOfExperts(hard.model.router, list(hard.model.experts))  # type: ignore[arg-type]
    assert status("M6", probed()) == "skipped"
    assert status("M6", probed(soft)) == "pass"
    assert status("M6", probed(hard)) == "warn"
    assert status("M6", probed(hard, "pgd-2,steer-5")) == "info"


class _RoundedForward(torch.autograd.Function):
    """Quantised on the way forward, an identity on the way back: a gradient that is invented."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return (x * 15).round() / 15

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        return gradients[0]


def test_m7_finite_differences() -> None:
    assert status("M7", probed()) == "pass"
    assert status("M7", probed(Wrapped(lambda x: SOUND(_RoundedForward.apply(x))))) == "warn"
    assert status("M7", probed(fragile("saturated"))) == "warn"
    assert status("M7", probed(_noisy(0.1))) == "skipped"


def test_m8_quantised_input() -> None:
    assert status("M8", probed()) == "pass"
    assert status("M8", probed(fragile("quantised"))) == "warn"
    assert result("M8", probed()).evidence["clips_inside"] == 0
    assert result("M8", probed(Wrapped(lambda x: SOUND(x.clamp(0, 1))))).evidence["clips_inside"] == 1


def _purified(x: Tensor) -> Tensor:
    with torch.enable_grad():
        moved = x.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(SOUND(moved).sum(), moved)
    return SOUND(x + 0 * gradient)  # type: ignore[no-any-return]


def _backward(x: Tensor) -> Tensor:
    with torch.enable_grad():
        moved = x.detach().clone().requires_grad_()
        SOUND(moved).sum().backward()
    return SOUND(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("forward", [_purified, _backward])
def test_m9_optimisation_in_the_forward_pass(forward: object) -> None:
    assert status("M9", probed()) == "pass"
    assert status("M9", probed(Wrapped(forward))) == "warn"


def test_m10_number_of_classes() -> None:
    assert status("M10", probed()) == "pass"
    assert "can be aimed at, not 20" in result("M10", probed(name="apgd-t-2x20")).sentence


def test_m11_health_of_the_router() -> None:
    assert status("M11", probed()) == "skipped"
    assert status("M11", probed(mixture(True, True), data=bright_and_dark())) == "pass"
    collapsed = result("M11", probed(mixture(True, True, share=0.9), data=bright_and_dark()))
    assert collapsed.status == "warn" and collapsed.evidence["largest_load"] == 1
    lost = mixture(True, True)
    lost.router = Wrapped(lambda x: torch.full((len(x), 2), float("nan")))
    assert result("M11", probed(lost)).evidence["gates_not_finite"] == 1


def test_m12_eps_in_pixel_space() -> None:
    probe = probed()
    assert status("M12", probe) == "pass"
    assert status("M12", edited(probe, "pgd-20", distance=0.1)) == "fail"
    outside = probe.batch._replace(x=2 * probe.batch.x)
    from dataclasses import replace

    assert status("M12", replace(probe, batch=outside)) == "fail"
    assert status("M12", replace(probe, batch=probe.batch._replace(x=probe.batch.x / 255))) == "warn"


def test_samples_are_made_as_they_say() -> None:
    batch = probed(name=WEAK).batch
    assert torch.equal(SOUND(batch.x), answer(batch.x, 1 - 2 * margin_of(batch.x)))
    assert isinstance(PGD().within, object) and Oracle()(batch.x).argmax(-1).equal(batch.y)


def test_m5_asks_nothing_of_an_image_that_errs_already() -> None:
    def third(x: Tensor) -> Tensor:
        """Right on grey images; on others the label is third, where DLR is constant."""
        level = x.flatten(1).mean(1)
        right = torch.stack([level + 2, level * 0.5, level * 0.3, level * 0], 1)
        wrong = torch.stack([level * 0.5, level + 5, level * 2 + 9, level * 0 - 9], 1)
        moved = x.flatten(1).std(1) > 0
        return torch.where(moved[:, None], wrong, right)

    model, x, y = Wrapped(third), torch.rand(8, 1, 4, 4), torch.zeros(8, dtype=torch.int64)
    climb = Target(model, model, "whole", "dlr", x, y).climb(x)
    assert climb.gradient is not None and not climb.gradient.any()
    grey = ImageSet(np.full((8, 1, 4, 4), 128, dtype=np.uint8), np.zeros(8, dtype=np.int64), np.arange(8), 255)
    assert status("M5", probed(model, WEAK, grey)) == "pass"
