"""What pydantic finds wrong, in a user's words: the constraint, the value got, the way out."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from pydantic_core import ErrorDetails

from phalanx.loading.problems import KeyPath, dotted, either, shown
from phalanx.loading.shapes import Choice, Located, Section, all_keys, keys, locate

_EXPECTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "list_type": "a list",
    "set_type": "a list",
    "frozen_set_type": "a list",
    "dict_type": "a mapping",
    "mapping_type": "a mapping",
    "dataclass_type": "a mapping",
    "none_required": "null",
}
"""pydantic's error types, as what the value should have been; its own words serve for the rest."""

_LEADING_NAME = re.compile(r"(?P<name>\w+(\.\w+)*)(?P<verb>: | (?=(must|is|has|needs|cannot|does|may) ))?")
_MOST_PLACES = 3
"""Sections named when a key belongs elsewhere."""


@dataclass(frozen=True)
class Fault:
    """One thing pydantic, or a configuration's own check, refused."""

    path: KeyPath
    """What the message is about."""
    message: str
    section: KeyPath
    """The section it was found in."""
    culprit: KeyPath
    """What to take out so that the rest can be checked."""
    missing: bool = False
    check: bool = False
    """Whether a `__post_init__` found it: it may then be a consequence of other keys."""
    meant: KeyPath | None = None
    """The key that a misspelt one was probably meant for."""

    def mentions(self, name: str | int) -> bool:
        """Whether the message names `name` as a word."""
        return str(name) in re.findall(r"\w+", self.message)


def faults_of(kind: type[Any], details: Iterable[ErrorDetails]) -> list[Fault]:
    """The faults behind the errors of one validation, those of a union's members on one value made one."""
    groups: dict[KeyPath, list[tuple[Located, ErrorDetails]]] = {}
    for detail in details:
        located = locate(kind, detail["loc"])
        groups.setdefault(located.path, []).append((located, detail))
    return [_fault(kind, group[0][0], [detail for _, detail in group]) for group in groups.values()]


def _fault(kind: type[Any], located: Located, details: Sequence[ErrorDetails]) -> Fault:
    path, detail = located.path, details[0]
    match detail["type"]:
        case "unexpected_keyword_argument":
            return _unknown_key(kind, located)
        case "missing":
            return Fault(path, "is required; add it", path[:-1], path[:-1], missing=True)
        case "union_tag_invalid" | "union_tag_not_found":
            return _unknown_variant(located, detail)
        case "value_error" | "assertion_error":
            return _failed_check(located, str(detail["ctx"]["error"]))
    return Fault(path, _unexpected_value(details), path[:-1], path)


def _unknown_key(kind: type[Any], located: Located) -> Fault:
    path, key = located.path, str(located.path[-1])
    fault = Fault(path, "", path[:-1], path)
    owners = _owners(located.choice, key)
    if owners:
        return replace(fault, message=f"no such key here, only with {either(owners)}; remove it")
    known = list(dict.fromkeys(all_keys(kind)))
    if tuple(key.split(".")) in known:
        section, _, leaf = key.rpartition(".")
        return replace(fault, message=f"no such key; write '{leaf}:' indented under '{section}:'")
    here = get_close_matches(key, keys(located.section.kind), n=1)
    elsewhere = [known_path for known_path in known if known_path[-1] == key]
    if not here and not elsewhere:
        close = get_close_matches(key, {str(known_path[-1]) for known_path in known}, n=1, cutoff=0.75)
        elsewhere = [known_path for known_path in known if known_path[-1] in close]
    if elsewhere:
        places = either([dotted(known_path) for known_path in elsewhere[:_MOST_PLACES]])
        return replace(fault, message=f"no such key; did you mean {places}?")
    if here:
        return replace(fault, message=f"no such key; did you mean '{here[0]}'?", meant=(*path[:-1], here[0]))
    names = ", ".join(keys(located.section.kind)) or "none"
    return replace(fault, message=f"no such key; the keys here are: {names}")


