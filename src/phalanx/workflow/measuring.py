"""Measure a model into an evaluation folder: alone, or as one of several processes that share it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from phalanx.config import EvaluationConfig, RunConfig
from phalanx.data import ImageSet, Splits, load_data
from phalanx.errors import LockedError
from phalanx.evaluation import Evaluation, Limits, Protocol, Shard, analyse, evaluate
from phalanx.evaluation.attribution import attribute, has_choice
from phalanx.evaluation.checks import check_classes
from phalanx.evaluation.corruptions import PART as CORRUPTIONS
from phalanx.evaluation.corruptions import under_corruptions
from phalanx.evaluation.evaluate import model_sha256
from phalanx.evaluation.honesty import LEFT_OUT, run_checks
from phalanx.evaluation.model_parts import protocol_for
from phalanx.evaluation.queries import query_curves
from phalanx.evaluation.reachability import reachability
from phalanx.evaluation.targeted import targeted_success
from phalanx.evaluation.transfer import Surrogate, with_surrogates
from phalanx.loading import to_plain
from phalanx.models import Weights
from phalanx.nn import frozen
from phalanx.report.certificates import read_certificates
from phalanx.report.corruptions import covered, read_corruptions
from phalanx.routing import Counts, counts
from phalanx.runs import Ledger, RunFolder, Verdict, write_bytes, write_json
from phalanx.runs.canonical import parse_json
from phalanx.runs.paths import not_through_links
from phalanx.runs.proofs import Proof
from phalanx.runs.threats import coverage
from phalanx.threat import ThreatModel
from phalanx.training import Reporter, Silent
from phalanx.workflow.compute import cpu_threads, environment, now, pick_device
from phalanx.workflow.gallery import GALLERY_NAME, gallery
from phalanx.workflow.identity import made_of, refuse_other_model
from phalanx.workflow.signals import stopped_by_signals
from phalanx.workflow.surrogates import surrogates
from phalanx.workflow.training import refuse_other_data, require_finished

EVALUATION_NAME = "evaluation.json"
ANALYSIS_NAME = "analysis.json"
ATTRIBUTION_NAME = "attribution.json"
HONESTY_NAME = "honesty.json"
QUERIES_NAME = "queries.json"
CORRUPTIONS_NAME = "corruptions.json"
TARGETED_NAME = "targeted.json"
LEDGER_NAME = "ledger.sqlite"
EVALUATION_SCHEMA = 1

ANALYSED = 1000
"""At most so many images are analysed: the averages stand, and the cost does not grow with the data."""

ATTRIBUTED_QUICKLY = 128
"""At most so many where the protocol is "quick", which has two minutes."""

COUNTED = 8
"""On so many images the model's cost is counted: it varies only with the routes, and only if experts differ in size."""

_CLOSING_SECONDS = 30.0
"""So long the last of several processes waits for the others to close the ledger."""


@dataclass(frozen=True)
class Subject:
    """A model to be measured, and the settings of the run that it, or its robust half, comes from."""

    settings: RunConfig
    runs: tuple[Path, ...]
    build: Callable[[Splits, torch.device], tuple[nn.Module, dict[str, Any] | None]]
    """The model on a device, and what evaluation.json says of the view, None for a run as it is."""
    bound: Mapping[str, Any]
    """What the folder is bound to."""
    label: str = ""
    outputs: int | None = None
    """Of the model; None for as many as the data have classes."""
    weights: Weights = "best"
    """Of the runs."""

    def made_of(self) -> list[str] | None:
        """What identifies the model of runs; a model made elsewhere has to be built for that."""
        return made_of(self.runs, self.weights) or None


@dataclass(frozen=True, kw_only=True)
class Conduct:
    """How one call goes about an evaluation."""

    limits: Limits = field(default_factory=Limits)
    allow: tuple[str, ...] = ()
    """Of `phalanx.evaluation.checks.ALLOWED`."""
    surrogates: tuple[str, ...] = ()
    """Runs, or functions "module:function", whose models are attacked for what carries over."""
    announce: Callable[[str], None] | None = None
    """Hears about how long it will take."""


