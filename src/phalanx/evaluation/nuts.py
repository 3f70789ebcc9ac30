"""The four numbers of a `MixedNUTS` from its robust half alone, by a search over a grid: nothing is trained."""

# B batch, C classes, N attacked-correct images, M clean images answered wrongly

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from phalanx.attacks import Attack
from phalanx.data import Batch, ImageSet
from phalanx.errors import InputError
from phalanx.evaluation.alpha import check_picking, kept_quantile, probability_margins
from phalanx.nn import exact_fp32, frozen, preserved_rng
from phalanx.rng import SampleRng
from phalanx.routing import LogitMap, normalised, routed

_RESOLVED = 1e-6
"""A margin nearer than this to 0 or 1 is lost when log-probabilities are rounded to float32."""


@dataclass(frozen=True, kw_only=True)
class NutsGrid:
    """The maps that are tried: `points` values in each of three ranges, both ends included.

    Raises InputError for a range that does not go up or that `LogitMap` refuses.
    """

    scale: tuple[float, float] = (0.05, 5.0)
    """Log-spaced. The default ranges hold what was published for CIFAR-10: 5, with power 4 and bias -1.1. For CIFAR-100
    it was 0.61, 3.6 and -2.1, for ImageNet 0.024, 2.7 and -0.29: lower `bias`, or `scale`."""
    power: tuple[float, float] = (1.0, 4.0)
    """Evenly spaced."""
    bias: tuple[float, float] = (-1.1, 0.0)
    """Evenly spaced. At 0 no map changes an answer of the robust half; a negative one may where no logit stands out."""
    points: int = 8

    def __post_init__(self) -> None:
        for name in ("scale", "power", "bias"):
            low, high = getattr(self, name)
            if not low <= high:
                raise InputError(f"grid.{name} must go from low to high, got {low} to {high}; swap them")
        if self.points < 1:
            raise InputError(f"grid.points must be at least 1, got {self.points}")
        try:
            for scale, power, bias in zip(self.scale, self.power, self.bias, strict=True):
                LogitMap(scale=scale, power=power, bias=bias)
        except ValueError as error:
            raise InputError(f"the grid has an end that is no map: {error}") from None

    def maps(self) -> list[LogitMap]:
        """`points`^3 of them."""
        shares = torch.linspace(0, 1, self.points, dtype=torch.float64).tolist()
        (low, high), *even = self.scale, self.power, self.bias
        scales = [low * (high / low) ** share for share in shares]
        powers, biases = ([start + (end - start) * share for share in shares] for start, end in even)
        return [
            LogitMap(scale=scale, power=power, bias=bias)
            for scale, power, bias in itertools.product(scales, powers, biases)
        ]


class NutsChoice(NamedTuple):
    """What a `MixedNUTS` is built with, and what it was read off."""

    alpha: float
    """1 / (1 + quantile), in [1/2, 1]."""
    scale: float
    power: float
    bias: float
    quantile: float
    """The margin in probability, in [0, 1], that at least the share `keep` of the `held` images reach."""
    out_of_reach: float
    """The share of the `wrong` images where R's first class leads its second by no less: no standard half can correct
    those. The others it can only if the label is close enough to that first class."""
    held: int
    """Images that the robust half answers correctly under the attack."""
    wrong: int
    """Images that it answers wrongly without one."""


class _Seen(NamedTuple):
    """Normalised logits of the robust half, float64 on the CPU."""

    clean_NC: Tensor
    attacked_NC: Tensor
    y_N: Tensor
    wrong_MC: Tensor


