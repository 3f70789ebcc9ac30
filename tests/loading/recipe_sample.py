"""A configuration as rich as the real one, and a recipe for it, one key to a line."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field


@dataclass(frozen=True, kw_only=True)
class PGD:
    name: Literal["pgd"] = "pgd"
    steps: int = 10
    """Gradient steps per example."""
    step_size: float | str = "2/255"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}; raise it")


@dataclass(frozen=True, kw_only=True)
class FGSM:
    name: Literal["fgsm"] = "fgsm"
    alpha: float = 1.25


Attack = Annotated[PGD | FGSM, Field(discriminator="name")]


@dataclass(frozen=True, kw_only=True)
class ST:
    name: Literal["st"] = "st"
    smoothing: float = 0.0


@dataclass(frozen=True, kw_only=True)
class AT:
    name: Literal["at"] = "at"
    attack: Attack = field(default_factory=lambda: PGD(steps=50))
    beta: float = 6.0

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 100:
            raise ValueError(f"beta must be in 0..100, got {self.beta}; choose one in range")


Method = Annotated[ST | AT, Field(discriminator="name")]


@dataclass(frozen=True, kw_only=True)
class Model:
    experts: int = 4
    top_k: int = 1
    kind: Literal["model", "conv", "token"] = "model"
    widths: tuple[int, ...] = (16, 32)
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.experts < 1:
            raise ValueError(f"experts must be at least 1, got {self.experts}; raise it")
        if not 1 <= self.top_k <= self.experts:
            raise ValueError(f"top_k must be in 1..experts={self.experts}, got {self.top_k}; lower it")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}; lower it")


@dataclass(frozen=True, kw_only=True)
class Threat:
    norm: Literal["Linf", "L2"] = "Linf"
    eps: float | str = "8/255"

    def __post_init__(self) -> None:
        numerator, _, denominator = str(self.eps).partition("/")
        try:
            value = float(numerator) / float(denominator or 1)
        except (ValueError, ZeroDivisionError):
            raise ValueError(f"eps: must be a number or a fraction, got {self.eps!r}; write 8/255") from None
        if not 0 <= value <= 1:
            raise ValueError(f"eps: must be in [0, 1], got {self.eps!r}; images are in [0, 1]")


class Precision(Enum):
    FP32 = "fp32"
    BF16 = "bf16"


@dataclass(frozen=True, kw_only=True)
class Training:
    epochs: int
    lr: float = 0.1
    precision: Precision = Precision.FP32
    ema: bool = False
    milestones: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Data:
    name: str = "digits"
    root: Path | None = None
    batch_size: int = 128
    limit: int | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    training: Training
    model: Model = field(default_factory=Model)
    threat: Threat = field(default_factory=Threat)
    method: Method = field(default_factory=AT)
    data: Data = field(default_factory=Data)
    attacks: tuple[Attack, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}; raise it")


TEXT = """\
seed: 3
model:
  experts: 4
  top_k: 2
  kind: conv
  widths: [16, 32]
  dropout: 0.1
threat:
  norm: Linf
  eps: 8/255
method:
  name: at
  beta: 6
  attack:
    name: pgd
    steps: 7
    step_size: 2/255
training:
  epochs: 3
  lr: 1e-3
  precision: bf16
  ema: true
  milestones:
    half: 0.5
data:
  name: digits
  root: data/digits
  batch_size: 64
  limit: 100
"""
