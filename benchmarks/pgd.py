"""PGD-10 evaluation beside torchattacks, foolbox and the Adversarial Robustness Toolbox, on the same images.

Run: python benchmarks/pgd.py [--data FOLDER] [--model FOLDER] [--rounds N]

The folder of --data ($PHALANX_CIFAR10 by default) holds CIFAR-10 in the Hugging Face Parquet layout; in that of --model
the attacked network is trained on the first call and found from then on.
"""

# B batch, C classes, N images

from __future__ import annotations

import argparse
import copy
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from common import RESULTS, Bar, Record, Spread, interleaved, ratio, write_record
from torch import Tensor, nn
from trained import METHOD, TRAINING, WIDTH, chosen, trained

from phalanx.attacks import PGD
from phalanx.attacks.base import Attack
from phalanx.data import Batch, ImageSet
from phalanx.evaluation import evaluate, protocol
from phalanx.nn import fold_batchnorm
from phalanx.rng import SampleRng
from phalanx.threat import ThreatModel

EPSILON, STEP_SIZE, STEPS = 8 / 255, 2 / 255, 10
OURS = PGD(eps="8/255", step_size="2/255", steps=STEPS)
BATCH = 64
TIMED_IMAGES = 256
JUDGED_IMAGES = 512
SIZES = (64, 128, 256, 512)

SPEED_LIMITS = {"torchattacks": 1.9, "foolbox": 2.4, "art": 2.4}
"""How many times faster than each library an evaluation must be."""
PACKAGES = ("torchattacks", "foolbox", "adversarial-robustness-toolbox")
"""The distributions whose versions the record states."""


class Tally(NamedTuple):
    """What one evaluation counted."""

    robust: int
    """Images still classified correctly."""
    n: int


Evaluator = Callable[[Batch], int]
"""Attacks a batch and counts the images that stay correct, each library in its own way."""


# -- the four evaluations ------------------------------------------------------------------------------------------


def ours(model: nn.Module | Callable[[Tensor], Tensor], attack: Attack = OURS) -> Evaluator:
    """Search, verdict by the real model, clean accuracy included."""

    def robust(batch: Batch) -> int:
        result = attack.run(model, batch.x, batch.y, rng=SampleRng(0, batch.ids))
        return int((~(result.broken | result.invalid)).sum())

    return robust


@torch.no_grad()
def _still_correct(model: nn.Module, x_adv: Tensor, y: Tensor) -> int:
    return int((model(x_adv).argmax(-1) == y).sum())


def with_torchattacks(model: nn.Module) -> Evaluator:
    import torchattacks

    attack = torchattacks.PGD(model, eps=EPSILON, alpha=STEP_SIZE, steps=STEPS, random_start=True)
    return lambda batch: _still_correct(model, attack(batch.x, batch.y), batch.y)


def with_foolbox(model: nn.Module) -> Evaluator:
    import foolbox

    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    attack = foolbox.attacks.LinfPGD(abs_stepsize=STEP_SIZE, steps=STEPS, random_start=True)

    def robust(batch: Batch) -> int:
        _, _, success = attack(wrapped, batch.x, batch.y, epsilons=EPSILON)
        return int((~success).sum())

    return robust


def with_art(model: nn.Module) -> Evaluator:
    from art.attacks.evasion import ProjectedGradientDescent
    from art.estimators.classification import PyTorchClassifier

    with torch.no_grad():
        num_classes = model(torch.zeros(1, 3, 32, 32)).shape[1]
    classifier = PyTorchClassifier(
        model,
        loss=nn.CrossEntropyLoss(),
        input_shape=(3, 32, 32),
        nb_classes=num_classes,
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )
    attack = ProjectedGradientDescent(
        classifier,
        norm=np.inf,
        eps=EPSILON,
        eps_step=STEP_SIZE,
        max_iter=STEPS,
        num_random_init=1,
        batch_size=BATCH,
        verbose=False,
    )

    def robust(batch: Batch) -> int:
        labels = batch.y.numpy()
        predicted = classifier.predict(attack.generate(batch.x.numpy(), labels), batch_size=BATCH).argmax(-1)
        return int((predicted == labels).sum())

    return robust


