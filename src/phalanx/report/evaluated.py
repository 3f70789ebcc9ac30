"""What a ledger says, finished or not, as lines for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

from phalanx.report.corruptions import covered, read_corruptions
from phalanx.report.material import CORRUPTIONS_NAME
from phalanx.runs import AttackSummary, Ledger, Summary, summarise, wilson
from phalanx.runs.headline import Challenge, challenges
from phalanx.runs.summary import Specs, aside_attacks, autoattack_keys, held_by_all
from phalanx.runs.threats import Coverage, Status, coverage


def evaluation_text(path: Path) -> str:
    """Clean accuracy, every attack and the worst case, each with n and 95 % Wilson interval.

    Of an evaluation that has not ended the worst case is an upper bound over the images begun, and says so. Raises
    InputError if there is no ledger, CorruptError if it is damaged.
    """
    with Ledger.read(path) as ledger:
        binding, attacks, size = ledger.binding(), ledger.attacks(), ledger.size()
        aside = aside_attacks(attacks, binding.norm, binding.eps)
        rows = ledger.rows()
    summary = summarise(rows, aside=aside, attacks=attacks)
    counted = [name for name in attacks if name not in aside]
    standard = autoattack_keys(counted, binding.norm)
    # with nothing besides, the worst case is its number
    alone = held_by_all(rows, {"AutoAttack alone": standard} if 0 < len(standard) < len(counted) else {})
    threat = f"{binding.norm} {binding.eps}"
    lines = _lines(summary, attacks, threat, summary.n if size is None else size, alone)
    lines += [_challenge(done) for done in challenges(rows, attacks, aside=aside)]
    threats = coverage(rows, attacks, binding.norm, binding.eps)
    return "\n".join([*lines, *_coverage(covered(threats, read_corruptions(path.parent / CORRUPTIONS_NAME)))])


def _challenge(done: Challenge) -> str:
    return (
        f"{done.attack} broke {done.broken:,} of {done.judged:,} images, {done.lowered:,} of which had held against "
        "every attack of the protocol"
    )


def _coverage(lines: Sequence[Coverage]) -> list[str]:
    named = {status: [line.threat for line in lines if line.status == status] for status in get_args(Status)}
    told = "; ".join(f"{status}: {', '.join(threats)}" for status, threats in named.items() if threats)
    return [f"threats {told}"]


def _lines(summary: Summary, attacks: Specs, threat: str, size: int, alone: Mapping[str, int]) -> list[str]:
    n, finished = summary.n, summary.n == size and not summary.incomplete
    last = ("worst case per image", summary.robust) if finished else ("worst case, at most", summary.standing)
    named = [
        ("clean", summary.clean_correct, ""),
        *(
            (_name(attack, attacks, threat), attack.held, _share(attack))
            for attack in summary.attacks
            if not attacks.get(attack.attack, {}).get("external")
        ),
        *((name, held, "") for name, held in alone.items() if finished),
        (*last, ""),
    ]
    width = max(len(name) for name, _, _ in named)
    lines = [f"{name:<{width}}  {_rate(held, n)}{share}" for name, held, share in named]
    if not finished:
        lines.append(
            f"not finished: {n:,} of {size:,} images begun, {summary.incomplete:,} of them have attacks left; the "
            "robust accuracy of these images can only fall; the same command goes on"
        )
    return lines


def _name(attack: AttackSummary, attacks: Specs, threat: str) -> str:
    # a name with a radius of its own says it
    named = attack.attack if ":" in attack.attack else f"{attack.attack} ({threat})"
    return f"then {named}" if attacks.get(attack.attack, {}).get("after") else named


def _share(attack: AttackSummary) -> str:
    """What the attack did to the images that it was tried on; in a cascade those that still stood."""
    counts = ((attack.invalid, "not finite"), (attack.timeout, "out of time"), (attack.untried, "not tried yet"))
    others = "".join(f", {count:,} {what}" for count, what in counts if count)
    return f"  broke {attack.broken:,} of {attack.tried:,}{others}"


def _rate(held: int, n: int) -> str:
    low, high = wilson(held, n)
    return f"{held / n if n else 0.0:6.1%}  [{low:.1%}, {high:.1%}]  n = {n}"
