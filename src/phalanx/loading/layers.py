"""How the sources of a recipe become one: defaults, the recipe it extends, itself, values, overrides.

Mappings merge key by key and lists are replaced. A section chosen by its `name` is replaced as a whole when
a later source gives it another name: the keys of "pgd" say nothing about "fgsm". So `--set method.name=st`
drops what the recipe says about the method it names, and nothing that another `--set` says; the rest takes
its default. The options of an expert or a backbone go with it in the same way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from enum import Enum
from functools import reduce
from pathlib import PurePath
from types import MappingProxyType
from typing import Any

from phalanx.loading.problems import DEFAULT, KeyPath, Place, Problem, RecipeErrors, shown
from phalanx.loading.scalars import encodable
from phalanx.loading.shapes import Choice, Items, Leaf, Section, Shape, Table, chosen
from phalanx.loading.strict_yaml import MAX_DEPTH, read_value
from phalanx.loading.tree import Node, Plain

BELONGS_TO = "belongs_to"
"""In a field's metadata: the field whose value it is about, as the options of an expert are."""

NOBODY: Mapping[str, str] = MappingProxyType({})
"""Overrides that are all the command line's."""


def layered(kind: type[Any], layers: Sequence[Node]) -> Node:
    """At least one layer made one tree, each over the one before, sections completed from defaults."""
    root = Section(kind)
    return reduce(
        lambda below, above: completed(root, merged(root, below, above)),
        layers[1:],
        completed(root, layers[0]),
    )


def merged(shape: Shape, below: Node | None, above: Node) -> Node:
    """`above` over `below`, both values of `shape`."""
    if below is None or not (isinstance(above.value, dict) and isinstance(below.value, dict)):
        return above
    if isinstance(shape, Choice) and _renamed(shape.discriminator, below, above):
        return above
    inner = chosen(shape, above, below)
    under = {key: node for key, node in below.value.items() if not _outdated(inner, key, below, above)}
    entries = {key: merged(inner.child(key), under.get(key), node) for key, node in above.value.items()}
    return Node(under | entries, _section_place(below.place, above.place))


def _outdated(shape: Shape, key: str, below: Node, above: Node) -> bool:
    """`key` belongs to another key's value (its field's metadata `BELONGS_TO` says which), and that is a new one."""
    if not isinstance(shape, Section):
        return False
    owner = next(
        (field.metadata.get(BELONGS_TO) for field in dataclasses.fields(shape.kind) if field.name == key), None
    )
    return owner is not None and _renamed(owner, below, above)


def _renamed(discriminator: str, below: Node, above: Node) -> bool:
    before, after = below.child(discriminator), above.child(discriminator)
    return before is not None and after is not None and before.value != after.value


def _section_place(below: Place, above: Place) -> Place:
    # a line of a file tells where a section is; an override names one of its keys only
    return below if above.line is None and below != DEFAULT else above


def completed(shape: Shape, node: Node) -> Node:
    """`node` with the keys it leaves out of sections taken from their field's declared default.

    Without this, `attack: {eps: 4/255}` under a default of `PGD(steps=50)` would take PGD's own default
    steps.
    """
    inner = chosen(shape, node)
    if isinstance(inner, Section) and isinstance(node.value, dict):
        given = {key: _over_default(inner.kind, key, child) for key, child in node.value.items()}
        return Node({key: completed(inner.child(key), child) for key, child in given.items()}, node.place)
    if isinstance(inner, Table) and isinstance(node.value, dict):
        return Node({key: completed(inner.child(key), child) for key, child in node.value.items()}, node.place)
    if isinstance(inner, Items) and isinstance(node.value, tuple):
        return Node(tuple(completed(inner.child(i), child) for i, child in enumerate(node.value)), node.place)
    return node


