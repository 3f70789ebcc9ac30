"""A training step of RT-ER beside one that runs the mixture image by image, as the released code does; JTDMoE's step
beside RT-ER's, and route steering beside PGD.

Run: python benchmarks/rt_er.py [--width W] [--batch B] [--rounds N] [--device cuda]
"""

# B batch, E experts, C classes

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from common import Bar, Record, from_command_line, interleaved, ratio
from dispatch import SHAPE, images, one_by_one
from torch import Tensor, nn

from phalanx.attacks import PGD, RouteSteering
from phalanx.attacks.base import Attack
from phalanx.data import Batch
from phalanx.experts import build_expert
from phalanx.methods import RTER, JTDMoE, Method
from phalanx.methods.base import mean_kl
from phalanx.rng import Rng
from phalanx.routing import DualModel, LinearRouter, MixtureOfExperts, RoutedModel
from phalanx.threat import ThreatModel

EXPERTS = 4
THREAT = ThreatModel("Linf", "8/255")
STEPS = 10
STEERING_STEPS = 10
BETA = 6.0
LEARNING_RATE = 1e-4

UNITS = {"rt_er": 49, "jtdmoe": 131}
"""Passes of one image through one expert in a `code` step, from the methods' docstrings."""

SPEED_LIMIT = 1.6
"""How many times faster than image by image an RT-ER step must be."""
OVERHEAD_LIMIT = 1.15
"""What a unit of JTDMoE's step may cost in units of RT-ER's."""
STEERING_LIMIT = 4.5
"""What steering over `EXPERTS` experts may cost in PGDs of as many steps."""

Step = Callable[[], object]


