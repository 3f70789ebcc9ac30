"""What several seeds of one study measured, as one record and one table: images held, not averages of averages.

Run: python benchmarks/seeds.py NAME FOLDER... (the same study with --set seed=K), which writes results/NAME.json and
prints the table.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import Record, write_record


def collect(name: str, tables: Sequence[Mapping[str, Any]]) -> Record:
    """The record of `table.json` contents, one a seed.

    Raises ValueError unless they are of the same rows, images and threat, with different seeds.
    """
    rows = [{row["label"]: row for row in table["rows"]} for table in tables]
    settings = [{label: _setting(row) for label, row in seed.items()} for seed in rows]
    if any(other != settings[0] for other in settings):
        raise ValueError("the tables must hold the same rows, images and threat; give the same study's folders")
    seeds = [next(iter(seed.values()))["seed"] for seed in rows]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"the tables must be of different seeds, got {seeds}")
    first = next(iter(rows[0].values()))
    return Record(
        benchmark=name,
        what=f"{tables[0]['title']}: images held of n, by row, column and seed, and by released attack",
        settings={
            "command": f"{tables[0]['command'].partition(' --set seed')[0]} --set seed=K",
            "threat": {"norm": first["measurement"]["norm"], "eps": first["measurement"]["eps"]},
            "protocol": {label: row["measurement"]["protocol"] for label, row in rows[0].items()},
            "data": first["data"]["trained on"],
            "n": first["n"],
            "seeds": seeds,
        },
        rounds=len(seeds),
        measurements={
            "held": {label: _held([seed[label]["columns"] for seed in rows]) for label in rows[0]},
            "released": {label: _held([_released(seed[label]) for seed in rows]) for label in rows[0]},
        },
        bars=[],
    )


def _setting(row: Mapping[str, Any]) -> tuple[Any, ...]:
    measured = row["measurement"]
    return row["n"], measured["norm"], measured["eps"], measured["protocol"], row["data"]["evaluated images (sha256)"]


def _released(row: Mapping[str, Any]) -> dict[str, Any]:
    """What each released attack says of the whole model."""
    return {attack: rates.get("RA") for attack, rates in row["released_columns"].items()}


def _held(seeds: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
    """Images held by column, one number a seed."""
    return {column: [seed[column]["held"] for seed in seeds] for column, rate in seeds[0].items() if rate is not None}


def markdown(record: Record, columns: Sequence[str]) -> str:
    """Mean and standard deviation over the seeds, in percent, of the chosen columns."""
    lines = [f"| model | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for label, held in record.measurements["held"].items():
        known = {**held, **record.measurements["released"][label]}
        cells = [_cell(known.get(column), record.settings["n"]) for column in columns]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(held: Sequence[int] | None, n: int) -> str:
    if held is None:
        return "–"
    shares = [100 * count / n for count in held]
    return f"{statistics.mean(shares):.1f} ± {statistics.stdev(shares):.1f}" if len(shares) > 1 else f"{shares[0]:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--columns", nargs="+", default=["SA", "RA", "min", "pgd-released", "worst"])
    arguments = parser.parse_args()
    tables = [json.loads((folder / "table.json").read_text(encoding="utf-8")) for folder in arguments.folders]
    record = collect(arguments.name, tables)
    write_record(record)
    print(markdown(record, arguments.columns))


if __name__ == "__main__":
    main()
