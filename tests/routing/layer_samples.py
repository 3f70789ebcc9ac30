"""Small layer-level mixtures in float64 whose decisions differ from image to image."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from phalanx.experts import build_backbone
from phalanx.routing import FeatureRouter, LayerMixture, LinearRouter, RoutedLayers, leaves

SHAPE = (3, 8, 8)
CLASSES = 3


def pixels(size: int, seed: int = 0) -> Tensor:
    return torch.rand(size, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layered(
    num_experts: int = 3,
    backbone: str = "small_cnn",
    *,
    scale: float = 0.5,
    routers: str = "shared",
    norm_kind: str = "shared",
    overlap: bool = False,
    options: dict[str, Any] | None = None,
    seed: int = 0,
    training: bool = False,
    **gate: Any,
) -> LayerMixture:
    """`gate` is what `LayerMixture` takes: top_k, temperature, straight_through."""
    torch.manual_seed(seed)
    layers = RoutedLayers(num_experts, scale, routers, norm_kind, overlap)  # type: ignore[arg-type]
    own = {"width": 8} if options is None else options
    network = build_backbone(backbone, layers, num_classes=CLASSES, image_size=SHAPE[1], **own)
    router: Any = None
    if num_experts > 1:
        router = [FeatureRouter(channels, num_experts) for channels in layers.sites] or LinearRouter(SHAPE, num_experts)
    model = LayerMixture(network, router, num_experts, **gate).double()
    _season(model)
    _balance(model.train(training))
    return model


def _season(model: nn.Module) -> None:
    """BatchNorm has seen data: nothing is at its default."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 0.8, 0.4)
            nn.init.normal_(module.bias, 0, 0.5)
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.3, 2)


@torch.no_grad()
def _balance(model: LayerMixture) -> None:
    """From the first decision to the last, scores and then logits that favour nobody on the whole."""
    x = pixels(32, seed=9)
    routers: Any = [] if model.router is None else [model.router] if model.shared else model.router
    for site, router in enumerate(routers):
        router[-1].weight.mul_(4)
        # asking moves BatchNorm's statistics
        scores = list(leaves(copy.deepcopy(model).gate(x)))[site].scores
        router[-1].bias.sub_(scores.mean(0))
    head: Any = model.network
    head[-1].bias.sub_(copy.deepcopy(model)(x).mean(0))
