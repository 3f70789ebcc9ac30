"""Training radii in pixel units or in those of the normalised image (where Divided We Fall is silent)."""

# C channels

from __future__ import annotations

from dataclasses import replace
from typing import Literal, TypeVar

from torch import nn

from phalanx.attacks import AnyAttack
from phalanx.errors import InputError
from phalanx.nn import Normalize
from phalanx.routing import RoutedModel
from phalanx.threat import parse_epsilon

AttackT = TypeVar("AttackT", bound=AnyAttack)

Units = Literal["pixel", "normalised"]
"""Of pixels in [0, 1], or of (pixel - mean) / std."""


def pixels_per_unit(units: Units, model: RoutedModel) -> float:
    """What a length in `units` is multiplied by to be one in pixel units: 1, or the mean of the C deviations of the
    model's normalisation layers, one number for all channels.

    Raises InputError for "normalised" if no part of the model begins with `phalanx.nn.Normalize`, or if the deviations
    of its parts differ.
    """
    if units == "pixel":
        return 1.0
    parts = model.modules() if isinstance(model, nn.Module) else ()
    stds: set[tuple[float, ...]] = {tuple(part.std.flatten().tolist()) for part in parts if isinstance(part, Normalize)}
    if not stds:
        raise InputError(
            "method.units is normalised, but no part of the model normalises its images with phalanx.nn.Normalize; "
            "use units pixel"
        )
    if len(stds) > 1:
        raise InputError(
            f"method.units is normalised, but the model's parts divide by {len(stds)} different deviations; "
            "use units pixel"
        )
    (std,) = stds
    return sum(std) / len(std)


def in_pixels(attack: AttackT, scale: float) -> AttackT:
    """`attack` with its radius and its step size, where it sets one, multiplied by `scale`."""
    if scale == 1.0:
        return attack
    changes = {"eps": attack.threat.epsilon * scale}
    step_size = getattr(attack, "step_size", None)
    if step_size is not None:
        changes["step_size"] = float(parse_epsilon(step_size)) * scale
    return replace(attack, **changes)  # type: ignore[arg-type]
