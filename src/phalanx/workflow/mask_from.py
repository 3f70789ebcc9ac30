"""`model.start` of a masked network: it begins as another run's network; is that the same one, in the phase before?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from phalanx.config import MaskedConfig
from phalanx.data import Splits
from phalanx.errors import InputError
from phalanx.models import build_masked
from phalanx.nn import Spec, spec_of
from phalanx.nn.masked import begin_mask, fix_mask
from phalanx.routing import MixtureOfExperts
from phalanx.runs.atomic import render_json

_ABOUT_DATA = ("num_classes", "image_size", "channels", "mean", "std")
_ABOUT_SCALE = ("scaled_stem", "routed_shortcuts")


def begun_masked(config: MaskedConfig, data: Splits, seed: int, run: Path, start: nn.Module) -> MixtureOfExperts:
    """The masked network of `config` with the weights of `start`, the network of `run`: in phase mask with scores that
    rank by them, in phase weights with its mask. Raises InputError for a `start` that is another network."""
    model = build_masked(config, data, seed)
    (network,) = model.experts
    if config.phase == "mask":
        _check_dense(config, run, spec_of(start))
        begin_mask(network, start.state_dict())
    else:
        _check_learned(config, run, spec_of(start))
        fix_mask(network, start)
    return model


def _check_dense(config: MaskedConfig, run: Path, spec: Spec | None) -> None:
    if spec is not None and spec.name == "masked":
        raise InputError(
            f"model.start: {run} is masked already; phase mask begins from a run of the same network without masks, "
            "or from null, random weights"
        )
    ours = config.backbone, {key: value for key, value in config.options.items() if key not in _ABOUT_SCALE}
    theirs = None if spec is None else (spec.name.removeprefix("expert."), _options(spec.arguments))
    if theirs is None or _plain(theirs) != _plain(ours):
        raise InputError(
            f"model.start: {run} is {_described(theirs)}, this model's backbone is {_described(ours)}; "
            "give both the same network and options"
        )


def _options(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in arguments.items() if key not in (*_ABOUT_DATA, *_ABOUT_SCALE)}


def _check_learned(config: MaskedConfig, run: Path, spec: Spec | None) -> None:
    if spec is None or spec.name != "masked" or spec.arguments["phase"] != "mask":
        raise InputError(
            f"model.start: {run} has not learned a mask; phase weights begins from a finished run of phase mask"
        )
    for key in ("backbone", "options", "scale", "convolutions"):
        theirs, ours = spec.arguments[key], getattr(config, key)
        if _plain(theirs) != _plain(ours):
            raise InputError(
                f"model.start: the mask of {run} is for {key} {theirs}, this model has {ours}; "
                f"give both the same model.{key}"
            )


def _plain(value: Any) -> bytes:
    # a list that was read back is the tuple that was written
    return render_json({"": value})


def _described(network: tuple[str, dict[str, Any]] | None) -> str:
    if network is None:
        return "built by hand"
    name, options = network
    return name + (f" with {', '.join(f'{key}={value}' for key, value in options.items())}" if options else "")
