"""The protocols thorough and quick beside standard, on one mixture: time, and what each leaves standing.

Run: python benchmarks/thorough.py [--run RUN] [--images N] [--rounds N]

RUN is a finished run's folder; without one, the recipe digits-rt-er (four experts, top-1) is trained into --folder on
the first call and found there from then on.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from common import RESULTS, Bar, Record, Spread, ratio, write_record
from torch import nn

from phalanx.config import load_run
from phalanx.data import ImageSet, load_data
from phalanx.evaluation import Evaluation, evaluate
from phalanx.evaluation.model_parts import protocol_for
from phalanx.models import load
from phalanx.threat import ThreatModel
from phalanx.workflow import run_config, train_run

PROTOCOLS = ("standard", "thorough", "quick")
BATCH = 64

THOROUGH_LIMIT = 2.5
"""What thorough may cost relative to standard."""
QUICK_MINUTES, QUICK_IMAGES, QUICK_CORES = 2.0, 1000, 2
"""What quick may take, on so many images and cores."""


@dataclass(frozen=True)
class Comparison:
    """Of one model."""

    n: int
    clean: int
    """Images classified rightly, of n."""
    standing: Mapping[str, int]
    """After each protocol."""
    broken: Mapping[str, int]
    """By each member of thorough, of what those before it left."""
    time: Mapping[str, Spread]
    """Of each protocol, relative to standard."""
    quick_minutes: float
    """Of quick, for 1,000 such images: the CPU time of one thread, shared by two cores."""


def compare(model: nn.Module, images: ImageSet, threat: ThreatModel, rounds: int, seed: int = 0) -> Comparison:
    """The protocols take turns, in an order shuffled each round."""
    few = images.images(slice(0, 8))
    tried = {name: protocol_for(name, threat, model, few) for name in PROTOCOLS}
    found: dict[str, Evaluation] = {}
    times: dict[str, list[float]] = {name: [] for name in PROTOCOLS}
    order, shuffle = list(PROTOCOLS), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            start = time.process_time()
            found[name] = evaluate(model, images, tried[name], threat, batch_size=BATCH, seed=seed)
            times[name].append(time.process_time() - start)
    summaries = {name: evaluation.summary for name, evaluation in found.items()}
    seconds = sorted(times["quick"])[rounds // 2] * QUICK_IMAGES / len(images)
    return Comparison(
        n=len(images),
        clean=summaries["standard"].clean_correct,
        standing={name: summary.robust for name, summary in summaries.items()},
        broken={attack.attack: attack.broken for attack in summaries["thorough"].attacks},
        time={name: ratio(times, name, "standard") for name in PROTOCOLS if name != "standard"},
        quick_minutes=round(seconds / 60 / QUICK_CORES, 3),
    )


def record(found: Comparison, run: str, threat: ThreatModel, rounds: int) -> Record:
    """The record of what `compare` found."""
    return Record(
        benchmark="thorough",
        what=(
            "The protocols thorough and quick beside standard (AutoAttack) on one mixture's test images: CPU time on "
            "one thread as a share of standard's, each round all three, and the images that each leaves standing."
        ),
        settings={"run": run, "threat": str(threat), "images": found.n, "batch": BATCH},
        rounds=rounds,
        measurements=vars(found),
        bars=[
            Bar("time of thorough relative to standard", found.time["thorough"].median, THOROUGH_LIMIT, at_most=True),
            Bar("minutes of quick for 1,000 images on two cores", found.quick_minutes, QUICK_MINUTES, at_most=True),
            Bar(
                "images that stand under thorough minus those under standard",
                found.standing["thorough"] - found.standing["standard"],
                0,
                at_most=True,
            ),
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark-thorough"))
    parser.add_argument("--images", type=int, default=450)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    run = chosen.run
    if run is None:
        run = chosen.folder / "digits-rt-er"
        train_run(load_run("digits-rt-er", ()).value, run)
    settings = run_config(run)
    images = load_data(settings.data).test.first(chosen.images)
    found = compare(load(run).eval(), images, settings.threat, chosen.rounds)
    write_record(record(found, run.name, settings.threat, chosen.rounds), chosen.out)


if __name__ == "__main__":
    main()
