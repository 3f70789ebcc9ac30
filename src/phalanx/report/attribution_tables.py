"""The tables of a row's attribution."""

from __future__ import annotations

from collections.abc import Iterator

from phalanx.report.attribution import Attribution, Part
from phalanx.report.page import Notice, Row
from phalanx.report.table import Table
from phalanx.report.words import ABSENT, bounds, percent, plural, rated
from phalanx.runs.rate import Rate


def attribution_tables(found: Attribution | None) -> list[Table]:
    """What attribution.json says but for the gates' moves, which are drawn; none without it."""
    if found is None:
        return []
    tables = [_blame(found), _apart(found)]
    for part in found.parts:
        tables += [_experts(found, part), _transfer(found, part)]
    return [table for table in (*tables, _ladder(found)) if table.lines]


def attribution_notices(row: Row) -> Iterator[Notice]:
    """Whether the evaluation missed something that the attribution found."""
    if row.attribution is not None and row.attribution.missed:
        found = row.attribution
        yield Notice(
            "alarm",
            row.label,
            f"{plural(found.missed, 'image')} of {found.n:,} that the evaluation counts as robust "
            f"{'was' if found.missed == 1 else 'were'} broken by {found.attack} while robust accuracy was taken apart: "
            "the attacks of the evaluation are too weak for this model; use --protocol thorough.",
        )


def _named(title: str, name: str) -> str:
    if name in ("standard", "robust"):
        return f"{title}, {name} half"
    return f"{title}, {name}" if name else title


def _share(rate: Rate) -> str:
    return f"{percent(rate.share)} % {bounds(rate)}" if rate.n else ABSENT


def _blame(found: Attribution) -> Table:
    lines = [
        (
            one.attack or "all",
            f"{one.n:,}",
            *(rated(Rate(count, one.n)) for count in one.culprits),
            rated(Rate(one.old_right, one.n)),
            rated(Rate(one.any_right, one.n)),
        )
        for one in found.blame
        if one.n
    ]
    left_out = "".join(
        f" {count:,} more {what}."
        for count, what in (
            (found.lost, "did not break again, and nobody is blamed for them"),
            (found.unexplained, "were broken by attacks that could not be run again"),
        )
        if count
    )
    return Table(
        "Who is to blame",
        f"Of {plural(found.n, 'image')}, {found.broken:,} that were right when clean are broken; each is looked at as "
        "the first attack that broke it left it. Router: under the clean image's route the answer would be right. "
        "Expert: the route is the same and the answer wrong. Both: the route flipped, and the old one is wrong, too."
        + left_out,
        ("attack", "broken", "router, %", "expert, %", "both, %", "old route right, %", "some expert right, %"),
        tuple(lines),
    )


def moves_tables(found: Attribution) -> Iterator[Table]:
    """Where each gate sends the broken images, the numbers of a drawing."""
    for gate in found.gates:
        n = sum(map(sum, gate.moves))
        experts = range(len(gate.moves))
        yield Table(
            _named("Routes of the broken images", gate.name),
            f"Images by first expert when clean (row) and under attack (column); {_share(Rate(gate.flipped, n))} of "
            f"{n:,} flip: another set of experts or, of a gate that selects them all, another first one.",
            ("from", *(f"to {expert}" for expert in experts)),
            tuple((str(expert), *(f"{count:,}" for count in gate.moves[expert])) for expert in experts),
        )


def _apart(found: Attribution) -> Table:
    lines = [
        ("whole model, worst case of the evaluation", found.whole),
        (f"only the route is attacked, {found.attack}", found.router),
        (f"the route is held, {found.attack}", found.experts),
    ]
    for part in found.parts:
        of = f"{part.name} half: " if part.name else ""
        if part.name:
            lines.append((f"{of}by itself", part.whole))
        if part.held_route is not None:
            lines.append((f"{of}each image's own expert alone", part.held_route))
        lines.append((f"{of}worst route, an adversary picks the expert", part.worst_route))
        if part.best_route is not None:
            lines.append((f"{of}best route, the label picks the expert", part.best_route[1]))
    return Table(
        "Robust accuracy taken apart",
        f"On the same {plural(found.n, 'image')}. The first two attacks are judged on the whole model. Worst route: "
        "held by the whole and by every expert alone; no attack on the router can push a model with one gate that asks "
        "one of them lower. Best route: not broken for all experts at once; no gate that picks one of them can hold "
        f"more. Both as far as {found.attack} is strong.",
        ("measured", "n", "held", "accuracy, %"),
        tuple((name, f"{rate.n:,}", f"{rate.held:,}", rated(rate)) for name, rate in lines),
    )


def _experts(found: Attribution, part: Part) -> Table:
    lines = []
    for expert, (_, robust) in enumerate(part.alone):
        own = part.own[expert] if part.own is not None else None
        rest = part.without[expert] if part.without is not None else None
        lines.append(
            (
                str(expert),
                ABSENT if own is None else f"{own[1].n:,}",
                ABSENT if own is None or not own[1].n else rated(own[1]),
                rated(robust),
                *((ABSENT, ABSENT) if rest is None else map(rated, rest)),
            )
        )
    undefined = f" Without an expert: not defined, since {part.undefined}." if part.undefined else ""
    return Table(
        _named("Each expert, and the model without it", part.name),
        f"RA of the expert attacked alone, on the images that it gets when they are clean (own) and on all; SA and RA "
        f"of the rest when it is left out and its images go to others, attacked anew; {found.attack}, n = {found.n:,}."
        + undefined,
        ("expert", "own images", "RA, own, %", "RA, all images, %", "SA without it, %", "RA without it, %"),
        tuple(lines),
    )


def _transfer(found: Attribution, part: Part) -> Table:
    experts = range(len(part.transfer))
    return Table(
        _named("Transfer between experts", part.name),
        f"Accuracy in percent on the images that {found.attack} made on the expert of the row, going on after its "
        f"first error; n = {found.n:,}. What an expert got wrong when clean was not moved.",
        ("made on", *(f"expert {expert}" for expert in experts), "whole model"),
        tuple((f"expert {expert}", *(percent(rate.share) for rate in part.transfer[expert])) for expert in experts),
    )


def _ladder(found: Attribution) -> Table:
    names = [gate.name or "gate" for gate in found.ladder[0].gates] if found.ladder else []
    heads = [head for name in names for head in (f"{name}: flipped, %", f"{name}: entropy, nats")]
    lines = []
    for rung in found.ladder:
        cells = [
            cell
            for gate in rung.gates
            for cell in (rated(gate.flipped), ABSENT if gate.entropy is None else f"{gate.entropy:.3f}")
        ]
        lines.append((rung.multiple, f"{rung.eps:.4g}", rated(rung.accuracy), *cells))
    return Table(
        "Gates by radius",
        f"Under {found.attack} on the whole model within multiples of the threat's radius; the last is outside it. "
        f"n = {found.n:,}. Flipped: another set of experts or, of a gate that selects all, another one weighs most.",
        ("radius, of eps", "radius", "accuracy, %", *heads),
        tuple(lines),
    )
