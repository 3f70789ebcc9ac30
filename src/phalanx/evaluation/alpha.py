"""The weight of a dual model's robust half, from that half's margins under attack: nothing is trained."""

# B batch, C classes, N attacked-correct images

from __future__ import annotations

import math
from fractions import Fraction
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from phalanx.attacks import Attack
from phalanx.data import Batch, ImageSet
from phalanx.errors import InputError
from phalanx.evaluation.filling import nobody
from phalanx.evaluation.halving import Halving
from phalanx.nn import exact_fp32, frozen, preserved_rng
from phalanx.rng import SampleRng
from phalanx.routing import routed

_MARGIN_SEEKING = ("margin", "steer")


class AlphaChoice(NamedTuple):
    """A weight for the robust half and what it was read off."""

    alpha: float
    """1 / (1 + quantile), in [1/2, 1]."""
    quantile: float
    """The margin in probability, in [0, 1], that at least the share `keep` of the `n` images reach."""
    n: int
    """Images that the robust half answers correctly under the attack."""


def pick_alpha(
    robust: nn.Module,
    images: ImageSet,
    attack: Attack,
    *,
    keep: float = 0.985,
    batch_size: int = 128,
    seed: int = 0,
) -> AlphaChoice:
    """The smallest alpha at which a `DualModel` must keep the share `keep` of what its robust half holds.

    The rule of MixedNUTS (Bai et al. 2024, TMLR) without its map of the logits: q is the (1 - keep) quantile of the
    margins p_y - max_{k != y} p_k of `robust` over the images it still answers correctly under attack, each at the
    worse of the clean and the attacked image, and alpha = 1 / (1 + q), so that (1 - alpha) / alpha = q.

    Guaranteed, up to a tie and rounding at q itself: at those points at least ceil(keep * n) of the n images are
    answered correctly by the dual model that mixes probabilities, whatever its standard half says. Not guaranteed:
    anything about other images, or about a perturbation of these at which the margin is smaller still. The attack
    found an upper bound on the smallest margin, so a stronger one gives a larger alpha; judge the dual model by an
    attack of its own. Nor does it say that the standard half can use the room it is left: near alpha = 1 it cannot.

    Args:
        robust: the robust half alone, images to logits (B, C). It is attacked in evaluation mode and left as it was.
        images: validation data, held out of training. Never the test split: alpha would be fitted to it.
        attack: what searches for the smallest margin, with objective "margin", or route steering for a mixture.
        keep: share of the attacked-correct images to keep, in (0, 1].
        batch_size: images attacked at once; no number depends on it, up to rounding.
        seed: of the attack's random numbers.

    Where no image withstands the attack there is nothing to keep: n is 0 and alpha 1, the robust half alone.
    Raises InputError for another objective, a bad `keep`, or no images.
    """
    check_picking(images, attack, keep)
    device = next((p.device for p in robust.parameters()), torch.device("cpu"))
    halving, margins = Halving(nobody), partial(_held_margins, robust, attack=attack, seed=seed)
    batches = images.batches(batch_size, device)
    margins_N = torch.cat([part for batch in batches for part in halving.pieces(batch, margins)]).sort().values
    n = len(margins_N)
    if not n:
        return AlphaChoice(1.0, 0.0, 0)
    quantile = kept_quantile(margins_N, keep)
    return AlphaChoice(1 / (1 + quantile), quantile, n)


def check_picking(images: ImageSet, attack: Attack, keep: float) -> None:
    """Raises InputError unless margins can be searched for on `images`, and a share `keep` of them kept."""
    if attack.objective not in _MARGIN_SEEKING:
        raise InputError(
            f"the attack must seek the smallest margin, got objective {attack.objective!r}; set objective='margin'"
        )
    if not 0 < keep <= 1:
        raise InputError(f"keep must be in (0, 1], the share of robust answers to keep, got {keep}")
    if not len(images):
        raise InputError("there are no images to pick on; raise data.val_fraction")


def kept_quantile(margins_N: Tensor, keep: float) -> float:
    """The largest of N >= 1 margins, sorted upwards, that at least the share `keep` of them reach."""
    # exact: in floating point (1 - 0.9) * 10 is less than 1
    return float(margins_N[math.floor((1 - Fraction(str(keep))) * len(margins_N))])


def _held_margins(robust: nn.Module, batch: Batch, attack: Attack, seed: int) -> Tensor:
    """(N,) float64 on the CPU: the worst margins of the batch's images that are still answered correctly."""
    result = attack.run(robust, batch.x, batch.y, rng=SampleRng(seed, batch.ids))
    held = ~(result.broken | result.invalid)
    with torch.no_grad(), frozen(robust), exact_fp32(), preserved_rng():
        margins = [probability_margins(routed(robust, x).logits, batch.y) for x in (batch.x, result.x_adv)]
    return torch.minimum(*margins)[held].cpu()


def probability_margins(logits_BC: Tensor, y_B: Tensor) -> Tensor:
    """(B,) p_y - max_{k != y} p_k in float64."""
    p_BC = logits_BC.double().softmax(-1)
    p_y_B1 = p_BC.gather(-1, y_B[:, None])
    return p_y_B1.squeeze(-1) - p_BC.scatter(-1, y_B[:, None], float("-inf")).amax(-1)
