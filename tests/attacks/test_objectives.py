from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from phalanx.attacks import OBJECTIVES
from phalanx.methods.base import mean_kl
from phalanx.routing import Route, Routed

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


# -- the router's part -------------------------------------------------------------------------------------------------


def _route(*probabilities: float, gap: float = 0.0) -> Route:
    """Scores whose softmax these are, for each of two images; `gap` lifts the first expert's."""
    scores = torch.tensor(probabilities).log().repeat(2, 1)
    scores[:, 0] += gap
    return Route(scores.requires_grad_(), scores.argmax(-1, keepdim=True), torch.ones(2, 1))


def test_the_divergence_of_classes_and_scores_by_hand() -> None:
    # KL((1, 3) / 4 || (3, 1) / 4) = ln(3) / 2, of the scores; the classes do not move
    clean, attacked = _route(0.25, 0.75), _route(0.75, 0.25)
    gain = OBJECTIVES["kl_route"](Routed(LOGITS, attacked), Routed(LOGITS, clean), Y)
    torch.testing.assert_close(gain.detach(), torch.full((2,), math.log(3) / 2))
    gain.sum().backward()
    # q - p on the attacked side; the clean side is fixed
    torch.testing.assert_close(attacked.scores.grad, torch.tensor([[0.5, -0.5], [0.5, -0.5]]))
    assert clean.scores.grad is None
    # 1 to 1 with the classes, and the mean over gates
    moved = Routed(LOGITS.flip(-1), (attacked, clean))
    whole = OBJECTIVES["kl_route"](moved, Routed(LOGITS, (clean, clean)), Y)
    classes = OBJECTIVES["kl"](moved, Routed(LOGITS, None), Y)
    torch.testing.assert_close(whole - classes, torch.full((2,), math.log(3) / 4))
    assert torch.equal(OBJECTIVES["kl_route"](Routed(LOGITS.flip(-1), None), Routed(LOGITS, None), Y), classes)


def _plain_kl(clean: Tensor, attacked: Tensor) -> Tensor:
    p, q = clean.softmax(-1), attacked.softmax(-1)
    return (p * (p.log() - q.log())).sum(-1)


@pytest.mark.parametrize("gap", [0.0, 1.0, 20.0, 79.0, 87.0, 104.0, 200.0, 500.0])
def test_the_divergence_is_finite_at_any_gap_and_the_plain_one_where_that_is(gap: float) -> None:
    # as released, t log t of a probability that underflows has a NaN gradient
    for first, second in ((gap, 0.0), (0.0, gap), (gap, -gap / 2), (gap, gap)):
        clean, attacked = (torch.tensor([[value, 0.0]], requires_grad=True) for value in (first, second))
        routes = (Route(scores, torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)) for scores in (attacked, clean))
        adv, before = (Routed(LOGITS[:1], route) for route in routes)
        gain = OBJECTIVES["kl_route"](adv, before, Y[:1])
        trained = mean_kl(clean, attacked)
        gradients = [
            *torch.autograd.grad(gain.sum(), attacked, retain_graph=True),
            *torch.autograd.grad(trained, (clean, attacked)),
        ]
        assert gain.isfinite().all() and trained.isfinite() and all(g.isfinite().all() for g in gradients)
        torch.testing.assert_close(gain.detach(), trained.detach()[None])
        if gap < 80:
            plain = _plain_kl(clean, attacked)
            torch.testing.assert_close(trained.detach()[None], plain.detach())
            expected = torch.autograd.grad(plain.sum(), (clean, attacked))
            torch.testing.assert_close(gradients[1:], list(expected), rtol=1e-4, atol=1e-5)
        elif gap >= 104:
            broken = torch.autograd.grad(_plain_kl(clean, attacked).sum(), (clean, attacked))
            assert any(not gradient.isfinite().all() for gradient in broken)


def test_the_released_loss_by_hand() -> None:
    # labels 0 and 2 of two experts: both expert 0, of probability 1/4
    y = torch.tensor([0, 2])
    route = _route(0.25, 0.75)
    gain = OBJECTIVES["cross_entropy_route-6"](Routed(LOGITS, route), None, y)
    torch.testing.assert_close(gain.detach(), torch.tensor([math.log(8), math.log(8)]) + 6 * math.log(4))
    odd = OBJECTIVES["cross_entropy_route-2"](Routed(LOGITS, (route, _route(0.5, 0.5))), None, torch.tensor([1, 1]))
    expected = torch.tensor([math.log(4), math.log(8 / 3)]) + 2 * (math.log(4 / 3) + math.log(2)) / 2
    torch.testing.assert_close(odd.detach(), expected)
    plain = OBJECTIVES["cross_entropy"](Routed(LOGITS, None), None, y)
    assert torch.equal(OBJECTIVES["cross_entropy_route-6"](Routed(LOGITS, None), None, y), plain)