@dataclass(frozen=True)
class _Measured:
    """Everything loaded for a measurement."""

    subject: Subject
    config: EvaluationConfig
    data: Splits
    images: ImageSet
    device: torch.device
    model: nn.Module
    seen: dict[str, Any] | None
    started: str
    clock: float
    surrogates: tuple[Surrogate, ...] = ()

    @cached_property
    def tried(self) -> Protocol:
        """The whole protocol of the evaluation."""
        return with_surrogates(self.protocol(self.config.protocol), self.surrogates, self.threat)

    def protocol(self, name: str) -> Protocol:
        return protocol_for(name, self.threat, self.model, self.few())

    def few(self) -> Tensor:
        """The first images, on the model's device: what is looked at to know the model."""
        return self.images.images(slice(0, COUNTED)).to(self.device)

    @property
    def threat(self) -> ThreatModel:
        return self.subject.settings.threat

    @property
    def seed(self) -> int:
        return self.subject.settings.seed


def measure(
    folder: Path, subject: Subject, config: EvaluationConfig, reporter: Reporter | None, conduct: Conduct
) -> Evaluation | None:
    """Measures into `folder`; None if that was finished already. The result says whether it is finished now."""
    for run in subject.runs:
        require_finished(run)
        not_through_links(run, folder)
    target, reporter = RunFolder(folder), reporter or Silent()
    shard = conduct.limits.shard
    with cpu_threads(subject.settings.threads):
        if shard is None:
            return _whole(target, subject, config, reporter, conduct)
        return _part(target, subject, config, reporter, conduct, shard)


def _whole(
    target: RunFolder, subject: Subject, config: EvaluationConfig, reporter: Reporter, conduct: Conduct
) -> Evaluation | None:
    early = _early(target, subject, config, conduct)
    with target.lock():
        if _begun(target, subject, shared=False):
            _refuse_other_model(target, subject, config)
            return None
        with target.records_outcome(), stopped_by_signals():
            loaded = early or _load(subject, config, conduct)
            found = _evaluated(target, loaded, reporter, conduct)
            if not found.finished:
                target.mark("interrupted")
                return found
            _write(target, loaded, found, reporter)
        target.finish()
    return found


def _part(
    target: RunFolder,
    subject: Subject,
    config: EvaluationConfig,
    reporter: Reporter,
    conduct: Conduct,
    shard: Shard,
) -> Evaluation | None:
    early = _early(target, subject, config, conduct)
    with target.part(shard.name), stopped_by_signals():
        with target.turn():
            if _begun(target, subject, shared=True):
                _refuse_other_model(target, subject, config)
                return None
        loaded = early or _load(subject, config, conduct)
        found = _evaluated(target, loaded, reporter, conduct)
        if not found.finished:
            return found
        # the union is whole: the first to see it closes the evaluation, and nobody writes any more
        with target.turn():
            if not _begun(target, subject, shared=False):
                found = _closed(target, loaded, reporter, conduct)
                _write(target, loaded, found, reporter)
                target.finish()
    return found


def _begun(target: RunFolder, subject: Subject, *, shared: bool) -> bool:
    """Whether the folder is finished, whole and of this subject."""
    target.prepare(subject.bound, shared=shared)
    if target.status() != "finished":
        return False
    target.verify()
    return True


def _refuse_other_model(target: RunFolder, subject: Subject, config: EvaluationConfig) -> None:
    """Raises InputError if the finished folder holds the numbers of another model."""
    recorded = parse_json(target.resolve(EVALUATION_NAME).read_bytes()).get("made_of")
    if recorded is not None:
        same = recorded == subject.made_of()
    elif len(subject.runs) > 1:
        # from before it was recorded; to build a view anew may mean to attack
        return
    else:
        same = _ledger_model(target) == _fingerprint(_load(subject, config, Conduct()))
    refuse_other_model(target.path, same)


def _ledger_model(target: RunFolder) -> str:
    with Ledger.read(target.resolve(LEDGER_NAME)) as ledger:
        return ledger.binding().model_sha256


def _fingerprint(loaded: _Measured) -> str:
    # as in an evaluation, once the protocol has looked at the model
    _ = loaded.tried
    return model_sha256(loaded.model)


def _early(target: RunFolder, subject: Subject, config: EvaluationConfig, conduct: Conduct) -> _Measured | None:
    """What is loaded for a new folder: a mistake that only this shows must not leave a folder bound to it."""
    if target.status() != "new":
        return None
    with stopped_by_signals():
        loaded = _load(subject, config, conduct)
        # not before is the protocol's name read
        _ = loaded.tried
    return loaded


