"""Certify a smoothed classifier into a folder of its own, image by image, or go on where that was stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from phalanx.certification import Smoothing, smoothed_json
from phalanx.certification.smoothing import METHOD, check_batch_size, counted
from phalanx.certification.votes import Voter, Votes
from phalanx.config import EvaluationConfig, RunConfig
from phalanx.data import ImageSet, Splits, load_data
from phalanx.errors import CorruptError
from phalanx.evaluation.budget import duration
from phalanx.evaluation.evaluate import model_sha256
from phalanx.loading import to_plain
from phalanx.models import load
from phalanx.runs import RunFolder, write_json
from phalanx.runs.metrics import MetricsLog, read_metrics
from phalanx.runs.paths import not_through_links
from phalanx.training import Reporter, Silent
from phalanx.workflow.compute import cpu_threads, pick_device
from phalanx.workflow.foreign import foreign_model, weights_record
from phalanx.workflow.measuring import Subject
from phalanx.workflow.signals import stopped_by_signals
from phalanx.workflow.training import refuse_other_data, require_finished, run_config

SMOOTHED_NAME = "smoothed.json"
VOTES_NAME = "votes.jsonl"

Tell = Callable[[str], None]


def smoothed_folder(run: Path, config: EvaluationConfig, smoothing: Smoothing) -> Path:
    """Where a smoothed run's certificates go: the name says what was certified."""
    part = "" if smoothing.smoothed == "whole" else f"-{smoothing.smoothed}"
    name = f"L2-{METHOD}{part}-{smoothing.sigma:g}-{smoothing.samples}-{config.weights}-{config.size}"
    return Path(run) / "certificates" / name


def smooth_run(
    run: Path,
    config: EvaluationConfig,
    smoothing: Smoothing,
    folder: Path | None = None,
    reporter: Reporter | None = None,
    *,
    seconds: float | None = None,
    announce: Tell | None = None,
) -> tuple[Path, dict[str, Any] | None]:
    """Certifies a finished run's smoothed answers to its test images: the folder, and what `smoothed.json` there
    holds, None where `seconds` ran out before. A kill loses at most one image's votes.

    Of `config` n, weights and batch_size count. `announce` hears about how long it will take. Raises InputError as
    `certify_smoothed` and `evaluate_run` do.
    """

    def build(data: Splits, device: torch.device) -> tuple[nn.Module, None]:
        del data
        return load(run, weights=config.weights).to(device), None

    subject = Subject(run_config(run), (run,), build, {})
    target = RunFolder(folder or smoothed_folder(run, config, smoothing))
    not_through_links(run, target.path)
    return _smooth(target, subject, config, smoothing, reporter or Silent(), seconds, announce)


def smooth_foreign(
    model: str,
    weights: Path | None,
    folder: Path,
    settings: RunConfig,
    config: EvaluationConfig,
    smoothing: Smoothing,
    reporter: Reporter | None = None,
    *,
    seconds: float | None = None,
    announce: Tell | None = None,
) -> tuple[Path, dict[str, Any] | None]:
    """The same of what "module:function" returns, with the weights of a file."""
    bound = {"model": {"factory": model, "weights_sha256": weights_record(weights)}, "data": to_plain(settings.data)}

    def build(data: Splits, device: torch.device) -> tuple[nn.Module, None]:
        del data
        return foreign_model(model, weights).to(device), None

    subject = Subject(settings, (), build, bound)
    return _smooth(RunFolder(folder), subject, config, smoothing, reporter or Silent(), seconds, announce)


def _smooth(
    target: RunFolder,
    subject: Subject,
    config: EvaluationConfig,
    smoothing: Smoothing,
    reporter: Reporter,
    seconds: float | None,
    announce: Tell | None,
) -> tuple[Path, dict[str, Any] | None]:
    for run in subject.runs:
        require_finished(run)
    check_batch_size(config.batch_size)
    with cpu_threads(subject.settings.threads):
        device, data = pick_device(subject.settings.device), load_data(subject.settings.data)
        for run in subject.runs:
            refuse_other_data(run, data)
        model, _ = subject.build(data, device)
        images = data.test.first(config.n)
        voter, sha256 = Voter.of(model, smoothing), model_sha256(model)
        voter.check(images)
        with target.lock():
            target.prepare({**subject.bound, **_bound(config, smoothing, sha256, images)})
            if target.status() == "finished":
                target.verify()
                return target.path, json.loads(target.resolve(SMOOTHED_NAME).read_bytes())
            with target.records_outcome(), stopped_by_signals("every finished image is kept, the same command goes on"):
                votes = _vote(target.resolve(VOTES_NAME), voter, images, config.batch_size, reporter, seconds, announce)
                if len(votes) < len(images):
                    target.mark("interrupted")
                    return target.path, None
                found = counted(votes, images, voter)
                record = {**smoothed_json(found, images.ids.tolist()), "model_sha256": sha256}
                write_json(target.resolve(SMOOTHED_NAME), record)
            target.finish()
    return target.path, record


def _bound(config: EvaluationConfig, smoothing: Smoothing, sha256: str, images: ImageSet) -> dict[str, Any]:
    return {
        "kind": "smoothed certificates",
        "smoothing": to_plain(smoothing),
        "n": config.n,
        "model_sha256": sha256,
        "data_sha256": images.fingerprint,
    }


def _vote(
    path: Path,
    voter: Voter,
    images: ImageSet,
    batch_size: int,
    reporter: Reporter,
    seconds: float | None,
    announce: Tell | None,
) -> list[Votes]:
    """The votes of the images in order, those in the file and as many more as there is time for."""
    started = time.monotonic()
    with MetricsLog(path) as log:
        votes = _read(path, images, voter.smoothing.samples)
        for row in range(len(votes), len(images)):
            begun, sample = time.monotonic(), int(images.ids[row])
            votes.append(voter.votes(images.images([row])[0], sample, batch_size))
            log.append({"sample": sample, **votes[-1]._asdict()})
            left = (time.monotonic() - begun) * (len(images) - len(votes))
            if announce is not None and left:
                announce(f"{len(images) - len(votes):,} images more take about {duration(left)}")
                announce = None
            reporter.progress(len(votes), len(images), "certified")
            if seconds is not None and time.monotonic() - started >= seconds:
                break
    return votes


def _read(path: Path, images: ImageSet, samples: int) -> list[Votes]:
    """Raises CorruptError naming a line that is not the next image's votes."""
    found = []
    for number, record in enumerate(read_metrics(path), start=1):
        votes = _votes(record)
        sample = int(images.ids[number - 1]) if number <= len(images) else None
        if votes is None or record.get("sample") != sample or sum(votes.counts) != samples:
            raise CorruptError(
                f"{path}, line {number}: not the votes on image {sample}; remove the folder, start again"
            )
        found.append(votes)
    return found


def _votes(record: dict[str, Any]) -> Votes | None:
    winner, counts, apart = (record.get(name) for name in Votes._fields)
    if not isinstance(counts, list) or not isinstance(apart, list) or not isinstance(winner, int):
        return None
    if not 0 <= winner < len(counts) or not all(isinstance(count, int) and count >= 0 for count in counts):
        return None
    return Votes(winner, tuple(counts), tuple(apart)) if all(isinstance(p, float) for p in apart) else None
