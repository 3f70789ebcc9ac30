"""Small synthetic runs and evaluations, written through `phalanx.runs` as training and evaluation write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from phalanx.report import Page, RowSource, build_page
from phalanx.runs import Binding, Ledger, MetricsLog, RunFolder, Verdict, write_json

OUTCOMES = {"h": "held", "b": "broken", "i": "invalid", "t": "timeout"}
MODEL_SHA256 = "ab" * 32
ENVIRONMENT = {
    "phalanx": "0.1.0",
    "python": "3.11.9",
    "torch": "2.15.0",
    "device": "cpu",
    "threads": 1,
    "seconds": 83.2,
}


def config(*, method: str = "at", experts: int = 4, seed: int = 0, eps: str = "8/255") -> dict[str, Any]:
    return {
        "seed": seed,
        "device": "auto",
        "threads": 1,
        "data": {"name": "digits", "size": None, "augment": ["translate:1"]},
        "model": {
            "expert": "small_cnn",
            "experts": experts,
            "options": {"width": 16},
            "router": {"name": "linear", "hidden": None, "train": True},
            "top_k": 1,
            "temperature": 1.0,
        },
        "threat": {"norm": "Linf", "eps": eps},
        "method": {"name": method, "balance": 0.1},
        "training": {"epochs": 3, "batch_size": 128, "optimizer": {"name": "sgd", "lr": 0.1}},
        "validation": {"protocol": "pgd-10", "n": 200},
    }


def epochs(count: int, experts: int = 4) -> list[dict[str, Any]]:
    """Plausible records: the loss falls, accuracies rise, the load tilts a little."""
    records: list[dict[str, Any]] = []
    for epoch in range(1, count + 1):
        done = epoch / count
        tilt = 0.04 * done
        load = [1 / experts + tilt, *[1 / experts] * (experts - 2), 1 / experts - tilt]
        train = {"loss": 2.3 - 1.6 * done, "accuracy": 0.2 + 0.6 * done, "lr": 0.1 * (1 - done), "seconds": 2.0 * epoch}
        routed = {"load": load} if experts > 1 else {}
        records.append({"kind": "train", "epoch": epoch, "step": 10 * epoch, **train, **routed, "zero_gradient": 0.0})
        clean, robust = round(200 * (0.3 + 0.65 * done)) / 200, round(200 * (0.1 + 0.5 * done)) / 200
        records.append(
            {
                "kind": "validation",
                "epoch": epoch,
                "step": 10 * epoch,
                "n": 200,
                "accuracy": clean,
                "robust_accuracy": robust,
            }
        )
    return records


def make_run(
    folder: Path,
    settings: Mapping[str, Any] | None = None,
    records: Sequence[Mapping[str, Any]] | None = None,
    *,
    notes: Sequence[str] = (),
    class_names: Sequence[str] = tuple("0123456789"),
    finished: bool = True,
) -> Path:
    """A training run's folder."""
    run = RunFolder(folder)
    settings = settings or config()
    with run.lock():
        run.prepare(settings)
        data = {"name": "digits", "shape": [1, 8, 8], "class_names": list(class_names), "mean": [0.31], "std": [0.38]}
        write_json(
            folder / "model.json",
            {
                "schema": 1,
                "spec": None,
                "parameters": 36282,
                "data": {**data, "notes": list(notes), "fingerprint": "cd" * 32},
            },
        )
        with MetricsLog(folder / "metrics.jsonl") as log:
            for record in epochs(3) if records is None else records:
                log.append(record)
        if finished:
            write_json(folder / "environment.json", ENVIRONMENT)
            run.finish()
    return folder


def spec(kind: str = "PGD", **changes: Any) -> dict[str, Any]:
    """An attack's budget as `Attack.spec()` gives it."""
    return {
        "attack": kind,
        "eps": "8/255",
        "norm": "Linf",
        "objective": "cross_entropy",
        "surface": "whole",
        "targeted": False,
        "steps": 50,
        "restarts": 1,
        "seed": 0,
        **changes,
    }


def verdict(sample: int, attack: str, outcome: str, *, surface: str = "whole", clean: bool = True) -> Verdict:
    """The row of a sample with label 1; `clean` is whether the model is right on the clean image."""
    return Verdict(
        sample=sample,
        label=1,
        attack=attack,
        surface=surface,
        restart=0,
        verdict=OUTCOMES[outcome],  # type: ignore[arg-type]
        predicted=1 if outcome == "h" else 0,
        clean_predicted=1 if clean else 0,
        flipped=None,
        loss=0.5,
        distance=0.03,
        queries=50,
        first_success=-1,
    )


def rows(clean: str, attacks: Mapping[str, str], surfaces: Mapping[str, str]) -> list[Verdict]:
    """One letter a sample: h held, b broken, i invalid, t timeout, . no row."""
    found = [verdict(sample, "clean", outcome, clean=outcome == "h") for sample, outcome in enumerate(clean)]
    for name, outcomes in attacks.items():
        found += [
            verdict(sample, name, outcome, surface=surfaces.get(name, "whole"))
            for sample, outcome in enumerate(outcomes)
            if outcome != "."
        ]
    return found


def make_evaluation(
    folder: Path,
    clean: str = "hhhhhhhhbb",
    attacks: Mapping[str, str] | None = None,
    specs: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    n: int | None = None,
    load: Sequence[float] | None = (0.4, 0.3, 0.2, 0.1),
    ended: bool = True,
    eps: str = "8/255",
    data_sha256: str = "ef" * 32,
    data_notes: Sequence[str] = (),
) -> Path:
    """An evaluation's folder; by default 10 images, 8 right when clean, 5 of them held under pgd-50."""
    attacks = {"pgd-50": "hhhhhbbb"} if attacks is None else attacks
    specs = {name: spec(eps=eps) for name in attacks} if specs is None else specs
    folder.mkdir(parents=True)
    binding = Binding(MODEL_SHA256, data_sha256, "Linf", eps, 1, {"torch": "2.15.0"})
    with Ledger.open(folder / "ledger.sqlite", binding) as ledger:
        for name, budget in specs.items():
            ledger.declare_attack(name, budget)
        ledger.add(rows(clean, attacks, {name: budget["surface"] for name, budget in specs.items()}))
        if ended:
            ledger.seal()
    if ended:
        record = {
            "schema": 1,
            "protocol": ",".join(attacks),
            "weights": "best",
            "n": len(clean) if n is None else n,
            "threat": {"norm": "Linf", "eps": eps},
            "seed": 0,
            "batch_size": 64,
            "seconds": 12.5,
            "environment": ENVIRONMENT,
            "data": {"name": "digits", "notes": list(data_notes)},
            "load": None if load is None else list(load),
            "model_sha256": MODEL_SHA256,
        }
        write_json(folder / "evaluation.json", record)
    return folder


def make_source(folder: Path, label: str = "AT", **evaluation: Any) -> RowSource:
    """A finished run and its evaluation."""
    name = label.replace("/", "_")
    return RowSource(label, make_run(folder / name), make_evaluation(folder / f"{name}.evaluation", **evaluation))


def page_of(*sources: RowSource, title: str = "Digits") -> Page:
    return build_page(title, "Does it hold?", sources, "phalanx run quickstart")
