"""A model of someone else's: the function that builds it, and a file with its weights."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from phalanx.errors import InputError
from phalanx.nn.factory import made_by, own_factory
from phalanx.runs import sha256_file


def foreign_model(factory: str, weights: Path | None) -> nn.Module:
    """What "module:function", called without arguments, returns, with the weights of a .safetensors file.

    Importing the module runs it: give only code that you trust. Raises InputError.
    """
    said = f"--model {factory}"
    made = made_by(own_factory(factory, said, "a model"), said, "nothing")
    if not isinstance(made, nn.Module):
        raise InputError(f"--model {factory} must return a torch.nn.Module, got {type(made).__name__}")
    if weights is not None:
        _load_into(made, _read(weights), weights)
    return made.eval()


def weights_record(weights: Path | None) -> str | None:
    """What an evaluation of a foreign model is bound to: the sha256 of its weights' file."""
    return None if weights is None else sha256_file(_existing(weights))


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
