"""RT-ER's and JTDMoE's losses as in the released code, one image and one expert at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from reference.mixture import mixture_logits


def _pgd(network: Callable[[Tensor], Tensor], image: Tensor, label: int, epsilon: float, steps: int) -> Tensor:
    """Linf ascent of the cross-entropy from the clean image, (1, ...), in steps of epsilon / 4; the last iterate."""
    moved = image.clone()
    for _ in range(steps):
        moved.requires_grad_()
        (gradient,) = torch.autograd.grad(-network(moved).log_softmax(-1)[0, label], moved)
        stepped = moved.detach() + epsilon / 4 * gradient.sign()
        moved = torch.minimum(torch.maximum(stepped, image - epsilon), image + epsilon).clamp(0, 1)
    return moved


def _kl(clean: Tensor, attacked: Tensor) -> Tensor:
    """KL(softmax(clean) || softmax(attacked)) of logits (1, C)."""
    p, q = clean.softmax(-1)[0], attacked.softmax(-1)[0]
    return torch.stack([p[c] * (p[c] / q[c]).log() for c in range(len(p))]).sum()


def rt_er_loss(
    router: nn.Module,
    experts: Sequence[nn.Module],
    x: Tensor,
    y: Tensor,
    *,
    regularised: str,
    reduction: str,
    beta: float,
    epsilon: float,
    steps: int,
) -> Tensor:
    """() the mean over the images of CE(F(x + d), y) + beta KL, of a top-1 mixture without balance loss.

    Every KL is that of one expert on its own attack; "second" is the clean image's second best expert, "all" is every
    expert. "mean" or "sum" over the experts of one image.
    """

    def whole(image: Tensor) -> Tensor:
        return mixture_logits(router, experts, image, 1)

    losses = []
    for image, label in zip(x.split(1), y.tolist(), strict=True):
        scores = router(image)[0].tolist()
        order = sorted(range(len(experts)), key=lambda e: -scores[e])
        d = _pgd(whole, image, label, epsilon, steps)
        kls = [
            _kl(experts[e](image), experts[e](_pgd(experts[e], image, label, epsilon, steps)))
            for e in (order[1:2] if regularised == "second" else order)
        ]
        kl = torch.stack(kls).sum() / (len(kls) if reduction == "mean" else 1)
        losses.append(-whole(d).log_softmax(-1)[0, label] + beta * kl)
    return torch.stack(losses).sum() / len(losses)


def dual_loss(
    standard: Callable[[Tensor], Tensor], robust: Callable[[Tensor], Tensor], alpha: float, mix: str
) -> Callable[[Tensor, Tensor], Tensor]:
    """(x, y) to the mean of -log D(x)[y], D the mixed probabilities, or the softmax of the mixed logits."""

    def loss(x: Tensor, y: Tensor) -> Tensor:
        terms = []
        for image, label in zip(x.split(1), y.tolist(), strict=True):
            s, r = standard(image)[0], robust(image)[0]
            if mix == "probabilities":
                terms.append(-((1 - alpha) * s.softmax(-1)[label] + alpha * r.softmax(-1)[label]).log())
            else:
                mixed = (1 - alpha) * s + alpha * r
                terms.append(-(mixed[label].exp() / mixed.exp().sum()).log())
        return torch.stack(terms).sum() / math.prod(y.shape)

    return loss
