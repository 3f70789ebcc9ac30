"""Which part of the model an attack differentiates: functions (model, attacked images, images, clean pass) -> Routed.

Registered by name. Whatever surface found it, a perturbation is judged on the whole real model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor

from phalanx.attacks.registry import Registry
from phalanx.routing import Routed, routed

Model: TypeAlias = Callable[[Tensor], Any]
Surface: TypeAlias = Callable[[Model, Tensor, Tensor, Routed | None], Routed]

SURFACES: Registry[Surface] = Registry("surface")


@SURFACES.register("whole")
def whole(model: Model, x_adv: Tensor, x: Tensor, clean: Routed | None) -> Routed:
    """The deployed model: routed(x'), gate and experts together."""
    del x, clean
    return routed(model, x_adv)
