"""Divided We Fall: what the joint step costs beside its count, and phase 1 in two processes beside one.

Run: python benchmarks/dwf.py [--width W] [--batch B] [--rounds N] [--device cuda]
"""

# B batch

from __future__ import annotations

import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from common import Bar, Record, from_command_line, interleaved, ratio
from dispatch import SHAPE
from rt_er import THREAT, Step, case, ours

from phalanx.experts import build_expert
from phalanx.methods import AT, DWF, Method
from phalanx.methods.dwf import KINDS
from phalanx.routing import MixtureOfExperts, MLPRouter
from phalanx.training import Silent
from phalanx.workflow import make_study, plan
from phalanx.workflow.studies import Plan

EXPERTS = 9
STEPS = 10
UNITS = {"dwf": 2 + 2 * STEPS + 9, "at": 2 * STEPS + 3}
"""Passes of one image through one expert: FGSM, PGD and 3 images' updates; PGD and one image's update."""
OVERHEAD_LIMIT = 1.15
"""What a unit of the joint step through nine experts may cost in units of AT of one of them."""
PHASE_RUNS = ("fgsm-1", "fgsm-2", "pgd-1", "pgd-2")
PHASE_EPOCHS = 240
PHASE_ROUNDS = 2
PHASE_LIMIT = 1.6
"""How many times faster phase 1 must be in two processes than in one, their start included."""


def steps(width: int, batch: int, device: str) -> dict[str, Step]:
    """The joint step through nine softly gated experts, and AT of one of them."""
    torch.manual_seed(0)
    experts = [build_expert("resnet18", num_classes=10, image_size=SHAPE[1], width=width) for _ in range(EXPERTS + 1)]
    mixture = case(MixtureOfExperts(MLPRouter(SHAPE, EXPERTS), experts[:-1], "all").train(), batch, device)
    single = case(MixtureOfExperts(None, experts[-1:]).train(), batch, device)
    joint: Method = DWF(fgsm_eps=(0.03,), pgd_steps=(STEPS,)).within(THREAT)
    alone: Method = AT().within(THREAT)
    return {"dwf": lambda: ours(joint, mixture), "at": lambda: ours(alone, single)}


def phase_1(epochs: int) -> Plan:
    """Four of phase 1's runs on digits."""
    return plan("dwf-digits", (f"training.epochs={epochs}", "evaluation.protocol=fgsm", "evaluation.n=50")).only(
        PHASE_RUNS
    )


def phase_seconds(study: Plan, workers: int) -> float:
    """Wall-clock seconds of making the runs from nothing."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        make_study(study, Path(folder), lambda _: nullcontext(Silent()), workers=workers)
        return time.monotonic() - started


def measure(
    width: int, *, batch: int, rounds: int, device: str, epochs: int = PHASE_EPOCHS, phases: int = PHASE_ROUNDS
) -> Record:
    """The record of both."""
    times = interleaved(steps(width, batch, device), rounds, device)
    joint = ratio(times, "dwf", "at")
    unit = joint.median * UNITS["at"] / (UNITS["dwf"] * EXPERTS)
    study = phase_1(epochs)
    pairs = [(phase_seconds(study, 1), phase_seconds(study, 2)) for _ in range(phases)]
    gain = statistics.median(one / two for one, two in pairs)
    return Record(
        benchmark="dwf",
        what="Divided We Fall's joint step through nine ResNet-18 beside AT of one, by counted passes; four runs of "
        "its phase 1 on digits in two processes beside one, wall clock, start of the processes included",
        settings={
            "width": width,
            "batch": batch,
            "experts": EXPERTS,
            "pgd_steps": STEPS,
            "images of an update": len(KINDS),
            "phase 1": {"runs": list(PHASE_RUNS), "epochs": epochs, "rounds": phases},
        },
        rounds=rounds,
        measurements={"joint step / AT step": joint, "unit": unit, "phase 1 seconds": pairs},
        bars=[
            Bar(what="a unit of the joint step in units of AT", value=unit, limit=OVERHEAD_LIMIT, at_most=True),
            Bar(what="phase 1: one process / two", value=gain, limit=PHASE_LIMIT, at_most=False),
        ],
    )


if __name__ == "__main__":
    from_command_line(__doc__, measure, width=16, batch=32, rounds=5)
