"""The options that a recipe, or a caller, gives to a backbone: are they of the kind that it takes?"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, get_args, get_type_hints

from torch import nn

from phalanx.errors import InputError

_FIXED = frozenset({"normalize", "num_classes", "image_size", "channels"})
"""What the data decide."""


def check_options(
    name: str, builder: Callable[..., nn.Module], options: Mapping[str, Any], *, routed: bool = False
) -> None:
    """Raises InputError for an option that `builder` does not have or that is of another kind; every whole number is
    one of something, at least 1. `routed` backbones take `routed_shortcuts`, too."""
    fixed = _FIXED if routed else _FIXED | {"routed_shortcuts"}
    taken = [parameter for parameter in inspect.signature(builder).parameters if parameter not in fixed]
    known = ["scale" if parameter == "layers" else parameter for parameter in taken]
    hints = get_type_hints(builder.func if isinstance(builder, functools.partial) else builder)
    for key, value in options.items():
        if key not in known:
            has = ", ".join(known) or "none"
            raise InputError(f"expert {name!r} has no option {key!r}; it has {has}", key="options")
        wrong = _wrong(value, float if key == "scale" else hints[key])
        if wrong:
            raise InputError(f"expert {name!r}: {key} must be {wrong}, got {value!r}", key=f"options.{key}")


def _wrong(value: object, kind: Any) -> str | None:
    """What `value` should have been; None where it fits. Names are left to the builder, which knows them."""
    kinds = get_args(kind)
    if kind == Sequence[int]:
        fits = isinstance(value, Sequence) and not isinstance(value, str)
        fits = fits and all(_wrong(item, int) is None for item in value)  # type: ignore[attr-defined]
        return None if fits else "a list of whole numbers of at least 1"
    if kind is int:
        fits = isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1
        return None if fits else "a whole number of at least 1"
    if kind is float:
        fits = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
        return None if fits else "a number"
    if bool in (kind, *kinds):
        return None if isinstance(value, bool) or (value is None and type(None) in kinds) else "true or false"
    return None if isinstance(value, str) or (value is None and type(None) in kinds) else "text"
