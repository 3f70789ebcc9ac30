"""Names for objectives and surfaces: what a recipe writes, a ledger records and an error message lists."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Generic, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

_NUMBERED = re.compile(r"(.+)-(0|[1-9][0-9]{0,3})")


class Registry(Generic[F]):
    """A mapping from names to functions of one kind; a family answers to "NAME-0", "NAME-1", ..."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._functions: dict[str, F] = {}
        self._families: dict[str, Callable[[int], F]] = {}
        self._with_clean_pass: set[str] = set()

    def register(self, name: str, *, clean_pass: bool = False) -> Callable[[F], F]:
        """Decorator; `clean_pass` declares that the function reads the pass on the clean image, which costs a forward.

        Raises ValueError if the name is taken.
        """

        def add(function: F) -> F:
            self._claim(name)
            self._functions[name] = function
            if clean_pass:
                self._with_clean_pass.add(name)
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

    def _claim(self, name: str) -> None:
        if name in self._functions or name in self._families:
            raise ValueError(f"{self._kind} {name!r} is registered already")

    def __getitem__(self, name: str) -> F:
        self.check(name)
        if name in self._functions:
            return self._functions[name]
        numbered = _NUMBERED.fullmatch(name)
        assert numbered is not None
        return self._families[numbered[1]](int(numbered[2]))

    def check(self, name: str) -> None:
        """Raises ValueError, listing the names there are, unless `name` is registered."""
        numbered = _NUMBERED.fullmatch(name)
        if name not in self._functions and not (numbered and numbered[1] in self._families):
            raise ValueError(f"{self._kind} must be one of {', '.join(self.names())}, got {name!r}")

    def names(self) -> list[str]:
        """Every name; a family's as "NAME-J"."""
        return [*self._functions, *(f"{name}-J" for name in self._families)]

    def needs_clean_pass(self, name: str) -> bool:
        return name in self._with_clean_pass
