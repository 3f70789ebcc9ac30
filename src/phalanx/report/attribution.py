"""Who is to blame for the broken images, and robust accuracy taken apart: what attribution.json says."""

# E experts

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from phalanx.errors import CorruptError
from phalanx.report.records import Fields, read_record
from phalanx.runs.rate import Rate
from phalanx.runs.rungs import Rung, RungGate

CULPRITS = ("router", "expert", "both")


@dataclass(frozen=True)
class Blame:
    """Of the images that one attack, or all of them, broke."""

    attack: str
    """"" for all."""
    n: int
    culprits: tuple[int, ...]
    """In the order of `CULPRITS`; they sum to n."""
    old_right: int
    """The clean image's route would have been right."""
    any_right: int
    """Some single expert would have been."""


@dataclass(frozen=True)
class Moves:
    """Where one gate sends the broken images."""

    name: str
    flipped: int
    moves: tuple[tuple[int, ...], ...]
    """(E, E) images by first expert when clean (row) and under attack (column)."""


@dataclass(frozen=True)
class Part:
    """A model's experts, or those of a half of a dual model."""

    name: str
    whole: Rate
    alone: tuple[tuple[Rate, Rate], ...]
    """(E,) clean and robust, of all images."""
    own: tuple[tuple[Rate, Rate], ...] | None
    """(E,) of the images that each expert gets; None with several gates."""
    held_route: Rate | None
    worst_route: Rate
    best_route: tuple[Rate, Rate] | None
    """Clean and robust."""
    transfer: tuple[tuple[Rate, ...], ...]
    """(E, E + 1) accuracy of expert j, at last of the whole model, on images made on expert i."""
    without: tuple[tuple[Rate, Rate], ...] | None
    """(E,) clean and robust without expert k."""
    undefined: str
    """Why `without` is None."""


@dataclass(frozen=True)
class Attribution:
    """What attribution.json says, without its list of single images."""

    attack: str
    n: int
    broken: int
    lost: int
    """Broken images that broke nothing when they were made again."""
    unexplained: int
    """Images broken by an attack that could not be run again."""
    blame: tuple[Blame, ...]
    """By attack, and at last of all together."""
    gates: tuple[Moves, ...]
    whole: Rate
    router: Rate
    experts: Rate
    missed: int
    """Images that the evaluation counts as robust, and that an attack of the attribution broke."""
    parts: tuple[Part, ...]
    ladder: tuple[Rung, ...]


def read_attribution(path: Path) -> Attribution | None:
    """The attribution in a file, None if there is none.

    Raises CorruptError naming the key, InputError for a file of a newer version.
    """
    if not path.exists():
        return None
    record = read_record(path, missing="")
    found = record.fields("blame")
    attacks = tuple(_blame(one, one.text("attack")) for one in found.items("attacks"))
    return Attribution(
        attack=record.text("attack"),
        n=record.integer("n"),
        broken=found.integer("broken"),
        lost=len(found.numbers("lost")),
        unexplained=len(found.numbers("unexplained")),
        blame=(*attacks, _blame(found.fields("total"), "")),
        gates=tuple(_moves(gate) for gate in found.items("gates")),
        whole=_rate(record.fields("whole")),
        router=_rate(record.fields("router")),
        experts=_rate(record.fields("experts")),
        missed=len(record.numbers("missed")),
        parts=tuple(_part(part) for part in record.items("parts")),
        ladder=tuple(_rung(rung) for rung in record.items("ladder")),
    )


def _blame(fields: Fields, attack: str) -> Blame:
    culprits, n = tuple(fields.integer(culprit) for culprit in CULPRITS), fields.integer("n")
    if sum(culprits) != n:
        raise CorruptError(f"{fields.where} should blame {n} images, blames {sum(culprits)}; restore it from a copy")
    return Blame(attack, n, culprits, _at_most(fields, "old_right", n), _at_most(fields, "any_right", n))


def _moves(gate: Fields) -> Moves:
    moves = gate.table("moves")
    return Moves(gate.text("name"), _at_most(gate, "flipped", sum(map(sum, moves))), moves)


def _at_most(fields: Fields, key: str, n: int) -> int:
    found = fields.integer(key)
    if found > n:
        raise CorruptError(f"{fields.where}.{key} should count at most {n} images, got {found}; restore it from a copy")
    return found


def _rate(fields: Fields) -> Rate:
    held, n = fields.integer("held"), fields.integer("n")
    if held > n:
        raise CorruptError(f"{fields.where} should count held <= n; restore it from a copy")
    return Rate(held, n)


def _counts(fields: Fields) -> tuple[Rate, Rate]:
    n, clean, robust = (fields.integer(key) for key in ("n", "clean", "robust"))
    if not robust <= clean <= n:
        raise CorruptError(f"{fields.where} should count robust <= clean <= n; restore it from a copy")
    return Rate(clean, n), Rate(robust, n)


def _part(part: Fields) -> Part:
    whole, table = _rate(part.fields("whole")), part.table("transfer")
    to_whole = [int(count or 0) for count in part.numbers("transfer_whole")]
    if len(to_whole) != len(table):
        raise CorruptError(
            f"{part.where}.transfer_whole should have {len(table)} numbers, got {len(to_whole)}; restore it from a copy"
        )
    return Part(
        name=part.text("name"),
        whole=whole,
        alone=_experts(part, "all", len(table)),
        own=_experts(part, "own", len(table)) if part.values.get("own") is not None else None,
        held_route=None if part.values.get("held_route") is None else _rate(part.fields("held_route")),
        worst_route=_rate(part.fields("worst_route")),
        best_route=None if part.values.get("best_route") is None else _counts(part.fields("best_route")),
        transfer=tuple(
            tuple(Rate(count, whole.n) for count in (*row, last)) for row, last in zip(table, to_whole, strict=True)
        ),
        without=_experts(part, "without", len(table)) if part.values.get("without") is not None else None,
        undefined=part.text("undefined"),
    )


def _experts(part: Fields, key: str, experts: int) -> tuple[tuple[Rate, Rate], ...]:
    found = tuple(map(_counts, part.items(key)))
    if len(found) != experts:
        raise CorruptError(f"{part.where}.{key} should tell of {experts} experts, got {len(found)}; restore it")
    return found


def _rung(rung: Fields) -> Rung:
    gates = tuple(
        RungGate(gate.text("name"), _rate(gate.fields("flipped")), gate.number("entropy"))
        for gate in rung.items("gates")
    )
    return Rung(rung.text("multiple"), rung.number("eps") or 0.0, _rate(rung.fields("accuracy")), gates)
