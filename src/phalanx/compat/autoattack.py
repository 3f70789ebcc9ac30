"""AutoAttack (Croce & Hein 2020) under the names of its reference: a script needs another import, nothing else."""

# N images of the evaluation, B batch

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from phalanx.attacks import check_answers
from phalanx.attacks.autoattack import VERSIONS
from phalanx.attacks.target import errors_of
from phalanx.compat.running import Images, Run
from phalanx.compat.settings import APGDSettings, APGDTargetedSettings, FABSettings, Settings, SquareSettings
from phalanx.compat.state import State, answers, fingerprint
from phalanx.errors import InputError
from phalanx.evaluation import EVALUATION_VERSION, Evaluation, Protocol, autoattack_log, protocol
from phalanx.evaluation.evaluate import model_sha256, versions
from phalanx.evaluation.filling import nobody
from phalanx.nn import exact_fp32, frozen, preserved_rng
from phalanx.routing import routed
from phalanx.runs import Binding
from phalanx.threat import ThreatModel, parse_norm

Answer: TypeAlias = Tensor | tuple[Tensor, Tensor]


class AutoAttack:
    """The standard, plus, rand or a custom version, attack by attack, each on what still stands.

    The interface is the reference's, the attacks and the judgement are Phalanx's: any number of classes, verdicts that
    do not depend on `bs`, `state_path` that continues. `apgd`, `apgd_targeted`, `fab` and `square` hold the members'
    settings; change them, and `attacks_to_run`, between construction and a run.

    Args:
        model: any callable, images (B, ...) in [0, 1] to logits (B, C).
        norm: "Linf", "L2" or "L1".
        eps: the radius in pixel units; "8/255" is kept exactly.
        seed: None is 0, so that a run can be repeated.
        verbose: log; warnings are logged in any case.
        attacks_to_run: for the version "custom": apgd-ce, apgd-dlr, apgd-t, fab, fab-t, square, in the order to run.
        device: where batches are sent; the model must be there already.
        log_path: a file that the log is appended to, besides standard output.

    Raises InputError for what does not fit.
    """

    def __init__(
        self,
        model: Callable[[Tensor], Any],
        norm: str = "Linf",
        eps: float | str = 0.3,
        seed: int | None = None,
        verbose: bool = True,
        attacks_to_run: Sequence[str] = (),
        version: str = "standard",
        is_tf_model: bool = False,
        device: str | torch.device = "cuda",
        log_path: str | Path | None = None,
    ) -> None:
        if is_tf_model:
            raise InputError("is_tf_model=True: only torch models can be attacked; convert it, or leave that out")
        if attacks_to_run and version in VERSIONS:
            raise InputError(f"version {version!r} has its own attacks_to_run; use version='custom' for yours")
        self.model = model
        try:
            self.norm = parse_norm(norm)
        except ValueError as error:
            raise InputError(str(error)) from None
        self.epsilon = eps
        self.seed = seed
        self.verbose = verbose
        self.attacks_to_run = list(attacks_to_run)
        self.version = version
        self.device = _usable(device, model)
        self.log_path = log_path
        self.evaluation: Evaluation | None = None
        """Of the last run: verdicts, intervals, what to make a claim of."""
        self._settings = Settings()
        if version != "custom":
            self.set_version(version)

    @property
    def apgd(self) -> APGDSettings:
        return self._settings.apgd

    @property
    def apgd_targeted(self) -> APGDTargetedSettings:
        return self._settings.apgd_targeted

    @property
    def fab(self) -> FABSettings:
        return self._settings.fab

    @property
    def square(self) -> SquareSettings:
        return self._settings.square

    def set_version(self, version: str = "standard") -> None:
        """Sets attacks and settings to those of a version. Raises InputError for an unknown one."""
        if version not in VERSIONS:
            raise InputError(f"version must be one of {', '.join(VERSIONS)}, custom, got {version!r}")
        if self.verbose:
            self._log(f"setting parameters for {version} version")
        self.version = version
        self._settings = Settings()
        members = protocol(version, self._threat).members
        self._settings.fab.n_restarts = 1
        self.attacks_to_run = self._settings.adopt(member.attack for member in members)

    def run_standard_evaluation(
        self,
        x_orig: Tensor,
        y_orig: Tensor,
        bs: int = 250,
        return_labels: bool = False,
        state_path: str | Path | None = None,
    ) -> Answer:
        """Attacks the images (N, ...) in [0, 1] with labels (N,).

        Returns (N, ...) the perturbed image where an attack has won, else the clean one; with `return_labels` also the
        model's answers (N,) to them. `state_path` names a file that keeps every verdict, and the images beside it: the
        same call, or one with more attacks, goes on where it was stopped and returns what it would have returned.
        """
        found, labels = self._run(x_orig, y_orig, bs, None if state_path is None else Path(state_path))
        return (found, labels) if return_labels else found

    def run_standard_evaluation_individual(
        self, x_orig: Tensor, y_orig: Tensor, bs: int = 250, return_labels: bool = False
    ) -> dict[str, Answer]:
        """Each attack alone on all images that are classified rightly; by attack as `run_standard_evaluation`."""
        names, verbose, found = self.attacks_to_run, self.verbose, {}
        if verbose:
            self._log(autoattack_log.using(self.version, names))
        self.verbose = False
        try:
            for name in names:
                started = time.monotonic()
                self.attacks_to_run = [name]
                x_adv, labels = self._run(x_orig, y_orig, bs, None)
                found[name] = (x_adv, labels) if return_labels else x_adv
                if verbose:
                    assert self.evaluation is not None
                    self._log(
                        f"robust accuracy by {name.upper()} \t {self.evaluation.robust_acc:.2%} "
                        f"\t (time attack: {time.monotonic() - started:.1f} s)"
                    )
        finally:
            self.attacks_to_run, self.verbose = names, verbose
        return found

    @torch.no_grad()
    def clean_accuracy(self, x_orig: Tensor, y_orig: Tensor, bs: int = 250) -> float:
        """The share of images (N, ...) that the model answers with their label (N,); a non-finite answer is none."""
        _check(x_orig, y_orig, bs)
        right = 0
        for batch in Images(x_orig, y_orig, bs, self.device).batches():
            with frozen(self.model), exact_fp32(), preserved_rng():
                logits = routed(self.model, batch.x).logits
            check_answers(logits, batch.y)
            wrong, invalid = errors_of(logits, batch.y)
            right += int((~(wrong | invalid)).sum())
        accuracy = right / len(y_orig)
        if self.verbose:
            self._log(f"clean accuracy: {accuracy:.2%}")
        return accuracy

    @property
    def _threat(self) -> ThreatModel:
        try:
            return ThreatModel(self.norm, self.epsilon)
        except ValueError as error:
            raise InputError(str(error)) from None

    def _log(self, line: str) -> None:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
        if self.log_path is not None:
            with Path(self.log_path).open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    def _run(self, x: Tensor, y: Tensor, bs: int, path: Path | None) -> tuple[Tensor, Tensor]:
        _check(x, y, bs)
        if not self.attacks_to_run or len({*self.attacks_to_run}) < len(self.attacks_to_run):
            raise InputError(
                f"attacks_to_run must name attacks, each once, such as ['apgd-ce', 'fab'], got {self.attacks_to_run}"
            )
        threat, started = self._threat, time.monotonic()
        members = self._settings.members(self.attacks_to_run, threat)
        with State.opened(path, self._binding(x, y), x, [member.name for member in members]) as state:
            say = self._log if self.verbose else nobody
            chosen, images = Protocol(self.version, members), Images(x, y, bs, self.device)
            run = Run(self.model, state, chosen, images, self.seed or 0, say, self._warn)
            accuracy = run.through(self.attacks_to_run)
            rows, attacks = state.book.rows(), state.book.attacks()
        if self.verbose:
            for line in autoattack_log.final(threat, state.x_adv, x, accuracy):
                self._log(line)
        seconds = time.monotonic() - started
        self.evaluation = Evaluation(
            self.version, threat, tuple(rows), None, seconds, path, planned=len(y), attacks=attacks
        )
        return state.x_adv, answers(rows, y)

    def _binding(self, x: Tensor, y: Tensor) -> Binding:
        """What a state is about."""
        return Binding(
            model_sha256=model_sha256(self.model),
            data_sha256=fingerprint(x, y),
            norm=self.norm,
            eps=str(self.epsilon),
            evaluation_version=EVALUATION_VERSION,
            versions=versions(),
        )

    def _warn(self, message: str) -> None:
        self._log(f"Warning: {message}")