LIBRARIES: dict[str, Callable[[nn.Module], Evaluator]] = {
    "torchattacks": with_torchattacks,
    "foolbox": with_foolbox,
    "art": with_art,
}


def installed() -> list[str]:
    """The other libraries that are there."""
    return [name for name in LIBRARIES if find_spec(name) is not None]


def tally(evaluator: Evaluator, batches: Sequence[Batch]) -> Tally:
    """Over all batches."""
    return Tally(sum(evaluator(batch) for batch in batches), sum(len(batch.y) for batch in batches))


# -- each saving switched off --------------------------------------------------------------------------------------


def _copy(model: nn.Module, memory_format: torch.memory_format) -> nn.Module:
    """Frozen, in evaluation mode, its weights laid out as said."""
    return copy.deepcopy(model).eval().requires_grad_(False).to(memory_format=memory_format)


def _bare(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The model as a plain function: an attack then takes it as it is."""
    return lambda x: model(x)


def without_savings(model: nn.Module) -> dict[str, Evaluator]:
    """Our evaluation with one of its three savings switched off at a time, and with none of them.

    Without dropping the last iterate is judged, as in the other libraries. Without folding or channels_last the attack
    is given a plain function, which it neither copies nor changes.
    """
    folded = fold_batchnorm(model)
    assert folded is not None
    keep_all = replace(OURS, early_drop=False, keep="last")
    plain = _copy(model, torch.contiguous_format)
    return {
        "without folding": ours(_bare(_copy(model, torch.channels_last))),
        "without channels_last": ours(_bare(folded.to(memory_format=torch.contiguous_format))),
        "without dropping": ours(model, keep_all),
        "without all three": ours(_bare(plain), keep_all),
    }


# -- time and memory over the number of images ---------------------------------------------------------------------


def repeated(images: ImageSet, n: int) -> ImageSet:
    """The first BATCH images over and over, n in all, with ids of their own: equal work in every batch."""
    rows = np.arange(n) % BATCH
    return ImageSet(images.pixels[rows], images.labels[rows], np.arange(n, dtype=np.int64), images.levels)


def probe(model: nn.Module, images: ImageSet, n: int) -> dict[str, float]:
    """CPU seconds per image of evaluating `n` images after a first batch, and this process's peak memory in MiB."""
    threat = ThreatModel("Linf", "8/255")
    wanted = protocol(f"pgd-{STEPS}", threat)
    evaluate(model, repeated(images, BATCH), wanted, threat, batch_size=BATCH)
    start = time.process_time()
    evaluate(model, repeated(images, n), wanted, threat, batch_size=BATCH)
    seconds = time.process_time() - start
    # kibibytes on Linux, bytes on macOS
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return {"seconds_per_image": seconds / n, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}


def probe_apart(source: Path, folder: Path, n: int) -> dict[str, float]:
    """`probe` in a process of its own, whose peak no earlier work has raised."""
    command = [sys.executable, __file__, "--data", str(source), "--model", str(folder), "--probe", str(n)]
    found: dict[str, float] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return found


def scaling(source: Path, folder: Path, sizes: Sequence[int] = SIZES, rounds: int = 3) -> dict[str, dict[str, Any]]:
    """For each size the time per image as a ratio to the smallest size's, and the largest peak memory seen."""
    probes = [{n: probe_apart(source, folder, n) for n in sizes} for _ in range(rounds)]
    return {
        str(n): {
            "time_per_image": Spread.of([p[n]["seconds_per_image"] / p[sizes[0]]["seconds_per_image"] for p in probes]),
            "peak_mib": round(max(p[n]["peak_mib"] for p in probes), 1),
        }
        for n in sizes
    }


# -- the record ----------------------------------------------------------------------------------------------------


def compare(model: nn.Module, images: ImageSet, timed: int, judged: int, rounds: int) -> dict[str, Any]:
    """Times relative to ours on the first `timed` images; accuracies on the first `judged`."""
    evaluators = {"ours": ours(model), **{name: LIBRARIES[name](model) for name in installed()}}
    ablated = {"ours": evaluators["ours"], **without_savings(model)}
    few, many = (list(images.first(n).batches(BATCH)) for n in (timed, judged))

    def relative(variants: dict[str, Evaluator]) -> dict[str, Spread]:
        times = interleaved({name: partial(tally, run, few) for name, run in variants.items()}, rounds)
        return {name: ratio(times, name, "ours") for name in variants if name != "ours"}

    # apart: every further variant pushes the others' compiled kernels out of oneDNN's cache
    time_relative = {**relative(evaluators), **relative(ablated)}
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002  ART draws its start from the global state
    clean = sum(_still_correct(model, batch.x, batch.y) for batch in many)
    return {
        "clean_accuracy": clean / judged,
        "robust_accuracy": {name: tally(run, many).robust / judged for name, run in evaluators.items()},
        "time_relative_to_ours": time_relative,
    }


def comparison_bars(found: dict[str, Any]) -> list[Bar]:
    times, robust = found["time_relative_to_ours"], found["robust_accuracy"]
    speed = [
        Bar(f"time of {name} relative to ours", times[name].median, limit, at_most=False)
        for name, limit in SPEED_LIMITS.items()
        if name in times
    ]
    strength = [
        Bar(f"our robust accuracy minus that of {name}", round(robust["ours"] - value, 4), 0.01, at_most=True)
        for name, value in robust.items()
        if name != "ours"
    ]
    return speed + strength


def scaling_bars(found: dict[str, dict[str, Any]]) -> list[Bar]:
    smallest, largest = min(found, key=int), max(found, key=int)
    growth = found[largest]["peak_mib"] / found[smallest]["peak_mib"]
    return [
        Bar(
            f"time per image at {largest} images relative to {smallest}",
            found[largest]["time_per_image"].median,
            1.15,
            at_most=True,
        ),
        Bar(f"peak memory at {largest} images relative to {smallest}", round(growth, 3), 1.05, at_most=True),
    ]


def record(found: dict[str, Any], scaled: dict[str, dict[str, Any]], timed: int, judged: int, rounds: int) -> Record:
    """The record of what `compare` and `scaling` found."""
    return Record(
        benchmark="pgd",
        what=(
            f"PGD-{STEPS} evaluation (attack and verdict; ours includes the clean accuracy) of a ResNet-18 of width "
            f"{WIDTH} on CIFAR-10 (JPEG) images that it was trained on: CPU time of each library's own PGD and "
            "accuracy as a ratio to ours, on the same images in the same batches; ours with one saving switched off; "
            "our time per image and peak memory over the number of images."
        ),
        settings={
            "eps": "8/255",
            "step_size": "2/255",
            "steps": STEPS,
            "batch": BATCH,
            "timed_images": timed,
            "judged_images": judged,
            "width": WIDTH,
            "method": chosen(METHOD),
            "training": chosen(TRAINING),
        },
        rounds=rounds,
        measurements={**found, "scaling": scaled},
        bars=comparison_bars(found) + (scaling_bars(scaled) if scaled else []),
        packages=PACKAGES,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("PHALANX_CIFAR10")
    parser.add_argument("--data", type=Path, default=default, required=default is None)
    parser.add_argument("--model", type=Path, default=Path("runs/benchmark-model"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--probe", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, images = trained(arguments.data, arguments.model)
    if arguments.probe is not None:
        print(json.dumps(probe(model, images, arguments.probe)))
        return
    found = compare(model, images, TIMED_IMAGES, JUDGED_IMAGES, arguments.rounds)
    scaled = scaling(arguments.data, arguments.model)
    write_record(record(found, scaled, TIMED_IMAGES, JUDGED_IMAGES, arguments.rounds), arguments.out)


if __name__ == "__main__":
    main()
