"""How a run is optimised."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal, Self

from pydantic import Field

from phalanx.data.config import Sampling
from phalanx.threat import Norm, ThreatModel


def _positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive, got {value}")


def _not_negative(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be at least 0, got {value}")


def _share(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value}")


def _of_peak(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is a share of the peak and must be in [0, 1], got {value}")


@dataclass(frozen=True, kw_only=True)
class SGD:
    """Stochastic gradient descent with momentum."""

    name: Literal["sgd"] = "sgd"
    lr: float = 0.1
    """Peak learning rate."""
    momentum: float = 0.9
    """Share of the last step that is repeated."""
    weight_decay: float = 5e-4
    """L2 penalty, coupled to the gradient."""
    nesterov: bool = False
    """Look-ahead momentum."""

    def __post_init__(self) -> None:
        _positive("lr", self.lr)
        _share("momentum", self.momentum)
        _not_negative("weight_decay", self.weight_decay)
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs momentum above 0, got 0")


@dataclass(frozen=True, kw_only=True)
class Adam:
    """Adam; `decoupled` weight decay makes it AdamW."""

    name: Literal["adam"] = "adam"
    lr: float = 1e-3
    """Peak learning rate."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    weight_decay: float = 0.0
    """Penalty on the weights."""
    decoupled: bool = True
    """Shrink the weights directly (AdamW) instead of adding to the gradient (Adam with L2)."""

    def __post_init__(self) -> None:
        _positive("lr", self.lr)
        _share("beta1", self.beta1)
        _share("beta2", self.beta2)
        _not_negative("weight_decay", self.weight_decay)


@dataclass(frozen=True, kw_only=True)
class Constant:
    """The peak learning rate throughout."""

    name: Literal["constant"] = "constant"


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """Linear warm-up, then half a cosine down."""

    name: Literal["cosine"] = "cosine"
    warmup: float = 0.0
    """Share of all steps spent warming up from 0."""
    final: float = 0.0
    """The last learning rate as a share of the peak."""

    def __post_init__(self) -> None:
        _share("warmup", self.warmup)
        _of_peak("final", self.final)


@dataclass(frozen=True, kw_only=True)
class OneCycle:
    """Half a cosine up, half a cosine down (Smith & Topin 2018)."""

    name: Literal["one_cycle"] = "one_cycle"
    peak: float = 0.3
    """Share of all steps until the peak."""
    start: float = 0.04
    """The first learning rate as a share of the peak."""
    final: float = 1e-4
    """The last learning rate as a share of the peak."""

    def __post_init__(self) -> None:
        _share("peak", self.peak)
        _of_peak("start", self.start)
        _of_peak("final", self.final)


@dataclass(frozen=True, kw_only=True)
class Cyclic:
    """Triangles between `low` and the peak (Smith 2017); the dual-model paper's is 5e-5 to 1e-4, 500 steps each way."""

    name: Literal["cyclic"] = "cyclic"
    low: float = 0.5
    """The lowest learning rate as a share of the peak."""
    steps_up: int = 500
    """Steps from low to peak."""
    steps_down: int = 500
    """Steps from peak to low."""

    def __post_init__(self) -> None:
        _of_peak("low", self.low)
        _positive("steps_up", self.steps_up)
        _positive("steps_down", self.steps_down)


Bound = Literal["ibp", "crown-ibp", "margin"]

Optimizer = Annotated[SGD | Adam, Field(discriminator="name")]
Schedule = Annotated[Constant | Cosine | OneCycle | Cyclic, Field(discriminator="name")]


@dataclass(frozen=True, kw_only=True)
class AWP:
    """Adversarial weight perturbation (Wu et al. 2020), for any method: before each update the weights that are about
    to move step up its loss, the gradient is taken there, and the weights are put back. It doubles the cost of an
    update, not that of the attack."""

    gamma: float = 0.005
    """Size of the perturbation relative to the norm of each weight tensor."""
    warmup_epochs: int = 0
    """Epochs before it begins."""

    def __post_init__(self) -> None:
        _positive("gamma", self.gamma)
        _not_negative("warmup_epochs", self.warmup_epochs)


