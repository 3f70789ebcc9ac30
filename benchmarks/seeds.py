"""What several seeds of one study measured, as one record and one table: images held, not averages of averages.

Run: python benchmarks/seeds.py NAME FOLDER... (each seed's folder: seed-0, seed-1, ... of phalanx run STUDY --seeds, or
those of the same study with --set seed=K), which writes results/NAME.json and prints the table.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import Record, write_record

from phalanx.report import SeedTable, Spread, over_seeds


def collect(name: str, tables: Sequence[Mapping[str, Any]]) -> tuple[Record, SeedTable]:
    """The record of `table.json` contents, one a seed, and all of them as one table. Raises as `over_seeds`."""
    command = f"{tables[0]['command'].partition(' --set seed')[0]} --set seed=K"
    table = over_seeds(tables, command)
    rows = {row["label"]: row for row in tables[0]["rows"]}
    first = rows[table.rows[0].label]
    record = Record(
        benchmark=name,
        what=f"{table.title}: images held of n, by row, column and seed, and by released attack",
        settings={
            "command": command,
            "threat": {"norm": first["measurement"]["norm"], "eps": first["measurement"]["eps"]},
            "protocol": {label: row["measurement"]["protocol"] for label, row in rows.items()},
            "data": first["data"]["trained on"],
            "n": first["n"],
            "seeds": list(table.seeds),
        },
        rounds=len(table.seeds),
        measurements={
            "held": {row.label: {key: _held(spread) for key, spread in row.columns.items()} for row in table.rows},
            # what each released attack says of the whole model
            "released": {
                row.label: {attack: _held(spreads["RA"]) for attack, spreads in row.released.items() if "RA" in spreads}
                for row in table.rows
            },
            **_threefold(tables),
        },
        bars=[],
    )
    return record, table


def _threefold(tables: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Images broken, certified and undecided, one number a seed, of the rows that have certificates."""
    found: dict[str, dict[str, list[int]]] = {}
    for row in (row for table in tables for row in table["rows"] if row.get("threefold")):
        for part in ("broken", "certified", "undecided"):
            found.setdefault(row["label"], {}).setdefault(part, []).append(row["threefold"][part])
    return {"threefold": found} if found else {}


def _held(spread: Spread) -> list[int]:
    """Images held, one number a seed."""
    return [rate.held for rate in spread.rates]


def markdown(table: SeedTable, columns: Sequence[str]) -> str:
    """Mean and standard deviation over the seeds, in percent, of the chosen columns and released attacks."""
    lines = [f"| model | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for row in table.rows:
        known = {**row.columns, **{attack: spreads.get("RA") for attack, spreads in row.released.items()}}
        cells = [spread.text if (spread := known.get(column)) else "–" for column in columns]
        lines.append(f"| {row.label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--columns", nargs="+", default=["SA", "RA", "min", "pgd-released", "worst"])
    arguments = parser.parse_args()
    tables = [json.loads((folder / "table.json").read_text(encoding="utf-8")) for folder in arguments.folders]
    record, table = collect(arguments.name, tables)
    write_record(record)
    print(markdown(table, arguments.columns))


if __name__ == "__main__":
    main()
