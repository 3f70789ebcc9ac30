"""A folded copy that answers otherwise than the model is not searched on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from phalanx.attacks import PGD


class _Indexing(nn.Module):
    """Uses a chain's parts out of order: ReLU between convolution and BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4 * 36, 3)

    def forward(self, x: Tensor) -> Tensor:
        conv, norm, relu = self.parts
        out: Tensor = self.head(norm(relu(conv(x))).flatten(1))
        return out


def test_a_module_that_indexes_into_a_chain_is_searched_as_it_is() -> None:
    torch.manual_seed(0)
    model = _Indexing()
    for _ in range(5):
        model(torch.rand(32, 1, 8, 8))
    model.eval()
    seen: list[object] = []

    class Spy(PGD):
        def perturb(self, target, rng):  # type: ignore[no-untyped-def]
            seen.append(target.search)
            return super().perturb(target, rng)

    x = torch.rand(8, 1, 8, 8)
    Spy(eps=0.1, steps=2).run(model, x, model(x).argmax(-1))
    assert seen == [model]
