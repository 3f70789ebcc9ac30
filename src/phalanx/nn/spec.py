"""A module remembers how it was built, so that a run can be loaded without pickle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True)
class Spec:
    """The builder's registered name and its arguments, all plain JSON values."""

    name: str
    arguments: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "arguments": dict(self.arguments)}


def record(module: ModuleT, name: str, /, **arguments: Any) -> ModuleT:
    """Attaches the spec and returns the module."""
    module.phalanx_spec = Spec(name, arguments)  # type: ignore[assignment]
    return module


def spec_of(module: nn.Module) -> Spec | None:
    """The spec the module was built from; None for one built by hand."""
    spec = getattr(module, "phalanx_spec", None)
    return spec if isinstance(spec, Spec) else None
