from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from phalanx.attacks import OBJECTIVES
from phalanx.routing import Routed

LOGITS = torch.log(torch.tensor([[1.0, 2.0, 5.0], [4.0, 3.0, 1.0]]))  # probabilities in eighths
Y = torch.tensor([0, 0])


def gain_and_gradient(name: str) -> tuple[Tensor, Tensor]:
    logits = LOGITS.clone().requires_grad_()
    gain = OBJECTIVES[name](Routed(logits, None), None, Y)
    return gain.detach(), torch.autograd.grad(gain.sum(), logits)[0]


def test_cross_entropy_by_hand() -> None:
    gain, gradient = gain_and_gradient("cross_entropy")
    torch.testing.assert_close(gain, torch.tensor([math.log(8), math.log(2)]))
    # softmax minus one-hot, for each image by itself: no mean over the batch
    torch.testing.assert_close(gradient, torch.tensor([[-7.0, 2.0, 5.0], [-4.0, 3.0, 1.0]]) / 8)


def test_margin_by_hand() -> None:
    gain, gradient = gain_and_gradient("margin")
    # the best other class against the label: 5 to 1 and 3 to 4; positive is an error
    torch.testing.assert_close(gain, torch.tensor([math.log(5), math.log(3 / 4)]))
    torch.testing.assert_close(gradient, torch.tensor([[-1.0, 0.0, 1.0], [-1.0, 1.0, 0.0]]))


@pytest.mark.parametrize("name", ["cross_entropy", "margin"])
def test_gains_are_per_image(name: str) -> None:
    whole = OBJECTIVES[name](Routed(LOGITS, None), None, Y)
    for row in range(2):
        part = OBJECTIVES[name](Routed(LOGITS[row : row + 1], None), None, Y[:1])
        torch.testing.assert_close(part, whole[row : row + 1])
