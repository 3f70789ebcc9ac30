"""The router's section."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """What decides which experts answer."""

    name: Literal["linear", "mlp", "cnn", "resnet20", "hierarchical"] = "linear"
    """One linear layer on the pixels, a fully connected network, a small convolutional one, AdvMoE's ResNet-20, or a
    router of routers: one chooses a group of experts, and one for each group an expert in it."""
    groups: int | None = None
    """Of a hierarchical router: how many groups of equal size, group 0 being the first experts."""
    inner: Literal["linear", "mlp", "cnn", "resnet20"] | None = None
    """Of a hierarchical router: the kind of all routers in it; None is linear."""
    hidden: tuple[int, ...] | None = None
    """Widths of the hidden layers of mlp or cnn; None is the router's own default."""
    train: bool = True
    """False keeps the router at its random initial weights (the released dual-model code's choice)."""

    def __post_init__(self) -> None:
        if self.name != "hierarchical" and (self.groups, self.inner) != (None, None):
            raise ValueError(f"groups and inner are of a hierarchical router, got a {self.name} one; leave them out")
        if self.name == "hierarchical" and self.groups is None:
            raise ValueError("groups must be given for a hierarchical router, for example 2")
        if self.hidden is not None and self.kind in ("linear", "resnet20"):
            raise ValueError(f"hidden cannot be set for a {self.kind} router, got {self.hidden}; choose mlp or cnn")
        if self.hidden is not None and (not self.hidden or min(self.hidden) < 1):
            raise ValueError(f"hidden must hold widths of at least 1, got {self.hidden}")

    @property
    def kind(self) -> str:
        """Of the router, or of those in a hierarchical one."""
        return (self.inner or "linear") if self.name == "hierarchical" else self.name

    def check_experts(self, experts: int) -> None:
        """Raises ValueError unless the router can choose among so many."""
        groups = self.groups
        if groups is not None and (groups < 2 or experts % groups or experts < 2 * groups):
            raise ValueError(
                f"router.groups must be at least 2 and divide the {experts} experts into groups of at least 2, "
                f"got {groups}"
            )
