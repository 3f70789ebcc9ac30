"""Fold evaluation-mode BatchNorm into the convolution or linear layer before it."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from phalanx.nn.layers import ConvBN
from phalanx.nn.routed import Chain, FoldableLayer

_FOLDABLE = ((nn.Conv2d, nn.BatchNorm2d), (nn.Linear, nn.BatchNorm1d))
_OURS: tuple[type[nn.Sequential], ...] = (ConvBN, Chain)
"""Chains that are only ever called as a whole. The parts of a plain `nn.Sequential` may be used in another order by the
module that holds it (a feature extractor that indexes into a chain)."""


def _scale_and_shift(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """(C,) and (C,) in float64: what `norm` in evaluation mode multiplies each channel by, and then adds."""
    assert norm.running_mean is not None and norm.running_var is not None
    # formed in float64: dividing by sqrt(var + eps) in float32 costs a digit
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift: Tensor = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach().double()


def _fold(layer: nn.Module, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> None:
    """Rewrites `layer` to compute norm(layer(x)) for norm in evaluation mode."""
    scale, shift = _scale_and_shift(norm)
    if isinstance(layer, FoldableLayer):
        dtype = next(layer.parameters()).dtype
        layer.fold(scale.to(dtype), shift.to(dtype))
        return
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    if layer.bias is not None:
        shift = shift + layer.bias.detach().double() * scale
    weight = layer.weight.detach()
    # rounded before it meets the weights: their product in float64 made folding three times as slow, no more exact
    factor = scale.to(weight.dtype).reshape(-1, *([1] * (weight.dim() - 1)))
    layer.weight = nn.Parameter(weight * factor, requires_grad=False)
    layer.bias = nn.Parameter(shift.to(weight.dtype), requires_grad=False)


def _places(model: nn.Module) -> Counter[int]:
    """How often each module stands in the model, by id."""
    # `children()` and `named_children()` skip a module's second place in one chain; `_modules` does not
    return Counter(id(child) for module in model.modules() for child in module._modules.values())


def _pairs(model: nn.Module, *, certain: bool) -> list[tuple[nn.Sequential, str, str]]:
    """(chain, layer's name, BatchNorm's name) wherever one feeds the other and nothing else.

    Only inside chains, ours alone where that must be `certain`, and only for modules that stand in one place.
    """
    places, chains = _places(model), _OURS if certain else (nn.Sequential, *_OURS)
    pairs = []
    for chain in model.modules():
        if type(chain) not in chains:
            continue
        assert isinstance(chain, nn.Sequential)
        for (name, layer), (norm_name, norm) in itertools.pairwise(chain._modules.items()):
            alone = places[id(layer)] == places[id(norm)] == 1
            if alone and _foldable(layer, norm) and _plain(layer, norm):
                pairs.append((chain, name, norm_name))
    return pairs


def _foldable(layer: nn.Module, norm: nn.Module) -> bool:
    """Exact types only: a subclass may compute more (an activation in a BatchNorm, standardised weights in a
    convolution). Of a layer that knows how to fold, the class itself must say so."""
    if isinstance(layer, FoldableLayer):
        return "fold" in vars(type(layer)) and type(norm) is nn.BatchNorm2d
    return (type(layer), type(norm)) in _FOLDABLE


def _plain(layer: Any, norm: Any) -> bool:
    """The norm is one fixed scale and shift for each output of `layer`, and nobody looks at what passes between."""
    outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    tracked = norm.running_mean is not None and len(norm.running_mean) == outputs
    # weight norm and spectral norm of the older kind rewrite the weight in a forward pre-hook
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, norm._forward_hooks, norm._forward_pre_hooks)
    return tracked and not any(hooks)


def _spare_a_copy(chain: nn.Sequential, folded_name: str, places: Counter[int]) -> None:
    """A ReLU right after a folded pair may overwrite its input: nobody else sees it, and no gradient needs it."""
    names = list(chain._modules)
    follower = chain._modules.get(names[names.index(folded_name) + 1]) if names[-1] != folded_name else None
    if type(follower) is nn.ReLU and places[id(follower)] == 1:
        follower.inplace = not (follower._forward_hooks or follower._forward_pre_hooks)


def folds_certainly(model: nn.Module) -> bool:
    """Whether all that `fold_batchnorm` folds lies in chains that are only ever called as a whole."""
    return len(_pairs(model, certain=True)) == len(_pairs(model, certain=False))


def fold_batchnorm(model: nn.Module, *, certain: bool = False) -> nn.Module | None:
    """A frozen evaluation-mode copy of `model` with its BatchNorms folded and its 4-d weights in channels_last.

    Equal to the model in evaluation mode up to rounding (1e-12 in float64), if no module uses the parts of a plain
    `nn.Sequential` in another order; with `certain` these are left as they are, and the parts of `ConvBN` and `Chain`
    alone folded. None where there is nothing to fold or the model cannot be copied. The model itself is untouched.
    """
    if not _pairs(model, certain=certain):
        return None
    try:
        folded = copy.deepcopy(model)
    except (RuntimeError, TypeError, NotImplementedError):
        return None
    places = _places(folded)
    with torch.no_grad():
        for chain, name, norm_name in _pairs(folded, certain=certain):
            layer, norm = chain.get_submodule(name), chain.get_submodule(norm_name)
            assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
            _fold(layer, norm)
            setattr(chain, norm_name, nn.Identity())
            _spare_a_copy(chain, norm_name, places)
    return folded.eval().requires_grad_(False).to(memory_format=torch.channels_last)
