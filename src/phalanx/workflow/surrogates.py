"""The models that a transfer attack searches on: finished runs, and someone else's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from phalanx.errors import InputError
from phalanx.evaluation.transfer import Surrogate
from phalanx.models import load
from phalanx.nn import frozen
from phalanx.nn.factory import made_by, own_factory
from phalanx.workflow.training import require_finished


def surrogates(names: Sequence[str], x: Tensor) -> tuple[Surrogate, ...]:
    """What --surrogate names, each a run's folder or "module:function", on the device of the images `x` (B, ...).

    Raises InputError for a run that is not finished, a function that returns no model, one that does not take these
    images, and for one that is named twice.
    """
    return tuple(
        Surrogate(label, taking(f"surrogate {name}", _model(name).to(x.device), x))
        for name, label in zip(names, labels(names), strict=True)
    )


def labels(names: Sequence[str]) -> list[str]:
    """Each by its own name, with its folder's where two have the same. Raises InputError for one named twice."""
    short = [name if _is_factory(name) else Path(name).resolve().name for name in names]
    found = [
        f"{Path(name).resolve().parent.name}/{label}" if short.count(label) > 1 and not _is_factory(name) else label
        for name, label in zip(names, short, strict=True)
    ]
    if twice := [label for label in found if found.count(label) > 1]:
        raise InputError(f"two surrogates are called {twice[0]!r}; name each once, or give one folder another name")
    return found


def _is_factory(name: str) -> bool:
    return not Path(name).is_dir() and ":" in name


def _model(name: str) -> nn.Module:
    if not _is_factory(name):
        require_finished(Path(name), "surrogate")
        return load(Path(name))
    said = f"--surrogate {name}"
    made = made_by(own_factory(name, said, "a model"), said, "nothing")
    if not isinstance(made, nn.Module):
        raise InputError(f"{said} must return a torch.nn.Module, got {type(made).__name__}")
    return made.eval()


@torch.no_grad()
def taking(what: str, model: nn.Module, x: Tensor) -> nn.Module:
    """The model, which takes images (B, ...) like these. Raises InputError naming `what` if it does not."""
    try:
        with frozen(model):
            model(x[:1])
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError) as error:
        raise InputError(
            f"{what} does not take images of shape {tuple(x.shape[1:])} "
            f"({str(error).splitlines()[0]}); give a model for the same data"
        ) from None
    return model
