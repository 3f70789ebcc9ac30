from __future__ import annotations

from torch import nn

from phalanx.nn import Chain, ConvBN, layers_of


def test_chains_are_opened_and_nothing_else() -> None:
    a, b, c, d = nn.Linear(1, 1), nn.ReLU(), ConvBN(1, 1), nn.Linear(1, 1)
    assert layers_of(nn.Sequential(a, nn.Sequential(b, Chain(c)), d)) == [a, b, c, d]
    assert layers_of(Chain(a, b)) == [a, b]
    assert layers_of(a) == [a] and layers_of(c) == [c]
    empty = nn.Sequential()
    assert layers_of(empty) == [empty]
