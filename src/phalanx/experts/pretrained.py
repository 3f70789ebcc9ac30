"""Any image classifier of timm, with weights from a file of yours; nothing is ever downloaded."""

from __future__ import annotations

import difflib
import hashlib
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from torch import nn

from phalanx.errors import InputError
from phalanx.experts.stems import Stem

TIMM = "timm:"
"""What the names of these experts begin with."""

_STEM_POOLS = ("maxpool", "features.pool0")


def timm_network(
    model: str, *, num_classes: int, image_size: int, channels: int, stem: Stem = "imagenet", weights: str | None = None
) -> nn.Module:
    """A timm network on normalised images (B, channels, image_size, image_size), logits (B, num_classes).

    Args:
        model: timm's name of the architecture, without a tag: "resnet18", "densenet121", "mobilenetv2_100".
        stem: "imagenet" is timm's own; "small" replaces the strided first convolution by a 3x3 one of stride 1 and
            drops the pooling after it, as the CIFAR literature does for 32-pixel images.
        weights: a .safetensors file of a network of exactly this shape; None initialises at random. It is read here
            only: a run that was trained from it holds its own.

    Raises InputError without timm, for an unknown model or stem, for images that the network cannot take, and for a
    file that is missing, damaged, not finite, or of another network.
    """
    timm = _timm()
    if not timm.is_model(model):
        close = difflib.get_close_matches(model, timm.list_models(), n=3)
        raise InputError(f"timm has no model {model!r}" + (f"; did you mean {' or '.join(close)}?" if close else ""))
    if stem not in get_args(Stem):
        raise InputError(f"stem must be one of {', '.join(get_args(Stem))}, got {stem!r}")
    # transformers are made for one size
    sized = {"img_size": image_size} if timm.get_pretrained_cfg(model).fixed_input_size else {}
    try:
        network: nn.Module = timm.create_model(
            model, pretrained=False, num_classes=num_classes, in_chans=channels, **sized
        )
        if stem == "small":
            _open_stem(network, model)
        _check_images(network, (1, channels, image_size, image_size), num_classes)
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"timm:{model} cannot classify {channels} x {image_size} x {image_size} images into {num_classes} classes: "
            f"{_first_line(error)}; choose another model, or set data.size"
        ) from None
    if weights is not None:
        _load(network, Path(str(weights)).expanduser(), f"timm:{model} with {num_classes} classes and the {stem} stem")
    return network


def weights_sha256(path: str) -> str:
    """Of a weights file. Raises InputError if it cannot be read."""
    return hashlib.sha256(_read(Path(path).expanduser())).hexdigest()


def _timm() -> ModuleType:
    # seconds: only for those who use it
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise InputError(
            f"experts named timm:MODEL need timm ({error}); install it with: pip install phalanx[vision]"
        ) from None


def _open_stem(network: nn.Module, model: str) -> None:
    """Full resolution: a first convolution of stride 1, and no pooling after it."""
    modules = dict(network.named_modules())
    name = getattr(network, "pretrained_cfg", {}).get("first_conv")
    old = modules.get(name) if isinstance(name, str) else None
    # patches that do not overlap are no stem to open
    if not isinstance(old, nn.Conv2d) or old.stride != (2, 2) or max(old.kernel_size) <= 2:
        raise InputError(f"timm:{model} has no first convolution of stride 2 that stem: small could replace; leave it")
    new = nn.Conv2d(old.in_channels, old.out_channels, 3, padding=1, bias=old.bias is not None)
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    network.set_submodule(str(name), new)
    for pool in _STEM_POOLS:
        if pool in modules:
            network.set_submodule(pool, nn.Identity())


def _check_images(network: nn.Module, shape: tuple[int, ...], num_classes: int) -> None:
    """Some networks shrink small images to nothing, or answer with more than logits."""
    network.eval()
    with torch.no_grad():
        answer: Any = network(torch.zeros(shape))
    network.train()
    if not isinstance(answer, torch.Tensor) or answer.shape != (1, num_classes):
        got = tuple(answer.shape) if isinstance(answer, torch.Tensor) else type(answer).__name__
        raise ValueError(f"it answers with {got}, not with {num_classes} logits")


def _read(path: Path) -> bytes:
    if path.suffix != ".safetensors":
        raise InputError(
            f"weights must be a .safetensors file, got {path}; other formats may run code when they are read, "
            "so convert it first"
        )
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"weights {path} cannot be read ({error.strerror}); give the path of your own file") from None


def _load(network: nn.Module, path: Path, what: str) -> None:
    try:
        tensors = parse_safetensors(_read(path))
    except SafetensorError as error:
        raise InputError(f"weights {path} is no readable safetensors file ({_first_line(error)})") from None
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise InputError(f"weights {path} is not finite in {name}; fetch it again")
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        _, *mismatches = str(error).splitlines()
        raise InputError(f"weights {path} does not fit {what}: {mismatches[0].strip()[:200]}") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
