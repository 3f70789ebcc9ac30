"""A layer-level mixture, computed sliced, against one narrow network and against all experts computed and masked.

Run: python benchmarks/layers.py [--rounds N] [--batch B] [--device cuda]
"""

# B batch, E experts

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from common import Bar, Record, from_command_line, interleaved, ratio
from dispatch import SHAPE, forward, images, input_gradient
from torch import Tensor, nn

from phalanx.experts import build_backbone, build_expert
from phalanx.nn import Plan, RoutedLayer, fold_batchnorm
from phalanx.routing import LayerMixture, MoEConv2d, ResNetRouter, Route, RoutedLayers
from phalanx.routing.stats import assignment_counts

EXPERTS = (2, 4, 8)
MASKED = (2, 4)
SCALE = 0.5
BATCH = 64
CLASSES = 10
PLAIN_LIMIT = 2.1
MASKED_LIMITS = {2: 0.65, 4: 0.4}


# -- the models ----------------------------------------------------------------------------------------------------


def mixture(num_experts: int, width: int, x: Tensor) -> LayerMixture:
    """ResNet-18 at half the width behind AdvMoE's ResNet-20, which sends about as many of `x` to each expert."""
    torch.manual_seed(0)
    layers = RoutedLayers(num_experts, SCALE)
    network = build_backbone("resnet18", layers, num_classes=CLASSES, image_size=SHAPE[1], width=width)
    model = LayerMixture(network, ResNetRouter(SHAPE, num_experts), num_experts)
    _balance(model, x)
    return model


