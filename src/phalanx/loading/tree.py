"""A recipe as written: plain values, each knowing its place."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

from phalanx.loading.problems import DEFAULT, KeyPath, Place

Scalar = str | int | float | bool | None
Plain = Scalar | list["Plain"] | dict[str, "Plain"]
"""What JSON can hold."""


@dataclass(frozen=True)
class Node:
    """A value and where it was written; a mapping's entry has the place of its key."""

    value: Scalar | tuple[Node, ...] | dict[str, Node]
    place: Place

    def entries(self) -> Mapping[str, Node]:
        """The mapping's entries; none where this is no mapping."""
        return self.value if isinstance(self.value, dict) else {}

    def child(self, part: str | int) -> Node | None:
        """The entry or list item at `part`, or None."""
        if isinstance(part, str):
            return self.entries().get(part)
        items = self.value if isinstance(self.value, tuple) else ()
        return items[part] if 0 <= part < len(items) else None

    def at(self, path: KeyPath) -> Node | None:
        """The node at `path`, or None."""
        node: Node | None = self
        for part in path:
            node = node and node.child(part)
        return node

    def plain(self) -> Plain:
        """The value alone."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, tuple):
            return [node.plain() for node in self.value]
        return self.value

    def walk(self, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Node]]:
        """This node and all below it, each with its path."""
        yield path, self
        if isinstance(self.value, dict):
            for key, node in self.value.items():
                yield from node.walk((*path, key))
        elif isinstance(self.value, tuple):
            for index, node in enumerate(self.value):
                yield from node.walk((*path, index))


def place_of(tree: Node, path: KeyPath) -> Place:
    """Where `path` was written; where nobody wrote it, the nearest section around it that somebody did."""
    place, node = tree.place, tree
    for part in path:
        below = node.child(part)
        if below is None:
            break
        node = below
        place = place if node.place == DEFAULT else node.place
    return place


def without(tree: Node, paths: Collection[KeyPath]) -> Node:
    """`tree` less the mapping entries at `paths`. List items stay, so that positions keep their meaning."""
    parts = {path[0] for path in paths if len(path) == 1}

    def below(part: str | int) -> list[KeyPath]:
        return [path[1:] for path in paths if len(path) > 1 and path[0] == part]

    if isinstance(tree.value, dict):
        kept = {key: without(node, below(key)) for key, node in tree.value.items() if key not in parts}
        return replace(tree, value=kept)
    if isinstance(tree.value, tuple):
        return replace(tree, value=tuple(without(node, below(i)) for i, node in enumerate(tree.value)))
    return tree
