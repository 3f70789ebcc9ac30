"""A layer-level mixture that computes every expert on every image and masks what was not selected."""

# B batch, E experts

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phalanx.nn import Plan, RoutedLayer
from phalanx.routing import ExpertNorm2d, LayerMixture, MoEConv2d


class Gates(NamedTuple):
    """One decision."""

    selected: Tensor
    """(B, E) bool."""
    values: Tensor
    """(B, E) what multiplies each expert's output: exactly 0 where it is not selected; carries the gradient."""


def gates(scores: Tensor, top_k: int, temperature: float, straight_through: str) -> Gates:
    """The `top_k` best of each row, ties to the lower index."""
    selected = torch.zeros_like(scores, dtype=torch.bool)
    for row, values in enumerate(scores.tolist()):
        for expert in sorted(range(len(values)), key=lambda e: (-values[e], e))[:top_k]:
            selected[row, expert] = True
    scores = scores / temperature
    if top_k == 1:
        amplitude = scores if straight_through == "score" else scores.softmax(-1)
        values = 1 + amplitude - amplitude.detach()
    else:
        exponentials = scores.exp() * selected
        values = exponentials / exponentials.sum(-1, keepdim=True)
    return Gates(selected, values * selected)


class MaskedConv(RoutedLayer):
    """sum_e gate_e * conv_e(x)."""

    def __init__(self, layer: MoEConv2d) -> None:
        super().__init__()
        self.weight = layer.weight
        self.inputs, self.outputs, self.experts = layer.in_channels, layer.out_channels, layer.num_experts
        self.full, self.site = layer.full, layer.site
        self.options = {"stride": layer.stride, "padding": layer.kernel_size // 2}

    def weight_of(self, expert: int) -> Tensor:
        if self.full is None:
            return self.weight[expert * self.outputs : (expert + 1) * self.outputs]
        last = max(self.experts - 1, 1)
        first_in = round(expert * (self.full[0] - self.inputs) / last)
        first_out = round(expert * (self.full[1] - self.outputs) / last)
        return self.weight[first_out : first_out + self.outputs, first_in : first_in + self.inputs]

    def forward(self, x: Tensor, plan: Plan) -> Tensor:
        gates: Gates = plan.at(self.site, x)
        total = torch.zeros(())
        for expert in range(self.experts):
            total = total + gates.values[:, expert, None, None, None] * F.conv2d(
                x, self.weight_of(expert), **self.options
            )
        return total


class MaskedNorm(RoutedLayer):
    """Each expert's BatchNorm on its own images, with the running statistics if they are fewer than eight."""

    def __init__(self, layer: ExpertNorm2d) -> None:
        super().__init__()
        self.norms, self.site = layer.norms, layer.site

    def forward(self, x: Tensor, plan: Plan) -> Tensor:
        gates: Gates = plan.at(self.site, x)
        one_each = bool((gates.selected.sum(1) == 1).all())
        total = torch.zeros_like(x)
        for expert, norm in enumerate(self.norms):
            rows = gates.selected[:, expert]
            if not rows.any():
                continue
            mode = norm.training
            norm.training = mode and int(rows.sum()) >= 8
            normalised = norm(x[rows])
            norm.training = mode
            # of one expert alone the gate's gradient was given by the convolution
            weights = torch.ones_like(gates.values) if one_each else gates.values
            total = total.index_put((rows.nonzero()[:, 0],), normalised * weights[rows, expert, None, None, None], True)
        return total


class MaskedMixture(nn.Module):
    """The same function of the same parameters (copies of them, under the same names) as a `LayerMixture`."""

    def __init__(self, mixture: LayerMixture) -> None:
        super().__init__()
        mixture = copy.deepcopy(mixture)
        self.network, self.router = mixture.network, mixture.router
        self.choice = (mixture.top_k, mixture.temperature, mixture.straight_through)
        self.experts, self.shared = mixture.num_experts, mixture.shared
        for parent in list(self.network.modules()):
            for name, layer in list(parent.named_children()):
                if isinstance(layer, MoEConv2d):
                    setattr(parent, name, MaskedConv(layer))
                elif isinstance(layer, ExpertNorm2d):
                    setattr(parent, name, MaskedNorm(layer))
        self.train(mixture.training)

    def forward(self, x: Tensor) -> Tensor:
        images, made = x, {}

        class Decisions:
            def at(_, site: int, x: Tensor) -> Gates:
                site, seen = (0, images) if self.shared else (site, x)
                if site not in made:
                    made[site] = gates(self.scores(site, seen), *self.choice)
                return made[site]

        return self.network(x, Decisions())

    def scores(self, site: int, x: Tensor) -> Tensor:
        if self.router is None:
            return x.new_zeros(len(x), 1)
        return (self.router if self.shared else self.router[site])(x)
