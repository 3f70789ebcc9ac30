"""The configuration of a run and of a study: frozen dataclasses, declared once, read by `phalanx.loading`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from phalanx.data.config import DataConfig
from phalanx.errors import InputError
from phalanx.loading import Loaded, load_recipe
from phalanx.methods import ST, AnyMethod
from phalanx.threat import ThreatModel
from phalanx.training.config import TrainingConfig

Scalar = int | float | str | bool


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """What decides which experts answer."""

    name: Literal["linear", "mlp", "cnn"] = "linear"
    """One linear layer on the pixels, a fully connected network, or a small convolutional one."""
    hidden: tuple[int, ...] | None = None
    """Widths of the hidden layers of mlp or cnn; None is the router's own default."""
    train: bool = True
    """False keeps the router at its random initial weights (the released dual-model code's choice)."""

    def __post_init__(self) -> None:
        if self.hidden is not None and self.name == "linear":
            raise ValueError(f"hidden cannot be set for a linear router, got {self.hidden}; choose mlp or cnn")
        if self.hidden is not None and (not self.hidden or min(self.hidden) < 1):
            raise ValueError(f"hidden must hold widths of at least 1, got {self.hidden}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A mixture of experts of one kind; `experts: 1` is a single network."""

    expert: str = "small_cnn"
    """"mlp", "small_cnn", "resnet18", or your own "module:factory"."""
    experts: int = 4
    """How many experts."""
    options: Mapping[str, Scalar | tuple[int, ...]] = field(default_factory=dict)
    """The expert's own options, such as {width: 16}."""
    router: RouterConfig = field(default_factory=RouterConfig)
    """Unused by a single network."""
    top_k: int | Literal["all"] = 1
    """How many experts answer for each image; "all" is the soft gate."""
    temperature: float = 1.0
    """Divides the router's scores inside the gate's softmax."""

    def __post_init__(self) -> None:
        if self.experts < 1:
            raise ValueError(f"experts must be at least 1, got {self.experts}")
        if self.top_k != "all" and not 1 <= self.top_k <= self.experts:
            raise ValueError(
                f"top_k must be in 1..experts={self.experts} or 'all', got {self.top_k}; lower top_k or add experts"
            )
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if not re.fullmatch(r"[A-Za-z_][\w.]*(:[A-Za-z_]\w*)?", self.expert):
            raise ValueError(f"expert must be a name or 'module:factory', got {self.expert!r}")


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """What is measured on the validation split during training."""

    protocol: str = "pgd-10"
    """One attack, named as in evaluation."""
    n: int | None = 500
    """Images used, the split's first; None for all."""

    def __post_init__(self) -> None:
        if self.n is not None and self.n < 1:
            raise ValueError(f"n must be at least 1, got {self.n}; leave it out for all images")
        if "," in self.protocol:
            raise ValueError(f"protocol must be one attack, got {self.protocol!r}")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured on the test split afterwards."""

    protocol: str = "pgd-50"
    """Attacks joined by commas: fgsm, pgd-STEPS, pgd-STEPSxRESTARTS, each with -margin if wanted."""
    n: int | None = None
    """Images used, the split's first; None for all."""
    weights: Literal["best", "last"] = "best"
    """The weights that validated best, or the last."""
    batch_size: int = 64
    """Images attacked together; verdicts do not depend on it."""

    def __post_init__(self) -> None:
        if self.n is not None and self.n < 1:
            raise ValueError(f"n must be at least 1, got {self.n}; leave it out for all images")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that determines a run."""

    label: str = ""
    """The run's name in tables; by default that of its recipe."""
    seed: int = 0
    """Initial weights, order of the data, augmentation, attacks."""
    device: str = "auto"
    """"auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N"."""
    threads: int | None = None
    """CPU threads; small networks are fastest with 1. None leaves torch's choice."""
    data: DataConfig = field(default_factory=DataConfig)
    """Images and their splits."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Experts and router."""
    threat: ThreatModel = field(default_factory=ThreatModel)
    """What an attacker may do, in training and in evaluation."""
    method: AnyMethod = field(default_factory=ST)
    """How it is trained."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """The loop."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """Numbers during training."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Numbers afterwards."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed must be in 0..2**31 - 1, got {self.seed}")
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ValueError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {self.device!r}")
        if self.threads is not None and not 1 <= self.threads <= 1024:
            raise ValueError(f"threads must be in 1..1024, got {self.threads}")


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Several runs that make one table."""

    title: str = ""
    """Heading of the report."""
    description: str = ""
    """What the study asks, in a sentence or two."""
    runs: Mapping[str, str] = field(default_factory=dict)
    """The runs in table order: a folder name and the recipe it is made by."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("runs must name at least one run, for example {at: digits-at}")


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    folder = Path(str(resources.files("phalanx") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """A recipe by its name or by its file's path. Raises InputError listing what there is."""
    shipped = shipped_recipes()
    if name in shipped:
        return shipped[name]
    path = Path(name)
    if path.suffix in {".yaml", ".yml"} or path.exists():
        if not path.is_file():
            raise InputError(f"recipe {name} does not exist; give a YAML file, or one of {', '.join(shipped)}")
        return path
    raise InputError(f"no recipe is named {name!r}; there are {', '.join(shipped)}, or give a path that ends in .yaml")


def is_study(path: Path) -> bool:
    """Whether a recipe describes a study: it has a top-level `runs`."""
    try:
        return bool(re.search(r"^runs\s*:", path.read_text(encoding="utf-8"), re.MULTILINE))
    except (OSError, UnicodeDecodeError):
        return False


def load_run(name: str, overrides: tuple[str, ...] = ()) -> Loaded[RunConfig]:
    """The run configuration of a recipe with `--set` overrides. Raises RecipeErrors with every mistake at once."""
    return load_recipe(RunConfig, find_recipe(name), overrides, extends=_extended)


def load_study(name: str) -> Loaded[StudyConfig]:
    """The study of a recipe."""
    return load_recipe(StudyConfig, find_recipe(name), extends=_extended)


def _extended(name: str) -> Path:
    return find_recipe(name)


def bound_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a resolved configuration that a run folder is bound to: how it is trained, not how it is measured
    afterwards or what it is called."""
    return {key: value for key, value in config.items() if key not in ("label", "evaluation")}
