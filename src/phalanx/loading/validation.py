"""From one tree to a validated configuration, or to every mistake in it.

pydantic stops at a section whose keys are wrong before that section's own `__post_init__`, which in turn
stops at its first complaint. So what is wrong is taken out, its default steps in, and the rest is validated
again, until nothing new turns up. A complaint that may only follow from what was taken out is not reported.
The check of a section that lacks a key without a default cannot run: what it would say waits for that key.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from functools import cache
from typing import Any, NewType, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from phalanx.loading.problems import DEFAULT, KeyPath, Problem
from phalanx.loading.tree import Node, place_of, without
from phalanx.loading.wording import Fault, faults_of

T = TypeVar("T")

_CONFIG = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


def _adapter(kind: type[T]) -> TypeAdapter[T]:
    """The validator of `kind`: strict, unknown keys forbidden, in every standard dataclass under it too."""
    return _cached_adapter(kind)  # type: ignore[arg-type]  # mypy takes type[T] for unhashable


@cache
def _cached_adapter(kind: type[Any]) -> TypeAdapter[Any]:
    # TypeAdapter refuses a config beside a dataclass, but dataclasses inherit that of a type around them
    return TypeAdapter(NewType("Recipe", kind), config=_CONFIG)  # type: ignore[arg-type]


def schema(kind: type[Any]) -> dict[str, Any]:
    """The JSON Schema of recipes for `kind`, a dataclass; field docstrings are its descriptions."""
    return _adapter(kind).json_schema()


def validated(kind: type[T], tree: Node, known: Collection[KeyPath] = ()) -> tuple[T | None, list[Problem]]:
    """The configuration that `tree` spells, None if too little is right to build one; and all that is wrong.

    `known` are paths whose problems were reported before: what follows from them is not reported again.
    """
    problems: dict[KeyPath, Problem] = {}
    doubtful = {_out_of_lists(path) for path in known}
    while True:
        try:
            # JSON, because only there strict mode takes a mapping for a dataclass and a list for a tuple
            return _adapter(kind).validate_json(json.dumps(tree.plain())), list(problems.values())
        except ValidationError as error:
            faults = faults_of(kind, error.errors(include_url=False))
        misspelt = {fault.meant for fault in faults if fault.meant}
        for fault in faults:
            if not _follows(fault, doubtful, misspelt):
                problems.setdefault(fault.path, Problem(place_of(tree, fault.path), fault.path, fault.message))
        culprits = {path for fault in faults for path in _culprits(tree, fault)}
        if not culprits:
            return None, list(problems.values())
        tree = without(tree, culprits)
        doubtful |= culprits | misspelt


def _follows(fault: Fault, doubtful: Iterable[KeyPath], misspelt: Collection[KeyPath]) -> bool:
    """Whether `fault` may be no mistake of its own: it is about, or its check names, a key not as written."""
    if fault.missing and fault.path in misspelt:
        return True
    return any(
        fault.path[: len(path)] == path or (fault.check and _within(path, fault.section) and fault.mentions(path[-1]))
        for path in doubtful
    )


def _within(path: KeyPath, section: KeyPath) -> bool:
    return len(path) > len(section) and path[: len(section)] == section


def _culprits(tree: Node, fault: Fault) -> set[KeyPath]:
    """The mapping entries to take out for `fault`; none if the top of the recipe is at fault."""
    section = tree.at(fault.section)
    if fault.check and tree.at(fault.culprit) is None and section is not None:
        # the field complained of has its default: the keys it disagrees with are those given
        written = {key for key, node in section.entries().items() if node.place != DEFAULT and fault.mentions(key)}
        return {(*fault.section, key) for key in written} or _entry(tree, fault.section)
    return _entry(tree, fault.culprit)


def _entry(tree: Node, path: KeyPath) -> set[KeyPath]:
    """The innermost mapping entry of `tree` on `path`: list items are not taken out singly."""
    while tree.at(path) is None:
        path = path[:-1]
    entry = _out_of_lists(path)
    return {entry} if entry else set()


def _out_of_lists(path: KeyPath) -> KeyPath:
    """`path`, or where it ends at a list's item that of the list, which goes as a whole."""
    while path and isinstance(path[-1], int):
        path = path[:-1]
    return path
