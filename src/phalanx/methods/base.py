"""What a training method is: a generator of updates. The trainer moves parameters between its `yield`s."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, Self

import torch.nn.functional as F
from torch import Tensor

from phalanx.rng import Rng
from phalanx.routing import DualRoute, Routed, RoutedModel, RouteTree, leaves, load_balance, load_per_expert
from phalanx.threat import ThreatModel

NO_LOGS: Mapping[str, Tensor] = MappingProxyType({})


class Loss(NamedTuple):
    """What one evaluation of an objective gives."""

    value: Tensor
    """() to be minimised, differentiable."""
    logs: Mapping[str, Tensor] = NO_LOGS
    """Detached by-products worth recording: "accuracy" (), "load" (E,), ..."""


class Update(NamedTuple):
    """One move: whose parameters go down which loss."""

    loss: Callable[[], Loss]
    """Called by the trainer, again if the weights are perturbed."""
    player: str = "all"
    """A name of the model's `players()`, the first part of a dotted one, or "all"."""
    logs: Mapping[str, Tensor] = NO_LOGS
    """Detached values known before the loss is: what the attack reports."""


class LabelledBatch(Protocol):
    """Images (B, C, H, W) in [0, 1], labels (B,) int64, sample ids (B,) int64."""

    @property
    def x(self) -> Tensor: ...
    @property
    def y(self) -> Tensor: ...
    @property
    def ids(self) -> Tensor: ...


class Method(Protocol):
    """A frozen dataclass with one `updates`. Everything it needs to resume exactly is in `state_dict`."""

    @property
    def streams(self) -> tuple[str, ...]:
        """The data streams it reads, independent of each other; most need one, "train"."""
        ...

    @property
    def name(self) -> str: ...

    def check(self, model: RoutedModel, num_classes: int) -> None:
        """Before training: raises InputError for a model that the method cannot train, on data of so many classes."""
        ...

    def updates(self, model: RoutedModel, batches: Mapping[str, LabelledBatch], rng: Rng) -> Iterator[Update]:
        """One step: yields its updates; when it is resumed, the parameters of the last one have moved."""
        ...

    def within(self, threat: ThreatModel) -> Self:
        """The method with the recipe's threat in every attack that does not set its own."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values and tensors, by name."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse; tensors come back on the CPU."""
        ...


class Stateless:
    """What most methods share: any model will do, and everything follows from the weights, the step and the seed."""

    def check(self, model: RoutedModel, num_classes: int) -> None:
        """Nothing to refuse."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, got {sorted(state)}")


def classification_loss(model: RoutedModel, x: Tensor, y: Tensor, balance: float) -> Loss:
    """Mean cross-entropy of the whole model at `x`, plus `balance` times its load-balance loss."""
    return loss_of_pass(model.routed(x), y, balance)


def loss_of_pass(passed: Routed, y: Tensor, balance: float) -> Loss:
    """The same of a forward pass that the caller goes on using."""
    logits, route = passed
    value = F.cross_entropy(logits, y)
    logs = {"accuracy": accuracy_of(logits, y)}
    if route is not None and any(leaf.num_experts > 1 for leaf in leaves(route)):
        value = value + balance * load_balance(route)
        logs |= _loads(route)
    return Loss(value, logs)


def accuracy_of(logits: Tensor, y: Tensor) -> Tensor:
    """() share of logits (B, C) that answer y (B,), detached."""
    return (logits.detach().argmax(-1) == y).float().mean()


def _loads(route: RouteTree) -> dict[str, Tensor]:
    """ "load" (E,), the shares of the largest gate; of a dual model "dual.standard.load" and "dual.robust.load"."""
    if isinstance(route, DualRoute):
        halves = route._asdict().items()
        return {f"dual.{half}.{key}": load for half, own in halves for key, load in _loads(own).items()}
    load = max(load_per_expert(route), key=len).detach()
    return {"load": load} if len(load) > 1 else {}


def mean_kl(clean_logits: Tensor, adv_logits: Tensor) -> Tensor:
    """() KL(softmax(clean) || softmax(adv)) of logits (B, C), averaged over the batch; both carry gradient."""
    log_p_BC, log_q_BC = clean_logits.log_softmax(-1), adv_logits.log_softmax(-1)
    return F.kl_div(log_q_BC, log_p_BC, reduction="batchmean", log_target=True)


def with_divergence(loss: Loss, beta: float, kl: Tensor) -> Loss:
    """`loss` plus `beta` times a divergence (), which is logged as "kl"."""
    return Loss(loss.value + beta * kl, {**loss.logs, "kl": kl.detach()})


def check_weight(name: str, value: float) -> None:
    """Raises ValueError unless a loss weight is finite and at least 0."""
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be at least 0, got {value}")
