"""Names for objectives and surfaces: what a recipe writes, a ledger records and an error message lists."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Generic, Literal, TypeAlias, TypeVar

F = TypeVar("F", bound=Callable[..., Any])
Aim: TypeAlias = Literal["targeted", "untargeted"]
"""Towards a class, or away from one: a targeted attack climbs an objective's negative at the class it wants."""

_NUMBERED = re.compile(r"(.+)-(0|[1-9][0-9]{0,3})")
_TEMPERED = re.compile(r"(.+)-t((?:0|[1-9][0-9]{0,3})(?:\.[0-9]{1,4})?)")


class Registry(Generic[F]):
    """A mapping from names to functions of one kind; a family answers to "NAME-0", "NAME-1", ..., one of temperatures
    to "NAME-t0.1" and the like."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._functions: dict[str, F] = {}
        self._families: dict[str, Callable[[int], F]] = {}
        self._tempered: dict[str, Callable[[float], F]] = {}
        self._with_clean_pass: set[str] = set()
        self._one_way: dict[str, Aim] = {}

    def register(self, name: str, *, clean_pass: bool = False, only: Aim | None = None) -> Callable[[F], F]:
        """Decorator; `clean_pass` declares that the function reads the pass on the clean image, which costs a forward,
        `only` that it serves attacks of this aim alone.

        Raises ValueError if the name is taken.
        """

        def add(function: F) -> F:
            self._claim(name)
            self._functions[name] = function
            if clean_pass:
                self._with_clean_pass.add(name)
            if only is not None:
                self._one_way[name] = only
            return function

        return add

    def register_family(self, name: str) -> Callable[[Callable[[int], F]], Callable[[int], F]]:
        """Decorator for a function from a number to a function: "expert" makes "expert-0", "expert-1", ...

        Raises ValueError if the name is taken.
        """

        def add(family: Callable[[int], F]) -> Callable[[int], F]:
            self._claim(name)
            self._families[name] = family
            return family

        return add

    def register_temperatures(self, name: str) -> Callable[[Callable[[float], F]], Callable[[float], F]]:
        """Decorator for a function from a positive temperature to a function: "dense" makes "dense-t0.1", ...

        A function may have the same name without a temperature. Raises ValueError if the name is taken.
        """

        def add(family: Callable[[float], F]) -> Callable[[float], F]:
            if name in self._tempered:
                raise ValueError(f"{self._kind} '{name}-tT' is registered already")
            self._tempered[name] = family
            return family

        return add

    def _claim(self, name: str) -> None:
        if name in self._functions or name in self._families:
            raise ValueError(f"{self._kind} {name!r} is registered already")

    def __getitem__(self, name: str) -> F:
        self.check(name)
        if name in self._functions:
            return self._functions[name]
        if tempered := self._split_temperature(name):
            return self._tempered[tempered[0]](tempered[1])
        numbered = _NUMBERED.fullmatch(name)
        assert numbered is not None
        return self._families[numbered[1]](int(numbered[2]))

    def _split_temperature(self, name: str) -> tuple[str, float] | None:
        found = _TEMPERED.fullmatch(name)
        if found is None or found[1] not in self._tempered or not float(found[2]):
            return None
        return found[1], float(found[2])

    def check(self, name: str) -> None:
        """Raises ValueError, listing the names there are, unless `name` is registered."""
        numbered = _NUMBERED.fullmatch(name)
        in_family = (numbered and numbered[1] in self._families) or self._split_temperature(name)
        if name not in self._functions and not in_family:
            raise ValueError(f"{self._kind} must be one of {', '.join(self.names())}, got {name!r}")

    def check_aim(self, name: str, *, targeted: bool) -> None:
        """Raises ValueError for a function that serves the other aim alone."""
        wanted = self._one_way.get(name)
        if wanted is not None and targeted != (wanted == "targeted"):
            raise ValueError(
                f"{self._kind} {name!r} is for {wanted} attacks alone, got targeted={targeted}; change one of them"
            )

    def names(self) -> list[str]:
        """Every name; a family's as "NAME-J", one of temperatures as "NAME-tT", T positive."""
        tempered = (f"{name}-tT" for name in self._tempered)
        return [*self._functions, *(f"{name}-J" for name in self._families), *tempered]

    def needs_clean_pass(self, name: str) -> bool:
        return name in self._with_clean_pass
