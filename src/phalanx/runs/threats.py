"""The threat-coverage table: which kinds of attacker an evaluation has measured, and which it has not."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from phalanx.runs.headline import challenges
from phalanx.runs.summary import (
    Key,
    Specs,
    aside_attacks,
    external_attacks,
    held_samples,
    summarise,
    wilson,
)
from phalanx.runs.verdict import CLEAN, Verdict, worst_by_sample

Status = Literal["measured", "partly", "not measured"]

WHITE_BOX, TRANSFER, SCORES, LABELS, EXTERNAL = "white-box", "transfer", "score-query", "label-query", "external"

HOW: Mapping[str, str] = {
    WHITE_BOX: "phalanx evaluate with --protocol standard, of a mixture thorough, attacks with the model's gradients",
    TRANSFER: "phalanx evaluate with --surrogate OTHER tries what breaks another model",
    SCORES: "phalanx evaluate with --protocol square-10000 attacks through the scores alone",
    LABELS: "phalanx evaluate with --protocol rays-10000, in L2 hsj-10000, attacks through the labels alone",
    EXTERNAL: "phalanx challenge submit judges images that somebody else made",
    "poisoning": "training again on data of which an attacker wrote a share, and evaluating what comes out",
    "backdoor": "looking for a small trigger that turns images of any class into one, as Neural Cleanse does",
    "extraction": "training a copy on the model's answers, and how far it agrees for how many of them",
    "membership": "a membership inference attack, its true positives at 0.1 % false ones on training and test images",
    "corruption": "phalanx evaluate with corruptions in its --protocol, such as quick,corruptions: noise, blur, codecs",
    "hardware": "accuracy with bits of the weights flipped, and under the arithmetic it is deployed with",
}
"""By threat, in the order of the table, what would measure it."""

_KINDS = {"Transfer": TRANSFER, "Square": SCORES, "RayS": LABELS, "HopSkipJump": LABELS, "Given": TRANSFER}
"""By an attack's kind, as its spec says it, the threat; every other attack uses the model's gradients."""
_BUDGETS = ("steps", "restarts", "targets", "queries")


@dataclass(frozen=True)
class Coverage:
    """One line of the table."""

    threat: str
    status: Status
    """"partly": its attacks met only what others had left standing, which is no accuracy of theirs."""
    attacks: tuple[str, ...] = ()
    """What measured it."""
    within: str = ""
    """Norm and radius."""
    budget: Mapping[str, int] | None = None
    """The largest steps, restarts, targets and queries of these attacks, for each image."""
    held: int | None = None
    """Of all n images those right when clean and held against all of `attacks`; None unless these met every image."""
    n: int = 0
    tried: int = 0
    """Images that at least one of them was tried on."""
    broken: int = 0
    """Of these, images that one of them did not leave held."""
    lowered: int | None = None
    """Of external images: by how many images the headline is lower for them."""

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % Wilson interval of held / n."""
        return None if self.held is None else wilson(self.held, self.n)

    @property
    def how(self) -> str:
        """What would measure it."""
        return HOW[self.threat]

    def to_json(self) -> dict[str, Any]:
        """As in evaluation.json and table.json; accuracy and interval in [0, 1]."""
        if self.status == "not measured":
            return {"threat": self.threat, "status": self.status, "how": self.how}
        return {
            "threat": self.threat,
            "status": self.status,
            "attacks": list(self.attacks),
            "within": self.within,
            "budget": dict(self.budget or {}),
            "held": self.held,
            "n": self.n,
            "accuracy": None if self.held is None else self.held / max(self.n, 1),
            "interval": None if self.interval is None else list(self.interval),
            "tried": self.tried,
            "broken": self.broken,
            **({} if self.lowered is None else {"lowered": self.lowered}),
        }


def coverage(rows: Iterable[Verdict], attacks: Specs, norm: str, eps: str) -> tuple[Coverage, ...]:
    """The table of a ledger, from its rows and its declared attacks; every line stands for itself.

    An attack outside the threat, or of a paper as released, measures nothing here. White-box covers, besides the
    attacks with gradients, those before them in a cascade: who has the model can make them, too. Any other threat is
    measured by those of its attacks that met every image, and otherwise "partly".
    """
    rows = list(rows)
    aside = aside_attacks(attacks, norm, eps)
    by_threat: dict[str, list[str]] = {threat: [] for threat in HOW}
    for name, spec in attacks.items():
        if name not in aside:
            by_threat[_threat(spec)].append(name)
    lines = [
        _external(rows, attacks, aside, f"{norm} {eps}")
        if threat == EXTERNAL
        else _line(threat, names, rows, attacks, f"{norm} {eps}")
        for threat, names in by_threat.items()
    ]
    return tuple(lines)


def _threat(spec: Mapping[str, Any]) -> str:
    return EXTERNAL if spec.get("external") else _KINDS.get(str(spec.get("attack")), WHITE_BOX)


def _line(threat: str, names: Sequence[str], rows: Sequence[Verdict], attacks: Specs, within: str) -> Coverage:
    before = {name: _before(attacks[name]) for name in names}
    if threat == WHITE_BOX:
        names = [name for name in attacks if name in names or any(name in earlier for earlier in before.values())]
    chosen = [name for name in names if _before(attacks[name]) <= {*names}]
    n = len({row.sample for row in rows})
    if not names or not n:
        return Coverage(threat, "not measured")
    used = chosen or names
    tried, broken = _counts(rows, used)
    if not chosen and not tried:
        return Coverage(threat, "not measured")
    keys: list[Key] = [(name, str(attacks[name].get("surface", "whole"))) for name in used]
    return Coverage(
        threat,
        "measured" if chosen else "partly",
        tuple(used),
        within,
        _budget([attacks[name] for name in used]),
        len(held_samples(rows, {"": keys})[""]) if chosen else None,
        n,
        tried,
        broken,
    )


def _external(rows: Sequence[Verdict], attacks: Specs, aside: Collection[str], within: str) -> Coverage:
    found = challenges(rows, attacks, aside=aside)
    if not found:
        return Coverage(EXTERNAL, "not measured")
    names = tuple(challenge.attack for challenge in found)
    tried, broken = _counts(rows, names)
    external = external_attacks(attacks)
    own = {name: spec for name, spec in attacks.items() if name not in external}
    without = summarise([row for row in rows if row.attack not in external], aside=aside, attacks=own)
    lowered = without.standing - summarise(rows, aside=aside, attacks=attacks).standing
    return Coverage(
        EXTERNAL, "measured", names, within, {}, None, without.n, tried=tried, broken=broken, lowered=lowered
    )


def _before(spec: Mapping[str, Any]) -> set[str]:
    found = spec.get("after")
    return set(map(str, found)) if isinstance(found, list | tuple) else set()


def _counts(rows: Iterable[Verdict], names: Collection[str]) -> tuple[int, int]:
    """Images that one of the attacks was tried on, and of these those not held."""
    worst = worst_by_sample((row.sample, row.verdict) for row in rows if row.attack in names and row.attack != CLEAN)
    return len(worst), sum(verdict != "held" for verdict in worst.values())


def _budget(specs: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    found: dict[str, int] = {}
    for key in _BUDGETS:
        values = [value for spec in specs if isinstance(value := spec.get(key), int) and not isinstance(value, bool)]
        if values and max(values) > (1 if key == "restarts" else 0):
            found[key] = max(values)
    return found
