"""Free adversarial training as Shafahi et al. 2019 write it, in plain SGD and one image at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def free_at(
    model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], replays: int, epsilon: float, length: float, lr: float
) -> Tensor:
    """Moves `model` over batches of (x (B, ...), y (B,)); the Linf perturbation (B, ...) that is left at the end.

    It belongs to places of the batch, and is kept within [0, 1] of the image it is added to.
    """
    carried = torch.zeros_like(max((x for x, _ in batches), key=len))
    for x, y in batches:
        for _ in range(replays):
            steps = [torch.zeros_like(parameter) for parameter in model.parameters()]
            climbed = []
            for place, label in enumerate(y.tolist()):
                image = (x[place] + carried[place].clamp(-epsilon, epsilon)).clamp(0, 1).requires_grad_()
                loss = -model(image[None]).log_softmax(-1)[0, label]
                gradient, *weights = torch.autograd.grad(loss, [image, *model.parameters()])
                climbed.append(image.detach() + length * gradient.sign())
                steps = [step + weight / len(x) for step, weight in zip(steps, weights, strict=True)]
            for place, image in enumerate(climbed):
                carried[place] = (image - x[place]).clamp(-epsilon, epsilon)
                carried[place] = (x[place] + carried[place]).clamp(0, 1) - x[place]
            with torch.no_grad():
                for parameter, step in zip(model.parameters(), steps, strict=True):
                    parameter -= lr * step
    return carried
