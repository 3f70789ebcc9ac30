"""Grouped top-1 dispatch against one expert: what a mixture costs beyond the network that answers.

Run: python benchmarks/dispatch.py [--rounds N] [--batch B] [--device cuda]
"""

# B batch, E experts

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from common import Bar, Record, Spread, from_command_line, interleaved, ratio
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from phalanx.experts import build_expert
from phalanx.routing import LinearRouter, MixtureOfExperts
from phalanx.routing.stats import assignment_counts

SHAPE = (3, 32, 32)
EXPERTS = (1, 2, 4, 8, 16)
BATCH = 64
COUNTED_BATCHES = (16, 64, 256)
COUNTED_WIDTH = 8
TIME_LIMITS = {1: 1.25, 2: 1.25, 4: 1.25, 8: 1.25, 16: 1.5}


def images(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(size, *SHAPE) uniform noise: symmetric about the normalisation's mean, so a random router is nearly balanced."""
    return torch.rand(size, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=dtype)


def backbones(count: int, width: int) -> list[nn.Module]:
    """ResNet-18s with random weights, in evaluation mode, without parameter gradients: as an attack sees them."""
    torch.manual_seed(0)
    built = [build_expert("resnet18", num_classes=10, image_size=SHAPE[1], width=width) for _ in range(count)]
    return [expert.eval().requires_grad_(False) for expert in built]


def mixture(experts: Sequence[nn.Module]) -> MixtureOfExperts:
    """A top-1 mixture behind a random linear router."""
    torch.manual_seed(1)
    router = LinearRouter(SHAPE, len(experts)) if len(experts) > 1 else None
    return MixtureOfExperts(router, experts, top_k=1).eval().requires_grad_(False)


def forward(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)  # type: ignore[no-any-return]


def input_gradient(model: nn.Module, x: Tensor) -> Tensor:
    """Forward and backward to the images: one step of an attack."""
    leaf = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf).logsumexp(-1).sum(), leaf)
    return gradient


PASSES: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {"forward": forward, "forward+backward": input_gradient}


# -- time ----------------------------------------------------------------------------------------------------------


def group_sizes(model: MixtureOfExperts, x: Tensor) -> list[int]:
    """Images per expert."""
    return [int(n) for n in assignment_counts(model.gate(x).experts, len(model.experts))]


def measure_time(width: int, counts: Sequence[int], batch: int, rounds: int, device: str = "cpu") -> dict[str, Any]:
    """For each E the ratio of each pass to that of one network of the same width, and the group sizes."""
    x = images(batch).to(device)
    pool = [expert.to(device) for expert in backbones(max(counts), width)]
    models = {count: mixture(pool[:count]).to(device) for count in counts}
    single = pool[0]
    result: dict[str, Any] = {str(count): {"group_sizes": group_sizes(models[count], x)} for count in counts}
    for name, run in PASSES.items():
        grouped = {str(count): partial(run, model, x) for count, model in models.items()}
        times = interleaved({"single": partial(run, single, x), **grouped}, rounds, device)
        for count in counts:
            result[str(count)][name] = ratio(times, str(count), "single")
    return result


# -- operations ----------------------------------------------------------------------------------------------------


