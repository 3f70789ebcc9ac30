"""Read a recipe: a YAML file, the one it extends, values and overrides, to a validated configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from phalanx.errors import InputError
from phalanx.loading.layers import NOBODY, layered, overrides_node, to_plain, values_node
from phalanx.loading.problems import DEFAULT, Place, Problem, RecipeErrors, printable, shown
from phalanx.loading.strict_yaml import read_yaml
from phalanx.loading.tree import Node, without
from phalanx.loading.validation import validated
from phalanx.loading.wording import as_written

T = TypeVar("T")

Extends = Callable[[str], Path]
"""From what a recipe's `extends:` says to the file it means; may raise InputError."""


@dataclass(frozen=True)
class Loaded(Generic[T]):
    """A validated configuration and where it comes from."""

    value: T
    resolved: dict[str, Any]
    """`value` as plain JSON data, every default included; loading it again gives `value`."""
    sources: dict[str, str]
    """For each key given, dotted: "file:line", "values" or "--set". What is not here is a default."""


def load_recipe(
    kind: type[T],
    path: Path | None,
    overrides: Sequence[str] = (),
    *,
    extends: Extends | None = None,
    values: Mapping[str, object] | None = None,
    written: Mapping[str, str] = NOBODY,
    values_are: str = "values",
) -> Loaded[T]:
    """The configuration of type `kind`, a frozen dataclass, that a recipe spells.

    Sources, each over the one before: the defaults of `kind`; the recipe that the file extends; the file at
    `path`; `values`, a mapping that a program gives; `overrides`, each "section.key=value" with a YAML
    value. How they merge: `phalanx.loading.layers`. `extends` finds the file that a recipe names; without
    it, the name is a path from the folder of the recipe. Recipes may extend in a chain, never in a circle.
    `written` says of overrides that are not the command line's where they stand, as "file:line",
    and `values_are` what to call `values`.

    Raises RecipeErrors (an InputError, exit code 2) with every mistake found, in the order of the lines.
    """
    layers, problems = _read_chain(path, extends) if path is not None else ([Node({}, Place("recipe"))], [])
    if values is not None:
        layers.append(values_node(values, values_are))
    overriding, found = overrides_node(overrides, written)
    problems += found
    if overriding is not None:
        layers.append(overriding)
    tree = layered(kind, layers)
    value, found = validated(kind, tree, {problem.path for problem in problems if problem.path})
    problems += found
    if problems or value is None:
        raise RecipeErrors(problems)
    return Loaded(value, to_plain(value), _sources(tree))


def _read_chain(path: Path, extends: Extends | None) -> tuple[list[Node], list[Problem]]:
    """The file at `path` after those it extends, the farthest first, and the mistakes left out of them."""
    files: list[Node] = []
    problems: list[Problem] = []
    met: list[Path] = []
    following: Path | None = path
    while following is not None:
        try:
            tree, found = read_yaml(following)
            problems += found
            met.append(following.resolve())
            files.insert(0, without(tree, {("extends",)}))
            named = tree.child("extends")
            following = _extended(named, following, met, extends) if named else None
        except RecipeErrors as error:
            # without its base a recipe lacks keys that are no mistake of its own: nothing further can be said
            raise RecipeErrors([*problems, *error.problems]) from None
    return files, problems


def _extended(named: Node, recipe: Path, met: Sequence[Path], extends: Extends | None) -> Path:
    """The file that `named`, the `extends:` of `recipe`, means."""

    def refused(message: str) -> RecipeErrors:
        return RecipeErrors([Problem(named.place, ("extends",), message)])

    name = named.value
    if not isinstance(name, str) or not name:
        raise refused(f"must be the name of another recipe, got {as_written(named.plain())}")
    try:
        file = extends(name) if extends else recipe.parent / name
        exists = file.is_file()
    except InputError as error:
        raise refused(str(error)) from None
    except OSError:
        exists = False
    if not exists:
        raise refused(f"no such recipe, got {shown(name)}; check the name and the folder")
    if file.resolve() in met:
        chain = " -> ".join(printable(link.name) for link in [*met, file])
        raise refused(f"recipes extend one another in a circle, {chain}; remove one 'extends'")
    return file


def _sources(tree: Node) -> dict[str, str]:
    return {
        ".".join(map(str, path)): node.place.origin
        for path, node in tree.walk()
        if path and isinstance(path[-1], str) and not isinstance(node.value, dict) and node.place != DEFAULT
    }