def _check(x: Tensor, y: Tensor, bs: int) -> None:
    if bs < 1:
        raise InputError(f"bs must be at least 1, got {bs}")
    for name, given in (("x_orig", x), ("y_orig", y)):
        if not isinstance(given, Tensor):
            raise InputError(f"{name} must be a torch tensor, got {type(given).__name__}; convert it")
    if y.dim() != 1 or y.is_floating_point():
        raise InputError(f"y_orig must be integer labels (N,), got {y.dtype} of shape {tuple(y.shape)}; convert them")
    if len(y) == 0 or x.dim() < 2 or len(x) != len(y):
        raise InputError(
            f"give as many images (N, ...) as labels, at least one, got shape {tuple(x.shape)} and {len(y)} labels"
        )
    low, high = (float(bound) for bound in x.aminmax())
    # a NaN pixel fails both comparisons
    if not (x.is_floating_point() and low >= 0 and high <= 1):
        raise InputError(
            f"x_orig must be float pixels in [0, 1], got {x.dtype} from {low:.6g} to {high:.6g}; "
            "normalisation belongs inside the model"
        )


def _usable(device: str | torch.device, model: Callable[[Tensor], Any]) -> torch.device:
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise InputError(f"device={str(device)!r} is none that torch knows; give 'cuda' or 'cpu'") from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device={str(device)!r}, but torch sees no GPU; give device='cpu'")
    own = next((parameter.device for parameter in model.parameters()), None) if isinstance(model, nn.Module) else None
    if own is not None and own.type != chosen.type:
        raise InputError(f"the model is on {own.type}, device={str(device)!r}; move one of them")
    return chosen
