"""The protocols that depend on what a model has: "thorough" and "quick". Each is one cascade, of names of attacks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from phalanx.attacks.autoattack import VERSIONS
from phalanx.threat import Norm


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a model has that an attack can aim at; see `phalanx.evaluation.model_parts`."""

    gates: bool = True
    """Something chooses among several experts."""
    halves: bool = False
    """It is a dual model."""
    mixing: bool = False
    """It has a mixing network."""
    random: bool = False
    """Its answers are random."""


# what breaks most comes first: whatever follows it in the cascade is cheaper by that much
_GATE_SURFACES = ("straight-through", "dense", "dense-t0.1", "router", "pinned", "experts")
_HALF_SURFACES = ("standard", "robust", "geometric", "softened-t3", "softened-t10")


def thorough(norm: Norm, parts: Parts) -> list[str]:
    """AutoAttack's standard version first, in its own cascade, so that its number can be read; then, on what still
    stands, everything that aims at the parts which the model has."""
    return [*VERSIONS["standard"][norm], *_averaged(norm, parts), *_on_parts(parts), *_BESIDES[norm]]


def _averaged(norm: Norm, parts: Parts) -> Iterator[str]:
    if parts.random:
        yield from VERSIONS["rand"][norm]
        surfaces = (*(("pinned", "dense") if parts.gates else ()), *(("robust",) if parts.halves else ()))
        yield from (f"apgd-100-eot:20@{surface}" for surface in surfaces)


def _on_parts(parts: Parts) -> Iterator[str]:
    yield "apgd-margin-100"
    if not (parts.gates or parts.halves):
        yield "pgd-50x10"
    if parts.halves:
        yield from ("joint-apgd-50x9", *_on(_HALF_SURFACES), "joint-50x9")
    if parts.gates:
        yield from ("steer-apgd-50", *_on(_GATE_SURFACES), "experts-apgd-100")
        # two gates of four experts each have sixteen combinations
        yield from ("steer-50", "steer-apgd-50x3" if parts.halves else "steer-apgd-50x9", "steer-50x9")
    if parts.mixing:
        yield "mislead-50"


def _on(surfaces: Sequence[str]) -> Iterator[str]:
    for surface in surfaces:
        yield from (f"apgd-100@{surface}", f"apgd-margin-50@{surface}")


_BESIDES: Mapping[Norm, tuple[str, ...]] = {
    "Linf": ("cw-100", "rays-2000"),
    "L2": ("cw-100", "hsj-2000"),
    # no attack of either kind is made for it
    "L1": (),
}
"""Another optimiser, and a search that sees labels alone."""


def quick(norm: Norm, parts: Parts) -> list[str]:
    """What broke most in the least time on validation images of mixtures of all kinds: 20 steps each."""
    del norm
    found = ["apgd-20-eot:4" if parts.random else "apgd-20"]
    if parts.halves:
        found.append("joint-apgd-20x3")
    if parts.gates:
        found += ["steer-apgd-20", "apgd-20@straight-through"]
    else:
        found.append("apgd-t-20x3")
    return found


SUITES: Mapping[str, Callable[[Norm, Parts], list[str]]] = {"thorough": thorough, "quick": quick}
"""By the name of the protocol, the names of its attacks in the order of their cascade."""
