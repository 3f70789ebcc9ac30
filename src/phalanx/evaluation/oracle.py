"""What a mixture's experts could hold if the gate knew the label: the gap to the gate's own number is the gate's."""

# B batch, C classes, E experts

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from phalanx.attacks import Attack
from phalanx.data import ImageSet
from phalanx.errors import InputError
from phalanx.rng import SampleRng
from phalanx.routing import MixtureOfExperts, SynergyOfExperts


class OracleResult(NamedTuple):
    """Accuracies of the label oracle. An image on which no expert's answer is finite counts in neither."""

    n: int
    """Images."""
    clean: float
    """Share that at least one expert answers correctly."""
    robust: float
    """Share on which the attack found no image, one and the same for all experts, on which every expert errs."""


class OracleVerdicts(NamedTuple):
    """The label oracle's verdicts, in the order of the images, on the CPU."""

    clean: Tensor
    """(N,) bool: at least one expert answers correctly."""
    robust: Tensor
    """(N,) bool: the attack found no image on which every expert errs."""


class _Oracle(nn.Module):
    """Images of the class `label`: the logits (B, C) of whichever expert puts that class farthest ahead.

    Its answer is wrong only where all experts' are. The label is one number for all images, so that no search has to
    carry labels along when samples drop out. Non-finite where all experts are.
    """

    def __init__(self, experts: Iterable[nn.Module], label: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.label = label

    def forward(self, x: Tensor) -> Tensor:
        logits_BEC = torch.stack([expert(x) for expert in self.experts], 1)
        if self.label >= logits_BEC.shape[-1]:
            raise InputError(
                f"labels must be in 0..{logits_BEC.shape[-1] - 1}, the experts' classes, got {self.label}; "
                "use the data that the model is for"
            )
        best_B = self._leads(logits_BEC.detach()).argmax(-1)
        return logits_BEC[torch.arange(len(x), device=x.device), best_B]

    def _leads(self, logits_BEC: Tensor) -> Tensor:
        others_BE = torch.cat([logits_BEC[..., : self.label], logits_BEC[..., self.label + 1 :]], -1).amax(-1)
        lead_BE = logits_BEC[..., self.label] - others_BE
        # a tie that the label wins is right: it comes before one that it loses
        right_BE = logits_BEC.argmax(-1) == self.label
        lead_BE = torch.where(right_BE, lead_BE.clamp_min(torch.finfo(lead_BE.dtype).tiny), lead_BE)
        return lead_BE.masked_fill(~logits_BEC.isfinite().all(-1), float("-inf"))


def oracle_accuracy(
    mixture: nn.Module, images: ImageSet, attack: Attack, *, batch_size: int = 128, seed: int = 0
) -> OracleResult:
    """Clean and robust accuracy of the mixture's experts under a gate that knows the label and picks the best of them.

    An image is broken only if all experts err at one common perturbed image. So no gate that sends each image to one
    of these experts can be more robust, as far as the attack is strong: the number is an upper bound on every such
    gate's only if the attack finds each such image, and an attack that misses some makes it larger, never smaller. It
    bounds no gate that weighs several experts: two wrong answers can average to a right one.

    Args:
        mixture: a `MixtureOfExperts` or `SynergyOfExperts`; what decides in it is not asked. It is attacked in
            evaluation mode and left as it was.
        images: labelled images; each class is attacked by itself, in batches of `batch_size`.
        attack: for example `PGD(steps=50, objective="margin", restarts=5)`. Each step climbs the best expert of that
            step. Every gradient costs all E experts.
        batch_size: images attacked at once; no number depends on it, up to rounding.
        seed: of the attack's random numbers.

    Raises InputError for another model, for an attack on a part of the mixture, for no images, or for labels that the
    experts do not have.
    """
    held = oracle_verdicts(mixture, images, attack, batch_size=batch_size, seed=seed)
    return OracleResult(len(images), *(float(column.double().mean()) for column in held))


def oracle_verdicts(
    mixture: nn.Module, images: ImageSet, attack: Attack, *, batch_size: int = 128, seed: int = 0
) -> OracleVerdicts:
    """The same image by image. Arguments and errors as for `oracle_accuracy`."""
    if not isinstance(mixture, MixtureOfExperts | SynergyOfExperts):
        raise InputError(f"the label oracle chooses among a mixture's experts, got a {type(mixture).__name__}")
    if attack.surface != "whole":
        raise InputError(f"the label oracle has no parts to attack, got surface {attack.surface!r}; use 'whole'")
    if not len(images):
        raise InputError("there are no images to ask the oracle about; give some")
    device = next((p.device for p in mixture.parameters()), torch.device("cpu"))
    clean_N, robust_N = (torch.zeros(len(images), dtype=torch.bool) for _ in range(2))
    for label in np.unique(images.labels).tolist():
        oracle = _Oracle(mixture.experts, label)
        places = torch.from_numpy(np.flatnonzero(images.labels == label))
        batches = images.select(places).batches(batch_size, device)
        for rows, batch in zip(torch.split(places, batch_size), batches, strict=True):
            result = attack.run(oracle, batch.x, batch.y, rng=SampleRng(seed, batch.ids))
            clean_N[rows] = ((result.clean_predicted == label) & ~result.invalid).cpu()
            robust_N[rows] = (~(result.broken | result.invalid)).cpu()
    return OracleVerdicts(clean_N, robust_N)
