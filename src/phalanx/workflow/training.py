"""Train what a recipe describes, into a run folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from phalanx.certification import check_certifiable
from phalanx.config import (
    AdaptiveConfig,
    AnyModel,
    AssembledConfig,
    DualConfig,
    LayersConfig,
    MaskedConfig,
    MixtureConfig,
    RunConfig,
    SynergyConfig,
    UpcycledConfig,
    bound_config,
)
from phalanx.data import Splits, load_data
from phalanx.errors import InputError, about
from phalanx.evaluation import protocol, validation
from phalanx.loading import load_recipe, to_plain
from phalanx.methods import Method
from phalanx.models import (
    MODEL_NAME,
    assemble,
    build_layers,
    build_masked,
    build_mixture,
    build_synergy,
    load_mixtures,
    new_router,
    read_description,
    save_description,
    single_network,
    upcycle,
    weights_before,
)
from phalanx.nn import frozen
from phalanx.nn.memory import RoomForWeights, available_bytes
from phalanx.routing import AdaptiveSmoothing, DualModel, LayerMixture, MixtureOfExperts, SynergyOfExperts
from phalanx.runs import RunFolder, write_json
from phalanx.runs.sidecar import verify_sidecar
from phalanx.training import BEST_NAME, Reporter, TrainingConfig, check_certified, train
from phalanx.training.loop import Validate, trained_seconds
from phalanx.workflow.compute import cpu_threads, environment, now, pick_device
from phalanx.workflow.mask_from import begun_masked
from phalanx.workflow.memory import check_memory
from phalanx.workflow.router_from import ROUTER, check_made_router, check_planned_router

ENVIRONMENT_NAME = "environment.json"

Buildable = MixtureOfExperts | LayerMixture | DualModel | SynergyOfExperts
"""What a recipe can describe."""

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
    """The sha256 of the weights that each part, where the model is made of runs, begins with."""


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
            started, clock = now(), time.monotonic() - trained_seconds(run)
            job = prepare()
            if run.resolve(MODEL_NAME).is_file():
                refuse_other_data(folder, job.data)
                _refuse_other_parts(folder, job.made_from)
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
    """Raises InputError unless `data` is, image for image and normalised alike, what `run` was begun with."""
    recorded = read_description(run)["data"]
    if recorded["fingerprint"] != data.fingerprint:
        raise InputError(
            f"{run} was made with other images: the fingerprint of {data.name} was {recorded['fingerprint'][:12]}..., "
            f"now {data.fingerprint[:12]}...; restore the data, or train into another folder"
        )
    # measured numbers may differ in their last digit between machines
    if not np.allclose([recorded["mean"], recorded["std"]], [data.mean, data.std], rtol=1e-9, atol=0):
        raise InputError(
            f"{run} was made with another normalisation: mean {recorded['mean']} and std {recorded['std']}, "
            f"now {list(data.mean)} and {list(data.std)}; give both the same data.mean and data.std"
        )


def _refuse_other_parts(run: Path, made_from: Mapping[str, str]) -> None:
    recorded = read_description(run).get("made_from", {})
    changed = sorted(part for part in {*recorded, *made_from} if recorded.get(part) != made_from.get(part))
    if changed:
        raise InputError(
            f"{run} was begun from other weights of its {' and '.join(map(part_name, changed))}; "
            "restore that run, or train into another folder"
        )


def train_run(
    config: RunConfig, folder: Path, reporter: Reporter | None = None, *, folders: Folders | None = None
) -> None:
    """Trains what a recipe describes; `folders` are those of the study it belongs to."""
    with about("device"):
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
    with about("data"):
        data = data or load_data(config.data, progress=None if reporter is None else reporter.progress)
    check_settings(config, data)
    with about("model"), RoomForWeights(available_bytes(torch.device("cpu"))):
        model, made_from = _build(config, data, folders or {})
    method = config.method.within(config.threat)
    with about("method"):
        method.check(model, data.num_classes)
    training = _checked_training(config, model, data)
    with about("training.batch_size"):
        check_memory(model, config, data, device)
    (validating,) = protocol(config.validation.protocol, config.threat).members
    images = data.val.first(config.validation.n)
    return Trained(
        model=model.to(device),
        method=method,
        data=data,
        training=training,
        seed=config.run_seed,
        augment=config.data.augment,
        validate=validation(images, validating.attack, seed=config.run_seed),
        made_from=made_from,
    )


def _checked_training(config: RunConfig, model: Buildable, data: Splits) -> TrainingConfig:
    training = config.training.within(config.threat)
    if training.certified is not None:
        with about("training.certified"):
            check_certified(model, data.shape)
    if config.evaluation.certify is not None:
        with about("evaluation.certify"), frozen(model):
            check_certifiable(model, data.shape, config.threat.norm)
    return training


def check_settings(config: RunConfig, data: Splits) -> None:
    """What can be said of a recipe before its model exists. Raises InputError."""
    mixing = isinstance(config.model, AdaptiveConfig)
    halves = mixing or isinstance(config.model, DualConfig)
    single = {"validation.protocol": config.validation.protocol, "evaluation.analysis": config.evaluation.analysis}
    for key, name in single.items():
        with about(key):
            if name is not None and len(protocol(name, config.threat, halves=halves, mixing=mixing).members) > 1:
                raise InputError(f"{key} must be one attack, got {name!r}, which is several")
    with about("evaluation.protocol"):
        protocol(config.evaluation.protocol, config.threat, halves=halves, mixing=mixing)
    if config.training.batch_size > len(data.train):
        raise InputError(
            f"training.batch_size is {config.training.batch_size}, but {data.name} has {len(data.train)} training "
            "images; lower it",
            key="training.batch_size",
        )


def check_unmade(config: RunConfig, parts: Mapping[str, RunConfig], data: Splits) -> None:
    """The same of a model made of runs of one study that are not made yet: their untrained models stand in.

    Raises InputError.
    """
    check_settings(config, data)
    models: dict[str, MixtureOfExperts] = {}
    begun = None
    folders = {part_name(part): Path(run) for part, run in config.model.made_of.items()}
    for (name, settings), run in zip(parts.items(), config.model.made_of.values(), strict=True):
        with about(f"model.{_key_of(config.model, run)}"):
            if settings.data != config.data:
                raise InputError(f"the {name} is trained on other data than the model made of it; give both the same")
            if name == ROUTER:
                begun = new_router(check_planned_router(config, settings), data, settings.run_seed, settings.threat)
            else:
                with RoomForWeights(available_bytes(torch.device("cpu"))):
                    models[name] = _stand_in(name, settings, data)
    with about("model"):
        model = _put_together(config, folders, models, data, begun)
    with about("method"):
        config.method.within(config.threat).check(model, data.num_classes)
    _checked_training(config, model, data)
    with about("training.batch_size"):
        check_memory(model, config, data, pick_device(config.device))


def _stand_in(name: str, settings: RunConfig, data: Splits) -> MixtureOfExperts:
    """The untrained model of a run that others are made of."""
    if isinstance(settings.model, MaskedConfig):
        return build_masked(settings.model, data, settings.run_seed)
    if not isinstance(settings.model, MixtureConfig):
        raise InputError(f"the {name} must be a mixture, not made of other runs itself; name another run")
    return build_mixture(settings.model, data, settings.run_seed, settings.threat)


def _build(config: RunConfig, data: Splits, folders: Folders) -> tuple[Buildable, dict[str, str]]:
    """The model to train, and the sha256 of the weights of the runs, or of the file, that it begins with."""
    model = config.model
    if isinstance(model, MixtureConfig):
        return build_mixture(model, data, config.run_seed, config.threat), weights_before(model)
    if isinstance(model, LayersConfig):
        return build_layers(model, data, config.run_seed), {}
    if isinstance(model, MaskedConfig) and model.start is None:
        return build_masked(model, data, config.run_seed), {}
    if isinstance(model, SynergyConfig):
        return build_synergy(model, data, config.run_seed), weights_before(model)
    runs = {part_name(name): folders.get(run, Path(run)) for name, run in model.made_of.items()}
    for (name, run), given in zip(runs.items(), model.made_of.values(), strict=True):
        with about(_key_of(model, given)):
            require_finished(run, f"model: the {name}")
            refuse_other_data(run, data)
    weights = [verify_sidecar(run / BEST_NAME) for run in runs.values()]
    made_from = dict(zip(model.made_of, weights, strict=True))
    if ROUTER in runs:
        check_made_router(runs[ROUTER], made_from)
    models = load_mixtures(runs)
    begun = models.pop(ROUTER).router if ROUTER in models else None
    return _put_together(config, runs, models, data, begun), made_from


def _key_of(model: AnyModel, run: str) -> str:
    """The key of the model's section that names a run it is made of."""
    return next(key for key, value in vars(model).items() if run in (value if isinstance(value, tuple) else (value,)))


