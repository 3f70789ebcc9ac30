"""YAML as recipes use it: the 1.2 core schema, no tags, no aliases, no key given twice.

PyYAML follows YAML 1.1, where `1e-3` is a string, `no` is false, `010` is 8 and `12:30:45` is 45045, and it
keeps the last of two equal keys without a word. Only its scanner, parser and composer are used here;
`phalanx.loading.scalars` says what a plain scalar means.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from phalanx.loading.problems import KeyPath, Place, Problem, RecipeErrors, shown
from phalanx.loading.scalars import encodable, scalar
from phalanx.loading.tree import Node

MAX_BYTES = 1_000_000
"""A recipe is written by hand: a larger file is another file given by mistake."""

MAX_DEPTH = 32
"""Levels of nesting, far above any configuration and far below Python's recursion limit."""

PlaceOf = Callable[[int], Place]
"""From a line, counted from 1, to the place to report."""


class _NotReadable(Exception):
    """Ends the reading of a file at a line, counted from 1."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


class _Composer(yaml.SafeLoader):
    """Composes nodes; remembers those that are more than plain data, so that all are reported together."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.refused: dict[int, str] = {}  # id of a node of the composed graph -> why it is refused
        self.depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            self.get_event()  # type: ignore[no-untyped-call]
            alias = yaml.ScalarNode("", "", event.start_mark, event.end_mark)  # type: ignore[arg-type]
            self.refused[id(alias)] = f"alias '*{event.anchor}' is not allowed; write the value out"
            return alias
        if self.depth >= MAX_DEPTH:
            line = event.start_mark.line + 1
            raise _NotReadable(line, f"is nested more than {MAX_DEPTH} levels deep; flatten it")
        reason = _refusal(event)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        if reason:
            self.refused[id(node)] = reason
        return node


def _refusal(event: yaml.Event) -> str | None:
    """Why the node that `event` begins is refused; its tag and anchor come off, so that reading goes on."""
    if not isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent):
        return None
    tag, anchor = event.tag, event.anchor
    event.tag, event.anchor = None, None
    if tag is not None:
        return f"YAML tag {shown(tag)} is not allowed, a recipe is plain data; remove the tag"
    if anchor is not None:
        return f"YAML anchor '&{anchor}' is not allowed; remove it and write the value out where it is used"
    return None


def read_yaml(path: Path) -> tuple[Node, list[Problem]]:
    """The mapping in the file at `path`, and the mistakes that left it readable, their keys left out.

    Raises RecipeErrors if nothing can be read: no regular file, over 1 MB, not UTF-8, not YAML, no mapping.
    """

    def place(line: int) -> Place:
        return Place(str(path), line)

    text = read_text(path)
    try:
        tree, problems = parse_yaml(text, place)
    except _NotReadable as error:
        raise RecipeErrors([Problem(place(error.line), (), str(error))]) from None
    if tree is None:
        raise RecipeErrors(problems)
    if not isinstance(tree.value, dict):
        raise RecipeErrors([*problems, Problem(tree.place, (), _not_a_mapping(tree))])
    return tree, problems


def read_text(path: Path) -> str:
    """The text of the file at `path`. Raises RecipeErrors if it is no regular file, over 1 MB, or not UTF-8."""
    try:
        return _decode(_read_bytes(path))
    except _NotReadable as error:
        raise RecipeErrors([Problem(Place(str(path), error.line), (), str(error))]) from None


def read_value(text: str, place: Place) -> tuple[Node | None, list[Problem]]:
    """One YAML value, all of it at `place`, None if it is no YAML or refused; and its mistakes."""
    try:
        return parse_yaml(text, lambda _: place)
    except _NotReadable as error:
        return None, [Problem(place, (), f"value {shown(text)} {error}")]


def parse_yaml(text: str, place: PlaceOf) -> tuple[Node | None, list[Problem]]:
    """The one document in `text` (null if it is empty), and the mistakes after which reading could go on.

    A refused value is left out of the mapping that holds it, with the list it is in; None if nothing is left.
    """
    root, refused = _compose(text)
    if root is None:
        return Node(None, place(1)), []
    converter = _Converter(place, refused)
    return converter.node(root, (), root.start_mark.line + 1), converter.problems


