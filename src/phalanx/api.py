"""What `import phalanx as px` offers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from phalanx import attacks, data, experts, methods, routing
from phalanx.certification import Certificate, SmoothedCertificate, certify, certify_smoothed
from phalanx.data import DataConfig, ImageSet, Splits, load_data
from phalanx.errors import InputError
from phalanx.evaluation import Evaluation, Limits, validation
from phalanx.evaluation import evaluate as _evaluate
from phalanx.evaluation import protocol as _protocol
from phalanx.evaluation.model_parts import protocol_for
from phalanx.experts import build_expert
from phalanx.loading import to_plain
from phalanx.methods import METHODS, Method
from phalanx.models import load
from phalanx.nn import spec_of
from phalanx.routing import CNNRouter, DualModel, LinearRouter, MixtureOfExperts, MLPRouter, Route
from phalanx.threat import ThreatModel, parse_norm
from phalanx.training import Reporter, TrainingConfig
from phalanx.workflow import Trained, train_into

__all__ = [
    "CNNRouter",
    "Certificate",
    "DataConfig",
    "DualModel",
    "Evaluation",
    "ImageSet",
    "Limits",
    "LinearRouter",
    "MLPRouter",
    "MixtureOfExperts",
    "Route",
    "Run",
    "SmoothedCertificate",
    "Splits",
    "ThreatModel",
    "TrainingConfig",
    "attacks",
    "build_expert",
    "certify",
    "certify_smoothed",
    "data",
    "evaluate",
    "experts",
    "load",
    "load_data",
    "methods",
    "routing",
    "train",
]


@dataclass(frozen=True)
class Run:
    """A finished run."""

    path: Path
    """Its folder."""
    model: nn.Module
    """The model with its best-validated weights, in evaluation mode, on the device it was trained on."""


def _method(method: str | Method, threat: ThreatModel) -> Method:
    if isinstance(method, str):
        if method not in METHODS:
            raise InputError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        return METHODS[method]().within(threat)
    return method.within(threat)


def _threat(norm: str, eps: float | str) -> ThreatModel:
    try:
        return ThreatModel(parse_norm(norm), eps)
    except ValueError as error:
        raise InputError(str(error)) from None


def _training(training: TrainingConfig | None, epochs: int | None) -> TrainingConfig:
    chosen = training or TrainingConfig()
    return chosen if epochs is None else replace(chosen, epochs=epochs)


def train(
    model: nn.Module,
    method: str | Method,
    data: Splits,
    *,
    out: Path | str,
    eps: float | str = "8/255",
    norm: str = "Linf",
    epochs: int | None = None,
    training: TrainingConfig | None = None,
    augment: tuple[str, ...] = (),
    seed: int = 0,
    reporter: Reporter | None = None,
    factory: Callable[[], nn.Module] | None = None,
) -> Run:
    """Trains a routed model; the same call takes up an interrupted run, and only verifies and loads a finished one.

    `model` is moved in place and holds the last step's weights then (of a finished run it stays as it is); the deployed
    model, with the weights that validation chose, is the returned run's own.

    Args:
        model: a `MixtureOfExperts` (of one, for a single network) on any device.
        method: "st", "at", or a method object with its own settings.
        data: from `load_data`; the validation split picks the best weights, the test split is not touched.
        out: the run's folder.
        eps, norm: the threat, for every attack that does not set its own.
        epochs: shorthand for `training`'s.
        training: optimizer, schedule, batch size, ...
        factory: builds the model anew, for one whose parts were not made by Phalanx's builders.

    Raises InputError for arguments that do not fit, DivergedError, NoGradientError, Interrupted after saving.
    """
    threat = _threat(norm, eps)
    spec = spec_of(model)
    if spec is None and factory is None:
        raise InputError(
            "the model was built by hand, so its run could not be loaded again; give train(..., factory=...), "
            "a function without arguments that builds it, or use px.build_expert and px.LinearRouter"
        )
    chosen, settings = _method(method, threat), _training(training, epochs).within(threat)
    member = _protocol("pgd-10", threat).members[0]
    job = Trained(
        model=model,
        method=chosen,
        data=data,
        training=settings,
        seed=seed,
        augment=augment,
        validate=validation(data.val, member.attack, seed=seed),
    )
    config: dict[str, Any] = {
        "seed": seed,
        "augment": list(augment),
        "data": {"name": data.name, "fingerprint": data.fingerprint},
        "spec": None if spec is None else spec.to_json(),
        "threat": to_plain(threat),
        "method": to_plain(chosen),
        "training": to_plain(settings),
    }
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    train_into(Path(out), config, lambda: job, device=device, reporter=reporter)
    return Run(Path(out), load(out, factory=factory).to(device))


def evaluate(
    model: Callable[[torch.Tensor], Any],
    images: ImageSet,
    *,
    protocol: str = "pgd-50",
    eps: float | str = "8/255",
    norm: str = "Linf",
    out: Path | str | None = None,
    batch_size: int = 64,
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
    limits: Limits | None = None,
    allow: Collection[str] = (),
    notify: Callable[[str], None] = warnings.warn,
) -> Evaluation:
    """Clean and robust accuracy of any callable, images (B, C, H, W) in [0, 1] to logits (B, C).

    Args:
        protocol: attacks joined by commas, such as "fgsm", "pgd-50x10" or "routing-50": every surface the model has;
            "standard", "plus" and "rand" are AutoAttack's versions.
        out: a ledger file that keeps every verdict and lets the same call continue; None keeps them in memory.
        limits: how far this call goes, such as px.Limits(seconds=600); the result says whether it has `finished`.
        allow: "probabilities", for a model that looks as if it answered with them and does not.
        notify: hears what must be known about the model, such as random answers; by default a warning.

    Raises InputError for an unknown protocol, bad images or logits, or a ledger of another model, data or threat.
    """
    threat = _threat(norm, eps)
    device = next((p.device for p in model.parameters()), None) if isinstance(model, nn.Module) else None
    return _evaluate(
        model,
        images,
        protocol_for(protocol, threat, model, images.images(slice(0, 8)).to(device or "cpu")),
        threat,
        ledger=None if out is None else Path(out),
        batch_size=batch_size,
        seed=seed,
        device=device or "cpu",
        progress=progress,
        limits=limits,
        allow=allow,
        notify=notify,
    )
