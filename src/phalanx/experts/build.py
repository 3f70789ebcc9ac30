"""Build an expert by name, or from your own `module:factory`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from phalanx.errors import InputError, about
from phalanx.experts.densenet import densenet
from phalanx.experts.lipschitz import lipschitz_cnn, lipschitz_mlp
from phalanx.experts.options import check_options
from phalanx.experts.pretrained import TIMM, timm_network
from phalanx.experts.resnet import resnet18
from phalanx.experts.small import mlp, small_cnn
from phalanx.experts.vgg import vgg16
from phalanx.experts.wrn import wrn
from phalanx.nn import Layers, Normalize, PlainLayers, record
from phalanx.nn.factory import made_by, own_factory

EXPERTS: dict[str, Callable[..., nn.Module]] = {
    "densenet": densenet,
    "lipschitz_cnn": lipschitz_cnn,
    "lipschitz_mlp": lipschitz_mlp,
    "mlp": mlp,
    "resnet18": resnet18,
    "small_cnn": small_cnn,
    "vgg16": vgg16,
    "wrn": wrn,
}


def _normalize(channels: int, mean: Sequence[float] | None, std: Sequence[float] | None) -> Normalize:
    for field, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) != channels:
            raise InputError(f"{field} must hold one value for each of {channels} channels, got {len(values)}")
    return Normalize(mean or (0.5,) * channels, std or (0.25,) * channels)


def _checked(
    role: str, name: str, normalize: Normalize, shape: dict[str, int], layers: Layers | None, options: dict[str, Any]
) -> nn.Module:
    """The network; `role` is the key that names it, for what is wrong with it and with none of its options."""
    routable = {} if layers is None else {"layers": layers}
    try:
        return EXPERTS[name](normalize, **shape, **routable, **options)
    except InputError:
        raise
    except ValueError as error:
        option = str(error).partition(" ")[0]
        key = f"options.{option}" if option in (*options, "scale") else role
        raise InputError(f"{name}: {error}", key=key) from None


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
        raise InputError(
            f"a backbone of routed or masked layers must be one of {', '.join(routable)}, got {name!r}", key="backbone"
        )
    check_options(name, EXPERTS[name], options, routed=True)
    if "scale" in options:
        raise InputError(f"{name}: scale belongs to the mixture, not to its backbone's options", key="options")
    shape = {"num_classes": num_classes, "image_size": image_size, "channels": channels}
    return _checked("backbone", name, _normalize(channels, mean, std), shape, layers, options)


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
        check_options(name, builder, options)
        expert: nn.Module = nn.Sequential(normalize, builder(**shape, **options))
        # a run that began with them holds its own: to load it needs no such file
        options.pop("weights", None)
    elif ":" in name:
        with about("expert"):
            factory = own_factory(name, f"expert {name!r}", "a network", from_file=True)
            takes = "num_classes, image_size, channels and its own options"
            network = made_by(factory, f"expert {name!r}", takes, **shape, **options)
        if not isinstance(network, nn.Module):
            made = type(network).__name__
            raise InputError(f"expert {name!r} must return a torch.nn.Module, got {made}", key="expert")
        expert = nn.Sequential(normalize, network)
    elif name in EXPERTS:
        check_options(name, EXPERTS[name], options)
        own = dict(options)
        routable = "layers" in inspect.signature(EXPERTS[name]).parameters
        layers = PlainLayers(own.pop("scale", 1.0)) if routable else None
        expert = _checked("expert", name, normalize, shape, layers, own)
    else:
        known = ", ".join(EXPERTS)
        raise InputError(f"expert must be one of {known}, 'timm:MODEL' or 'module:factory', got {name!r}", key="expert")
    return record(expert, f"expert.{name}", **shape, mean=mean, std=std, **options)
