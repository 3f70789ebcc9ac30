"""Certify a run's answers to its test images into a folder of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from phalanx.certification import (
    Constants,
    certificate_json,
    certify,
    lipschitz_constants,
    parse_reachable,
    parse_wanted,
    read_constants,
    write_constants,
)
from phalanx.config import EvaluationConfig
from phalanx.data import load_data
from phalanx.evaluation.evaluate import model_sha256
from phalanx.models import load
from phalanx.runs import RunFolder, write_json
from phalanx.runs.paths import not_through_links
from phalanx.threat import Norm
from phalanx.training import Reporter, Silent
from phalanx.workflow.compute import cpu_threads, pick_device
from phalanx.workflow.signals import stopped_by_signals
from phalanx.workflow.training import refuse_other_data, require_finished, run_config

CERTIFICATES_NAME = "certificates.json"


def certificates_folder(
    run: Path, config: EvaluationConfig, norm: str, method: str, reachable: str = "pairwise"
) -> Path:
    """Where the certificates of a run go: the name says what was certified."""
    rule = "" if reachable == "pairwise" else f"-{reachable}"
    return Path(run) / "certificates" / f"{norm}-{method}{rule}-{config.weights}-{config.size}"


def certify_run(
    run: Path,
    config: EvaluationConfig,
    norm: str,
    method: str,
    folder: Path | None = None,
    reporter: Reporter | None = None,
    *,
    reachable: str = "pairwise",
) -> tuple[Path, dict[str, Any]]:
    """Certifies a finished run's answers to its test images; the folder, and what `certificates.json` there holds.

    What is finished is read and not made again, nor are the model's Lipschitz constants, which are kept beside. Of
    `config` n, weights and batch_size count. Raises InputError as `certify` and `evaluate_run` do.
    """
    require_finished(run)
    wanted, method = parse_wanted(norm, method)
    rule = parse_reachable(reachable)
    settings, reporter = run_config(run), reporter or Silent()
    target = RunFolder(folder or certificates_folder(run, config, wanted, method, rule))
    not_through_links(run, target.path)
    with target.lock(), cpu_threads(settings.threads):
        device, data = pick_device(settings.device), load_data(settings.data)
        refuse_other_data(run, data)
        model = load(run, weights=config.weights).to(device)
        images = data.test.first(config.n)
        bound = {
            "kind": "certificates",
            "norm": wanted,
            "method": method,
            **({} if rule == "pairwise" else {"reachable": rule}),
            "n": config.n,
            "model_sha256": model_sha256(model),
            "data_sha256": images.fingerprint,
        }
        target.prepare(bound)
        if target.status() == "finished":
            target.verify()
            return target.path, json.loads(target.resolve(CERTIFICATES_NAME).read_bytes())
        with target.records_outcome(), stopped_by_signals("the same command starts again"):
            found = certify(
                model,
                images,
                norm=wanted,
                method=method,
                reachable=rule,
                batch_size=config.batch_size,
                constants=_constants(run, config, model, images.shape, wanted),
                progress=reporter.progress,
            )
            record = {**certificate_json(found, images.ids.tolist()), "model_sha256": bound["model_sha256"]}
            write_json(target.resolve(CERTIFICATES_NAME), record)
        target.finish()
    return target.path, record


def _constants(run: Path, config: EvaluationConfig, model: nn.Module, shape: tuple[int, ...], norm: Norm) -> Constants:
    """Those kept beside the run's certificates, or made and kept."""
    path = Path(run) / "certificates" / f"constants-{norm}-{config.weights}.json"
    digest = model_sha256(model)
    found = read_constants(path, digest, norm)
    if found is None:
        found = lipschitz_constants(model, shape, norm)
        write_constants(path, digest, norm, found)
    return found
