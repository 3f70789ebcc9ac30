"""Build an expert by name, or from your own `module:factory`."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from phalanx.errors import InputError
from phalanx.experts.resnet import resnet18
from phalanx.experts.small import mlp, small_cnn
from phalanx.nn import Normalize, record

EXPERTS: dict[str, Callable[..., nn.Module]] = {"mlp": mlp, "resnet18": resnet18, "small_cnn": small_cnn}


def _own_factory(name: str) -> Callable[..., Any]:
    module_name, _, attribute = name.partition(":")
    if not module_name or module_name.startswith("."):
        raise InputError(f"expert {name!r} must be 'module:factory' with the module's full name")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except ImportError as error:
        raise InputError(
            f"expert {name!r}: cannot import module {module_name!r} ({error}); is it on PYTHONPATH?"
        ) from None
    except AttributeError:
        raise InputError(f"expert {name!r}: module {module_name!r} has no {attribute!r}") from None
    if not callable(factory):
        raise InputError(f"expert {name!r} must be a function that returns a network, got {type(factory).__name__}")
    return factory  # type: ignore[no-any-return]


def _check_options(name: str, builder: Callable[..., nn.Module], options: dict[str, Any]) -> None:
    fixed = {"normalize", "num_classes", "image_size", "channels"}
    known = [key for key in inspect.signature(builder).parameters if key not in fixed]
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
        name: one of `EXPERTS`, or "module:factory": a function of (num_classes, image_size, channels, **options) that
            returns a network on normalised images.
        mean, std: per channel, of the normalisation that is the network's first layer; 0.5 and 0.25 if not given.
        options: the backbone's own (`width` of resnet18 and small_cnn, `hidden` of mlp).

    Raises InputError for an unknown name, option or factory.
    """
    for field, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) != channels:
            raise InputError(f"{field} must hold one value for each of {channels} channels, got {len(values)}")
    normalize = Normalize(mean or (0.5,) * channels, std or (0.25,) * channels)
    shape = {"num_classes": num_classes, "image_size": image_size, "channels": channels}
    if ":" in name:
        factory = _own_factory(name)
        _check_arguments(name, factory, {**shape, **options})
        network = factory(**shape, **options)
        if not isinstance(network, nn.Module):
            raise InputError(f"expert {name!r} must return a torch.nn.Module, got {type(network).__name__}")
        expert: nn.Module = nn.Sequential(normalize, network)
    elif name in EXPERTS:
        _check_options(name, EXPERTS[name], options)
        expert = EXPERTS[name](normalize, **shape, **options)
    else:
        raise InputError(f"expert must be one of {', '.join(EXPERTS)} or 'module:factory', got {name!r}")
    return record(expert, f"expert.{name}", **shape, mean=mean, std=std, **options)
