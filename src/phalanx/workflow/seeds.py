"""The training seeds of a study, and one report of all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from phalanx.errors import InputError
from phalanx.report import Page, over_seeds, seeds_text, terminal_table, to_json, write_report, write_seeds_report


def parse_seeds(text: str, overrides: Sequence[str] = ()) -> tuple[int, ...]:
    """The seeds that `--seeds` names, such as "0,1,2", in its order.

    Raises InputError unless they are different whole numbers in 0..2**31 - 1, and if `overrides` set the seed, too.
    """
    if any(item.partition("=")[0].strip() == "seed" for item in overrides):
        raise InputError("--seeds and --set seed=N both choose the seed; give one of them")
    seeds: list[int] = []
    for part in map(str.strip, text.split(",")):
        if not (part.isascii() and part.isdigit()) or int(part) >= 2**31:
            raise InputError(
                f"--seeds must be whole numbers in 0..2**31 - 1 joined by commas, such as 0,1,2; got {part!r}"
            )
        if int(part) in seeds:
            raise InputError(f"--seeds names {part} twice; each seed counts once")
        seeds.append(int(part))
    return tuple(seeds)


def seed_folder(folder: Path, seed: int) -> Path:
    """Where a study under one of several seeds goes."""
    return folder / f"seed-{seed}"


def report_over_seeds(pages: Mapping[int, Page], folder: Path, command: str) -> tuple[str, dict[str, Path]]:
    """Writes the report of a study's pages, by seed, into `folder`: what the terminal shows, and its files by name.

    One seed has no deviation: its own page is the report.
    """
    first = next(iter(pages.values()))
    if len(pages) == 1:
        return terminal_table(first), write_report(folder, first)
    table = over_seeds([to_json(page) for page in pages.values()], command)
    return seeds_text(table), write_seeds_report(folder, table)
