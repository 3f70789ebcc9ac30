"""What the numbers say, what they do not say, and what went wrong: as sentences, derived from the page's values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from phalanx.report.curves import Curves
from phalanx.report.mixture import Mixture
from phalanx.report.page import UNTRAINED, Attack, Notice, Row
from phalanx.report.words import bounds, listed, percent, plural
from phalanx.runs import AttackSummary
from phalanx.runs.rate import Rate
from phalanx.runs.summary import autoattack_keys, radius

SMALL_N = 1000
"""Below this many images the interval of an accuracy spans more than 6 points in the middle."""

ONE_SEED = "Each row is one training run with one seed"
"""How the caveat begins that several seeds answer."""

ZERO_GRADIENT_ALARM = 0.05
"""A larger share of images without any gradient: the training attack is blind on them."""

_TOLD_ROWS = 3
_AUTOATTACK_PARTS = frozenset({"APGD", "APGDTargeted", "FAB", "Square"})
_GENERAL_OBJECTIVES = frozenset({"cross_entropy", "margin", "dlr", "dlr_targeted", "kl"})


# -- what was found ------------------------------------------------------------------------------------------------


def summary(rows: Sequence[Row], attacks: Sequence[Attack]) -> tuple[str, ...]:
    """What was trained, how accurate it is, and how robust under what. Many rows: only the most robust is told."""
    told = told_rows(rows)
    trained = [f"{row.label} ({_architecture(row)}, {_made(row)})" for row in told]
    if len(told) == len(rows):
        first = f"{_models(len(rows))} on {_data_names(rows)}: {listed(trained)}."
    else:
        first = f"{_models(len(rows))} on {_data_names(rows)}; the most robust of them is {trained[0]}."
    return first, *(accuracy_sentence(row, attacks) for row in told)


def told_rows(rows: Sequence[Row]) -> Sequence[Row]:
    """Those that are told of in the opening: all if they are few, else the most robust one."""
    return rows if len(rows) <= _TOLD_ROWS else [most_robust(rows)]


def most_robust(rows: Sequence[Row]) -> Row:
    """The first of them with the highest worst case."""
    return max(rows, key=lambda row: row.worst.share if row.worst else -1.0)


def _models(count: int) -> str:
    return "One model was evaluated" if count == 1 else f"{count} models were evaluated"


def _data_names(rows: Sequence[Row]) -> str:
    names = dict.fromkeys(str(row.data["evaluated on"] or row.data["trained on"]) for row in rows)
    return listed(list(names))


def _architecture(row: Row) -> str:
    size = f"{row.parameters:,} parameters"
    if row.is_foreign:
        return size
    if row.is_dual:
        weight = "" if row.alpha is None else f" with weight {row.alpha:.6g} on its robust half"
        halves = " and ".join(mixture.text for mixture in row.mixtures)
        return f"a dual model{weight}, {halves}, {size}"
    return f"{_mixture(row.mixtures[0])}, {size}"


def _mixture(mixture: Mixture) -> str:
    if mixture.scale is not None and mixture.experts > 1:
        share = f"{mixture.experts} experts of {mixture.scale:g} of the channels"
        return f"a {mixture.expert} whose layers are divided into {share}"
    if mixture.experts == 1:
        return f"a single {mixture.expert}"
    chosen = "all of which answer" if mixture.top_k in ("all", mixture.experts) else f"{mixture.top_k} of which answers"
    if isinstance(mixture.top_k, int) and 1 < mixture.top_k < mixture.experts:
        chosen = f"{mixture.top_k} of which answer"
    return f"{mixture.experts} {mixture.expert} experts, {chosen} each image"


def _made(row: Row) -> str:
    if row.is_foreign:
        return "made elsewhere"
    if row.method == UNTRAINED:
        return "not trained here"
    return "put together from trained runs" if row.is_view else f"trained with method {row.method}"


_NAMED_ATTACKS = 3
"""A sentence names at most so many; the table names all."""


def accuracy_sentence(row: Row, attacks: Sequence[Attack]) -> str:
    """How accurate a row is, and how robust under what."""
    clean = f"Of {plural(row.n, 'image')}, {row.label} classifies {_rate(row.clean)} correctly when they are clean"
    if row.worst is None:
        return f"{clean}; it has not been attacked."
    faced = [attack for attack, done in zip(attacks, row.attacks, strict=True) if done]
    submitted = [f"the images of {plural(len(row.challenges), 'challenge')}"] if row.challenges else []
    if not faced:
        return f"{clean} and {_rate(row.worst)} under {listed(submitted)}."
    widest = max(faced, key=lambda attack: _radius(attack, row))
    many = len(faced) > _NAMED_ATTACKS
    told = [f"the {len(faced)} attacks of the table"] if many else [attack.label for attack in faced]
    names = listed([*told, *submitted])
    under = f"under {names}" if len(faced) + len(submitted) == 1 else f"in the worst case over {names}"
    return f"{clean} and {_rate(row.worst)} {under} ({widest.threat})."


def _rate(rate: Rate) -> str:
    return f"{percent(rate.share)} % {bounds(rate)}"


# -- what to distrust ----------------------------------------------------------------------------------------------


def caveats(rows: Sequence[Row], attacks: Sequence[Attack]) -> tuple[str, ...]:
    """What the numbers do not show: attacks that were not run, too few images or seeds, rows that do not compare."""
    return (*_attack_caveats(rows, attacks), *_sample_caveats(rows), *_comparison_caveats(rows, attacks))


def _attack_caveats(rows: Sequence[Row], attacks: Sequence[Attack]) -> Iterator[str]:
    if not attacks:
        yield "No attack has been run: nothing here says anything about robustness."
        return
    weak = [row for row in rows if row.worst is not None and not _faced_autoattack(row, attacks)]
    if weak and len(weak) == len(rows):
        families = list(dict.fromkeys(str(attack.spec.get("attack", attack.name)) for attack in attacks))
        without = "not the whole of AutoAttack" if {*families} & _AUTOATTACK_PARTS else "no AutoAttack"
        yield (
            f"Only {listed(families)} {'has' if len(families) == 1 else 'have'} been run, {without}: "
            "each robust accuracy is an upper bound, and a stronger attack may lower it."
        )
    elif weak:
        yield (
            f"Of {listed([row.label for row in weak])} robust accuracy is an upper bound: not the whole of AutoAttack "
            "has been run."
        )
    small = [row.label for row in rows if row.worst is not None and not _used_whole_radius(row, attacks)]
    if small:
        yield f"No attack on {listed(small)} had the whole radius of the threat: a larger perturbation may break more."
    if any(row.has_router for row in rows) and not any(aims_at_routing(attack) for attack in attacks):
        yield "No routing-aware attack has been run, though a router is one more part that can be fooled."
    if any(row.is_dual for row in rows) and not any(_aims_at_halves(attack) for attack in attacks):
        yield "No attack has aimed at a dual model's halves, one of which may be fooled far more easily than both."
    if all(attack.spec.get("restarts", 1) == 1 for attack in attacks):
        yield "Every attack started once per image; restarts may break more."


def _faced_autoattack(row: Row, attacks: Sequence[Attack]) -> bool:
    """All of its standard version, each with the published budget."""
    faced = [attack.name for attack, done in zip(attacks, row.attacks, strict=True) if done]
    return bool(autoattack_keys(faced, str(row.measurement["norm"])))


def _used_whole_radius(row: Row, attacks: Sequence[Attack]) -> bool:
    faced = (attack for attack, done in zip(attacks, row.attacks, strict=True) if done)
    return any(_radius(attack, row) == radius(row.measurement["eps"]) for attack in faced)


def _radius(attack: Attack, row: Row) -> float:
    """An attack that declares none has the whole radius."""
    return radius(attack.spec.get("eps", row.measurement["eps"]))


def aims_at_routing(attack: Attack) -> bool:
    """Whether it knows of routes: it climbs another surface than the whole model's, or an objective about routes, or
    tries what breaks a single expert."""
    if attack.spec.get("attack") == "ExpertTransfer":
        return True
    return attack.surface != "whole" or attack.spec.get("objective", "margin") not in _GENERAL_OBJECTIVES


_HALVES = ("standard", "robust", "halves")


def _aims_at_halves(attack: Attack) -> bool:
    return attack.surface in _HALVES


def _sample_caveats(rows: Sequence[Row]) -> Iterator[str]:
    n = min(row.n for row in rows)
    if n < SMALL_N:
        width = max(high - low for row in rows for low, high in (rate.interval for rate in _rates(row)))
        yield (
            f"{plural(n, 'image')} {'is' if n == 1 else 'are'} few: the 95 % intervals are up to {percent(width)} "
            "points wide, and smaller differences may be chance."
        )
    both = ", or several such runs put together" if any(row.is_view for row in rows) else ""
    yield f"{ONE_SEED}{both}: the intervals do not hold the spread between seeds."


def _rates(row: Row) -> list[Rate]:
    return [row.clean, *(Rate(attack.held, attack.n) for attack in row.attacks if attack)]


def _comparison_caveats(rows: Sequence[Row], attacks: Sequence[Attack]) -> Iterator[str]:
    if len({row.data["evaluated images (sha256)"] for row in rows}) > 1:
        yield "The rows were evaluated on different images, so their accuracies do not compare directly."
    if len({(row.measurement["norm"], row.measurement["eps"]) for row in rows}) > 1:
        yield "The rows were attacked within different budgets, so their robust accuracies do not compare."
    # only some dual models have a mixing network
    common = [attack.surface not in (*_HALVES, "mixing") for attack in attacks]
    if len({row.worst is None for row in rows}) > 1 or len({_faced(row, common) for row in rows}) > 1:
        yield "Not every row faced every attack, so the worst cases do not compare."
    elif len({_faced(row, [True] * len(attacks)) for row in rows}) > 1:
        yield (
            "The dual models also faced attacks on their halves, which the other rows do not have: a little of a "
            "difference between their worst cases may come from that."
        )


def _faced(row: Row, counted: Sequence[bool]) -> tuple[bool, ...]:
    return tuple(attack is not None for attack, counts in zip(row.attacks, counted, strict=True) if counts)


# -- what went wrong -----------------------------------------------------------------------------------------------


def training_notices(
    label: str, half: str, status: str, curves: Curves, metrics: Sequence[Mapping[str, Any]]
) -> Iterator[Notice]:
    """Alarms of a training run, each kind once, and a run that did not end.

    Args:
        label: the row's.
        half: "standard" or "robust" for a dual model made of two runs, which is said; else empty.
        status: of the run.
        curves: of the run.
        metrics: its records, which hold the alarms.
    """
    whose = f"{_sentence(half)} half: " if half else ""
    if status != "finished":
        yield Notice("incomplete", label, f"{whose}Training did not end: the run is {status}.")
    alarms: dict[str, list[str]] = {}
    for record in metrics:
        if record.get("kind") == "alarm":
            alarms.setdefault(str(record.get("alarm")), []).append(str(record.get("message")))
    for messages in alarms.values():
        repeated = f" (raised in {len(messages)} epochs, first shown)" if len(messages) > 1 else ""
        yield Notice("alarm", label, whose + _sentence(messages[0]) + repeated)
    blind = max((point.zero_gradient or 0.0 for point in curves.train), default=0.0)
    if blind > ZERO_GRADIENT_ALARM:
        yield Notice(
            "alarm",
            label,
            f"{whose}The training attack had no gradient on up to {percent(blind)} % of an epoch's images: gradients "
            "may be masked, and the robust accuracy too high.",
        )


def evaluation_notices(row: Row, planned: int | None) -> Iterator[Notice]:
    """Verdicts that are not finite, and whatever of the evaluation is missing; `planned` images, None if unknown."""
    if row.clean_invalid:
        yield Notice("invalid", row.label, f"{_non_finite(row.clean_invalid)} to clean images; never counted as right.")
    if planned is None:
        yield Notice(
            "incomplete",
            row.label,
            f"The evaluation did not end: the numbers are of the {plural(row.n, 'image')} judged so far.",
        )
    elif row.n < planned:
        yield Notice("incomplete", row.label, f"Only {row.n:,} of {plural(planned, 'image')} were judged.")
    for attack in filter(None, row.attacks):
        yield from _attack_notices(row, attack)


def _attack_notices(row: Row, attack: AttackSummary) -> Iterator[Notice]:
    if attack.invalid:
        text = f"{_non_finite(attack.invalid)} under {attack.attack}; never counted as robust."
        yield Notice("invalid", row.label, text)
    for count, what in ((attack.untried, "were not attacked by"), (attack.timeout, "ran out of time under")):
        if count:
            text = (
                f"{count:,} of {plural(row.clean.held, 'correctly classified image')} {what} {attack.attack} "
                "and are not counted as robust."
            )
            yield Notice("incomplete", row.label, text)


def _non_finite(count: int) -> str:
    return plural(count, "answer was not a finite number", "answers were not finite numbers")


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
