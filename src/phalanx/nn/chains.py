"""Networks that are chains of layers, seen layer by layer."""

from __future__ import annotations

from torch import nn

from phalanx.nn.routed import Chain


def layers_of(network: nn.Module) -> list[nn.Module]:
    """The layers of a chain in order, chains within it opened; anything else is one layer.

    Exact types only, since a subclass may compute more.
    """
    if not isinstance(network, nn.Sequential) or type(network) not in (nn.Sequential, Chain) or not len(network):
        return [network]
    return [layer for part in network for layer in layers_of(part)]
