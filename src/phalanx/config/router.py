"""The router's section."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from phalanx.threat import Norm, ThreatModel

MAX_ATTEMPTS = 4096
"""Of fitting a robust router."""


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """What decides which experts answer."""

    name: Literal["linear", "mlp", "cnn", "resnet20", "lipschitz", "hierarchical", "robust"] = "linear"
    """One linear layer on the pixels, a fully connected network, a small convolutional one, AdvMoE's ResNet-20, one
    that is Lipschitz by construction (see `LipschitzRouter`), a router of routers: one chooses a group of experts, and
    one for each group an expert in it; or a robust one, which is fitted to the training images and the threat before
    training and then never moves (see `RobustRouter`)."""
    groups: int | None = None
    """Of a hierarchical router: how many groups of equal size, group 0 being the first experts."""
    inner: Literal["linear", "mlp", "cnn", "resnet20"] | None = None
    """Of a hierarchical router: the kind of all routers in it; None is linear."""
    hidden: tuple[int, ...] | None = None
    """Widths of the hidden layers of mlp, cnn or lipschitz; None is the router's own default."""
    train: bool = True
    """False keeps the router at its random initial weights (the released dual-model code's choice). A robust router
    does not train, whatever is said here."""
    features: Literal["pixels", "low_pass", "pooled"] | None = None
    """Of a robust router: what it is linear in, see `fit_robust_router`; None is pixels."""
    layout: Literal["tree", "flat"] | None = None
    """Of a robust router: one split after the other or all regions at once; None is tree. Two experts are one split."""
    attempts: int | None = None
    """Of a robust router: clusterings to begin with, of which the best is kept; None is 12."""
    eps: float | str | None = None
    """Of a robust router: the radius it is fitted for; None is the recipe's threat."""
    norm: Norm | None = None
    """Of a robust router: the norm, likewise; of a lipschitz one: the norm that it is Lipschitz in, L2 or Linf, None
    being the recipe's threat's."""

    def __post_init__(self) -> None:
        if self.name != "hierarchical" and (self.groups, self.inner) != (None, None):
            raise ValueError(f"groups and inner are of a hierarchical router, got a {self.name} one; leave them out")
        if self.name == "hierarchical" and self.groups is None:
            raise ValueError("groups must be given for a hierarchical router, for example 2")
        ours = {**self.fit_options, "eps": self.eps, "norm": None if self.name == "lipschitz" else self.norm}
        given = [field for field, value in ours.items() if value is not None]
        if self.name != "robust" and given:
            raise ValueError(f"{given[0]} is of a robust router, got a {self.name} one; leave it out")
        if self.attempts is not None and not 1 <= self.attempts <= MAX_ATTEMPTS:
            raise ValueError(f"attempts must be in 1..{MAX_ATTEMPTS}, got {self.attempts}")
        self.threat_within(ThreatModel())
        if self.hidden is not None and self.kind in ("linear", "resnet20", "robust"):
            raise ValueError(f"hidden cannot be set for a {self.kind} router, got {self.hidden}; choose mlp or cnn")
        if self.name == "lipschitz":
            self._check_lipschitz()
        if self.hidden is not None and (not self.hidden or min(self.hidden) < 1):
            raise ValueError(f"hidden must hold widths of at least 1, got {self.hidden}")

    def _check_lipschitz(self) -> None:
        if self.norm == "L1":
            raise ValueError("norm of a lipschitz router must be L2 or Linf, got L1")
        if any(width % 2 for width in self.hidden or ()):
            raise ValueError(f"hidden of a lipschitz router must hold even widths, got {self.hidden}")

    @property
    def kind(self) -> str:
        """Of the router, or of those in a hierarchical one."""
        return (self.inner or "linear") if self.name == "hierarchical" else self.name

    @property
    def trains(self) -> bool:
        """Whether it moves with the experts."""
        return self.train and self.name != "robust"

    @property
    def fit_options(self) -> dict[str, Any]:
        """How a robust router is fitted, by field of `fit_robust_router`; None where nothing is said."""
        return {"features": self.features, "layout": self.layout, "attempts": self.attempts}

    def threat_within(self, threat: ThreatModel) -> ThreatModel:
        """What a robust router is fitted for in a recipe with this threat. Raises ValueError for a bad radius."""
        return ThreatModel(self.norm or threat.norm, threat.eps if self.eps is None else self.eps)

    def check_experts(self, experts: int) -> None:
        """Raises ValueError unless the router can choose among so many."""
        groups = self.groups
        if groups is not None and (groups < 2 or experts % groups or experts < 2 * groups):
            raise ValueError(
                f"router.groups must be at least 2 and divide the {experts} experts into groups of at least 2, "
                f"got {groups}"
            )
