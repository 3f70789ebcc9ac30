"""Free adversarial training: one backward pass gives the gradient of the weights and that of the images."""

# B batch

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from phalanx.methods.base import NO_LOGS, LabelledBatch, Loss, Update, check_weight, classification_loss
from phalanx.rng import Rng
from phalanx.routing import RoutedModel
from phalanx.threat import Norm, ThreatModel, parse_epsilon


@dataclass(frozen=True, kw_only=True)
class FreeAT:
    """Shafahi et al. 2019, Algorithm 1: each batch is replayed, and after each replay weights and images move at once.

    The perturbation starts at zero and is carried from replay to replay and from batch to batch, image by position; as
    in the implementation of Wong et al. 2020 it is kept within the pixel range of the images it was made for. What the
    images climb is what the weights go down, in training mode, load-balance loss included.

    A step is `replays` updates at one learning rate, each of 4 passes through the network (forward 1, backward to image
    and parameters 3): `epochs` counts passes of the data loader, of which the paper takes a `replays`-th. Any clipping
    of the gradient is of the weights' alone.
    """

    name: Literal["free_at"] = "free_at"
    replays: int = 8
    """m, the updates on each batch; the paper's is 8 on CIFAR-10."""
    step_size: float | str | None = None
    """Length of an ascent step in pixel units; by default eps, as in the paper."""
    eps: float | str | None = None
    """Radius; by default the recipe's threat."""
    norm: Norm | None = None
    """Norm; by default the recipe's threat."""
    balance: float = 0.1
    """Weight of the load-balance loss."""
    streams: ClassVar[tuple[str, ...]] = ("train",)

    def __post_init__(self) -> None:
        check_weight("balance", self.balance)
        if self.replays < 1:
            raise ValueError(f"replays must be at least 1, got {self.replays}; 8 is the paper's")
        if self.eps is not None:
            ThreatModel(self.norm or "L2", self.eps)
        if self.step_size is not None:
            try:
                parse_epsilon(self.step_size)
            except ValueError:
                raise ValueError(
                    f"step_size must be a number or a fraction such as '2/255', at least 0, got {self.step_size!r}"
                ) from None

    def check(self, model: RoutedModel, num_classes: int) -> None:
        """Any model will do."""

    def within(self, threat: ThreatModel) -> Self:
        eps, norm = self.eps, self.norm
        return replace(self, eps=threat.eps if eps is None else eps, norm=threat.norm if norm is None else norm)

    @property
    def threat(self) -> ThreatModel:
        """The ball; raises ValueError if `eps` was given neither here nor by a recipe."""
        if self.eps is None:
            raise ValueError("eps must be given, for example FreeAT(eps='8/255'), got None")
        return ThreatModel(self.norm or "Linf", self.eps)

    @cached_property
    def _carried(self) -> _Carried:
        return _Carried()

    def updates(self, model: RoutedModel, batches: Mapping[str, LabelledBatch], rng: Rng) -> Iterator[Update]:
        del rng
        x, y, threat = batches["train"].x, batches["train"].y, self.threat
        step_size = threat.epsilon if self.step_size is None else float(parse_epsilon(self.step_size))
        x_adv, logs = threat.project(x + self._carried.onto(x), x), NO_LOGS
        for _ in range(self.replays):
            replay = _Replay(model, x_adv, y, self.balance)
            yield Update(replay.loss, logs=logs)
            gradient = replay.gradient
            # known only after the update: logged with the next one
            logs = {"zero_gradient": (gradient.flatten(1) == 0).all(1).float().mean()}
            x_adv = threat.step(x_adv, gradient, step_size, x)
        self._carried.keep(x_adv - x)

    def state_dict(self) -> dict[str, Any]:
        """The carried perturbation (B, C, H, W), once there is one."""
        carried = self._carried.perturbation
        return {} if carried is None else {"perturbation": carried}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._carried.perturbation = state.get("perturbation")


class _Replay:
    """One pass of a batch. After the backward of its loss, `gradient` (B, C, H, W) is that of the images."""

    def __init__(self, model: RoutedModel, x_adv: Tensor, y: Tensor, balance: float) -> None:
        self._model, self._x_adv, self._y, self._balance = model, x_adv, y, balance
        self._leaf = x_adv

    def loss(self) -> Loss:
        # a new leaf for each pass: only the one whose weights' gradient is applied counts
        self._leaf = self._x_adv.detach().requires_grad_()
        loss = classification_loss(self._model, self._leaf, self._y, self._balance)
        return Loss(loss.value, {**loss.logs, "adversarial_accuracy": loss.logs["accuracy"]})

    @property
    def gradient(self) -> Tensor:
        # a model may ignore its input: that is a zero gradient, not an error
        return torch.zeros_like(self._x_adv) if self._leaf.grad is None else self._leaf.grad


class _Carried:
    """The perturbation that goes from batch to batch, image by position; as long as the largest batch so far."""

    def __init__(self) -> None:
        self.perturbation: Tensor | None = None

    def onto(self, x: Tensor) -> Tensor:
        """(B, ...) what images x (B, ...) begin with: zero where none was carried that far."""
        if self.perturbation is None:
            return torch.zeros_like(x)
        carried = self.perturbation.to(x)[: len(x)]
        return torch.cat([carried, x.new_zeros(len(x) - len(carried), *x.shape[1:])])

    def keep(self, perturbation: Tensor) -> None:
        """A smaller batch replaces its part."""
        rest = (
            perturbation[:0] if self.perturbation is None else self.perturbation.to(perturbation)[len(perturbation) :]
        )
        self.perturbation = torch.cat([perturbation, rest])
