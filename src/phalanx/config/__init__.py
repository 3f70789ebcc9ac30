"""The configuration of a run and of a study: frozen dataclasses, declared once, read by `phalanx.loading`."""

from phalanx.config.models import (
    AdaptiveConfig,
    AnyModel,
    AssembledConfig,
    DualConfig,
    LayersConfig,
    MaskedConfig,
    MixtureConfig,
    SynergyConfig,
    UpcycledConfig,
)
from phalanx.config.parts import Mix, Scalar
from phalanx.config.recipes import (
    find_recipe,
    is_study,
    load_reproduction,
    load_run,
    load_study,
    shipped_recipes,
    shipped_reproductions,
)
from phalanx.config.router import RouterConfig
from phalanx.config.run import EvaluationConfig, RunConfig, ValidationConfig, bound_config
from phalanx.config.study import (
    AnyView,
    DualView,
    EnsembleView,
    GateView,
    NutsView,
    ReproductionConfig,
    StudyConfig,
    StudyRun,
)

__all__ = [
    "AdaptiveConfig",
    "AnyModel",
    "AnyView",
    "AssembledConfig",
    "DualConfig",
    "DualView",
    "EnsembleView",
    "EvaluationConfig",
    "GateView",
    "LayersConfig",
    "MaskedConfig",
    "Mix",
    "MixtureConfig",
    "NutsView",
    "ReproductionConfig",
    "RouterConfig",
    "RunConfig",
    "Scalar",
    "StudyConfig",
    "StudyRun",
    "SynergyConfig",
    "UpcycledConfig",
    "ValidationConfig",
    "bound_config",
    "find_recipe",
    "is_study",
    "load_reproduction",
    "load_run",
    "load_study",
    "shipped_recipes",
    "shipped_reproductions",
]
