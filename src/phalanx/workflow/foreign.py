"""A model of someone else's: the function that builds it, and a file with its weights."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from phalanx.errors import InputError
from phalanx.runs import sha256_file


def foreign_model(factory: str, weights: Path | None) -> nn.Module:
    """What "module:function", called without arguments, returns, with the weights of a .safetensors file.

    Importing the module runs it: give only code that you trust. Raises InputError.
    """
    made = _function(factory)()
    if not isinstance(made, nn.Module):
        raise InputError(f"--model {factory} must return a torch.nn.Module, got {type(made).__name__}")
    if weights is not None:
        _load_into(made, _read(weights), weights)
    return made.eval()


def weights_record(weights: Path | None) -> str | None:
    """What an evaluation of a foreign model is bound to: the sha256 of its weights' file."""
    return None if weights is None else sha256_file(_existing(weights))


def _function(factory: str) -> Any:
    module_name, _, attribute = factory.partition(":")
    if not module_name or module_name.startswith(".") or not attribute:
        raise InputError(f"--model must be 'module:function' with the module's full name, got {factory!r}")
    try:
        made = getattr(importlib.import_module(module_name), attribute)
    except ImportError as error:
        raise InputError(
            f"--model {factory}: cannot import module {module_name!r} ({error}); is it on PYTHONPATH?"
        ) from None
    except AttributeError:
        raise InputError(f"--model {factory}: module {module_name!r} has no {attribute!r}") from None
    if not callable(made):
        raise InputError(f"--model {factory} must be a function that returns a model, got {type(made).__name__}")
    return made


def _existing(weights: Path) -> Path:
    if weights.suffix != ".safetensors":
        raise InputError(
            f"--weights {weights} must be best, last or a .safetensors file; other formats may hold code that runs "
            "when they are read: convert them with safetensors.torch.save_file(model.state_dict(), 'w.safetensors')"
        )
    if not weights.is_file():
        raise InputError(f"there is no {weights}; check the name")
    return weights


def _read(weights: Path) -> dict[str, Tensor]:
    try:
        return load_file(_existing(weights))
    except SafetensorError as error:
        raise InputError(f"{weights} is no sound .safetensors file ({error}); save it again") from None


def _load_into(model: nn.Module, tensors: dict[str, Tensor], weights: Path) -> None:
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise InputError(
            f"the weights in {weights} do not fit the model: {str(error).splitlines()[-1].strip()}"
        ) from None