class OperationCounter(TorchDispatchMode):
    """Counts the aten operations that reach a device, backward included; a view computes nothing and is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        if not func.is_view:
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def operations(model: nn.Module, x: Tensor) -> int:
    """Operations of one forward and backward; the number is that of kernel launches on a GPU, give or take fusion."""
    with OperationCounter() as counter:
        input_gradient(model, x)
    return sum(counter.counts.values())


def operation_limit(experts: int) -> int:
    """About one ResNet-18 for each expert (165 operations forward and backward) and 50 for routing."""
    return 165 * experts + 50


def count_operations(counts: Sequence[int], batches: Sequence[int]) -> dict[str, dict[str, int]]:
    """{E: {batch: operations, ..., "limit": the bar}}; independent of the width, so counted on narrow networks."""
    pool = backbones(max(counts), COUNTED_WIDTH)
    result = {}
    for count in counts:
        model = mixture(pool[:count])
        counted = {str(batch): operations(model, images(batch)) for batch in batches}
        result[str(count)] = {**counted, "limit": operation_limit(count)}
    return result


# -- equality ------------------------------------------------------------------------------------------------------


def one_by_one(model: MixtureOfExperts, x: Tensor) -> Tensor:
    """Each image alone through the expert its route names: the slow, obvious version, logits (B, C)."""
    rows = []
    for image in x.split(1):
        route = model.gate(image)
        rows.append(route.weights * model.experts[int(route.experts)](image))
    return torch.cat(rows)


def largest_differences(num_experts: int, batch: int) -> dict[str, float]:
    """Grouped against one by one in float64: largest absolute difference, over the largest value, of the logits and
    of their squares' gradients with respect to the images and to the router."""
    model = mixture(backbones(num_experts, COUNTED_WIDTH)).double()
    router = [parameter.requires_grad_() for parameter in model.router.parameters()] if model.router else []

    def everything(function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        leaf = images(batch, torch.float64).requires_grad_()
        logits = function(leaf)
        return [logits.detach(), *torch.autograd.grad(logits.square().sum(), [leaf, *router])]

    pairs = list(zip(everything(model), everything(lambda x: one_by_one(model, x)), strict=True))
    relative = [float((a - b).abs().max() / b.abs().max()) for a, b in pairs]
    return {"logits": relative[0], "input_gradient": relative[1], "router_gradient": max(relative[2:], default=0.0)}


# -- the record ----------------------------------------------------------------------------------------------------


def bars(
    time: dict[str, Any], counted: dict[str, dict[str, int]], equality: dict[str, float], limits: dict[int, float]
) -> list[Bar]:
    result = []
    for experts, measured in time.items():
        spread: Spread = measured["forward+backward"]
        limit = limits[int(experts)]
        result.append(Bar(f"forward+backward at E = {experts}, ratio to one network", spread.median, limit, True))
    for experts, numbers in counted.items():
        most = max(number for key, number in numbers.items() if key != "limit")
        result.append(Bar(f"operations at E = {experts}, any batch", most, numbers["limit"], True))
    worst = max(equality.values())
    result.append(Bar("largest relative difference to the one-by-one loop, float64", worst, 1e-12, True))
    return result


def measure(
    width: int = 64,
    counts: Sequence[int] = EXPERTS,
    batch: int = BATCH,
    rounds: int = 9,
    counted_batches: Sequence[int] = COUNTED_BATCHES,
    device: str = "cpu",
) -> Record:
    """The whole benchmark; the defaults are the recorded setting. Operations and equality are the CPU's anyway."""
    time = measure_time(width, counts, batch, rounds, device)
    counted = count_operations(counts, counted_batches)
    equality = largest_differences(max(counts), batch=min(batch, 32))
    return Record(
        benchmark="dispatch" if device == "cpu" else f"dispatch-{device.partition(':')[0]}",
        what=(
            "Grouped top-1 dispatch over E ResNet-18 experts, evaluation mode, 32x32 images: time as a ratio to "
            "one such network on the same batch; aten operations (views left out) of one forward and backward to the "
            "input; equality with the one-by-one loop in float64, relative to the largest value."
        ),
        settings={
            "device": device,
            "width": width,
            "batch": batch,
            "counted_width": COUNTED_WIDTH,
            "experts": list(counts),
        },
        rounds=rounds,
        measurements={"ratio_to_one_network": time, "operations": counted, "largest_relative_difference": equality},
        bars=bars(time, counted, equality, TIME_LIMITS),
    )


if __name__ == "__main__":
    from_command_line(__doc__, measure, width=64, batch=BATCH, rounds=9)
