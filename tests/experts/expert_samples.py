"""Every named backbone, as small as its options allow."""

from __future__ import annotations

from typing import Any

SMALL: dict[str, dict[str, Any]] = {
    "densenet": {"depth": 10, "growth": 4},
    "lipschitz_cnn": {"width": 4, "hidden": 6},
    "lipschitz_mlp": {"hidden": [6]},
    "mlp": {"hidden": [5]},
    "resnet18": {"width": 4},
    "small_cnn": {"width": 4},
    "vgg16": {"width": 4, "hidden": 6},
    "wrn": {"depth": 10, "widen": 1},
}
LEAST: dict[str, int] = {
    "densenet": 4,
    "lipschitz_cnn": 4,
    "lipschitz_mlp": 1,
    "mlp": 1,
    "resnet18": 1,
    "small_cnn": 1,
    "vgg16": 16,
    "wrn": 1,
}
"""Pixels."""
