"""The only training loop. A method says what goes down; this moves the parameters, watches, saves and resumes.

Everything random is a function of (seed, step, sample), so a run that was killed and resumed ends with the same bytes
as one that was not.
"""

# E experts

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from phalanx.data import Batch, Loader, Splits
from phalanx.errors import CorruptError, DivergedError, InputError, Interrupted
from phalanx.methods.base import Method, Update
from phalanx.nn import preserved_rng
from phalanx.nn.memory import attempted
from phalanx.rng import Rng, derive_seed
from phalanx.routing import RoutedModel
from phalanx.runs import MetricsLog, RunFolder
from phalanx.runs.checkpoint import Checkpoint, load_latest, save_checkpoint, save_tensors
from phalanx.runs.metrics import read_metrics
from phalanx.training.awp import perturbed_weights
from phalanx.training.certified import certified_part, check_certified, with_certified_loss
from phalanx.training.config import TrainingConfig
from phalanx.training.ema import Average
from phalanx.training.guards import collapse_alarms, diverged, gradient_norm, overfitting_alarms
from phalanx.training.meters import Meters
from phalanx.training.players import build_optimizers, moving
from phalanx.training.reporter import Reporter, Silent
from phalanx.training.schedules import lr_factor
from phalanx.training.signals import StopRequest, stop_requests
from phalanx.training.state import Best, State

METRICS_NAME = "metrics.jsonl"
CHECKPOINTS_NAME = "checkpoints"
LAST_NAME, BEST_NAME = "last.safetensors", "best.safetensors"

Validate = Callable[[nn.Module], Mapping[str, float]]
"""From the deployed model to numbers on the validation split; must hold "accuracy" and "robust_accuracy"."""


def train(
    model: nn.Module,
    method: Method,
    data: Splits,
    config: TrainingConfig,
    folder: RunFolder,
    *,
    seed: int = 0,
    augment: tuple[str, ...] = (),
    validate: Validate | None = None,
    reporter: Reporter | None = None,
) -> nn.Module:
    """Trains `model`, a routed model, in place, inside a prepared and locked run folder, from its last checkpoint.

    Writes checkpoints, metrics.jsonl, last.safetensors and, with `validate`, best.safetensors. Returns the deployed
    model with its last weights (the average if there is one), on the model's device, in evaluation mode.

    Raises InputError, before anything is written, for a model that is not routed or that the method cannot train;
    DivergedError at the first non-finite number, NoGradientError for a player without gradient, Interrupted after
    saving when a signal asked to stop, CorruptError or DiskError from the files.
    """
    if not isinstance(model, RoutedModel):
        raise InputError(
            f"a {type(model).__name__} is no routed model; wrap a single network: MixtureOfExperts(None, [network])"
        )
    method.check(model, data.num_classes)
    if config.certified is not None:
        check_certified(model, data.shape)
    reporter = reporter or Silent()
    with stop_requests() as stop, preserved_rng(), _determinism(), MetricsLog(folder.resolve(METRICS_NAME)) as log:
        run = _Run(model, method, data, config, folder, seed, augment, validate, reporter, log)
        run.resume()
        run.go(stop)
        return run.finish()


@contextmanager
def _determinism() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = benchmark


@contextmanager
def _naming_step(done: int) -> Iterator[None]:
    """A save that refuses non-finite numbers, such as running statistics that no training pass reads, says when."""
    try:
        yield
    except DivergedError as error:
        raise DivergedError(f"training diverged at step {max(done - 1, 0)}: {error}") from error


def trained_seconds(folder: RunFolder) -> float:
    """How long earlier sessions trained, up to the last checkpoint; 0 for a new run. Raises CorruptError."""
    checkpoint = load_latest(folder.resolve(CHECKPOINTS_NAME))
    return 0.0 if checkpoint is None else _seconds_of(checkpoint)


def _seconds_of(checkpoint: Checkpoint) -> float:
    # checkpoints of older versions do not have them
    return float(checkpoint.state["metrics"].get("seconds", 0.0))


