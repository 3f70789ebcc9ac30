"""Convolutions of which a mask keeps the filters that a score tensor ranks highest (AdvMoE's AT (Sparse), HYDRA)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phalanx.nn.routed import PlainLayers, Width

Phase = Literal["mask", "weights"]
Masked = Literal["all", "routed"]


def kept_filters(filters: int, scale: float) -> int:
    """How many of a convolution's filters are kept: C - int((1 - scale) C), the ceiling of scale * C.

    One more than `scaled_width` keeps, unless scale * C is whole. Raises ValueError for a scale outside (0, 1].
    """
    if not 0 < scale <= 1:
        raise ValueError(f"scale must be in (0, 1], got {scale}")
    # 0.28 * 25 is 7.000000000000001
    return max(1, math.ceil(scale * filters - 1e-9))


class MaskedConv2d(nn.Module):
    """A bias-free convolution that keeps `kept_filters(out_channels, scale)` of its filters; the others are zero.

    In phase "mask" a score tensor of the weight's shape ranks the filters by the L1 norm of their |scores|; of equal
    ones the later are kept. The gradient of the mask passes unchanged to |scores|: that of the loss in the masked
    weight, times the weight, also of filters that are zero now. The weight is frozen.

    In phase "weights" the mask is the fixed buffer `kept` (out,), and the weight moves. A zeroed filter gets no
    gradient; weight decay may shrink its weights, which nothing reads.

    In evaluation mode a BatchNorm after it turns a zeroed filter's channel into a constant, not into zeros.
    """

    kept: Tensor | None
    scores: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        stride: int = 1,
        padding: int | None = None,
        scale: float,
        phase: Phase = "mask",
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel_size
        self.stride, self.padding = stride, kernel_size // 2 if padding is None else padding
        self.num_kept = kept_filters(out_channels, scale)
        shape = (out_channels, in_channels, kernel_size, kernel_size)
        # what nn.Conv2d does, and AdvMoE's code for the scores
        bound = (in_channels * kernel_size**2) ** -0.5
        learned = phase == "mask"
        self.weight = nn.Parameter(torch.empty(shape).uniform_(-bound, bound), requires_grad=not learned)
        self.scores = nn.Parameter(torch.empty(shape).uniform_(-bound, bound)) if learned else None
        self.register_buffer("kept", None if learned else torch.arange(out_channels) < self.num_kept)

    def extra_repr(self) -> str:
        """The shape; also tells two networks of the same weights apart in a ledger."""
        return (
            f"{self.in_channels}, {self.out_channels}, {self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, kept={self.num_kept}"
        )

    def selected(self) -> Tensor:
        """(out,) bool: the filters that are kept, `num_kept` of them."""
        if self.kept is not None:
            return self.kept
        assert self.scores is not None
        order = self.scores.detach().abs().flatten(1).sum(1).argsort(stable=True)
        return torch.ones_like(order, dtype=torch.bool).index_fill(0, order[: len(order) - self.num_kept], False)

    def _mask(self) -> Tensor:
        """Zeros and ones, (out, 1, 1, 1) or, where the scores want their gradient, of the weight's shape."""
        mask = self.selected().to(self.weight.dtype).reshape(-1, 1, 1, 1)
        if self.scores is None or not self.scores.requires_grad:
            return mask
        size = self.scores.abs()
        return mask + (size - size.detach())

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) to (B, out, H', W')."""
        return F.conv2d(x, self.weight * self._mask(), stride=self.stride, padding=self.padding)

    @torch.no_grad()
    def rank_by_weight(self) -> None:
        """Sets the scores to sqrt(6 / fan-in) w / max|w|, so that the largest filters lead (HYDRA's start)."""
        assert self.scores is not None
        fan_in = self.in_channels * self.kernel_size**2
        self.scores.copy_(self.weight * (6 / fan_in) ** 0.5 / self.weight.abs().max())


class MaskedLayers(PlainLayers):
    """Makes a backbone's convolutions masked where a layer-level mixture's would be routed: a `phalanx.nn.Layers` of
    the unscaled widths."""

    def __init__(self, scale: float, phase: Phase = "mask") -> None:
        super().__init__()
        self.kept_scale, self.phase = scale, phase

    def conv(self, inputs: Width, outputs: Width, kernel_size: int = 3, *, stride: int = 1) -> nn.Module:
        """See `Layers`."""
        return MaskedConv2d(
            inputs.kept, outputs.kept, kernel_size, stride=stride, scale=self.kept_scale, phase=self.phase
        )


def mask_the_rest(network: nn.Module, scale: float, phase: Phase = "mask") -> None:
    """Puts a masked convolution, freshly initialised, in the place of every plain one: stems, shortcuts, transitions.

    Raises ValueError for one that a `MaskedConv2d` cannot stand for.
    """
    for parent in [*network.modules()]:
        for name, layer in parent.named_children():
            if type(layer) is nn.Conv2d:
                setattr(parent, name, _masked(layer, scale, phase))


def _masked(layer: nn.Conv2d, scale: float, phase: Phase) -> MaskedConv2d:
    size, stride, padding = layer.kernel_size[0], layer.stride[0], layer.padding[0]
    assert isinstance(padding, int)
    plain = nn.Conv2d(layer.in_channels, layer.out_channels, size, stride=stride, padding=padding, bias=False)
    if repr(plain) != repr(layer):
        raise ValueError(f"only square bias-free convolutions of one group can be masked, got {layer}")
    return MaskedConv2d(
        layer.in_channels, layer.out_channels, size, stride=stride, padding=padding, scale=scale, phase=phase
    )


def masked_convolutions(network: nn.Module) -> Iterator[tuple[str, MaskedConv2d]]:
    """Those of `network`, by name."""
    return ((name, module) for name, module in network.named_modules() if isinstance(module, MaskedConv2d))


def freeze_weights(network: nn.Module, *, train_norms: bool) -> None:
    """Leaves only the scores to move and, with `train_norms`, scale and shift of every BatchNorm.

    Running statistics go on moving in training mode.
    """
    network.requires_grad_(False)
    for module in network.modules():
        if isinstance(module, MaskedConv2d) and module.scores is not None:
            module.scores.requires_grad_(True)
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.requires_grad_(train_norms)


def begin_mask(network: nn.Module, dense: Mapping[str, Tensor]) -> None:
    """Gives a network in phase "mask" the weights of the same one without masks, and scores that rank by them."""
    scores = {name: tensor for name, tensor in network.state_dict().items() if name.endswith(".scores")}
    network.load_state_dict({**dense, **scores})
    for _, layer in masked_convolutions(network):
        layer.rank_by_weight()


def fix_mask(network: nn.Module, learned: nn.Module) -> None:
    """Gives a network in phase "weights" the weights of `learned`, the same one in phase "mask", and its mask."""
    kept = {f"{name}.kept": layer.selected() for name, layer in masked_convolutions(learned)}
    weights = {name: tensor for name, tensor in learned.state_dict().items() if not name.endswith(".scores")}
    network.load_state_dict({**weights, **kept})
