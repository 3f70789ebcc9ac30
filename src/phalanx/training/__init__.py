"""The only training loop."""

from phalanx.training.certified import check_certified
from phalanx.training.config import (
    AWP,
    SGD,
    Adam,
    CertifiedTraining,
    Constant,
    Cosine,
    Cyclic,
    OneCycle,
    TrainingConfig,
)
from phalanx.training.guards import NoGradientError
from phalanx.training.loop import BEST_NAME, LAST_NAME, METRICS_NAME, train
from phalanx.training.reporter import Reporter, Silent

__all__ = [
    "AWP",
    "BEST_NAME",
    "LAST_NAME",
    "METRICS_NAME",
    "SGD",
    "Adam",
    "CertifiedTraining",
    "Constant",
    "Cosine",
    "Cyclic",
    "NoGradientError",
    "OneCycle",
    "Reporter",
    "Silent",
    "TrainingConfig",
    "check_certified",
    "train",
]
