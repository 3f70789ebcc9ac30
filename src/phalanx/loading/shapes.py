"""What a configuration type looks like from a recipe: sections, choices between them, lists, tables, values.

pydantic validates; this says what it does not: which section a key lies in, which keys and variants there
are. It reads the same annotations that pydantic reads.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator, Mapping, MutableMapping, MutableSequence, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic.fields import FieldInfo

from phalanx.loading.problems import KeyPath
from phalanx.loading.tree import Node


@dataclass(frozen=True)
class Section:
    """A mapping with the fixed keys of a dataclass."""

    kind: type[Any]

    def child(self, key: str | int) -> Shape:
        known = isinstance(key, str) and key in keys(self.kind)
        return shape_of(hints(self.kind)[str(key)]) if known else Leaf()


@dataclass(frozen=True)
class Choice:
    """A mapping whose entry `discriminator` says which dataclass it is."""

    discriminator: str
    variants: Mapping[str, type[Any]]

    def variant(self, name: object) -> Section | Leaf:
        """The section called `name`; a leaf where there is none."""
        kind = self.variants.get(name) if isinstance(name, str) else None
        return Section(kind) if kind else Leaf()


@dataclass(frozen=True)
class Items:
    """A list: each item its own annotation, or any number of the one annotation in `each`."""

    each: tuple[Any, ...]

    def child(self, index: str | int) -> Shape:
        position = index if isinstance(index, int) else 0
        return shape_of(self.each[min(position, len(self.each) - 1)])


@dataclass(frozen=True)
class Table:
    """A mapping with any keys."""

    each: Any

    def child(self, _: str | int) -> Shape:
        return shape_of(self.each)


@dataclass(frozen=True)
class Leaf:
    """A value without parts of its own."""

    def child(self, _: str | int) -> Shape:
        return self


Shape = Section | Choice | Items | Table | Leaf

_LISTS = (list, tuple, set, frozenset, Sequence, MutableSequence)
_TABLES = (dict, Mapping, MutableMapping)


def shape_of(annotation: Any) -> Shape:
    """The shape of values of type `annotation`; an optional section has the section's shape."""
    base, discriminator = _bare(annotation)
    members = [member for member in _members(base) if member is not type(None)]
    if discriminator is not None:
        return Choice(discriminator, _variants(members, discriminator))
    if len(members) != 1:
        return Leaf()
    if members[0] is not base:
        return shape_of(members[0])
    if isinstance(base, type) and dataclasses.is_dataclass(base):
        return Section(base)
    origin, arguments = get_origin(base), get_args(base)
    if origin in _LISTS and arguments:
        return Items(tuple(argument for argument in arguments if argument is not Ellipsis))
    if origin in _TABLES and arguments:
        return Table(arguments[1])
    return Leaf()


def _bare(annotation: Any) -> tuple[Any, str | None]:
    """`annotation` less its metadata, and the discriminator named there."""
    if get_origin(annotation) is not Annotated:
        return annotation, None
    base, *metadata = get_args(annotation)
    named = [note.discriminator for note in metadata if isinstance(note, FieldInfo)]
    return base, next((name for name in named if isinstance(name, str)), None)


def _members(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _variants(members: Sequence[Any], discriminator: str) -> dict[str, type[Any]]:
    return {name: kind for kind in members for name in get_args(_literal(kind, discriminator))}


def _literal(kind: type[Any], discriminator: str) -> Any:
    annotation, _ = _bare(hints(kind)[discriminator])
    if get_origin(annotation) is not Literal:
        raise TypeError(f"{kind.__name__}.{discriminator} must be a Literal, it tells the variants apart")
    return annotation


def hints(kind: type[Any]) -> dict[str, Any]:
    """Field names to annotations, metadata kept."""
    return _hints(kind)  # type: ignore[arg-type]  # mypy takes type[Any] for unhashable


@cache
def _hints(kind: type[Any]) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def keys(kind: type[Any]) -> tuple[str, ...]:
    """The keys of a section, in the order declared."""
    return tuple(field.name for field in dataclasses.fields(kind) if field.init)


def chosen(shape: Shape, *nodes: Node | None) -> Section | Items | Table | Leaf:
    """`shape`, or of a choice the variant that the first of `nodes` to name one names."""
    if not isinstance(shape, Choice):
        return shape
    names = (node.child(shape.discriminator) for node in nodes if node)
    return shape.variant(next((name.value for name in names if name), None))


@dataclass(frozen=True)
class Located:
    """What a pydantic error's `loc` points at."""

    path: KeyPath
    shape: Shape
    section: Section
    """The innermost section on the path; the recipe's own at least."""
    choice: Choice | None
    """The choice that `section` is a variant of."""


def locate(kind: type[Any], location: Sequence[str | int]) -> Located:
    """Walk from the top of a recipe along `location`, a pydantic error's `loc`.

    pydantic puts the name of a discriminated variant, and of a union's member, between the keys: left out
    here.
    """
    found = Located((), Section(kind), Section(kind), None)
    holder: Shape = Leaf()
    for part in location:
        # after the key of a table, "[key]" says that the key is wrong; elsewhere it is a strange key
        if isinstance(found.shape, Leaf) or (part == "[key]" and isinstance(holder, Table)):
            break
        holder, found = found.shape, _step(found, part)
    return found


def _step(at: Located, part: str | int) -> Located:
    shape: Shape
    if isinstance(at.shape, Choice):
        shape, choice, path = at.shape.variant(part), at.shape, at.path
    else:
        shape, choice, path = at.shape.child(part), None, (*at.path, part)
    if isinstance(shape, Section):
        return Located(path, shape, shape, choice)
    return dataclasses.replace(at, path=path, shape=shape)


def all_keys(kind: type[Any], above: tuple[str, ...] = (), within: tuple[type, ...] = ()) -> Iterator[KeyPath]:
    """Every key there is under `kind`, through sections and choices, not entering a kind within itself."""
    for key in keys(kind):
        yield (*above, key)
        shape = Section(kind).child(key)
        kinds = shape.variants.values() if isinstance(shape, Choice) else ()
        for below in (shape.kind,) if isinstance(shape, Section) else dict.fromkeys(kinds):
            if below not in within:
                yield from all_keys(below, (*above, key), (*within, kind))
