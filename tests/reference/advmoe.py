"""AdvMoE's two losses and its attack, one image at a time, in probabilities; no BatchNorm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def _kl(clean: Tensor, attacked: Tensor) -> Tensor:
    """KL(softmax(clean) || softmax(attacked)) of (N,)."""
    p, q = clean.softmax(0), attacked.softmax(0)
    return torch.stack([p[k] * (p[k] / q[k]).log() for k in range(len(p))]).sum()


def _best(scores: Tensor) -> int:
    return scores.tolist().index(max(scores.tolist()))


def _answer(router: nn.Module, experts: Sequence[nn.Module], image: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (C,) of the best expert, times 1 with the gradient of its probability; scores (E,)."""
    scores = router(image)[0]
    p = scores.softmax(0)[_best(scores)]
    return experts[_best(scores)](image)[0] * (1 + p - p.detach()), scores


def advmoe_attack(
    router: nn.Module,
    experts: Sequence[nn.Module],
    x: Tensor,
    start: Tensor,
    *,
    epsilon: float,
    step: float,
    steps: int,
    attack_router: bool,
) -> Tensor:
    """Linf ascent of KL(f) + KL(s), or of KL(f) alone, from `start`."""
    found = []
    for image, moved in zip(x.split(1), start.split(1), strict=True):
        logits, scores = (answer.detach() for answer in _answer(router, experts, image))
        for _ in range(steps):
            moved = moved.detach().requires_grad_()
            logits_adv, scores_adv = _answer(router, experts, moved)
            gain = _kl(logits, logits_adv) + (_kl(scores, scores_adv) if attack_router else 0)
            (gradient,) = torch.autograd.grad(gain, moved)
            stepped = moved.detach() + step * gradient.sign()
            moved = torch.minimum(torch.maximum(stepped, image - epsilon), image + epsilon).clamp(0, 1)
        found.append(moved)
    return torch.cat(found)


def experts_loss(
    router: nn.Module, experts: Sequence[nn.Module], x: Tensor, x_adv: Tensor, y: Tensor, *, beta: float
) -> Tensor:
    """() CE(f(x), y) + beta KL(f(x) || f(x')), a mean over the images; also the "end_to_end" router's."""
    losses = []
    for image, attacked, label in zip(x.split(1), x_adv.split(1), y.tolist(), strict=True):
        clean, adv = (_answer(router, experts, each)[0] for each in (image, attacked))
        losses.append(-clean.softmax(0)[label].log() + beta * _kl(clean, adv))
    return torch.stack(losses).sum() / len(losses)


def router_loss(router: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, *, alpha: float, beta: float) -> Tensor:
    """() alpha CE(s(x), y mod E) + beta KL(s(x) || s(x')), a mean over the images."""
    losses = []
    for image, attacked, label in zip(x.split(1), x_adv.split(1), y.tolist(), strict=True):
        clean, adv = router(image)[0], router(attacked)[0]
        losses.append(-alpha * clean.softmax(0)[label % len(clean)].log() + beta * _kl(clean, adv))
    return torch.stack(losses).sum() / len(losses)