@torch.no_grad()
def _balance(model: LayerMixture, x: Tensor) -> None:
    """An untrained router sends every image to one expert. Its BatchNorms take the statistics of `x`, so that it
    decides alike in both modes, and its scores are standardised over `x`."""
    router: Any = model.router
    norms = [layer for layer in router.modules() if isinstance(layer, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    router.train()(x)
    for norm in norms:
        norm.momentum = 0.1
    scores_BE = router.eval()(x)
    router[-1].weight.div_(scores_BE.std(0)[:, None])
    router[-1].bias.sub_(scores_BE.mean(0)).div_(scores_BE.std(0))


class _MaskedConv(RoutedLayer):
    """All experts' channels of every image times a mask, of which the selected expert's are kept: how AdvMoE's code
    computes it."""

    def __init__(self, layer: MoEConv2d) -> None:
        super().__init__()
        self.weight, self.stride, self.padding = layer.weight, layer.stride, layer.kernel_size // 2
        self.num_experts = layer.num_experts

    def forward(self, x: Tensor, plan: Plan) -> Tensor:
        route: Route = plan.at(0, x)
        outputs = F.conv2d(x, self.weight, stride=self.stride, padding=self.padding)
        mask_BE = torch.zeros_like(route.scores).scatter(-1, route.experts, route.weights)
        masked_BEC = outputs.view(len(x), self.num_experts, -1, *outputs.shape[2:]) * mask_BE[..., None, None, None]
        return masked_BEC[torch.arange(len(x), device=x.device), route.experts[:, 0]]


class Masked(nn.Module):
    """The same function of copies of the same weights as a top-1 `LayerMixture`."""

    def __init__(self, model: LayerMixture) -> None:
        super().__init__()
        self.mixture = copy.deepcopy(model)
        for parent in list(self.mixture.network.modules()):
            for name, layer in list(parent.named_children()):
                if isinstance(layer, MoEConv2d):
                    setattr(parent, name, _MaskedConv(layer))

    def forward(self, x: Tensor) -> Tensor:
        route = self.mixture.gate(x)

        class One:
            def at(self, site: int, x: Tensor) -> Route:
                del site, x
                return route  # type: ignore[return-value]

        return self.mixture.network(x, One())  # type: ignore[no-any-return]


# -- time ----------------------------------------------------------------------------------------------------------


def evaluated(model: nn.Module, run: Callable[[nn.Module, Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    return partial(run, copy.deepcopy(model).eval().requires_grad_(False), x)


def folded(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    copied = fold_batchnorm(copy.deepcopy(model).eval())
    assert copied is not None
    return partial(input_gradient, copied, x.contiguous(memory_format=torch.channels_last))


def trained(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """Forward, backward to every parameter, SGD. The learning rate is 0: the route stays what it is."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, weight_decay=5e-4)
    y = torch.arange(len(x), device=x.device) % CLASSES

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


PASSES: dict[str, Callable[[nn.Module, Tensor], Callable[[], object]]] = {
    "forward": lambda model, x: evaluated(model, forward, x),
    "forward+backward": lambda model, x: evaluated(model, input_gradient, x),
    "training step": trained,
}
FOLDED = "forward+backward, folded"
"""On copies whose BatchNorms are folded, as an attack runs it; without a bar. A masked network cannot be folded."""


def measure_time(width: int, counts: Sequence[int], batch: int, rounds: int, device: str) -> dict[str, Any]:
    """For each E and pass the ratio to the plain network and, where there is one, to the masked; and group sizes."""
    x = images(batch).to(device)
    torch.manual_seed(0)
    options: dict[str, Any] = {"num_classes": CLASSES, "image_size": SHAPE[1], "width": width, "scale": SCALE}
    models: dict[str, nn.Module] = {"plain": build_expert("resnet18", **options)}
    result: dict[str, Any] = {}
    for count in counts:
        sliced = mixture(count, width, x.cpu())
        models[f"sliced {count}"] = sliced
        if count in MASKED:
            models[f"masked {count}"] = Masked(sliced)
        route = copy.deepcopy(sliced).eval().gate(x.cpu())
        assert isinstance(route, Route)
        result[str(count)] = {"group_sizes": assignment_counts(route.experts, count).tolist()}
    for name, make in {**PASSES, FOLDED: folded}.items():
        kept = {key: model for key, model in models.items() if name in PASSES or "masked" not in key}
        times = interleaved({key: make(model.to(device), x) for key, model in kept.items()}, rounds, device)
        for count in counts:
            for other in ("plain", f"masked {count}"):
                if other in kept:
                    spread = ratio(times, f"sliced {count}", other)
                    result[str(count)].setdefault(name, {})[other.split()[0]] = spread
    return result


# -- equality ------------------------------------------------------------------------------------------------------


def largest_differences(num_experts: int, batch: int) -> dict[str, float]:
    """Sliced against masked in float64 and training mode: largest absolute difference, over the largest value, of the
    logits and of their squares' gradients with respect to the images, the network and the router."""
    x = images(batch)
    model = mixture(num_experts, 8, x).double().train()

    def everything(network: nn.Module) -> list[Tensor]:
        leaf = x.double().requires_grad_()
        logits = network(leaf)
        return [logits.detach(), *torch.autograd.grad(logits.square().sum(), [leaf, *network.parameters()])]

    masked, sliced = everything(Masked(model)), everything(model)
    relative = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(sliced, masked, strict=True)]
    return {"logits": relative[0], "input_gradient": relative[1], "parameter_gradients": max(relative[2:])}


# -- the record ----------------------------------------------------------------------------------------------------


def bars(time: dict[str, Any], equality: dict[str, float]) -> list[Bar]:
    result = []
    for name in PASSES:
        for experts, measured in time.items():
            spread = measured[name]["plain"]
            result.append(
                Bar(f"{name} at E = {experts}, ratio to the narrow network", spread.median, PLAIN_LIMIT, True)
            )
        for experts, limit in MASKED_LIMITS.items():
            if str(experts) in time:
                spread = time[str(experts)][name]["masked"]
                result.append(Bar(f"{name} at E = {experts}, ratio to masked experts", spread.median, limit, True))
    worst = max(equality.values())
    result.append(Bar("largest relative difference to masked experts, float64", worst, 1e-9, True))
    return result


def measure(
    width: int = 64, counts: Sequence[int] = EXPERTS, batch: int = BATCH, rounds: int = 9, device: str = "cpu"
) -> Record:
    """The whole benchmark; the defaults are the recorded setting. Equality is the CPU's anyway."""
    time = measure_time(width, counts, batch, rounds, device)
    equality = largest_differences(max(counts), batch=min(batch, 32))
    return Record(
        benchmark="layers" if device == "cpu" else f"layers-{device.partition(':')[0]}",
        what=(
            "ResNet-18 with MoE convolutions at half the width behind a ResNet-20 router, each expert's slice on its "
            "own images, over a plain ResNet-18 of half the width and over the same mixture with all experts computed "
            "and masked: a pass without gradients, one with the images' gradient, a training step."
        ),
        settings={"device": device, "width": width, "scale": SCALE, "batch": batch, "experts": list(counts)},
        rounds=rounds,
        measurements={"ratios": time, "largest_relative_difference": equality},
        bars=bars(time, equality),
    )


if __name__ == "__main__":
    from_command_line(__doc__, measure, width=64, batch=BATCH, rounds=9)
