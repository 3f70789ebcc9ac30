"""Train what a recipe describes, into a run folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from phalanx.config import AnyModel, DualConfig, MixtureConfig, RunConfig, bound_config
from phalanx.data import Splits, load_data
from phalanx.errors import InputError
from phalanx.evaluation import protocol, validation
from phalanx.loading import load_recipe, to_plain
from phalanx.methods import Method
from phalanx.models import MODEL_NAME, build_mixture, join, read_description, save_description
from phalanx.routing import DualModel, MixtureOfExperts
from phalanx.runs import RunFolder, write_json
from phalanx.runs.sidecar import verify_sidecar
from phalanx.training import BEST_NAME, Reporter, TrainingConfig, train
from phalanx.training.loop import Validate
from phalanx.workflow.compute import cpu_threads, environment, now, pick_device

ENVIRONMENT_NAME = "environment.json"

Folders = Mapping[str, Path]
"""The folders of a study's runs by name; what is not among them is a path."""


@dataclass(frozen=True)
class Trained:
    """What `train_into` was asked to do, ready to be done: built only if the folder is not finished."""

    model: nn.Module
    method: Method
    data: Splits
    training: TrainingConfig
    seed: int
    augment: tuple[str, ...]
    validate: Validate
    made_from: Mapping[str, str] = field(default_factory=dict)
    """The sha256 of the weights that each half of a dual model begins with."""


def train_into(
    folder: Path,
    config: Mapping[str, Any],
    prepare: Callable[[], Trained],
    *,
    device: torch.device,
    reporter: Reporter | None = None,
) -> None:
    """Makes the run folder bound to `config`, resumes it, or, if it is finished, verifies it."""
    run = RunFolder(folder)
    with run.lock():
        run.prepare(config)
        if run.status() == "finished":
            run.verify()
            return
        with run.records_outcome():
            started, clock = now(), time.monotonic()
            job = prepare()
            if run.resolve(MODEL_NAME).is_file():
                refuse_other_data(folder, job.data)
                _refuse_other_halves(folder, job.made_from)
            else:
                save_description(run.resolve(MODEL_NAME), job.model, job.data, job.made_from)
            train(
                job.model,
                job.method,
                job.data,
                job.training,
                run,
                seed=job.seed,
                augment=job.augment,
                validate=job.validate,
                reporter=reporter,
            )
            write_json(run.resolve(ENVIRONMENT_NAME), environment(device, started, time.monotonic() - clock))
        results = [name for name in run.files() if not name.startswith("evaluations/")]
        run.finish(results)


def refuse_other_data(run: Path, data: Splits) -> None:
    """Raises InputError unless `data` is, image for image, what `run` was begun with."""
    recorded = read_description(run)["data"]["fingerprint"]
    if recorded != data.fingerprint:
        raise InputError(
            f"{run} was made with other images: the fingerprint of {data.name} was {recorded[:12]}..., "
            f"now {data.fingerprint[:12]}...; restore the data, or train into another folder"
        )


def _refuse_other_halves(run: Path, made_from: Mapping[str, str]) -> None:
    recorded = read_description(run).get("made_from", {})
    changed = sorted(half for half in {*recorded, *made_from} if recorded.get(half) != made_from.get(half))
    if changed:
        raise InputError(
            f"{run} was begun from other weights of its {' and '.join(changed)} half; "
            "restore that run, or train into another folder"
        )


def train_run(
    config: RunConfig, folder: Path, reporter: Reporter | None = None, *, folders: Folders | None = None
) -> None:
    """Trains what a recipe describes; `folders` are those of the study it belongs to."""
    device = pick_device(config.device)

    def prepare() -> Trained:
        return prepare_run(config, device, reporter, folders=folders)

    with cpu_threads(config.threads):
        # a mistake that only building shows must not leave a new folder bound to it
        made = prepare() if RunFolder(folder).status() == "new" else None
        train_into(folder, bound_config(to_plain(config)), lambda: made or prepare(), device=device, reporter=reporter)


