"""Routed layers: a convolution whose experts are slices of its channels, and BatchNorm for each expert (AdvMoE)."""

# B batch, E experts

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phalanx.nn.routed import FoldableLayer, Plan, RoutedLayer, Width, scaled_width
from phalanx.routing.assignment import Assignment, scaled
from phalanx.routing.dispatch import MIN_BATCHNORM_GROUP
from phalanx.routing.stats import weights_by_expert

Routers = Literal["shared", "block", "layer"]
NormKind = Literal["shared", "per_expert"]


class MoEConv2d(FoldableLayer):
    """A bias-free convolution of E experts: each image's output is that of the slice its expert owns.

    Expert e maps `in_channels` to `out_channels`. Disjoint experts own rows [e out, (e+1) out) of a weight
    (E out, in, k, k) and read the compact features of the layer before. Overlapping ones are bands of one convolution
    of the unscaled widths `full`: expert e takes `out_channels` outputs from round(e (full - out) / (E - 1)) on, and
    the inputs of its own band of the layer before: each expert is a sub-model of the backbone, as the paper draws it.

    Computed sliced: the cost is that of the selected experts. Each expert starts as a convolution of its own width
    would, whatever E is.

    Args:
        site: which decision of the pass it follows.
        full: unscaled (input, output) widths of overlapping experts; the input's is `in_channels` where the input is
            not routed. None for disjoint ones.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        stride: int = 1,
        num_experts: int,
        site: int = 0,
        full: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel_size
        self.stride, self.num_experts, self.site, self.full = stride, num_experts, site, full
        total_in, total_out = (in_channels, num_experts * out_channels) if full is None else full
        self.weight = nn.Parameter(torch.empty(total_out, total_in, kernel_size, kernel_size))
        # what nn.Conv2d does, by the fan-in that one expert has
        bound = (in_channels * kernel_size**2) ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        self.shift: Tensor | None
        self.register_buffer("shift", None)

    def extra_repr(self) -> str:
        """The shape; also tells two networks of the same weights apart in a ledger."""
        overlap = "" if self.full is None else f", full={self.full}"
        return (
            f"{self.in_channels}, {self.out_channels}, {self.kernel_size}, stride={self.stride}, "
            f"num_experts={self.num_experts}, site={self.site}{overlap}"
        )

    def slices(self) -> tuple[Tensor, ...]:
        """E weights (out, in, k, k), views."""
        if self.full is None:
            # one unbind, so that backward joins the slices' gradients once and not E times
            return self.weight.view(self.num_experts, -1, *self.weight.shape[1:]).unbind(0)
        return tuple(self._band(expert) for expert in range(self.num_experts))

    def _band(self, expert: int) -> Tensor:
        assert self.full is not None
        starts = [
            round(expert * (full - width) / max(self.num_experts - 1, 1))
            for full, width in zip(self.full, (self.in_channels, self.out_channels), strict=True)
        ]
        return self.weight.narrow(1, starts[0], self.in_channels).narrow(0, starts[1], self.out_channels)

    def fold(self, scale_C: Tensor, shift_C: Tensor) -> None:
        """From now on compute scale * y + shift, per channel of the output y; each expert then has rows of its own, for
        one channel may stand in several bands at different places."""
        rows = [scaled(weight.detach(), scale_C) for weight in self.slices()]
        self.weight = nn.Parameter(torch.cat(rows), requires_grad=False)
        self.full = None
        self.shift = shift_C if self.shift is None else scale_C * self.shift + shift_C

    def forward(self, x: Tensor, plan: Plan) -> Tensor:
        """(B, in, H, W) to (B, out, H', W')."""
        assignment: Assignment = plan.at(self.site, x)
        # the gate's weights do not multiply the shift: as a bias it is right only where they are 1
        bias = self.shift if assignment.unit else None
        if not assignment.sizes and self.full is None:
            y = self._all(x, assignment)
        else:
            convolutions = [partial(self._conv, weight=weight, bias=bias) for weight in self.slices()]
            # the smaller side; a folded shift is no part of what the gate multiplies
            shrinks = self.out_channels < self.in_channels * self.stride**2
            y = assignment.mix(x, convolutions, gated="output" if shrinks and self.shift is None else "input")
        return y if self.shift is None or assignment.unit else y + self.shift[:, None, None]

    def _conv(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.conv2d(x, weight, bias, stride=self.stride, padding=self.kernel_size // 2)

    def _all(self, x: Tensor, assignment: Assignment) -> Tensor:
        """Every expert on every image, in one convolution."""
        outputs = self._conv(x, self.weight)
        outputs_BEC = outputs.view(len(x), self.num_experts, self.out_channels, *outputs.shape[2:])
        return torch.einsum("bechw,be->bchw", outputs_BEC, weights_by_expert(assignment.route))


class ExpertNorm2d(RoutedLayer):
    """A BatchNorm for each expert, on the images that are its own; the E paths then share no statistics.

    A training group of fewer than 8 images is normalised by the running statistics and leaves them alone.
    """

    def __init__(self, channels: int, *, num_experts: int, site: int = 0) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(num_experts))
        self.site = site

    def forward(self, x: Tensor, plan: Plan) -> Tensor:
        """(B, C, H, W) to the same shape."""
        assignment: Assignment = plan.at(self.site, x)
        # the gate's gradient belongs to the convolutions: a normalised output would give it a second time
        return assignment.mix(x, [partial(_normalise, norm) for norm in self.norms], gated=None)


def _normalise(norm: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(norm, nn.BatchNorm2d)
    if norm.training and len(x) < MIN_BATCHNORM_GROUP:
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
    out: Tensor = norm(x)
    return out


@dataclass
class RoutedLayers:
    """Makes a backbone's layers routed: a `phalanx.nn.Layers` that also says where decisions are taken.

    Args:
        num_experts: E.
        scale: each expert's share of every width, in (0, 1], truncated.
        routers: one decision for the whole network ("shared"), or one for each block or each layer.
        norm_kind: BatchNorm shared by the experts or one for each; "per_expert" has no meaning with a decision for
            each layer, for features then belong to no one expert.
        overlap: experts are bands of a backbone of the full widths instead of slices of their own; with one shared
            decision only, since a band reads the same expert's band of the layer before.

    Raises ValueError where these do not fit together.
    """

    num_experts: int
    scale: float = 0.5
    routers: Routers = "shared"
    norm_kind: NormKind = "shared"
    overlap: bool = False
    sites: list[int] = field(default_factory=list)
    """Channels that each decision within the network reads; empty for one shared decision."""

    def __post_init__(self) -> None:
        if self.num_experts < 1:
            raise ValueError(f"num_experts must be at least 1, got {self.num_experts}")
        scaled_width(1 << 20, self.scale)
        if self.norm_kind == "per_expert" and self.routers == "layer":
            raise ValueError("batch_norm must be shared where every layer decides by itself, got per_expert")
        if self.overlap and self.routers != "shared":
            raise ValueError(f"overlap needs one shared router, got routers {self.routers!r}")

    @property
    def _site(self) -> int:
        return max(len(self.sites) - 1, 0)

    @property
    def routed(self) -> bool:
        """See `phalanx.nn.Layers`."""
        return True

    def width(self, channels: int) -> Width:
        """See `phalanx.nn.Layers`."""
        return Width(channels, scaled_width(channels, self.scale))

    def begin_block(self, inputs: Width) -> None:
        """See `phalanx.nn.Layers`."""
        if self.routers == "block":
            self.sites.append(inputs.kept)

    def conv(self, inputs: Width, outputs: Width, kernel_size: int = 3, *, stride: int = 1) -> nn.Module:
        """See `phalanx.nn.Layers`."""
        if self.routers == "layer":
            self.sites.append(inputs.kept)
        return MoEConv2d(
            inputs.kept,
            outputs.kept,
            kernel_size,
            stride=stride,
            num_experts=self.num_experts,
            site=self._site,
            full=(inputs.full, outputs.full) if self.overlap else None,
        )

    def norm(self, width: Width) -> nn.Module:
        """See `phalanx.nn.Layers`."""
        if self.norm_kind == "shared":
            return nn.BatchNorm2d(width.kept)
        return ExpertNorm2d(width.kept, num_experts=self.num_experts, site=self._site)
