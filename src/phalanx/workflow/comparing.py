"""Compare two evaluations image by image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phalanx.errors import InputError
from phalanx.evaluation.compare import Paired
from phalanx.report.records import read_record
from phalanx.runs import Binding, Ledger, Summary, Verdict, summarise
from phalanx.runs.summary import Key, aside_attacks, external_attacks, held_samples
from phalanx.workflow.measuring import EVALUATION_NAME, LEDGER_NAME

COMPARISON_SCHEMA = 1
TEST = "exact McNemar test, two-sided"
INTERVAL = "95 % interval of the paired difference, Newcombe 1998 method 10"


@dataclass(frozen=True)
class Comparison:
    """What two models say to the same images."""

    first: str
    """The evaluations' folders."""
    second: str
    threat: str
    measures: Mapping[str, Paired]
    """"SA", "RA" and every attack by its name: held against it and, in a cascade, against those before it."""
    apart: tuple[str, ...] = ()
    """Attacks of the protocol that are made for one of the two kinds of model: they count in RA alone."""

    def text(self) -> str:
        """A table for a terminal, differences in points."""
        n = self.measures["RA"].n
        lines = [
            f"A: {self.first}",
            f"B: {self.second}",
            f"{n:,} images, {self.threat}; {TEST}; {INTERVAL}",
            "",
            f"{'':<24}{'A %':>7}{'B %':>7}{'B - A':>8}  {'interval':<16}{'only A':>7}{'only B':>7}  p",
        ]
        lines += [_line(name, paired) for name, paired in self.measures.items()]
        if self.apart:
            lines += [
                "",
                f"RA is under the whole of one protocol. {len(self.apart)} of its attacks are made for one kind of "
                f"model, and are not compared by themselves: {', '.join(self.apart)}",
            ]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Everything, shares and differences in [-1, 1]."""
        return {
            "schema": COMPARISON_SCHEMA,
            "first": self.first,
            "second": self.second,
            "threat": self.threat,
            "n": self.measures["RA"].n,
            "test": TEST,
            "interval": INTERVAL,
            "measures": {name: _json(paired) for name, paired in self.measures.items()},
            "apart": list(self.apart),
        }


def _line(name: str, paired: Paired) -> str:
    low, high = paired.interval
    interval = f"[{100 * low:+.1f}, {100 * high:+.1f}]"
    return (
        f"{name:<24}{100 * paired.first:7.1f}{100 * paired.second:7.1f}{100 * paired.difference:+8.1f}  {interval:<16}"
        f"{paired.only_first:7,}{paired.only_second:7,}  {paired.p_value:.3g}"
    )


def _json(paired: Paired) -> dict[str, Any]:
    return {
        "first": paired.first,
        "second": paired.second,
        "difference": paired.difference,
        "interval": list(paired.interval),
        "p_value": paired.p_value,
        "both": paired.both,
        "only_first": paired.only_first,
        "only_second": paired.only_second,
        "neither": paired.neither,
    }


@dataclass(frozen=True)
class _Side:
    """One evaluation."""

    folder: Path
    binding: Binding
    attacks: Mapping[str, Mapping[str, Any]]
    """Those that count, without their seeds; images that somebody submitted of one model do not."""
    rows: Sequence[Verdict]
    protocol: str | None
    """As it was asked for; None where no evaluation says."""

    def held(self) -> dict[str, set[int]]:
        """The images held, by measure."""
        keys: dict[str, Key] = {name: (name, str(spec.get("surface", "whole"))) for name, spec in self.attacks.items()}
        ordered = sorted(keys, key=lambda name: (len(self.attacks[name].get("after", ())), name))
        choices: dict[str, list[Key]] = {"SA": [], "RA": list(keys.values())}
        for name in ordered:
            choices[name] = [keys[earlier] for earlier in (*self.attacks[name].get("after", ()), name)]
        return held_samples(self.rows, choices)


def compare(first: Path, second: Path) -> Comparison:
    """Of two evaluation folders, or of two runs that have one evaluation of the same name.

    One and the same protocol is made of other attacks for a mixture than for a single network: the whole of it is
    compared then, and attack by attack what both have.

    Raises InputError unless both are finished and measured the same images, threat and protocol or attacks;
    CorruptError.
    """
    one, two = (_read(folder) for folder in _folders(first, second))
    _refuse_different(one, two)
    ours, theirs = one.held(), two.held()
    n = len({row.sample for row in one.rows})
    apart = _apart(one, two)
    measures = {name: Paired.of(ours[name], theirs[name], n) for name in ours if name not in apart}
    return Comparison(str(one.folder), str(two.folder), f"{one.binding.norm} {one.binding.eps}", measures, apart)


def _apart(one: _Side, two: _Side) -> tuple[str, ...]:
    """The attacks that only one has, or that stand elsewhere in its cascade."""
    names = sorted({*one.attacks, *two.attacks})
    return tuple(name for name in names if one.attacks.get(name) != two.attacks.get(name))


def _folders(first: Path, second: Path) -> tuple[Path, Path]:
    if (first / LEDGER_NAME).is_file() or (second / LEDGER_NAME).is_file():
        return first, second
    one, two = (
        {path.parent.name for path in folder.glob(f"evaluations/*/{LEDGER_NAME}")} for folder in (first, second)
    )
    common = sorted(one & two)
    if len(common) != 1:
        raise InputError(
            f"{first} and {second} have {'no' if not common else 'several'} evaluations of the same name"
            f"{': ' + ', '.join(common) if common else ''}; name two evaluation folders, such as RUN/evaluations/NAME"
        )
    return first / "evaluations" / common[0], second / "evaluations" / common[0]


def _read(folder: Path) -> _Side:
    with Ledger.read(folder / LEDGER_NAME) as ledger:
        binding, attacks, rows, size = ledger.binding(), ledger.attacks(), ledger.rows(), ledger.size()
    aside = aside_attacks(attacks, binding.norm, binding.eps)
    _refuse_unfinished(folder, summarise(rows, aside=aside, attacks=attacks), size)
    counted = {
        name: {key: value for key, value in spec.items() if key != "seed"}
        for name, spec in attacks.items()
        if name not in (*aside, *external_attacks(attacks))
    }
    return _Side(folder, binding, counted, rows, _protocol(folder / EVALUATION_NAME))


def _protocol(path: Path) -> str | None:
    return read_record(path, missing="").text("protocol") if path.is_file() else None


def _refuse_unfinished(folder: Path, summary: Summary, size: int | None) -> None:
    if summary.n < (size or 1) or summary.incomplete:
        raise InputError(
            f"{folder} is not finished: {summary.n:,} of {'?' if size is None else f'{size:,}'} images begun, "
            f"{summary.incomplete:,} of them have attacks left; give the same phalanx evaluate command again"
        )


def _refuse_different(one: _Side, two: _Side) -> None:
    """Raises InputError naming everything in which the two differ."""
    names = {"data_sha256": "images", "norm": "norm", "eps": "eps", "evaluation_version": "evaluation version"}
    different = [
        f"{what}: {_short(getattr(one.binding, field))} and {_short(getattr(two.binding, field))}"
        for field, what in names.items()
        if getattr(one.binding, field) != getattr(two.binding, field)
    ]
    # what one protocol is made of depends on the model, but surrogates are asked for besides
    same = one.protocol is not None and one.protocol == two.protocol
    different += [
        f"attack {name}: {'other settings' if name in one.attacks and name in two.attacks else 'only one has it'}"
        for name in _apart(one, two)
        if not same or _is_transfer(name, one) or _is_transfer(name, two)
    ]
    if different:
        raise InputError(
            f"{one.folder} and {two.folder} do not compare: {'; '.join(different)}; evaluate both with the same "
            "--protocol and --surrogate on the same images"
        )


def _is_transfer(name: str, side: _Side) -> bool:
    return side.attacks.get(name, {}).get("attack") == "Transfer"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 20 else f"{text[:12]}..."