class Case(NamedTuple):
    """A model in training mode, its optimizer and its batch."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batch: Batch


def mixture(width: int, seed: int) -> MixtureOfExperts:
    """`EXPERTS` ResNet-18s behind a random linear router, in training mode."""
    torch.manual_seed(seed)
    experts = [build_expert("resnet18", num_classes=10, image_size=SHAPE[1], width=width) for _ in range(EXPERTS)]
    return MixtureOfExperts(LinearRouter(SHAPE, EXPERTS), experts).train()


def case(model: nn.Module, batch: int, device: str) -> Case:
    """Images (batch, *SHAPE) of noise with arbitrary labels."""
    model = model.to(device)
    data = Batch(images(batch), torch.arange(batch) % 10, torch.arange(batch))
    return Case(
        model, torch.optim.Adam(model.parameters(), lr=LEARNING_RATE), Batch(*(part.to(device) for part in data))
    )


# -- the steps -----------------------------------------------------------------------------------------------------


def ours(method: Method, it: Case) -> float:
    """One step as the training loop makes it; the sum of the losses."""
    model, total = it.model, 0.0
    assert isinstance(model, RoutedModel)
    for update in method.updates(model, {"train": it.batch}, Rng(0)):
        it.optimizer.zero_grad(set_to_none=True)
        loss = update.loss().value
        loss.backward()  # type: ignore[no-untyped-call]
        it.optimizer.step()
        total += loss.item()
    return total


def _pgd(answer: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """`STEPS` sign steps of epsilon / 4 from a random start, the gradient being that of the images alone."""
    epsilon = THREAT.epsilon
    moved = (x + epsilon * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
    for _ in range(STEPS):
        moved.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(answer(moved), y, reduction="sum"), moved)
        stepped = moved.detach() + epsilon / 4 * gradient.sign()
        moved = torch.minimum(torch.maximum(stepped, x - epsilon), x + epsilon).clamp(0, 1)
    return moved


def image_by_image(it: Case) -> float:
    """RT-ER's `code` step with the released code's dispatch: every pass through the mixture is a loop over its images,
    and each expert attacks the images whose second expert it is. In evaluation mode, as that code is after its first
    attack; a pass of one image has no batch statistics."""
    model, (x, y, _) = it.model, it.batch
    assert isinstance(model, MixtureOfExperts)
    model.eval()
    x_adv = _pgd(lambda moved: one_by_one(model, moved), x, y)
    # the released code runs the whole mixture to learn the route
    with torch.no_grad():
        one_by_one(model, x)
        second_B = model.gate(x).scores.argsort(-1, descending=True)[:, 1]
    it.optimizer.zero_grad(set_to_none=True)
    loss = F.cross_entropy(one_by_one(model, x_adv), y)
    for index, expert in enumerate(model.experts):
        rows = (second_B == index).nonzero().squeeze(1)
        if len(rows):
            own = _pgd(expert, x[rows], y[rows])
            loss = loss + BETA * len(rows) / len(x) * mean_kl(expert(x[rows]), expert(own))
    loss.backward()  # type: ignore[no-untyped-call]
    it.optimizer.step()
    return loss.item()


def training_steps(width: int, batch: int, device: str) -> dict[str, Step]:
    """The step of each variant, on weights of its own."""
    attack = PGD(steps=STEPS)
    rt_er, jtdmoe = (method(preset="code", attack=attack, beta=BETA).within(THREAT) for method in (RTER, JTDMoE))
    single, looped = (case(mixture(width, 0), batch, device) for _ in range(2))
    dual = case(DualModel(mixture(width, 1), mixture(width, 0), alpha=0.7), batch, device)
    return {
        "rt_er": lambda: ours(rt_er, single),
        "image by image": lambda: image_by_image(looped),
        "jtdmoe": lambda: ours(jtdmoe, dual),
    }


def attacks(width: int, batch: int, device: str, steps: int = STEERING_STEPS) -> dict[str, Step]:
    """Steering and PGD that both take every step on every image: it does not move and is labelled as the model answers,
    so that no search ends at its first error."""
    model = mixture(width, 0).to(device).eval()
    x = images(batch).to(device)
    with torch.no_grad():
        y = model(x).argmax(-1)
    still = {"eps": 0.0, "step_size": "1/255", "steps": steps}

    def run(attack: Attack) -> Step:
        return lambda: attack.run(model, x, y)

    return {"pgd": run(PGD(**still)), "steering": run(RouteSteering(**still))}  # type: ignore[arg-type]


# -- the record ----------------------------------------------------------------------------------------------------


def measure(
    width: int = 64, batch: int = 32, rounds: int = 3, device: str = "cpu", steering_steps: int = STEERING_STEPS
) -> Record:
    """The whole benchmark; the defaults are the recorded setting."""
    trained = interleaved(training_steps(width, batch, device), rounds, device)
    attacked = interleaved(attacks(width, batch, device, steering_steps), rounds, device)
    counted = UNITS["jtdmoe"] / UNITS["rt_er"]
    faster, jtdmoe = ratio(trained, "image by image", "rt_er"), ratio(trained, "jtdmoe", "rt_er")
    steering = ratio(attacked, "steering", "pgd")
    return Record(
        benchmark="rt_er" if device == "cpu" else f"rt_er-{device.partition(':')[0]}",
        what=(
            f"Training steps of {EXPERTS} ResNet-18 experts on 32x32 images, PGD-{STEPS}, Adam included: RT-ER (preset "
            "code) beside the same step with the mixture run image by image, as in the released code, and each expert "
            "attacked by itself; JTDMoE (preset code) beside RT-ER. Route steering beside one PGD of as many steps."
        ),
        settings={
            "device": device,
            "width": width,
            "batch": batch,
            "experts": EXPERTS,
            "steps": STEPS,
            "steering_steps": steering_steps,
            "beta": BETA,
        },
        rounds=rounds,
        measurements={
            "image_by_image_relative_to_rt_er": faster,
            "jtdmoe_relative_to_rt_er": {"time": jtdmoe, "counted": round(counted, 3)},
            "steering_relative_to_pgd": steering,
        },
        bars=[
            Bar("time of an RT-ER step image by image, relative to ours", faster.median, SPEED_LIMIT, False),
            Bar(
                f"time of a JTDMoE step relative to RT-ER's, over the {counted:.2f} counted",
                round(jtdmoe.median / counted, 3),
                OVERHEAD_LIMIT,
                True,
            ),
            Bar(f"time of steering over {EXPERTS} experts, relative to one PGD", steering.median, STEERING_LIMIT, True),
        ],
    )


if __name__ == "__main__":
    from_command_line(__doc__, measure, width=64, batch=32, rounds=3)
