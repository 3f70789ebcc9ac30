"""What a routed model holds, and what the answer to one image costs."""

# B batch, C channels

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor, nn

from phalanx.nn import exact_fp32, frozen, preserved_rng
from phalanx.nn.alive import spared
from phalanx.nn.flops import ReadParameters, macs
from phalanx.nn.lipschitz import prepared_weights
from phalanx.routing.route import RoutedModel


@dataclass(frozen=True)
class Counts:
    """Parameters, and multiply-adds (MACs) of convolutions and matrix products for one image in evaluation mode."""

    parameters: int
    """All of the model's."""
    active_parameters: int
    """Those that one image's answer is computed with: the routers', the selected experts' and what they share."""
    path_macs: int
    """Of the answer once the route is known: the selected experts and what they share, of masked convolutions (see
    `phalanx.nn.alive`) what is alive."""
    router_macs: int
    """Of the decision, beyond what it shares with the path; 0 for a single network."""
    executed_macs: int
    """Of what runs for an image of a batch; more than `total_macs` where unselected experts, or filters that a mask
    zeroes, are computed too."""

    @property
    def total_macs(self) -> int:
        """The path and the router: what one image's answer needs."""
        return self.path_macs + self.router_macs

    def to_json(self) -> dict[str, int]:
        return {**asdict(self), "total_macs": self.total_macs}


@torch.no_grad()
def counts(model: nn.Module, images: Tensor) -> Counts:
    """What `model` costs an image: the mean over `images` (B, C, H, W) in [0, 1], rounded to whole numbers.

    Any images give the same numbers unless experts differ in size: then the routes matter, and typical images are
    wanted. The model's mode, flags and statistics and torch's random state are left as they were.

    A model whose decision runs what the answer needs (Synergy-of-Experts asks every sub-model) does not do so twice:
    its path and router together cost no more than what is executed.

    Raises ValueError without an image.
    """
    if not len(images):
        raise ValueError("images must hold at least one image, got none")
    # torch's counter hooks the gradient of any module input that wants one, and fails where none is computed
    images = images.detach()
    with frozen(model), exact_fp32(), preserved_rng(), prepared_weights(model):
        singles = [_single(model, image) for image in torch.split(images, 1)]
        _, executed = macs(lambda: model(images))
    active, router, path = (sum(column) for column in zip(*singles, strict=True))
    path_macs = round(path / len(images))
    return Counts(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        active_parameters=round(active / len(images)),
        path_macs=path_macs,
        router_macs=round(min(path + router, executed) / len(images)) - path_macs,
        executed_macs=round(executed / len(images)),
    )


def _single(model: nn.Module, image: Tensor) -> tuple[int, int, int]:
    """Of one image (1, C, H, W): the parameters read, and the multiply-adds of the decision and of the path."""
    run: Callable[[Tensor], object] = model
    with ReadParameters(model) as read:
        router = 0
        if isinstance(model, RoutedModel):
            route, router = macs(lambda: model.gate(image))
            run = partial(model.routed, route=route)
        _, path = macs(lambda: run(image))
    unneeded = spared(model, run, image)
    return read.count - unneeded.parameters, router, path - unneeded.macs
