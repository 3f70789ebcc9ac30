"""Averages over an epoch, kept on the device until they are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Meters:
    """Running sums of named tensors, each of any fixed shape."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor], *, player: str = "all") -> None:
        """One observation of each; those of an update of a single player carry its name."""
        for name, value in values.items():
            key = name if player == "all" else f"{player}.{name}"
            # float64 sums: the order of addition is fixed, and saving them as text loses nothing
            total = value.detach().double()
            self._sums[key] = total if key not in self._sums else self._sums[key].to(total.device) + total
            self._counts[key] = self._counts.get(key, 0) + 1

    def means(self) -> dict[str, float | list[float]]:
        """The average of each, as plain numbers."""
        return {key: (total / self._counts[key]).tolist() for key, total in self._sums.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"sums": {key: total.tolist() for key, total in self._sums.items()}, "counts": dict(self._counts)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Meters:
        """The inverse of `state_dict`; the sums come back on the CPU and follow the first value added."""
        meters = cls()
        meters._sums = {key: torch.tensor(total, dtype=torch.float64) for key, total in state["sums"].items()}
        meters._counts = {key: int(count) for key, count in state["counts"].items()}
        return meters