def prepare_run(
    config: RunConfig,
    device: torch.device,
    reporter: Reporter | None = None,
    *,
    folders: Folders | None = None,
    data: Splits | None = None,
) -> Trained:
    """Data, model, method and validation of a recipe. Raises InputError for whatever does not fit together."""
    data = data or load_data(config.data, progress=None if reporter is None else reporter.progress)
    check_settings(config, data)
    model, made_from = _build(config.model, data, config.seed, folders or {})
    method = config.method.within(config.threat)
    method.check(model)
    (validating,) = protocol(config.validation.protocol, config.threat).members
    images = data.val if config.validation.n is None else data.val.first(config.validation.n)
    return Trained(
        model=model.to(device),
        method=method,
        data=data,
        training=config.training,
        seed=config.seed,
        augment=config.data.augment,
        validate=validation(images, validating.attack, seed=config.seed),
        made_from=made_from,
    )


def check_settings(config: RunConfig, data: Splits) -> None:
    """What can be said of a recipe before its model exists. Raises InputError."""
    halves = isinstance(config.model, DualConfig)
    single = {"validation.protocol": config.validation.protocol, "evaluation.analysis": config.evaluation.analysis}
    for key, name in single.items():
        if name is not None and len(protocol(name, config.threat, halves=halves).members) > 1:
            raise InputError(f"{key} must be one attack, got {name!r}, which is several")
    protocol(config.evaluation.protocol, config.threat, halves=halves)
    if config.training.batch_size > len(data.train):
        raise InputError(
            f"training.batch_size is {config.training.batch_size}, but {data.name} has {len(data.train)} training "
            "images; lower it"
        )


def check_unmade(config: RunConfig, halves: Mapping[str, RunConfig], data: Splits) -> None:
    """The same of a dual model whose halves, runs of one study, are not made yet: their untrained models stand in.

    Raises InputError.
    """
    check_settings(config, data)
    assert isinstance(config.model, DualConfig)
    models: dict[str, MixtureOfExperts] = {}
    for half, settings in halves.items():
        if not isinstance(settings.model, MixtureConfig):
            raise InputError(f"the {half} half of a dual model must be a mixture, not a dual model itself")
        if settings.data != config.data:
            raise InputError(f"the {half} half of a dual model is trained on other data; give all three the same data")
        models[half] = build_mixture(settings.model, data, settings.seed)
    model = DualModel(models["standard"], models["robust"], config.model.alpha, mix=config.model.mix)
    config.method.within(config.threat).check(model)


def _build(
    config: AnyModel, data: Splits, seed: int, folders: Folders
) -> tuple[MixtureOfExperts | DualModel, dict[str, str]]:
    """The model to train, and the sha256 of the weights its halves come with."""
    if isinstance(config, MixtureConfig):
        return build_mixture(config, data, seed), {}
    named = {"standard": config.standard, "robust": config.robust}
    halves = {half: folders.get(name, Path(name)) for half, name in named.items()}
    for half, run in halves.items():
        require_finished(run, f"model.{half}")
        refuse_other_data(run, data)
    model = join(halves["standard"], halves["robust"], config.alpha, config.mix)
    return model, {half: verify_sidecar(run / BEST_NAME) for half, run in halves.items()}


def require_finished(run: Path, what: str = "") -> None:
    """Raises InputError for a run that may still change, CorruptError for one that is damaged."""
    folder = RunFolder(run)
    status = folder.status()
    if status != "finished":
        # its best weights so far may still change, and what is made of them would outlive them
        name = f"{what}: {run}" if what else str(run)
        if status == "new":
            raise InputError(f"{name} does not exist; check the name, or train it first")
        raise InputError(f"{name} is not finished (status {status}); give its train command again, it goes on")
    folder.verify()


def run_config(run: Path) -> RunConfig:
    """The configuration a recipe's run was made with. Raises InputError for a run of a hand-built model."""
    record = RunFolder(run).record()["config"]
    if "model" not in record:
        raise InputError(f"{run} was not made from a recipe; evaluate it from Python: px.evaluate(model, images, ...)")
    return load_recipe(RunConfig, None, values=record).value
