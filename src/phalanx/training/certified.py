"""A loss that enlarges certificates: cross-entropy of the worst logits that a bound leaves possible around each image.

Computed on the clean images, for the experts that the gate selects there, with its weights: a router learns from it as
it does from any loss of the mixture. All networks, the router too, are read as they are in evaluation mode, BatchNorm
by its running statistics, since that is what is certified; none of these moves.
"""

# N samples, E experts, K selected, C classes

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from phalanx.bounds import (
    Ball,
    Stage,
    crown_ibp_lower,
    forward,
    interval_features,
    interval_lower,
    output_lipschitz,
    read_network,
)
from phalanx.errors import InputError
from phalanx.methods.base import LabelledBatch, Loss, Update
from phalanx.routing import DualModel, MixtureOfExperts, RoutedModel
from phalanx.threat import ThreatModel
from phalanx.training.config import Bound, CertifiedTraining


def certified_part(model: RoutedModel) -> tuple[MixtureOfExperts, str]:
    """The mixture whose certificates are enlarged, and the player that its experts are: a dual model's robust half.

    Raises InputError for a model without one.
    """
    part, player = (model.robust, "robust.experts") if type(model) is DualModel else (model, "experts")
    if type(part) is not MixtureOfExperts:
        raise InputError(
            f"training.certified is for mixtures of whole networks and for dual models of them, got a "
            f"{type(model).__name__}; leave it out"
        )
    if not part.train_experts:
        raise InputError("training.certified moves experts, and this mixture's are frozen; leave it out")
    return part, player


def check_certified(model: RoutedModel, shape: Sequence[int]) -> None:
    """Raises InputError, naming the layer, for experts on images (*shape) that no bound is known for."""
    mixture, _ = certified_part(model)
    for index, expert in enumerate(mixture.experts):
        try:
            read_network(expert, tuple(shape), where=f"experts.{index}", trained=True)
        except InputError as error:
            raise InputError(f"training.certified: {error}") from None


def with_certified_loss(
    update: Update, model: RoutedModel, batch: LabelledBatch, settings: CertifiedTraining, progress: float
) -> Update:
    """`update` with the share k = `settings.weight` * `progress` of its loss replaced by the cross-entropy of
    `worst_logits` at radius `settings.eps` * `progress`, `progress` in [0, 1].

    Logs "certified_loss" () and "certified_accuracy" (), the share of images whose worst logits are right.
    """
    mixture, _ = certified_part(model)
    threat = settings.threat_within(ThreatModel())
    share = settings.weight * progress

    def loss() -> Loss:
        own = update.loss()
        worst_NC = worst_logits(mixture, batch.x, batch.y, settings, threat.epsilon * progress)
        value = F.cross_entropy(worst_NC, batch.y)
        right = (worst_NC.detach().scatter(1, batch.y[:, None], float("-inf")) < 0).all(1).float().mean()
        logs = {"certified_loss": value.detach(), "certified_accuracy": right}
        return Loss((1 - share) * own.value + share * value, {**own.logs, **logs})

    return update._replace(loss=loss)


def worst_logits(mixture: MixtureOfExperts, x: Tensor, y: Tensor, settings: CertifiedTraining, radius: float) -> Tensor:
    """(N, C): 0 for the label y (N,), and for every other class the most that its logit can exceed the label's within
    `radius` of images x, in the selected experts' average; weights are the gate's at x."""
    threat = settings.threat_within(ThreatModel())
    with _evaluating(mixture):
        route = mixture.gate(x)
    worst_NC: Tensor | None = None
    for index, expert in enumerate(mixture.experts):
        selected_NK = route.experts == index
        rows = selected_NK.any(1).nonzero()[:, 0]
        if not len(rows):
            continue
        stages = read_network(expert, tuple(x.shape[1:]), trained=True)
        ball = Ball(x[rows], x.new_full((len(rows),), radius), threat.norm)
        low_nC = _lower(stages, ball, y[rows], settings.bound)
        weight_n1 = (route.weights * selected_NK).sum(1, keepdim=True)[rows]
        if worst_NC is None:
            worst_NC = low_nC.new_zeros(len(x), low_nC.shape[1])
        worst_NC = worst_NC.index_add(0, rows, -weight_n1 * low_nC)
    assert worst_NC is not None
    return worst_NC


@contextmanager
def _evaluating(mixture: MixtureOfExperts) -> Iterator[None]:
    """Evaluation mode inside, with gradients."""
    modes = [(module, module.training) for module in mixture.modules()]
    try:
        mixture.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def _lower(stages: tuple[Stage, ...], ball: Ball, y: Tensor, bound: Bound) -> Tensor:
    """(n, C): lower bounds of f^y - f^k in the ball."""
    (classes,) = stages[-1].out_shape
    eye_CC = torch.eye(classes, dtype=ball.x.dtype, device=ball.x.device)
    rows_nCC = eye_CC[y][:, None] - eye_CC
    match bound:
        case "ibp":
            return interval_lower(stages, interval_features(stages, ball), rows_nCC)
        case "crown-ibp":
            return crown_ibp_lower(stages, rows_nCC, ball)
        case "margin":
            with torch.no_grad():
                constants_CC = output_lipschitz(stages, tuple(ball.x.shape[1:]), ball.norm).to(ball.x)
            logits = forward(stages, ball.x)
            return logits.gather(1, y[:, None]) - logits - constants_CC[y] * ball.radius[:, None]
