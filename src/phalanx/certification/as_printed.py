"""What the printed theorems of the dual-model paper claim of a model's images. UNSOUND: to be attacked, not believed.

Their constants are taken literally: of the class and the expert that answer, with a router that is constant around
every image, as the paper's text has it for top-1 (r = 0; no bound M is then needed). docs/certification.md says what is
wrong.
"""

# N samples, C classes, E experts

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from phalanx.bounds import class_lipschitz, dual_norm, forward
from phalanx.bounds.stages import Shape
from phalanx.certification.networks import Network
from phalanx.certification.paper import printed_theorem_5_4, printed_theorem_5_5
from phalanx.errors import InputError
from phalanx.routing import DualModel, MixtureOfExperts
from phalanx.threat import Norm

Slopes = Literal["upper bounds", "gradients"]
"""What is put in for Lipschitz constants: upper bounds of them, valid everywhere, or the gradient at the image, which
is no bound of anything around it."""
SLOPES: tuple[Slopes, ...] = get_args(Slopes)


@dataclass(frozen=True, eq=False)
class Claim:
    """Radii as printed. UNSOUND."""

    theorem: Literal["5.4", "5.5"]
    slopes: Slopes
    radius: Tensor
    """(N,) float64; 0 for images that are misclassified."""


def printed_claims(model: nn.Module, x: Tensor, y: Tensor, norm: Norm) -> tuple[Claim, ...]:
    """Theorem 5.4's radii of a top-1 mixture, or 5.5's of a dual model whose robust half is one, around images x
    (N, C, H, W) with labels y (N,), once for each of `SLOPES`.

    Raises InputError for another model: under another gate the theorems ask for bounds that no mixture of logits has.
    """
    mixture, alpha = _subject(model)
    shape: Shape = tuple(x.shape[1:])
    with torch.no_grad():
        right = model(x).argmax(1) == y
        expert = mixture.gate(x).experts[:, 0]
    networks = [Network.read(each, shape, norm, f"experts.{index}") for index, each in enumerate(mixture.experts)]
    values = torch.zeros(len(x), networks[0].lipschitz.shape[0], dtype=torch.float64, device=x.device)
    bounds, gradients = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    for index, network in enumerate(networks):
        some = (expert == index).nonzero()[:, 0]
        if len(some):
            found = _at(network, x[some], y[some], norm, probabilities=alpha is not None)
            values[some], bounds[some], gradients[some] = found
    margins = values.gather(1, y[:, None])[:, 0] - values.scatter(1, y[:, None], -torch.inf).amax(1)
    margins = margins.masked_fill(~right, 0)
    # weight 1 on the expert that answers, whatever its number
    one, none = torch.ones_like(values[:, :1]), values.new_zeros(1)
    claims = []
    for slopes, own in zip(SLOPES, (bounds, gradients), strict=True):
        if alpha is None:
            radius = printed_theorem_5_4(margins, one, none, none, own[:, None])
        else:
            radius = printed_theorem_5_5(margins, one, none, own[:, None], alpha)
        claims.append(Claim("5.4" if alpha is None else "5.5", slopes, radius))
    return tuple(claims)


def _subject(model: nn.Module) -> tuple[MixtureOfExperts, float | None]:
    robust = model.robust if type(model) is DualModel else model
    if type(robust) is not MixtureOfExperts or robust.top_k != 1:
        raise InputError(
            "the printed theorems are computed for top-1 mixtures, and for dual models whose robust half is one; under "
            "another gate they ask for bounds that no mixture of logits has"
        )
    if type(model) is not DualModel:
        return robust, None
    if model.mix != "probabilities":
        raise InputError(f"theorem 5.5 is about averaged probabilities, and the dual model averages {model.mix}")
    if not 0.5 <= model.alpha <= 1:
        raise InputError(f"theorem 5.5 asks for alpha in [1/2, 1], and the dual model has {model.alpha}")
    return robust, model.alpha


def _at(network: Network, x: Tensor, y: Tensor, norm: Norm, *, probabilities: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Values (N, C), an upper bound of what the theorem's L is, and the gradient in its place, both (N,).

    Theorem 5.4 has the true class's constant, 5.5 those of both classes, of probabilities: Lip(p_c) <= max_j l_cj / 4.
    """
    image = x.double().requires_grad_()
    logits = forward(network.stages, image)
    values = logits.softmax(1) if probabilities else logits
    rival = values.scatter(1, y[:, None], -torch.inf).argmax(1)
    own, other = (values.gather(1, klass[:, None]).sum() for klass in (y, rival))
    steep = _steepness(own, image, norm)
    if not probabilities:
        slopes = class_lipschitz(network.stages, network.shape, norm).to(image)[y]
        return values.detach(), slopes, steep
    each = network.lipschitz.to(image).amax(1) / 4
    return values.detach(), each[y] + each.amax(), steep + _steepness(other, image, norm)


def _steepness(value: Tensor, image: Tensor, norm: Norm) -> Tensor:
    """(N,): the dual norm of each image's gradient."""
    return dual_norm(torch.autograd.grad(value, image, retain_graph=True)[0].flatten(1), norm)