@dataclass(frozen=True, kw_only=True)
class CertifiedTraining:
    """A share of the loss that enlarges certificates, for any method that moves a mixture's experts: cross-entropy of
    the worst logits that a bound leaves possible in the ball around each clean image; `phalanx.training.certified`."""

    bound: Bound = "crown-ibp"
    """Interval bounds (Gowal et al. 2018), linear bounds over interval bounds (Zhang et al. 2020), or the margin less
    eps times the network's Lipschitz constant (Tsuzuku et al. 2018): for experts that are Lipschitz by construction."""
    weight: float = 0.5
    """k in (1 - k) times the method's loss plus k times this one, in (0, 1)."""
    eps: float | str | None = None
    """Radius of the ball; None is the recipe's threat."""
    norm: Norm | None = None
    """The ball's norm, likewise."""
    warmup: float = 0.0
    """Share of all steps over which `weight` and `eps` rise from 0."""

    def __post_init__(self) -> None:
        if not 0 < self.weight < 1:
            raise ValueError(f"weight must be in (0, 1), got {self.weight}: the method's own loss has the rest")
        _share("warmup", self.warmup)
        self.threat_within(ThreatModel())

    def threat_within(self, threat: ThreatModel) -> ThreatModel:
        """The ball in a recipe with this threat. Raises ValueError for a bad radius."""
        return ThreatModel(self.norm or threat.norm, threat.eps if self.eps is None else self.eps)

    def within(self, threat: ThreatModel) -> Self:
        """With the recipe's threat where none is set."""
        ball = self.threat_within(threat)
        return replace(self, eps=ball.eps, norm=ball.norm)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The loop's settings: the same for every method."""

    epochs: int = 30
    """Passes over the training split; 0 deploys the weights that the model comes with."""
    batch_size: int = 128
    """Images per step; an epoch's last partial batch is dropped."""
    sampling: Sampling = "shuffled"
    """"shuffled" shows every image once an epoch; "class_balanced" every class equally often, small ones by repetition.
    Classes are so weighed in whatever a method goes down: cross-entropies, KL terms, load balance and the router's."""
    optimizer: Optimizer = field(default_factory=SGD)
    """One of its kind for each of the model's players."""
    schedule: Schedule = field(default_factory=Cosine)
    """The learning rate over the steps."""
    ema_decay: float | None = None
    """Keep an exponential moving average of the weights with this decay per step; it is then what is validated and
    deployed."""
    ema_start_epoch: int = 0
    """Epochs before averaging begins; until then the average is the trained model."""
    awp: AWP | None = None
    """Adversarial weight perturbation; None for none."""
    certified: CertifiedTraining | None = None
    """Training that enlarges certificates; None for none."""
    clip_norm: float | None = None
    """Scale the gradient of each update down to at most this L2 norm."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Autocast of training passes and of the attacks inside training; verdicts are always fp32."""
    validate_every: int = 1
    """Epochs between validations; the last epoch is always validated."""
    select: Literal["robust_accuracy", "accuracy"] = "robust_accuracy"
    """Which validation number picks the best weights; ties go to the other one, then to the later epoch."""
    checkpoint_seconds: float = 30.0
    """A kill loses at most about this much work."""

    def __post_init__(self) -> None:
        _not_negative("epochs", self.epochs)
        for name in ("batch_size", "validate_every"):
            _positive(name, getattr(self, name))
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in (0, 1), got {self.ema_decay}; leave it out for no average")
        self._check_start("ema_start_epoch", self.ema_start_epoch)
        if self.ema_start_epoch and self.ema_decay is None:
            raise ValueError(f"ema_start_epoch is {self.ema_start_epoch}, but there is no average; set ema_decay")
        if self.awp is not None:
            self._check_start("awp.warmup_epochs", self.awp.warmup_epochs)
        if self.clip_norm is not None:
            _positive("clip_norm", self.clip_norm)
        _not_negative("checkpoint_seconds", self.checkpoint_seconds)

    def within(self, threat: ThreatModel) -> Self:
        """With the recipe's threat in what does not set its own."""
        return self if self.certified is None else replace(self, certified=self.certified.within(threat))

    def _check_start(self, name: str, epoch: int) -> None:
        """Raises ValueError for what would never begin."""
        if not 0 <= epoch < max(1, self.epochs):
            raise ValueError(f"{name} must be at least 0 and below epochs={self.epochs}, got {epoch}")
