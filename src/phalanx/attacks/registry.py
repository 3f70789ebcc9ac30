"""Names for objectives and surfaces: what a recipe writes, a ledger records and an error message lists."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


class Registry(Generic[F]):
    """A mapping from names to functions of one kind."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._functions: dict[str, F] = {}
        self._with_clean_pass: set[str] = set()

    def register(self, name: str, *, clean_pass: bool = False) -> Callable[[F], F]:
        """Decorator; `clean_pass` declares that the function reads the pass on the clean image, which costs a forward.

        Raises ValueError if the name is taken.
        """

        def add(function: F) -> F:
            if name in self._functions:
                raise ValueError(f"{self._kind} {name!r} is registered already")
            self._functions[name] = function
            if clean_pass:
                self._with_clean_pass.add(name)
            return function

        return add

    def __getitem__(self, name: str) -> F:
        self.check(name)
        return self._functions[name]

    def check(self, name: str) -> None:
        """Raises ValueError, listing the names there are, unless `name` is registered."""
        if name not in self._functions:
            raise ValueError(f"{self._kind} must be one of {', '.join(self._functions)}, got {name!r}")

    def needs_clean_pass(self, name: str) -> bool:
        return name in self._with_clean_pass