def part_name(name: str) -> str:
    """What a run becomes in a model that is made of several, as messages call it."""
    return f"{name} half" if name in ("standard", "robust") else name


def _put_together(
    config: RunConfig,
    runs: Mapping[str, Path],
    models: Mapping[str, MixtureOfExperts],
    data: Splits,
    begun: nn.Module | None,
) -> Buildable:
    if isinstance(config.model, DualConfig):
        return DualModel(models["standard half"], models["robust half"], config.model.alpha, mix=config.model.mix)
    if isinstance(config.model, AdaptiveConfig):
        return AdaptiveSmoothing(
            models["standard half"],
            models["robust half"],
            scales=config.model.scales,
            alpha_range=config.model.alpha_range,
            hidden=config.model.hidden,
            seed=config.run_seed,
        )
    experts = [single_network(name, runs[name], model) for name, model in models.items()]
    if isinstance(config.model, MaskedConfig):
        (run,) = runs.values()
        return begun_masked(config.model, data, config.run_seed, run, experts[0])
    if isinstance(config.model, UpcycledConfig):
        return upcycle(config.model, experts[0], data, config.run_seed, config.threat)
    assert isinstance(config.model, AssembledConfig)
    return assemble(config.model, experts, data, config.run_seed, begun, config.threat)


def require_finished(run: Path, what: str = "") -> None:
    """Raises InputError for a run that may still change, CorruptError for one that is damaged."""
    folder = RunFolder(run)
    if run.exists():
        folder.record()
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
