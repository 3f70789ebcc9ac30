"""A soft mixture as an attack runs it, BatchNorm folded and in channels_last, beside the plain sum over its experts.

Run: python benchmarks/soft.py [--width W] [--batch B] [--rounds N] [--device cuda]
"""

# B batch, E experts, C classes

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from common import Bar, Record, Spread, from_command_line, interleaved, ratio
from dispatch import PASSES, SHAPE, backbones, images, input_gradient
from torch import Tensor, nn

from phalanx.attacks import PGD
from phalanx.nn import fold_batchnorm
from phalanx.routing import MixtureOfExperts, build_router

EXPERTS = 9
STEPS = 10
COUNTED_WIDTH = 8

TIME_LIMIT = 0.85
"""What a forward and backward to the images may cost, as a share of the plain sum's."""
DIFFERENCE_LIMIT = 1e-12

Run = Callable[[], Tensor]


def mixture(width: int) -> MixtureOfExperts:
    """`EXPERTS` ResNet-18s behind the fully connected soft gate of Divided We Fall, random weights, no gradients."""
    experts = backbones(EXPERTS, width)
    return MixtureOfExperts(build_router("mlp", SHAPE, EXPERTS), experts, "all").eval().requires_grad_(False)


class PlainSum(nn.Module):
    """sum_e softmax(gate(x))_e f_e(x), one expert after the other: the model as it was trained, logits (B, C)."""

    def __init__(self, model: MixtureOfExperts) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        assert self.model.router is not None
        weights_BE = self.model.router(x).softmax(-1)
        return torch.stack([weights_BE[:, e, None] * expert(x) for e, expert in enumerate(self.model.experts)]).sum(0)


def as_attacked(model: MixtureOfExperts) -> nn.Module:
    """What an attack searches on."""
    folded = fold_batchnorm(model)
    assert folded is not None
    return folded


# -- time ----------------------------------------------------------------------------------------------------------


def plain_attack(model: nn.Module, x: Tensor) -> Tensor:
    """`STEPS` gradients of the images, which stay where they are."""
    for _ in range(STEPS):
        x = (x + 0 * input_gradient(model, x).sign()).clamp(0, 1)
    return x


def pairs(model: MixtureOfExperts, x: Tensor) -> dict[str, tuple[Run, Run]]:
    """Ours and the plain sum's run of each pass, and of a whole attack, in which ours has yet to fold."""
    plain, folded, y = PlainSum(model), as_attacked(model), torch.zeros(len(x), dtype=torch.int64, device=x.device)
    attack = PGD(eps=0.0, step_size="1/255", steps=STEPS, random_start=False)
    return {
        **{name: (partial(run, folded, x), partial(run, plain, x)) for name, run in PASSES.items()},
        f"pgd-{STEPS}": (partial(attack, model, x, y), partial(plain_attack, plain, x)),
    }


def measure_time(width: int, batch: int, rounds: int, device: str) -> dict[str, Spread]:
    """Each of `pairs` as a ratio to the plain sum's."""
    runs = pairs(mixture(width).to(device), images(batch).to(device))
    return {
        name: ratio(interleaved({"ours": ours, "plain": plain}, rounds, device), "ours", "plain")
        for name, (ours, plain) in runs.items()
    }


# -- equality ------------------------------------------------------------------------------------------------------


def largest_differences(batch: int) -> dict[str, float]:
    """In float64: largest absolute difference of logits and of image gradients, over the largest value."""
    model, x = mixture(COUNTED_WIDTH).double(), images(batch, torch.float64)
    plain, folded = PlainSum(model), as_attacked(model)
    answers = {
        "logits": (folded(x), plain(x)),
        "input_gradient": (input_gradient(folded, x), input_gradient(plain, x)),
    }
    return {name: float((ours - theirs).abs().max() / theirs.abs().max()) for name, (ours, theirs) in answers.items()}


# -- the record ----------------------------------------------------------------------------------------------------


def measure(width: int = 16, batch: int = 64, rounds: int = 9, device: str = "cpu") -> Record:
    """The whole benchmark; the defaults are the recorded setting. Equality is the CPU's anyway."""
    time, equality = measure_time(width, batch, rounds, device), largest_differences(min(batch, 16))
    return Record(
        benchmark="soft" if device == "cpu" else f"soft-{device.partition(':')[0]}",
        what=(
            f"A soft mixture of {EXPERTS} ResNet-18s on 32x32 images in evaluation mode, as an attack searches on it "
            "(BatchNorm folded, channels_last), as a ratio to the plain sum over the experts of the model as given: "
            f"passes, and PGD-{STEPS} with the folding included. Equality of the two in float64, relative to the "
            "largest value."
        ),
        settings={
            "device": device,
            "width": width,
            "batch": batch,
            "experts": EXPERTS,
            "steps": STEPS,
            "counted_width": COUNTED_WIDTH,
        },
        rounds=rounds,
        measurements={"ratio_to_plain_sum": time, "largest_relative_difference": equality},
        bars=[
            Bar(
                f"forward+backward of {EXPERTS} soft experts, ratio to the plain sum",
                time["forward+backward"].median,
                TIME_LIMIT,
                at_most=True,
            ),
            Bar(
                "largest relative difference to the plain sum, float64",
                max(equality.values()),
                DIFFERENCE_LIMIT,
                at_most=True,
            ),
        ],
    )


if __name__ == "__main__":
    from_command_line(__doc__, measure, width=16, batch=64, rounds=9)
