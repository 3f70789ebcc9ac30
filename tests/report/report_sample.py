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
            "name": "mixture",
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
    model_spec: Mapping[str, Any] | None = None,
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
                "spec": model_spec,
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


def mixture_spec(*, expert: str = "mlp", experts: int = 4, top_k: int = 1) -> dict[str, Any]:
    """As `spec_of(MixtureOfExperts(...)).to_json()` gives it."""
    parts = [{"name": f"expert.{expert}", "arguments": {"num_classes": 10}} for _ in range(experts)]
    router = {"name": "router.linear", "arguments": {}}
    return {"name": "mixture", "arguments": {"router": router, "experts": parts, "top_k": top_k, "temperature": 1.0}}


def dual_spec(*, alpha: float = 0.7) -> dict[str, Any]:
    halves = {"standard": mixture_spec(), "robust": mixture_spec(expert="small_cnn", top_k=2)}
    return {"name": "dual", "arguments": {**halves, "alpha": alpha, "mix": "probabilities"}}


def dual_config(*, alpha: float = 0.7) -> dict[str, Any]:
    """Of a trained dual model: its halves are named, and described in model.json."""
    model = {"name": "dual", "standard": "st", "robust": "rt-er", "alpha": alpha, "mix": "probabilities"}
    return {**config(method="jtdmoe"), "model": model}


def view(alpha: float = 0.7, **changes: Any) -> dict[str, Any]:
    """How an evaluation says that it is of two runs put together."""
    return {"kind": "dual", "alpha": alpha, "mix": "probabilities", "picked": None, **changes}


def analysis(*, duals: bool = False, margins: float = 0.1, counts: Sequence[int] = (2, 8)) -> dict[str, Any]:
    """An analysis.json of 10 images, two classes and two experts."""
    names = ("standard", "robust") if duals else ("",)
    gate = {
        "experts": 2,
        "top_k": 1,
        "load_clean": [0.6, 0.4],
        "load_attacked": [0.3, 0.7],
        "entropy_clean": 0.25,
        "entropy_attacked": 0.5,
        "flipped": 0.3,
        "own": [{"n": 6, "clean": 5, "robust": 3}, {"n": 4, "clean": 4, "robust": 1}],
        "all": [{"n": 10, "clean": 7, "robust": 4}, {"n": 10, "clean": 6, "robust": 2}],
    }
    by_class = {"clean": [margins + 0.5, None], "attacked": [margins, None]}
    return {
        "schema": 1,
        "attack": "pgd-20",
        "n": 10,
        "num_classes": 2,
        "gates": [{"name": name, **gate} for name in names],
        "oracle": None if duals else {"n": 10, "clean": 9, "robust": 6},
        "margins": dict.fromkeys(("model", *(names if duals else ())), by_class),
        "counts": list(counts),
        "invalid": 1,
    }


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


def verdict(
    sample: int,
    attack: str,
    outcome: str,
    *,
    surface: str = "whole",
    clean: bool = True,
    label: int = 1,
    flipped: bool | None = None,
) -> Verdict:
    """The row of a sample; `clean` is whether the model is right on the clean image."""
    return Verdict(
        sample=sample,
        label=label,
        attack=attack,
        surface=surface,
        restart=0,
        verdict=OUTCOMES[outcome],  # type: ignore[arg-type]
        predicted=label if outcome == "h" else label + 1,
        clean_predicted=label if clean else label + 1,
        flipped=flipped,
        loss=0.5,
        distance=0.03,
        queries=50,
        first_success=-1,
    )


def rows(
    clean: str, attacks: Mapping[str, str], surfaces: Mapping[str, str], labels: Sequence[int], flips: str
) -> list[Verdict]:
    """One letter a sample: h held, b broken, i invalid, t timeout, . no row."""
    found = [
        verdict(sample, "clean", outcome, clean=outcome == "h", label=labels[sample])
        for sample, outcome in enumerate(clean)
    ]
    for name, outcomes in attacks.items():
        found += [
            verdict(
                sample,
                name,
                outcome,
                surface=surfaces.get(name, "whole"),
                label=labels[sample],
                flipped={"y": True, "n": False}.get(flips[sample : sample + 1]),
            )
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
    labels: Sequence[int] | None = None,
    flips: str = "",
    view: Mapping[str, Any] | None = None,
    analysis: Mapping[str, Any] | None = None,
    ended: bool = True,
    eps: str = "8/255",
    data_sha256: str = "ef" * 32,
    data_notes: Sequence[str] = (),
    counts: Mapping[str, Any] | None = None,
) -> Path:
    """An evaluation's folder; by default 10 images, 8 right when clean, 5 of them held under pgd-50.

    `flips`: y where an attack changes the route, n where not, else unknown.
    """
    attacks = {"pgd-50": "hhhhhbbb"} if attacks is None else attacks
    specs = {name: spec(eps=eps) for name in attacks} if specs is None else specs
    folder.mkdir(parents=True)
    binding = Binding(MODEL_SHA256, data_sha256, "Linf", eps, 1, {"torch": "2.15.0"})
    with Ledger.open(folder / "ledger.sqlite", binding) as ledger:
        for name, budget in specs.items():
            ledger.declare_attack(name, budget)
        surfaces = {name: budget["surface"] for name, budget in specs.items()}
        ledger.add(rows(clean, attacks, surfaces, labels or [1] * len(clean), flips))
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
            "view": None if view is None else dict(view),
            "model_sha256": MODEL_SHA256,
        }
        # records of models that were not counted have no such key
        write_json(folder / "evaluation.json", record if counts is None else {**record, "counts": dict(counts)})
    if analysis is not None:
        write_json(folder / "analysis.json", analysis)
    return folder


def make_source(folder: Path, label: str = "AT", **evaluation: Any) -> RowSource:
    """A finished run and its evaluation."""
    name = label.replace("/", "_")
    return RowSource(label, make_run(folder / name), make_evaluation(folder / f"{name}.evaluation", **evaluation))


ROUTING = {
    "pgd-50": ("PGD", "whole"),
    "pgd-50@pinned": ("PGD", "pinned"),
    "pgd-50@experts": ("PGD", "experts"),
    "pgd-50@router": ("PGD", "router"),
    "pgd-50@dense": ("PGD", "dense"),
    "steer-50": ("RouteSteering", "whole"),
}
DUAL = {
    **ROUTING,
    "pgd-50@standard": ("PGD", "standard"),
    "pgd-50@robust": ("PGD", "robust"),
    "joint-50": ("JointMargin", "halves"),
}
RELEASED = {"pgd-released": ("ReleasedPGD", "whole"), "pgd-released@experts": ("ReleasedPGD", "experts")}


def specs_of(names: Mapping[str, tuple[str, str]]) -> dict[str, dict[str, Any]]:
    """The budgets of named attacks; released ones say so."""
    return {
        name: spec(kind, surface=surface, **({"reproduction": True} if name in RELEASED else {}))
        for name, (kind, surface) in names.items()
    }


def make_view(folder: Path, label: str, standard: Path, robust: Path, alpha: float, **evaluation: Any) -> RowSource:
    """A dual model of two runs, and its evaluation."""
    made = make_evaluation(folder / f"{label}.evaluation", view=view(alpha), load=None, **evaluation)
    return RowSource(label, robust, made, standard)


def page_of(*sources: RowSource, title: str = "Digits", **reported: Any) -> Page:
    return build_page(title, "Does it hold?", sources, "phalanx run quickstart", **reported)