def pick_nuts(
    robust: nn.Module,
    images: ImageSet,
    attack: Attack,
    *,
    keep: float = 0.985,
    batch_size: int = 128,
    seed: int = 0,
    grid: NutsGrid | None = None,
) -> NutsChoice:
    """The map on `grid` (by default `NutsGrid()`) and the alpha with which a `MixedNUTS` corrects most and keeps the
    share `keep` of what its robust half holds (Bai et al. 2024, TMLR).

    For each map T: q is the (1 - keep) quantile of the margins p_y - max_{k != y} p_k of p = softmax(T(z_R)) over the
    images that R still answers correctly under attack, each at the worse of the clean and the attacked image. Images
    that R answers wrongly without an attack with a lead of its first class over its second of at least q are out of S's
    reach. The map with the fewest of them wins, and alpha = 1 / (1 + q), so that (1 - alpha) / alpha = q. Among equals
    it is the one whose q is farthest from 0 and 1, where rounding to float32 decides.

    Guaranteed and not guaranteed is what `pick_alpha` says, of R's mapped probabilities. The attack sees R without T:
    the perturbation that it finds need not be the one that leaves the least margin after T.

    Args:
        robust: the robust half alone, images to logits (B, C). It is attacked in evaluation mode and left as it was.
        images: validation data, held out of training. Never the test split (the released code takes its first 1000
            images): all four numbers would be fitted to it.
        attack: what searches for the smallest margin, with objective "margin", or route steering for a mixture.
        keep: share of the attacked-correct images to keep, in (0, 1]; published: 0.985 for CIFAR, 0.99 for ImageNet.
        batch_size: images attacked at once; no number depends on it, up to rounding.
        seed: of the attack's random numbers.
        grid: the maps to try.

    Raises InputError for another objective, a bad `keep`, no images, no image that withstands the attack, or a grid of
    which every map turns answers that should be kept.
    """
    check_picking(images, attack, keep)
    device = next((p.device for p in robust.parameters()), torch.device("cpu"))
    batches = [_seen(robust, batch, attack, seed) for batch in images.batches(batch_size, device)]
    seen = _Seen(*(torch.cat(parts) for parts in zip(*batches, strict=True)))
    if not len(seen.y_N):
        raise InputError(
            f"the robust half answers none of {len(images)} images correctly under attack, so there is no margin to "
            "keep; train it for robustness, or attack within a smaller eps"
        )
    choices = [_tried(each, seen, keep) for each in (grid or NutsGrid()).maps()]
    safe = [choice for choice in choices if choice.quantile >= 0]
    if not safe:
        raise InputError("every map of the grid turns answers of the robust half; let grid.bias reach up to 0")
    return min(safe, key=_rank)


def _rank(choice: NutsChoice) -> tuple[bool, float, float]:
    room = min(choice.quantile, 1 - choice.quantile)
    return room < _RESOLVED, choice.out_of_reach, -room


def _seen(robust: nn.Module, batch: Batch, attack: Attack, seed: int) -> _Seen:
    result = attack.run(robust, batch.x, batch.y, rng=SampleRng(seed, batch.ids))
    held = ~(result.broken | result.invalid)
    wrong = (result.clean_predicted != batch.y) & ~result.invalid
    with torch.no_grad(), frozen(robust), exact_fp32(), preserved_rng():
        clean, attacked = (normalised(routed(robust, x).logits) for x in (batch.x, result.x_adv))
    return _Seen(clean[held].cpu(), attacked[held].cpu(), batch.y[held].cpu(), clean[wrong].cpu())


def _tried(found: LogitMap, seen: _Seen, keep: float) -> NutsChoice:
    margins = [probability_margins(found.stretched(part), seen.y_N) for part in (seen.clean_NC, seen.attacked_NC)]
    margins_N = torch.minimum(*margins).sort().values
    quantile = kept_quantile(margins_N, keep)
    wrong = len(seen.wrong_MC)
    first_M, second_M = found.stretched(seen.wrong_MC).softmax(-1).topk(2).values.unbind(-1)
    out_of_reach = float((first_M - second_M >= quantile).double().mean()) if wrong else 0.0
    alpha = 1 / (1 + max(quantile, 0.0))
    return NutsChoice(
        alpha, found.scale, found.power, found.bias, quantile, out_of_reach, held=len(margins_N), wrong=wrong
    )
