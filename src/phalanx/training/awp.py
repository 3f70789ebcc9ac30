"""Adversarial weight perturbation: an update's gradient is taken where its loss is higher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from phalanx.nn import preserved_rng

_TINY = 1e-20
"""Keeps a tensor without gradient where it is."""


@contextmanager
def perturbed_weights(
    model: nn.Module, parameters: Sequence[nn.Parameter], loss: Callable[[], Tensor], gamma: float
) -> Iterator[Tensor]:
    """Inside, every weight w among `parameters` is w + gamma ||w|| g / ||g||, g the gradient of `loss` (Wu et al. 2020,
    eqs. 8 to 10, one step: relative size gamma in every tensor); outside, bit for bit what it was.

    Weights are the tensors of more than one dimension, as in the paper: kernels and matrices, not biases and
    BatchNorm's scales. The pass that gives g leaves no trace: buffers (BatchNorm's statistics) and torch's global
    random state are put back, so that the pass made inside draws the same dropout and is the only one that counts.

    Args:
        model: whose buffers the loss may move.
        parameters: those that are about to move; others stay where they are.
        loss: () differentiable, called once.
        gamma: the relative size, positive.

    Yields the loss () before the perturbation, detached.
    """
    weights = [parameter for parameter in parameters if parameter.dim() > 1]
    before = [weight.detach().clone() for weight in weights]
    with preserved_rng(), _buffers_kept(model):
        value, gradients = _gradients(loss, weights)
    try:
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.addcmul_(gradient, gamma * weight.norm() / (gradient.norm() + _TINY))
        yield value
    finally:
        with torch.no_grad():
            for weight, old in zip(weights, before, strict=True):
                weight.copy_(old)


def _gradients(loss: Callable[[], Tensor], weights: Sequence[nn.Parameter]) -> tuple[Tensor, Sequence[Tensor]]:
    value = loss()
    # backward runs in the precision the forward chose
    with torch.autocast(value.device.type, enabled=False):
        # an idle expert's weights are not in the graph: they stay
        gradients = torch.autograd.grad(value, weights, materialize_grads=True) if weights else ()
    return value.detach(), gradients


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            # by name: a module may have put another tensor in a buffer's place
            for name, buffer in model.named_buffers():
                buffer.copy_(before[name])
