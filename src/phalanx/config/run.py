"""The configuration of a run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from phalanx.config.models import AnyModel, MixtureConfig
from phalanx.data.config import DataConfig
from phalanx.methods import ST, AnyMethod
from phalanx.rng import derive_seed
from phalanx.threat import ThreatModel
from phalanx.training.config import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """What is measured on the validation split during training."""

    protocol: str = "pgd-10"
    """One attack, named as in evaluation."""
    n: int | None = 500
    """Images used, the split's first; None for all."""

    def __post_init__(self) -> None:
        if self.n is not None and self.n < 1:
            raise ValueError(f"n must be at least 1, got {self.n}; leave it out for all images")
        if "," in self.protocol:
            raise ValueError(f"protocol must be one attack, got {self.protocol!r}")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured on the test split afterwards."""

    protocol: str = "pgd-50"
    """Attacks joined by commas, such as "fgsm,pgd-50x5" or "routing-50", every surface that the model has."""
    n: int | None = None
    """Images used, the split's first; None for all."""
    weights: Literal["best", "last"] = "best"
    """The weights that validated best, or the last."""
    batch_size: int = 64
    """Images attacked together; verdicts do not depend on it."""
    analysis: str | None = None
    """One attack, such as pgd-20, under which routes, single experts and margins are looked at besides, on at most
    1,000 images; it costs that attack once for the model and once for each expert, and for a mixture as much again
    under a gate that knows the label. None leaves it out."""
    attribution: bool | None = None
    """Whether each broken image is blamed on the router or on an expert, and robust accuracy taken apart, on at most
    1,000 images (128 under "quick"); it costs 20 gradient steps 6 times for the model and 3 times for each expert. None
    does it for models with a route under standard, plus, quick, thorough and routing-STEPS."""
    checks: int | None = None
    """Images that the honesty checks look at, spread over the split; 0 leaves the checks out. None is 256 under
    standard, thorough, plus and rand, else 64."""
    certify: Literal["auto", "lipschitz", "ibp", "crown"] | None = None
    """How a run's own answers are certified beside its evaluation, in the threat's norm, as `phalanx certify` does it;
    views of runs are not. None leaves it out."""

    @property
    def size(self) -> str:
        """What the names of folders call `n`."""
        return "all" if self.n is None else str(self.n)

    def __post_init__(self) -> None:
        if self.n is not None and self.n < 1:
            raise ValueError(f"n must be at least 1, got {self.n}; leave it out for all images")
        if self.analysis is not None and "," in self.analysis:
            raise ValueError(f"analysis must be one attack, got {self.analysis!r}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.checks is not None and self.checks < 0:
            raise ValueError(f"checks must be at least 0, got {self.checks}; 0 leaves them out")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that determines a run."""

    label: str = ""
    """The run's name in tables; by default that of its recipe."""
    seed: int = 0
    """Initial weights, order of the data, augmentation, attacks."""
    replica: int = 0
    """Tells runs of one recipe and seed apart: another replica has other weights to begin with, another order of the
    data and other draws."""
    device: str = "auto"
    """"auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N"."""
    threads: int | None = None
    """CPU threads; small networks are fastest with 1. None leaves torch's choice."""
    data: DataConfig = field(default_factory=DataConfig)
    """Images and their splits."""
    model: AnyModel = field(default_factory=MixtureConfig)
    """Experts and router, or two finished runs joined."""
    threat: ThreatModel = field(default_factory=ThreatModel)
    """What an attacker may do, in training and in evaluation."""
    method: AnyMethod = field(default_factory=ST)
    """How it is trained."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """The loop."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """Numbers during training."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Numbers afterwards."""

    def __post_init__(self) -> None:
        for name, value in (("seed", self.seed), ("replica", self.replica)):
            if not 0 <= value < 2**31:
                raise ValueError(f"{name} must be in 0..2**31 - 1, got {value}")
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ValueError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {self.device!r}")
        if self.threads is not None and not 1 <= self.threads <= 1024:
            raise ValueError(f"threads must be in 1..1024, got {self.threads}")

    @property
    def run_seed(self) -> int:
        """What the run's random numbers derive from: the seed, unless it is a replica."""
        return derive_seed(self.seed, "replica", self.replica) % 2**31 if self.replica else self.seed


def bound_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a resolved configuration that a run folder is bound to: how it is trained, not how it is measured
    afterwards or what it is called."""
    bound = {key: value for key, value in config.items() if key not in ("label", "evaluation")}
    # folders from before there was a choice do not speak of it
    training = {key: value for key, value in bound["training"].items() if (key, value) != ("sampling", "shuffled")}
    training = {key: value for key, value in training.items() if (key, value) != ("certified", None)}
    method = {key: value for key, value in bound["method"].items() if (key, value) != ("noise", 0.0)}
    return {**bound, "training": training, "method": method}
