"""Closed Ranks: what its step costs beside AT of one network, and what the reachable set and a router's fit cost.

Run: python benchmarks/closed_ranks.py [--width W] [--batch B] [--rounds N] [--device cuda]
"""

# B batch, E experts

from __future__ import annotations

import time
from functools import partial

import torch
import torch.nn.functional as F
from common import Bar, Record, from_command_line, interleaved, ratio
from dispatch import SHAPE
from rt_er import LEARNING_RATE, STEPS, THREAT, Case, Step, ours
from torch import Tensor, nn

from phalanx.attacks import PGD
from phalanx.data import Batch
from phalanx.experts import build_expert
from phalanx.methods import AT, ClosedRanks, Method
from phalanx.routing import MixtureOfExperts, RobustRouter, fit_robust_router

EXPERTS, REACH_EXPERTS = 2, 4
FITTED, REACHED = 50_000, 10_000
RAND_LIMIT = SUM_LIMIT = 1.1
"""What a step of "rand" may cost in AT's, and one of "sum" in AT's times the mean reach."""
REACH_SECONDS, FIT_SECONDS = 1.0, 120.0


def smooth_images(count: int) -> Tensor:
    """(count, *SHAPE) noise of 4 x 4 blocks: a router can tell such images apart, as it can photographs."""
    noise = torch.rand(count, SHAPE[0], 4, 4, generator=torch.Generator().manual_seed(0))
    bright = torch.rand(count, 1, 1, 1, generator=torch.Generator().manual_seed(1))
    return F.interpolate(0.4 * noise + 0.6 * bright, size=SHAPE[1:], mode="bilinear")


def network(width: int, seed: int) -> nn.Module:
    """A ResNet-18."""
    torch.manual_seed(seed)
    return build_expert("resnet18", num_classes=10, image_size=SHAPE[1], width=width)


def steps(width: int, batch: int, device: str) -> tuple[dict[str, Step], float]:
    """AT of one network, and "rand" and "sum" of two of them; and the mean reach of the batch."""
    x = smooth_images(batch)
    router = fit_robust_router(x, EXPERTS, THREAT, attempts=2)
    data = Batch(*(part.to(device) for part in (x, torch.arange(batch) % 10, torch.arange(batch))))
    attack = PGD(steps=STEPS)
    methods: dict[str, Method] = {
        "at": AT(attack=attack).within(THREAT),
        "rand": ClosedRanks(attack=attack, form="rand").within(THREAT),
        "sum": ClosedRanks(attack=attack, form="sum").within(THREAT),
    }
    made: dict[str, Step] = {}
    for name, method in methods.items():
        experts = [network(width, seed) for seed in range(1 if name == "at" else EXPERTS)]
        gate = None if name == "at" else router
        model = MixtureOfExperts(gate, experts, train_router=False).train().to(device)
        optimizer = torch.optim.Adam(model.experts.parameters(), lr=LEARNING_RATE)
        made[name] = partial(ours, method, Case(model, optimizer, data))
    return made, float(router.reachable(data.x, THREAT).sum(1).float().mean())


def reach_seconds(count: int, device: str) -> float:
    """Of the reachable set of `count` images among four experts."""
    torch.manual_seed(0)
    router, x = RobustRouter(SHAPE, REACH_EXPERTS).to(device), smooth_images(count).to(device)
    router.reachable(x, THREAT)
    clock = time.process_time if device == "cpu" else time.perf_counter
    started = clock()
    int(router.reachable(x, THREAT).sum())
    return clock() - started


def fit_seconds(count: int) -> float:
    """Of a fit to `count` images, at its defaults; on the CPU."""
    x = smooth_images(count)
    started = time.process_time()
    fit_robust_router(x, EXPERTS, THREAT)
    return time.process_time() - started


def measure(
    width: int, *, batch: int, rounds: int, device: str, fitted: int = FITTED, reached: int = REACHED
) -> Record:
    """The record of all."""
    made, reach = steps(width, batch, device)
    times = interleaved(made, rounds, device)
    rand, whole = ratio(times, "rand", "at"), ratio(times, "sum", "at")
    per_reach, looked, fit = whole.median / reach, reach_seconds(reached, device), fit_seconds(fitted)
    return Record(
        benchmark="closed_ranks",
        what="A training step of Closed Ranks with two ResNet-18 beside AT of one; seconds of the reachable set and of "
        "a router's fit on images of CIFAR-10's size, on the CPU those of one thread",
        settings={
            "width": width,
            "batch": batch,
            "experts": EXPERTS,
            "pgd_steps": STEPS,
            "images fitted": fitted,
            "images reached": reached,
            "experts reached": REACH_EXPERTS,
        },
        rounds=rounds,
        measurements={"rand / AT": rand, "sum / AT": whole, "mean reach": reach, "fit": fit, "reachable": looked},
        bars=[
            Bar(what="a rand step in AT steps of one network", value=rand.median, limit=RAND_LIMIT, at_most=True),
            Bar(what="a sum step in AT steps times reach", value=per_reach, limit=SUM_LIMIT, at_most=True),
            Bar(what="seconds of R(x), E 4", value=looked, limit=REACH_SECONDS, at_most=True),
            Bar(what="seconds of fitting a router, E 2", value=fit, limit=FIT_SECONDS, at_most=True),
        ],
    )


if __name__ == "__main__":
    from_command_line(__doc__, measure, width=16, batch=64, rounds=5)
