"""What the ledgers of a study over seeds say, image by image: AutoAttack beside the worst case, and who broke what.

Run: python benchmarks/ledgers.py NAME FOLDER --rows ROW... [--against ROW] [--picture FILE.svg]

FOLDER is that of `phalanx run STUDY --seeds 0,1,... --set evaluation.protocol=thorough,pgd-50`. Writes
results/NAME.json and prints the table. With --against every other row's worst case is compared with that row's, seed
by seed: the mean of the paired differences in points, with a 95 % t-interval over the seeds.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from common import RESULTS, Record, write_record
from matplotlib import rc_context
from matplotlib.figure import Figure
from scipy.stats import t as student

from phalanx.runs import Ledger
from phalanx.runs.summary import autoattack_keys, held_by_all, summarise

WORST, AUTOATTACK, CLEAN, PGD = "worst case", "AutoAttack", "SA", "PGD-50"
COLUMNS = (CLEAN, PGD, AUTOATTACK, WORST)


@dataclass(frozen=True)
class Reading:
    """One row and seed."""

    n: int
    held: Mapping[str, int]
    """Images, by column."""
    broken: Mapping[str, int]
    """Images that each attack was the first of the cascade to break."""
    blame: Mapping[str, int] = field(default_factory=dict)
    """Broken images by who is to blame: router, expert or both; empty without attribution."""
    reach: Mapping[str, int] | None = None
    """Of n images: experts that can be reached, in all; images whose route is proved unflippable, and how many of those
    an attack flipped none the less. None without a proof."""


def read(evaluation: Path) -> Reading:
    """Of an evaluation's folder, made under "thorough,pgd-50"."""
    with Ledger.read(evaluation / "ledger.sqlite") as ledger:
        rows, attacks, binding = ledger.rows(), ledger.attacks(), ledger.binding()
    keys = {(row.attack, row.surface) for row in rows if row.attack in attacks}
    found = summarise(rows, attacks=attacks)
    choices = {
        CLEAN: (),
        PGD: [key for key in keys if key[0] == "pgd-50"],
        AUTOATTACK: autoattack_keys(attacks, binding.norm),
        WORST: keys,
    }
    record = json.loads((evaluation / "evaluation.json").read_text(encoding="utf-8"))
    return Reading(
        n=found.n,
        held=held_by_all(rows, choices),
        broken={attack.attack: attack.broken for attack in found.attacks if attack.attack != "pgd-50"},
        blame=_blame(evaluation / "attribution.json"),
        reach=record.get("reach"),
    )


def _blame(path: Path) -> Mapping[str, int]:
    if not path.exists():
        return {}
    attacks = json.loads(path.read_text(encoding="utf-8"))["blame"]["attacks"]
    return {who: sum(attack[who] for attack in attacks) for who in ("router", "expert", "both")}


def paired(row: Sequence[Reading], other: Sequence[Reading]) -> dict[str, Any]:
    """The worst case of `row` minus that of `other`, both one a seed, in points."""
    points = [100 * (one.held[WORST] / one.n - two.held[WORST] / two.n) for one, two in zip(row, other, strict=True)]
    spread = stdev(points) / len(points) ** 0.5 if len(points) > 1 else None
    half = None if spread is None else float(student.ppf(0.975, len(points) - 1)) * spread
    mean = fmean(points)
    return {
        "mean": round(mean, 2),
        "interval": None if half is None else [round(mean - half, 2), round(mean + half, 2)],
        "positive": sum(point > 0 for point in points),
        "seeds": [round(point, 2) for point in points],
    }


def collect(folder: Path, rows: Sequence[str]) -> dict[str, list[Reading]]:
    """By row, one reading a seed. Raises SystemExit for an evaluation that is missing."""
    seeds = sorted(folder.glob("seed-*"), key=lambda path: int(path.name.removeprefix("seed-")))
    missing = [f"{seed.name}/{row}" for seed in seeds for row in rows if not (seed / f"{row}.evaluation").is_dir()]
    if missing or not seeds:
        raise SystemExit(f"nothing evaluated in {folder}: {', '.join(missing) or 'no seed-K folder'}")
    return {row: [read(seed / f"{row}.evaluation") for seed in seeds] for row in rows}


def table(found: Mapping[str, Sequence[Reading]]) -> str:
    """Mean and standard deviation over the seeds, in percent, and who broke how many of all that were broken."""
    lines = [f"| model | {' | '.join(COLUMNS)} | broken first by |", f"|---|{'---|' * (len(COLUMNS) + 1)}"]
    for row, readings in found.items():
        cells = [_spread([100 * one.held[column] / one.n for one in readings]) for column in COLUMNS]
        total: Counter[str] = sum((Counter(one.broken) for one in readings), Counter())
        most = ", ".join(f"{attack} {count}" for attack, count in total.most_common(4))
        lines.append(f"| {row} | {' | '.join(cells)} | {most} |")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    return f"{fmean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def picture(found: Mapping[str, Sequence[Reading]], path: Path) -> None:
    """An SVG: each row's accuracies, mean over the seeds, and of all that broke the share whose router is to blame."""
    figure = Figure(figsize=(8, 0.42 * len(found) + 1.1), layout="constrained")
    accuracy, blame = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    places = range(len(found), 0, -1)
    styles = dict(zip(COLUMNS[1:], (("o", "#8a8f98"), ("s", "#2f6fb2"), ("D", "#b8442f")), strict=True))
    for column, (marker, color) in styles.items():
        means = [fmean(100 * one.held[column] / one.n for one in readings) for readings in found.values()]
        accuracy.plot(means, places, marker, color=color, label=column)
    accuracy.set(xlim=(0, 100), xlabel="robust accuracy, %", yticks=list(places), yticklabels=list(found))
    accuracy.grid(axis="x", alpha=0.3)
    accuracy.legend(loc="lower right", fontsize="small", frameon=False)
    for place, readings in zip(places, found.values(), strict=True):
        total = sum((Counter(one.blame) for one in readings), Counter[str]())
        if all_ := total.total():
            blame.barh(place, 100 * total["router"] / all_, color="#2f6fb2", height=0.5)
    blame.set(xlim=(0, 100), xlabel="router to blame, %")
    blame.grid(axis="x", alpha=0.3)
    with rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(path, metadata={"Date": None})


def record(name: str, found: Mapping[str, Sequence[Reading]], against: str | None) -> Record:
    """The record of `collect`'s readings."""
    others = [row for row in found if against is not None and row != against]
    return Record(
        benchmark=name,
        what=(
            "Images held of n, one number a seed: clean, under PGD-50, under AutoAttack (standard), under everything "
            "that the protocol thorough tries; which attack of its cascade broke how many; whom attribution blames"
        ),
        settings={"protocol": "thorough,pgd-50", "rows": list(found), "against": against},
        rounds=len(next(iter(found.values()))),
        measurements={
            "rows": {row: list(readings) for row, readings in found.items()},
            "paired differences of the worst case, in points": {
                row: paired(found[row], found[against]) for row in others if against is not None
            },
        },
        bars=[],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", nargs="+", required=True)
    parser.add_argument("--against")
    parser.add_argument("--picture", type=Path, help="Also draw it into this SVG.")
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    found = collect(chosen.folder, chosen.rows)
    made = record(chosen.name, found, chosen.against)
    write_record(made, chosen.out)
    if chosen.picture is not None:
        picture(found, chosen.picture)
    print(table(found))
    for row, difference in made.measurements["paired differences of the worst case, in points"].items():
        print(f"{row} - {chosen.against}: {difference}")


if __name__ == "__main__":
    main()