def _load(subject: Subject, config: EvaluationConfig, conduct: Conduct) -> _Measured:
    started, clock, device = now(), time.monotonic(), pick_device(subject.settings.device)
    data = load_data(subject.settings.data)
    for run in subject.runs:
        refuse_other_data(run, data)
    model, seen = subject.build(data, device)
    images = data.test.first(config.n)
    _check_outputs(model, images, device, subject.outputs or data.num_classes)
    loaded = _Measured(subject, config, data, images, device, model, seen, started, clock)
    return replace(loaded, surrogates=surrogates(conduct.surrogates, loaded.few()))


@torch.no_grad()
def _check_outputs(model: nn.Module, images: ImageSet, device: torch.device, classes: int) -> None:
    # another kind of answer is named by the evaluation itself
    if not isinstance(model, nn.Module) or not len(images):
        return
    with frozen(model):
        answer = model(images.images([0]).to(device))
    if isinstance(answer, Tensor) and answer.dim() == 2:
        check_classes(answer.shape[1], classes)


def _evaluated(target: RunFolder, loaded: _Measured, reporter: Reporter, conduct: Conduct) -> Evaluation:
    return evaluate(
        loaded.model,
        loaded.images,
        loaded.tried,
        loaded.threat,
        ledger=target.resolve(LEDGER_NAME),
        batch_size=loaded.config.batch_size,
        seed=loaded.seed,
        device=loaded.device,
        progress=reporter.progress,
        limits=conduct.limits,
        allow=conduct.allow,
        notify=reporter.notify,
        announce=conduct.announce,
    )


def _closed(target: RunFolder, loaded: _Measured, reporter: Reporter, conduct: Conduct) -> Evaluation:
    """Nothing is left to attack: reads the whole, and seals the ledger once every other process has closed it."""
    end = time.monotonic() + _CLOSING_SECONDS
    while True:
        try:
            return _evaluated(target, loaded, reporter, replace(conduct, limits=Limits(), announce=None))
        except LockedError:
            if time.monotonic() > end:
                raise
        time.sleep(0.1)


def _write(target: RunFolder, loaded: _Measured, found: Evaluation, reporter: Reporter) -> None:
    config, seconds = loaded.config, time.monotonic() - loaded.clock
    if config.analysis is not None:
        write_json(target.resolve(ANALYSIS_NAME), _analysed(loaded, config.analysis, reporter))
    attributed = _attributed(loaded, found, reporter) if _is_attributed(loaded) else None
    if attributed is not None:
        write_json(target.resolve(ATTRIBUTION_NAME), attributed)
    curves = query_curves(found.rows, found.attacks)
    if curves is not None:
        write_json(target.resolve(QUERIES_NAME), curves.to_json())
    if CORRUPTIONS in _asked(config):
        write_json(target.resolve(CORRUPTIONS_NAME), _corrupted(loaded, reporter))
    if "thorough" in _asked(config):
        write_json(target.resolve(TARGETED_NAME), _targeted(loaded, reporter))
    pictures = _pictured(loaded, found)
    if pictures is not None:
        write_bytes(target.resolve(GALLERY_NAME), pictures)
    write_json(target.resolve(HONESTY_NAME), _checked(loaded, found, attributed, reporter))
    record = {
        "schema": EVALUATION_SCHEMA,
        "label": loaded.subject.label,
        "view": loaded.seen,
        "protocol": config.protocol,
        "weights": config.weights,
        "n": found.n,
        "threat": to_plain(loaded.threat),
        "seed": loaded.seed,
        "batch_size": config.batch_size,
        "seconds": round(seconds, 1),
        "environment": environment(loaded.device, loaded.started, seconds),
        "data": {"name": loaded.data.name, "notes": list(loaded.data.notes)},
        "load": None if found.load is None else list(found.load),
        "counts": _counted(loaded).to_json(),
        "reach": _reach(loaded, found),
        "threats": threats_json(target.path, found.rows, found.attacks, loaded.threat),
        "model_sha256": _ledger_model(target),
        "made_of": loaded.subject.made_of(),
    }
    write_json(target.resolve(EVALUATION_NAME), record)


def threats_json(
    folder: Path, rows: Iterable[Verdict], attacks: Mapping[str, Mapping[str, Any]], threat: ThreatModel
) -> list[dict[str, Any]]:
    """The threat-coverage table, as evaluation.json has it; the ledger's, and what `folder` holds beside it."""
    lines = coverage(rows, attacks, threat.norm, str(threat.eps))
    return [line.to_json() for line in covered(lines, read_corruptions(folder / CORRUPTIONS_NAME))]