class _Run:
    """One run in progress."""

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        data: Splits,
        config: TrainingConfig,
        folder: RunFolder,
        seed: int,
        augment: tuple[str, ...],
        validate: Validate | None,
        reporter: Reporter,
        log: MetricsLog,
    ) -> None:
        assert isinstance(model, RoutedModel)
        self.config, self.folder = config, folder
        self.seed, self.validate, self.reporter, self.log = seed, validate, reporter, log
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.loaders = {
            stream: Loader(
                data.train,
                batch_size=config.batch_size,
                seed=derive_seed(seed, "data"),
                stream=stream,
                augment=augment,
                sampling=config.sampling,
                device=str(self.device),
            )
            for stream in method.streams
        }
        self.steps_per_epoch = min(loader.steps_per_epoch for loader in self.loaders.values())
        self.total = config.epochs * self.steps_per_epoch
        self.players = {name: list(parameters) for name, parameters in model.players().items()}
        average = None
        if config.ema_decay is not None:
            average = Average(model, config.ema_decay, start=config.ema_start_epoch * self.steps_per_epoch)
        self.state = State(model, build_optimizers(config.optimizer, self.players), average, method)
        self.routed: RoutedModel = model
        self.saved_at = time.monotonic()
        self.started = time.monotonic()
        """Less what earlier sessions took."""

    # -- one step ------------------------------------------------------------------------------------------------

    def go(self, stop: StopRequest) -> None:
        """From the state's step to the last."""
        state = self.state
        if not self.total and self.validate is not None and state.best is None:
            # nothing to train: the weights that it came with are measured and deployed
            self._validate(0, self.validate)
        while state.step < self.total:
            if stop.signum is not None:
                self.save()
                raise Interrupted(
                    stop.signum, f"stopped at step {state.step} of {self.total}, saved; the same command goes on"
                )
            if attempted(partial(self._one_step, state.step)) is None:
                raise self._too_large(state.step)
            state.step += 1
            if state.step % self.steps_per_epoch == 0:
                self._end_epoch(state.step // self.steps_per_epoch)
            if time.monotonic() - self.saved_at >= self.config.checkpoint_seconds:
                self.save()
            self.reporter.progress(state.step, self.total, f"epoch {state.step // self.steps_per_epoch}")

    def _too_large(self, step: int) -> InputError:
        """Nothing is saved any more, so smaller batches are tried on the state as it is. They are only named: the same
        recipe with fewer images at once, or with BatchNorm on parts of a batch, would be another training."""
        size = self.config.batch_size // 2
        while size and attempted(partial(self._one_step, step, size)) is None:
            size //= 2
        found = f"{size} images at once do: set training.batch_size={size}" if size else "not even one image does"
        return InputError(
            f"a step of {self.config.batch_size} images does not fit into the memory of {self.device} (step {step}); "
            f"{found}, take narrower experts, or free memory and give the same command again",
            key="training.batch_size",
        )

    def _one_step(self, step: int, most: int | None = None) -> None:
        """`most` images of the step's batch, by default all."""
        batches = {
            stream: Batch(*(column[:most] for column in loader.batch(step))) for stream, loader in self.loaders.items()
        }
        rng = Rng(derive_seed(self.seed, "step", step))
        # dropout and whatever else draws from torch's global state
        torch.manual_seed(rng.fold("global").seed)
        self.state.model.train()
        factor = lr_factor(self.config.schedule, step, self.total)
        with self._autocast():
            for update in self.state.method.updates(self.routed, batches, rng):
                self._apply(self._certified(update, batches, step), step, factor)
        if self.state.average is not None:
            self.state.average.update(self.state.model, step)

    def _certified(self, update: Update, batches: Mapping[str, Batch], step: int) -> Update:
        """The update with the loss that enlarges certificates, where that is on and the update moves its experts."""
        settings = self.config.certified
        if settings is None or certified_part(self.routed)[1] not in moving(update.player, self.players):
            return update
        rising = settings.warmup * self.total
        progress = min(1.0, (step + 1) / rising) if rising else 1.0
        return with_certified_loss(update, self.routed, batches[self.state.method.streams[0]], settings, progress)

    def _autocast(self) -> torch.autocast:
        # without its cache: that would go on with a weight's old value after the weight has moved within the step
        bf16 = self.config.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=bf16, cache_enabled=False)

    def _apply(self, update: Update, step: int, factor: float) -> None:
        names = moving(update.player, self.players)
        self.state.model.zero_grad(set_to_none=True)
        with self._perturbed(update, names, step) as before:
            loss = update.loss()
            # backward runs in the precision the forward chose
            with torch.autocast(self.device.type, enabled=False):
                loss.value.backward()  # type: ignore[no-untyped-call]
        logs = {**update.logs, **loss.logs}
        with torch.autocast(self.device.type, enabled=False):
            self._check(loss.value, logs, names, step)
            self._move(names, factor)
        if before is not None:
            logs["awp_rise"] = loss.value.detach() - before
        self.state.meters.add({"loss": loss.value.detach(), **logs}, player=update.player)

    def _perturbed(self, update: Update, names: list[str], step: int) -> AbstractContextManager[Tensor | None]:
        """The weights of `names` perturbed, if AWP is on, and the update's loss before that."""
        awp = self.config.awp
        if awp is None or step < awp.warmup_epochs * self.steps_per_epoch:
            return nullcontext()
        parameters = [parameter for name in names for parameter in self.players[name]]
        return perturbed_weights(self.state.model, parameters, lambda: update.loss().value, awp.gamma)

    def _check(self, loss: Tensor, logs: Mapping[str, Tensor], names: list[str], step: int) -> None:
        norms = {name: gradient_norm(self.players[name]) for name in names}
        known = {name: norm for name, norm in norms.items() if norm is not None}
        # one wait for the device per update, whatever the number of players
        value, *sizes = torch.stack([loss.detach().float(), *(n.float() for n in known.values())]).tolist()
        if not all(math.isfinite(number) for number in (value, *sizes)):
            raise diverged(step, value, self.state.model, logs)
        found = dict(zip(known, sizes, strict=True))
        self.state.watch.check(step, {name: found.get(name) for name in names})

    def _move(self, names: list[str], factor: float) -> None:
        parameters = [p for name in names for p in self.players[name]]
        for parameter in parameters:
            if parameter.grad is None:
                # an idle expert's gradient is zero, as it would be on another rank: momentum and decay go on
                parameter.grad = torch.zeros_like(parameter)
        if self.config.clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, self.config.clip_norm)
        for name in names:
            optimizer = self.state.optimizers[name]
            for group in optimizer.param_groups:
                group["lr"] = self.config.optimizer.lr * factor
            optimizer.step()
        self.state.model.zero_grad(set_to_none=True)

    # -- the end of an epoch -------------------------------------------------------------------------------------

    def _end_epoch(self, epoch: int) -> None:
        state = self.state
        means = state.meters.means()
        lr = self.config.optimizer.lr * lr_factor(self.config.schedule, state.step - 1, self.total)
        seconds = round(self._seconds, 3)
        self.log.append({"kind": "train", "epoch": epoch, "step": state.step, **means, "lr": lr, "seconds": seconds})
        self._raise("router_collapse", collapse_alarms(means, epoch), epoch)
        state.meters = Meters()
        due = epoch % self.config.validate_every == 0 or epoch == self.config.epochs
        if self.validate is not None and due:
            self._validate(epoch, self.validate)
            self._raise("catastrophic_overfitting", overfitting_alarms(read_metrics(self.log.path)), epoch)

    def _raise(self, alarm: str, messages: Iterable[str], epoch: int) -> None:
        for message in messages:
            self.log.append({"kind": "alarm", "epoch": epoch, "alarm": alarm, "message": message})
            self.reporter.notify(message)

    def _validate(self, epoch: int, validate: Validate) -> None:
        state = self.state
        numbers = dict(validate(state.deployed))
        self.log.append({"kind": "validation", "epoch": epoch, "step": state.step, **numbers})
        other = "accuracy" if self.config.select == "robust_accuracy" else "robust_accuracy"
        score = (numbers[self.config.select], numbers[other])
        if state.best is None or score >= state.best.score:
            state.best = Best(score, epoch)
            with _naming_step(state.step):
                save_tensors(self.folder.resolve(BEST_NAME), dict(state.deployed.state_dict()), {})

    # -- saving and resuming -------------------------------------------------------------------------------------

    def save(self) -> None:
        """Writes a checkpoint of the state."""
        state, offset = self.state, self.log.offset()
        log = {"bytes": offset, "sha256": self.log.digest(offset), "seconds": self._seconds}
        saved = {**state.plain(), "metrics": log}
        with _naming_step(state.step):
            save_checkpoint(self.folder.resolve(CHECKPOINTS_NAME), state.step, state.tensors(), saved)
        self.saved_at = time.monotonic()

    def resume(self) -> None:
        """Loads the last checkpoint, or writes the first one, of step 0."""
        checkpoint = load_latest(self.folder.resolve(CHECKPOINTS_NAME))
        if checkpoint is None:
            self.log.truncate_to(0)
            self.save()
            return
        for note in checkpoint.notes:
            self.reporter.notify(note)
        self._load(checkpoint)

    def _load(self, checkpoint: Checkpoint) -> None:
        offset, sha256 = int(checkpoint.state["metrics"]["bytes"]), checkpoint.state["metrics"]["sha256"]
        self.log.truncate_to(offset)
        if self.log.digest(offset) != sha256:
            raise CorruptError(f"{self.log.path} does not match its checkpoint: expected sha256 {sha256}; start afresh")
        self.state.load(checkpoint, self.folder.path)
        self.started -= _seconds_of(checkpoint)

    @property
    def _seconds(self) -> float:
        """Of all sessions up to now, without what was lost between a checkpoint and a kill."""
        return time.monotonic() - self.started

    def finish(self) -> nn.Module:
        """Writes the last weights; the deployed model."""
        self.save()
        deployed = self.state.deployed.eval()
        # no metadata: safetensors writes several keys in a random order, and equal runs must be equal bytes
        save_tensors(self.folder.resolve(LAST_NAME), dict(deployed.state_dict()), {})
        return deployed
