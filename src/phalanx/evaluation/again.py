"""Images judged once more, in batches of another size: a verdict must not depend on what else is in the batch."""

# N images, C classes

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from phalanx.evaluation.alone import answer

CLOSE = 1e-5
"""Where the two largest logits are closer, another batch size may decide otherwise by rounding alone."""


class Again(NamedTuple):
    """What a model says to N images, on the CPU."""

    predicted: Tensor
    """(N,) int64"""
    invalid: Tensor
    """(N,) bool: the answer is not finite."""
    close: Tensor
    """(N,) bool: finite, and rounding may decide."""

    def differs(self, predicted: Tensor, invalid: Tensor) -> Tensor:
        """(N,) bool: it is another answer than (N,) before, or finite only before, or only now."""
        return (self.invalid != invalid) | (~self.invalid & (self.predicted != predicted))


def judged_in(size: int, model: Callable[[Tensor], Any], x: Tensor, device: torch.device | str) -> Again:
    """What a model on `device` says to images (N, ...), `size` at a time."""
    logits = torch.cat([answer(model, part.to(device)).logits.cpu() for part in torch.split(x, size)])
    # of a single class there is no second
    top = logits.topk(min(2, logits.shape[1]), -1).values
    finite = logits.isfinite().all(-1)
    return Again(logits.argmax(-1), ~finite, finite & (top[:, 0] - top[:, -1] < CLOSE))


def other_size(batch_size: int) -> int:
    """Another number of images, to judge again in."""
    return batch_size // 2 + 1 if batch_size > 2 else batch_size + 1