def _compose(text: str) -> tuple[yaml.Node | None, dict[int, str]]:
    try:
        composer = _Composer(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise _NotReadable(line, f"holds the character U+{ord(text[error.position]):04X}; remove it") from None
    try:
        return composer.get_single_node(), composer.refused
    except yaml.MarkedYAMLError as error:
        raise _NotReadable(*_explain(error)) from None
    except (ValueError, OverflowError):  # PyYAML's own chr() and int() on escapes and directives
        line = composer.line + 1
        raise _NotReadable(line, "is not valid YAML: an escape or a directive is out of range") from None


def _explain(error: yaml.MarkedYAMLError) -> tuple[int, str]:
    mark = error.problem_mark or error.context_mark
    line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
    reason = error.problem or error.context or "cannot be read"
    if r"'\t'" in reason:
        return line, f"a tab begins column {column}; indent with spaces"
    if "expected a single document" in str(error):
        return line, "a second document begins after '---'; one recipe is one document"
    return line, f"is not valid YAML: {reason} (column {column}); check colons, quotes and indentation"


class _Converter:
    """From PyYAML's nodes to ours; a refused node is left out of what holds it, and its problem kept."""

    def __init__(self, place: PlaceOf, refused: dict[int, str]) -> None:
        self.place = place
        self.refused = refused
        self.problems: list[Problem] = []

    def refuse(self, path: KeyPath, line: int, message: str) -> None:
        self.problems.append(Problem(self.place(line), path, message))

    def node(self, node: yaml.Node, path: KeyPath, line: int) -> Node | None:
        if id(node) in self.refused:
            self.refuse(path, line, self.refused[id(node)])
            return None
        if isinstance(node, yaml.MappingNode):
            return Node(self.mapping(node, path), self.place(line))
        if isinstance(node, yaml.SequenceNode):
            return self.sequence(node, path, line)
        try:
            return Node(scalar(node.value, plain=getattr(node, "style", None) is None), self.place(line))
        except ValueError as error:
            self.refuse(path, line, str(error))
            return None

    def sequence(self, node: yaml.SequenceNode, path: KeyPath, line: int) -> Node | None:
        read = [self.node(item, (*path, i), item.start_mark.line + 1) for i, item in enumerate(node.value)]
        items = tuple(item for item in read if item is not None)
        # a list short of an item would give the others wrong positions
        return Node(items, self.place(line)) if len(items) == len(read) else None

    def mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Node]:
        entries: dict[str, Node] = {}
        first: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = self.key(key_node, path, line)
            if key is None:
                continue
            if key in first:
                self.refuse((*path, key), line, f"is given twice, first on line {first[key]}; keep one")
                continue
            first[key] = line
            value = self.node(value_node, (*path, key), line)
            if value is not None:
                entries[key] = value
        return entries

    def key(self, node: yaml.Node, path: KeyPath, line: int) -> str | None:
        if id(node) in self.refused:
            self.refuse(path, line, f"a key's {self.refused[id(node)]}")
        elif not isinstance(node, yaml.ScalarNode):
            self.refuse(path, line, "a key is a list or a mapping; keys are names")
        elif not encodable(node.value):
            self.refuse((*path, node.value), line, "the key holds half of a surrogate pair; remove it")
        else:
            # keys are names: `on`, `010` and `4` are taken as they are written
            return str(node.value)
        return None


def _read_bytes(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():
            raise _NotReadable(1, f"is {'a folder' if path.is_dir() else 'no regular file'}; give a recipe's file")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a path holding a zero byte
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise _NotReadable(1, f"cannot be read: {reason}; check the path") from None
    if len(data) > MAX_BYTES:
        raise _NotReadable(1, f"is larger than {MAX_BYTES:,} bytes; that is no recipe")
    return data


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _NotReadable(line, f"is not UTF-8: byte 0x{data[error.start]:02x}; save the file as UTF-8") from None


def _not_a_mapping(tree: Node) -> str:
    if tree.value is None:
        return "is empty; write at least one 'key: value'"
    return f"must be a mapping of 'key: value' lines, got {shown(tree.plain())}"
