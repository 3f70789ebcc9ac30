"""What a ledger says, finished or not, as lines for a terminal."""

from __future__ import annotations

from pathlib import Path

from phalanx.runs import AttackSummary, Ledger, Summary, summarise, wilson
from phalanx.runs.summary import Specs, aside_attacks


def evaluation_text(path: Path) -> str:
    """Clean accuracy, every attack and the worst case, each with n and 95 % Wilson interval.

    Of an evaluation that has not ended the worst case is an upper bound over the images begun, and says so. Raises
    InputError if there is no ledger, CorruptError if it is damaged.
    """
    with Ledger.read(path) as ledger:
        binding, attacks, size = ledger.binding(), ledger.attacks(), ledger.size()
        aside = aside_attacks(attacks, binding.norm, binding.eps)
        summary = summarise(ledger.rows(), aside=aside, attacks=attacks)
    return "\n".join(_lines(summary, attacks, f"{binding.norm} {binding.eps}", summary.n if size is None else size))


def _lines(summary: Summary, attacks: Specs, threat: str, size: int) -> list[str]:
    n, finished = summary.n, summary.n == size and not summary.incomplete
    last = ("worst case per image", summary.robust) if finished else ("worst case, at most", summary.standing)
    named = [
        ("clean", summary.clean_correct, ""),
        *((_name(attack, attacks, threat), attack.held, _share(attack)) for attack in summary.attacks),
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