def _owners(choice: Choice | None, key: str) -> list[str]:
    return [name for name, kind in choice.variants.items() if key in keys(kind)] if choice else []


def _unknown_variant(located: Located, detail: ErrorDetails) -> Fault:
    if not isinstance(located.shape, Choice):
        raise TypeError(f"{dotted(located.path)}: declare the discriminator as Field(discriminator='...')")
    names = list(located.shape.variants)
    path = (*located.path, located.shape.discriminator)
    given = detail["input"].get(located.shape.discriminator) if isinstance(detail["input"], dict) else None
    if detail["type"] == "union_tag_not_found" and given is None:
        return Fault(path, f"is required, {either(names)}; add it", located.path, located.path, missing=True)
    remedy = _did_you_mean(given, names)
    return Fault(path, f"must be {either(names)}, got {as_written(given)}{remedy}", located.path, located.path)


def _failed_check(located: Located, message: str) -> Fault:
    """The fault behind a `__post_init__`, whose message begins with the name of the field it is about."""
    section = located.path
    named = _LEADING_NAME.match(message)
    fields = _fields_on(located, named["name"].split(".")) if named else ()
    if not named or not fields:
        return Fault(section, message, section, section, check=True)
    path = (*section, *fields)
    rest = message[named.end() :] if named["verb"] and named["name"] == ".".join(fields) else message
    return Fault(path, rest, section, path, check=True)


def _fields_on(located: Located, names: Sequence[str]) -> tuple[str, ...]:
    """The part of `names` that are keys, each under the one before, from the located section on."""
    shape, found = located.shape, []
    for name in names:
        if not isinstance(shape, Section) or name not in keys(shape.kind):
            break
        found.append(name)
        shape = shape.child(name)
    return tuple(found)


def _unexpected_value(details: Sequence[ErrorDetails]) -> str:
    value = details[0]["input"]
    expected = list(dict.fromkeys(_expectation(detail) for detail in details))
    options = [option for detail in details for option in _options(detail)]
    return f"must be {' or '.join(expected)}, got {as_written(value)}{_remedy(value, expected, options)}"


def _expectation(detail: ErrorDetails) -> str:
    words = detail["msg"]
    return _EXPECTED.get(detail["type"]) or words.removeprefix("Input should be ")


def _options(detail: ErrorDetails) -> list[str]:
    """The names that a Literal or an enumeration admits."""
    known = detail["type"] in ("literal_error", "enum")
    return re.findall(r"'([^']*)'", detail["ctx"]["expected"]) if known else []


def _remedy(value: Any, expected: Sequence[str], options: Sequence[str]) -> str:
    if value is None:
        return "; give a value or remove the key"
    if options:
        return _did_you_mean(value, options)
    if isinstance(value, str) and {"an integer", "a number"} & set(expected) and _is_number(value):
        return "; remove the quotes"
    if isinstance(value, float) and "an integer" in expected and value.is_integer():
        return f"; write {value:.0f}"
    if list(expected) == ["text"] and isinstance(value, int | float):
        return "; put it in quotes"
    if "a list" in expected and isinstance(value, str | int | float):
        return f"; write [{as_written(value)}]"
    return ""


def _did_you_mean(value: object, names: Sequence[str]) -> str:
    close = get_close_matches(value, names, n=1, cutoff=0.5) if isinstance(value, str) else []
    if close:
        return f"; did you mean '{close[0]}'?"
    return "; choose one of them" if len(names) > 1 else f"; write {either(names)}"


def _is_number(text: str) -> bool:
    try:
        return text.isascii() and math.isfinite(float(text))
    except ValueError:
        return False


def as_written(value: object) -> str:
    """`value` as a recipe would spell it, on one line and cut to 60 characters."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "null"
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else f"{'-' if value < 0 else ''}.inf"
    return shown(value)
