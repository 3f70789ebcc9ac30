"""The headline sample by sample, and what submitted images took from it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from phalanx.errors import HonestyError
from phalanx.runs.summary import Specs, external_attacks, fallen_samples, summarise
from phalanx.runs.verdict import Verdict

_NAMED = 5
"""A message names at most so many samples."""


@dataclass(frozen=True, slots=True)
class Headline:
    """Every sample is one of three: robust accuracy lies between certified / n and 1 - broken / n."""

    broken: frozenset[int]
    """Wrong or not finite, when clean or under an attack."""
    certified: frozenset[int]
    """Proved to be right in the whole ball."""
    undecided: frozenset[int]
    """Neither: nothing has broken them, or an attack was given up, and nothing is proved."""

    @property
    def n(self) -> int:
        return len(self.broken) + len(self.certified) + len(self.undecided)


def headline(rows: Iterable[Verdict], *, aside: Collection[str] = (), certified: Collection[int] = ()) -> Headline:
    """What is known of each sample of a ledger.

    Args:
        rows: the ledger's.
        aside: attacks outside the threat or of a paper (see `aside_attacks`): they break nothing here.
        certified: samples that are proved to be right in the whole ball.

    Raises HonestyError naming samples that are certified and broken, one of which must be false, or certified and not
    in the ledger.
    """
    rows = list(rows)
    samples = {row.sample for row in rows}
    broken = {row.sample for row in rows if row.attack not in aside and row.wrong}
    _refuse(broken.intersection(certified), "both certified and broken", "a certificate is unsound, or a verdict wrong")
    _refuse(set(certified) - samples, "certified, but not in the ledger", "give the certificates of this evaluation")
    proved = frozenset(certified)
    return Headline(frozenset(broken), proved, frozenset(samples - broken - proved))


def _refuse(samples: Collection[int], what: str, why: str) -> None:
    if samples:
        named = ", ".join(map(str, sorted(samples)[:_NAMED]))
        more = f" and {len(samples) - _NAMED:,} more" if len(samples) > _NAMED else ""
        raise HonestyError(f"{'sample' if len(samples) == 1 else 'samples'} {named}{more} {what}: {why}")


@dataclass(frozen=True, slots=True)
class Challenge:
    """What somebody's images did to an evaluation."""

    attack: str
    """"external:NAME"."""
    spec: Mapping[str, Any]
    """As the ledger declares it: the file's sha256, how many images, when."""
    judged: int
    """Images of samples that are right when clean; no others are judged."""
    broken: int
    """Of these, answered wrongly or not finitely."""
    lowered: int
    """Of these, held against every attack of the protocol: by so many images the headline is lower for it alone."""

    @property
    def name(self) -> str:
        return self.attack.partition(":")[2]

    @property
    def submitted(self) -> int:
        """Images in the file."""
        return int(self.spec["count"])

    def to_json(self) -> dict[str, Any]:
        """Name, file and counts."""
        return {
            "name": self.name,
            "sha256": self.spec["sha256"],
            "when": self.spec["when"],
            "submitted": self.submitted,
            "judged": self.judged,
            "broken": self.broken,
            "lowered": self.lowered,
        }


def challenges(rows: Iterable[Verdict], attacks: Specs, *, aside: Collection[str] = ()) -> tuple[Challenge, ...]:
    """Every submission of a ledger, in the order in which they came."""
    rows, external = list(rows), external_attacks(attacks)
    if not external:
        return ()
    own = {name: spec for name, spec in attacks.items() if name not in external}
    before = summarise([row for row in rows if row.attack not in external], aside=aside, attacks=own)
    found = []
    for name in sorted(external, key=lambda name: (str(attacks[name].get("when")), name)):
        only = [row for row in rows if row.attack not in external or row.attack == name]
        after = summarise(only, aside=aside, attacks={**own, name: attacks[name]})
        judged = {row.sample for row in only if row.attack == name}
        lowered = before.standing - after.standing
        found.append(Challenge(name, attacks[name], len(judged), len(fallen_samples(only, [name])), lowered))
    return tuple(found)
