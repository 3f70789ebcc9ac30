"""Build an expert by name, or from your own `module:factory`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from phalanx.errors import InputError
from phalanx.experts.densenet import densenet
from phalanx.experts.pretrained import TIMM, timm_network
from phalanx.experts.resnet import resnet18
from phalanx.experts.small import mlp, small_cnn
from phalanx.experts.vgg import vgg16
from phalanx.experts.wrn import wrn
from phalanx.nn import Layers, Normalize, PlainLayers, record
from phalanx.nn.factory import own_factory

EXPERTS: dict[str, Callable[..., nn.Module]] = {
    "densenet": densenet,
    "mlp": mlp,
    "resnet18": resnet18,
    "small_cnn": small_cnn,
    "vgg16": vgg16,
    "wrn": wrn,
}


def _check_options(
    name: str, builder: Callable[..., nn.Module], options: dict[str, Any], *, routed: bool = False
) -> None:
    fixed = {"normalize", "num_classes", "image_size", "channels"} | (set() if routed else {"routed_shortcuts"})
    known = ["scale" if key == "layers" else key for key in inspect.signature(builder).parameters if key not in fixed]
    for key in options:
        if key not in known:
            raise InputError(f"expert {name!r} has no option {key!r}; it has {', '.join(known) or 'none'}")


def _check_arguments(name: str, factory: Callable[..., Any], arguments: dict[str, Any]) -> None:
    try:
        inspect.signature(factory).bind(**arguments)
    except TypeError as error:
        raise InputError(
            f"expert {name!r} is called with {', '.join(arguments)}, which it does not take: {error}; "
            "it must be a function of num_classes, image_size, channels and its own options"
        ) from None


def _normalize(channels: int, mean: Sequence[float] | None, std: Sequence[float] | None) -> Normalize:
    for field, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) != channels:
            raise InputError(f"{field} must hold one value for each of {channels} channels, got {len(values)}")
    return Normalize(mean or (0.5,) * channels, std or (0.25,) * channels)


def _checked(name: str, builder: Callable[..., nn.Module], normalize: Normalize, **arguments: Any) -> nn.Module:
    try:
        return builder(normalize, **arguments)
    except ValueError as error:
        raise InputError(f"{name}: {error}") from None


def build_backbone(
    name: str,
    layers: Layers,
    *,
    num_classes: int,
    image_size: int,
    channels: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    **options: Any,
) -> nn.Module:
    """The network `build_expert` builds, its layers made by `layers`: with routed ones it also wants a plan.

    Raises InputError for an unknown name or option, and for a backbone that has no layers to route.
    """
    routable = [known for known, builder in EXPERTS.items() if "layers" in inspect.signature(builder).parameters]
    if name not in routable:
        raise InputError(f"a backbone of routed or masked layers must be one of {', '.join(routable)}, got {name!r}")
    _check_options(name, EXPERTS[name], options, routed=True)
    if "scale" in options:
        raise InputError(f"{name}: scale belongs to the mixture, not to its backbone's options")
    shape = {"num_classes": num_classes, "image_size": image_size, "channels": channels}
    return _checked(name, EXPERTS[name], _normalize(channels, mean, std), **shape, layers=layers, **options)


def build_expert(
    name: str,
    *,
    num_classes: int,
    image_size: int,
    channels: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    **options: Any,
) -> nn.Module:
    """A fresh network, images (B, channels, image_size, image_size) in [0, 1] to logits (B, num_classes).

    Args:
        name: one of `EXPERTS`; "timm:MODEL" (see `timm_network`); or "module:factory": a function of (num_classes,
            image_size, channels, **options) that returns a network on normalised images.
        mean, std: per channel, of the normalisation that is the network's first layer; 0.5 and 0.25 if not given.
        options: the backbone's own (the keyword arguments of its function, such as `width` of resnet18 and `hidden` of
            mlp), and `scale` in (0, 1], which narrows every layer of a backbone that can be routed, too (see
            `build_backbone`).

    Raises InputError for an unknown name, option or factory.
    """
    normalize = _normalize(channels, mean, std)
    shape = {"num_classes": num_classes, "image_size": image_size, "channels": channels}
    if name.startswith(TIMM):
        builder: Callable[..., nn.Module] = functools.partial(timm_network, name.removeprefix(TIMM))
        _check_options(name, builder, options)
        expert: nn.Module = nn.Sequential(normalize, builder(**shape, **options))
        # a run that began with them holds its own: to load it needs no such file
        options.pop("weights", None)
    elif ":" in name:
        factory = own_factory(name, f"expert {name!r}", "a network")
        _check_arguments(name, factory, {**shape, **options})
        network = factory(**shape, **options)
        if not isinstance(network, nn.Module):
            raise InputError(f"expert {name!r} must return a torch.nn.Module, got {type(network).__name__}")
        expert = nn.Sequential(normalize, network)
    elif name in EXPERTS:
        _check_options(name, EXPERTS[name], options)
        own = dict(options)
        if "layers" in inspect.signature(EXPERTS[name]).parameters:
            own["layers"] = PlainLayers(own.pop("scale", 1.0))
        expert = _checked(name, EXPERTS[name], normalize, **shape, **own)
    else:
        raise InputError(f"expert must be one of {', '.join(EXPERTS)}, 'timm:MODEL' or 'module:factory', got {name!r}")
    return record(expert, f"expert.{name}", **shape, mean=mean, std=std, **options)