def _over_default(kind: type[Any], key: str, given: Node) -> Node:
    default = next((_default(field) for field in dataclasses.fields(kind) if field.name == key), None)
    if not dataclasses.is_dataclass(default) or isinstance(default, type):
        return given
    return merged(Section(kind).child(key), node_of(default, DEFAULT), given)


def _default(field: dataclasses.Field[Any]) -> object:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def overrides_node(overrides: Sequence[str], written: Mapping[str, str] = NOBODY) -> tuple[Node | None, list[Problem]]:
    """The tree that `a.b=value` strings spell, the last of equal keys winning; None if there are none. `written` names
    the source of those that are not the command line's."""
    tree: Node | None = None
    problems: list[Problem] = []
    for override in overrides:
        node, found = _override_node(override, written.get(override, "--set"))
        problems += found
        if node is not None:
            tree = merged(Leaf(), tree, node)
    return tree, problems


def _override_node(override: str, source: str) -> tuple[Node | None, list[Problem]]:
    place = Place(source, detail=override)
    key, equals, text = override.partition("=")
    path = tuple(part.strip() for part in key.split("."))
    if not equals or not all(path) or len(path) > MAX_DEPTH or not encodable(key):
        return None, [Problem(place, (), "is not KEY=VALUE; write --set section.key=value")]
    value, found = read_value(text, place)
    problems = [dataclasses.replace(problem, path=(*path, *problem.path)) for problem in found]
    if value is None:
        return None, problems
    return reduce(lambda node, part: Node({part: node}, place), reversed(path), value), problems


def values_node(values: Mapping[str, object], said: str = "values") -> Node:
    """The tree of a mapping that a program gives, all of it placed at `said`.

    Raises RecipeErrors for what no recipe can hold: an object of another type, a key that is no string,
    text that is not Unicode.
    """
    place = Place(said)
    try:
        tree = node_of(values, place)
        for path, node in tree.walk():
            # what UTF-8 cannot hold could neither be recorded nor shown
            "".join(part for part in (*path, node.value) if isinstance(part, str)).encode()
    except (TypeError, UnicodeEncodeError) as error:
        raise RecipeErrors([Problem(place, (), str(error))]) from None
    return tree


def node_of(value: object, place: Place) -> Node:
    """Plain data, dataclasses, paths and enumerations as a tree, all of it at `place`."""

    def grow(plain: Plain) -> Node:
        if isinstance(plain, dict):
            return Node({key: grow(item) for key, item in plain.items()}, place)
        if isinstance(plain, list):
            return Node(tuple(grow(item) for item in plain), place)
        return Node(plain, place)

    return grow(to_plain(value))


def to_plain(value: object, path: KeyPath = ()) -> Any:
    """`value` as what JSON can hold: a dataclass becomes the mapping of its `init` fields.

    Loading gives it back. Tuples and sets become lists (a set's sorted), a path its string, an
    enumeration's member its value. `path` is where `value` stands in what is converted. Raises TypeError
    for anything else, naming where it is.
    """
    if isinstance(value, Enum):
        return to_plain(value.value, path)
    if value is None or isinstance(value, str | int | float):
        return value
    if len(path) > MAX_DEPTH:
        raise TypeError(f"values nested more than {MAX_DEPTH} levels deep have no place in a recipe; flatten them")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
    if isinstance(value, Mapping):
        return {_plain_key(key, path): to_plain(item, (*path, key)) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        value = sorted(value)
    if isinstance(value, list | tuple):
        return [to_plain(item, (*path, index)) for index, item in enumerate(value)]
    if isinstance(value, PurePath):
        return str(value)
    where = ".".join(map(str, path)) or "it"
    raise TypeError(
        f"{where} is {shown(value)}, a {type(value).__name__}; a recipe holds text, numbers, lists, mappings"
    )


def _plain_key(key: object, path: KeyPath) -> str:
    if isinstance(key, str):
        return key
    where = f" in {'.'.join(map(str, path))}" if path else ""
    raise TypeError(f"key {shown(key)}{where} is a {type(key).__name__}; keys are strings")
