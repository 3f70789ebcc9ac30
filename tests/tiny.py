"""Runs small enough for a test: a few digits, small mixtures, and what a run ends with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from phalanx.data import Splits, load_data
from phalanx.experts import build_expert
from phalanx.methods import AT, ST
from phalanx.methods.base import Method
from phalanx.routing import LinearRouter, MixtureOfExperts
from phalanx.runs import RunFolder
from phalanx.runs.checkpoint import load_latest
from phalanx.runs.metrics import read_metrics
from phalanx.threat import ThreatModel
from phalanx.training import SGD, TrainingConfig, train

THREAT = ThreatModel("Linf", "3/16")
BATCH = 32


@lru_cache
def digits() -> Splits:
    """100 images to train on (3 batches of 32), 30 to validate and 40 to test on."""
    return load_data("digits", train_limit=100, val_limit=30, test_limit=40)


def mixture(experts: int = 2, top_k: int | str = 1, *, seed: int = 0, expert: str = "mlp", **options: Any) -> Any:
    """A mixture for `digits()`; `options` are the mixture's."""
    torch.manual_seed(seed)
    own: dict[str, Any] = {"hidden": [12]} if expert == "mlp" else {}
    networks = [build_expert(expert, num_classes=10, image_size=8, channels=1, **own) for _ in range(experts)]
    router = LinearRouter((1, 8, 8), experts) if experts > 1 else None
    return MixtureOfExperts(router, networks, top_k, **options)


def noisy_cnn(num_classes: int, image_size: int, channels: int) -> nn.Module:
    """BatchNorm, which remembers, and dropout, which draws: what makes an exact resume hard."""
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(4 * image_size**2, num_classes),
    )


def at(steps: int = 2, **settings: Any) -> AT:
    from phalanx.attacks import PGD

    return AT(attack=PGD(steps=steps), **settings).within(THREAT)


def run_training(
    folder: Path,
    model: nn.Module | None = None,
    method: Method | None = None,
    *,
    reporter: Any = None,
    validate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    augment: tuple[str, ...] = (),
    **training: Any,
) -> nn.Module:
    """Trains `model` on `digits()` into `folder`, two epochs of three steps by default, or takes the run up again.

    Checkpoints are written at the start and at the end, unless `checkpoint_seconds` says otherwise.
    """
    settings = {"epochs": 2, "batch_size": BATCH, "optimizer": SGD(lr=0.05), "checkpoint_seconds": 3600.0, **training}
    run = RunFolder(folder)
    with run.lock():
        run.prepare({"test": 1})
        return train(
            mixture() if model is None else model,
            ST() if method is None else method,
            digits(),
            TrainingConfig(**settings),
            run,
            reporter=reporter,
            validate=validate,
            augment=augment,
        )


def sha256_of(tensors: Mapping[str, Tensor]) -> str:
    """Names, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def metrics(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without the clock."""
    records = read_metrics(folder / "metrics.jsonl")
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def result(folder: Path) -> dict[str, str]:
    """The sha256 of everything a run ends with: last checkpoint by file, deployed weights, log."""
    checkpoint = load_latest(folder / "checkpoints")
    assert checkpoint is not None and not checkpoint.notes
    found = {f"checkpoint {group}": sha256_of(tensors) for group, tensors in checkpoint.tensors.items()}
    state = {key: value for key, value in checkpoint.state.items() if key != "metrics"}
    found["checkpoint step and state"] = json.dumps([checkpoint.step, state], sort_keys=True)
    for path in sorted(folder.glob("*.safetensors")):
        found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    found["metrics"] = json.dumps(metrics(folder), sort_keys=True)
    return found


class Stop(Exception):
    """What `StopAt` raises: a crash, as far as the loop knows."""


class StopAt:
    """A reporter that calls `action` (by default: crashes) after so many steps of this process."""

    def __init__(self, steps: int, action: Callable[[], object] | None = None) -> None:
        self.left = steps
        self.action = action
        self.messages: list[str] = []

    def progress(self, done: int, total: int, note: str) -> None:
        self.left -= 1
        if self.left == 0:
            if self.action is None:
                raise Stop
            self.action()

    def notify(self, message: str) -> None:
        self.messages.append(message)