def _reach(loaded: _Measured, found: Evaluation) -> dict[str, int] | None:
    proved = reachability(
        loaded.model, loaded.images, loaded.threat, found.rows, aside=found.aside, device=loaded.device
    )
    return None if proved is None else proved.to_json()


def _counted(loaded: _Measured) -> Counts:
    # spread over the set: a folder's images come class by class
    spread = torch.linspace(0, len(loaded.images) - 1, min(COUNTED, len(loaded.images))).long()
    return counts(loaded.model, loaded.images.images(spread).to(loaded.device))


def _analysed(loaded: _Measured, name: str, reporter: Reporter) -> dict[str, Any]:
    (member,) = loaded.protocol(name).members
    return analyse(
        loaded.model,
        loaded.images.first(min(ANALYSED, len(loaded.images))),
        member.attack,
        name=name,
        num_classes=loaded.data.num_classes,
        batch_size=loaded.config.batch_size,
        seed=loaded.seed,
        device=loaded.device,
        progress=reporter.progress,
    ).to_json()


def _asked(config: EvaluationConfig) -> set[str]:
    """The parts of a protocol's name."""
    return {part.strip() for part in config.protocol.split(",")}


def _corrupted(loaded: _Measured, reporter: Reporter) -> dict[str, Any]:
    return under_corruptions(
        loaded.model,
        loaded.images.first(min(ANALYSED, len(loaded.images))),
        batch_size=loaded.config.batch_size,
        seed=loaded.seed,
        device=loaded.device,
        progress=reporter.progress,
    ).to_json()


_ATTRIBUTED = re.compile(r"standard|plus|quick|thorough|routing-\d+")


def _is_attributed(loaded: _Measured) -> bool:
    config = loaded.config
    by_default = any(_ATTRIBUTED.fullmatch(part) for part in _asked(config))
    wanted = by_default if config.attribution is None else config.attribution
    return wanted and len(loaded.images) > 0 and has_choice(loaded.model, loaded.images, loaded.device)


def _attributed(loaded: _Measured, found: Evaluation, reporter: Reporter) -> dict[str, Any]:
    most = ATTRIBUTED_QUICKLY if _asked(loaded.config) - {CORRUPTIONS} == {"quick"} else ANALYSED
    return attribute(
        loaded.model,
        loaded.images.first(min(most, len(loaded.images))),
        found,
        loaded.tried,
        batch_size=loaded.config.batch_size,
        seed=loaded.seed,
        device=loaded.device,
        progress=reporter.progress,
    ).to_json()


def _pictured(loaded: _Measured, found: Evaluation) -> bytes | None:
    return gallery(
        loaded.model,
        loaded.images,
        found,
        loaded.tried,
        batch_size=loaded.config.batch_size,
        seed=loaded.seed,
        device=loaded.device,
    )


def _targeted(loaded: _Measured, reporter: Reporter) -> dict[str, Any]:
    return targeted_success(
        loaded.model,
        loaded.images.first(min(ANALYSED, len(loaded.images))),
        loaded.threat,
        num_classes=loaded.subject.outputs or loaded.data.num_classes,
        batch_size=loaded.config.batch_size,
        seed=loaded.seed,
        device=loaded.device,
        progress=reporter.progress,
        notify=reporter.notify,
    ).to_json()


def _proofs(loaded: _Measured, found: Evaluation) -> list[Proof]:
    """The certificates that the runs' folders hold of the very model."""
    assert found.ledger is not None
    with Ledger.read(found.ledger) as ledger:
        binding = ledger.binding()
    samples = {row.sample for row in found.rows}
    return [each.proof for run in loaded.subject.runs for each in read_certificates(run, binding, samples)]


def _checked(
    loaded: _Measured, found: Evaluation, attributed: dict[str, Any] | None, reporter: Reporter
) -> dict[str, Any]:
    checks = loaded.config.checks
    if checks == 0:
        return LEFT_OUT.to_json()
    return run_checks(
        loaded.model,
        loaded.images,
        found,
        loaded.tried,
        samples=checks,
        seed=loaded.seed,
        device=loaded.device,
        batch_size=loaded.config.batch_size,
        attribution=attributed,
        proofs=_proofs(loaded, found),
        progress=reporter.progress,
    ).to_json()
