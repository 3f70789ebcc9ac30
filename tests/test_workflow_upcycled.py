"""A mixture whose experts begin as one network, behind a router fitted before training: study, record, mistakes."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from phalanx.config import MixtureConfig, RouterConfig, UpcycledConfig, load_run
from phalanx.data import load_data
from phalanx.errors import InputError
from phalanx.models import build_mixture, load, read_description
from phalanx.routing import MixtureOfExperts, RobustRouter
from phalanx.runs.checkpoint import load_tensors
from phalanx.threat import ThreatModel
from phalanx.training import Silent
from phalanx.workflow import make_study, pick_device, plan, prepare_run, train_run

TINY = (
    "data.train_limit=120",
    "data.val_limit=10",
    "data.test_limit=20",
    "training.epochs=1",
    "training.batch_size=32",
    "method.attack.steps=2",
    "validation.protocol=fgsm",
    "evaluation.protocol=routing-2",
    "evaluation.analysis=null",
    "evaluation.checks=0",
    "device=cpu",
)
STUDY = """\
title: Upcycled
runs:
  base: {recipe: digits-single-at}
  longer: {recipe: digits-single-at, set: ["model={name: upcycled, start: base, experts: 1}", "label=longer"]}
  closed: {recipe: digits-closed-ranks, set: [model.start=base, model.router.attempts=4]}
"""


def _prepared(name: str, *overrides: str, **options: Any) -> Any:
    return prepare_run(load_run(name, (*TINY, *overrides)).value, pick_device("cpu"), **options)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("upcycled") / "base"
    train_run(load_run("digits-single-at", TINY).value, run)
    return run


def test_a_study_trains_the_network_first_and_proves_routes(tmp_path: Path) -> None:
    path = tmp_path / "upcycled.yaml"
    path.write_text(STUDY)
    rows = make_study(plan(str(path), TINY), tmp_path / "made", lambda _: nullcontext(Silent()))
    assert [row.label for row in rows] == ["AT, single network", "longer", "Closed Ranks"]
    made = load(tmp_path / "made" / "closed")
    assert isinstance(made, MixtureOfExperts) and isinstance(made.router, RobustRouter) and len(made.experts) == 2
    described = read_description(tmp_path / "made" / "closed")
    assert described["made_from"].keys() == {"network"}
    fitted = described["spec"]["arguments"]["router"]["arguments"]
    assert fitted["eps"] == "3/16" and fitted["norm"] == "Linf" and 1 <= fitted["fitted"]["reach"] < 2
    assert isinstance(load(tmp_path / "made" / "longer"), MixtureOfExperts)


def test_experts_begin_as_copies_of_the_network(base: Path) -> None:
    trained = _prepared("digits-closed-ranks", f"model.start={base}", "model.router.attempts=4", "model.experts=3")
    tensors, _ = load_tensors(base / "best.safetensors")
    model = trained.model
    assert len({parameter.data_ptr() for parameter in model.experts.parameters()}) == 3 * sum(
        1 for _ in model.experts[0].parameters()
    )
    for expert in model.experts:
        assert all(torch.equal(value, tensors[f"experts.0.{name}"]) for name, value in expert.state_dict().items())
    assert list(model.players()) == ["experts"] and trained.made_from.keys() == {"network"}


@pytest.mark.parametrize("method", ["at", "trades", "rt_er"])
def test_every_method_trains_behind_a_robust_router(method: str, tmp_path: Path) -> None:
    name = {"at": "digits-at", "trades": "digits-trades", "rt_er": "digits-rt-er"}[method]
    settings = "model.options.hidden=[8]", "model.experts=2", "model.router={name: robust, attempts: 4}"
    train_run(load_run(name, (*TINY, *settings)).value, tmp_path / "run")
    model = load(tmp_path / "run")
    assert isinstance(model, MixtureOfExperts) and isinstance(model.router, RobustRouter)
    again = build_mixture(
        MixtureConfig(
            expert="mlp", experts=2, options={"hidden": (8,)}, router=RouterConfig(name="robust", attempts=4)
        ),
        load_data("digits", train_limit=120, val_limit=10, test_limit=20),
        0,
        ThreatModel("Linf", "3/16"),
    )
    # training has not moved it
    assert isinstance(again.router, RobustRouter) and torch.equal(
        again.router.linear.weight, model.router.linear.weight
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("model.router={name: robust, attempts: 4, eps: 1/16}",),
            "fitted for Linf 1/16, the training attack has Linf 3",
        ),
        (
            ("model.router={name: linear, train: false, attempts: null}",),
            "needs a mixture behind a robust router, got a LinearRouter",
        ),
        (("model.experts=1", "model.router.attempts=4"), "behind a robust router, got a single network"),
        (
            ("model.experts=64", "model.router.attempts=4"),
            r"regions that hold .* training images each cannot be kept apart .* only \d held; .* \(64; ",
        ),
        (("threat.eps=0.95", "model.router.attempts=4"), r"at eps 0.95 \(Linf\).*model.experts=1"),
    ],
)
def test_mistakes_are_named_before_training(base: Path, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        _prepared("digits-closed-ranks", f"model.start={base}", *overrides)


def test_a_start_that_cannot_be_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the network: .*nowhere does not exist"):
        _prepared("digits-closed-ranks", f"model.start={tmp_path / 'nowhere'}")
    with pytest.raises(InputError, match=r"another normalisation: mean .* give both the same data.mean"):
        _prepared("digits-closed-ranks", f"model.start={base}", "data.mean=[0.1]", "data.std=[1]")
    train_run(load_run("digits-at", (*TINY, "model.options.hidden=[8]")).value, tmp_path / "mixture")
    with pytest.raises(InputError, match="mixture, has 4 experts; give runs of single networks"):
        _prepared("digits-closed-ranks", f"model.start={tmp_path / 'mixture'}")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: UpcycledConfig(start="a", experts=0), "experts must be at least 1, got 0"),
        (lambda: UpcycledConfig(start="a", experts=2, top_k=3), "top_k must be in 1..experts=2"),
        (lambda: RouterConfig(features="pixels"), "features is of a robust router, got a linear one; leave it out"),
        (lambda: RouterConfig(name="mlp", eps="1/8"), "eps is of a robust router, got a mlp one"),
        (lambda: RouterConfig(name="robust", attempts=0), r"attempts must be in 1\.\.4096, got 0"),
        (lambda: RouterConfig(name="robust", eps="many"), "eps must be a number or a fraction"),
        (lambda: RouterConfig(name="robust", hidden=(8,)), "hidden cannot be set for a robust router"),
    ],
)
def test_a_bad_section_is_refused(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_a_robust_router_never_trains() -> None:
    assert not RouterConfig(name="robust").trains and RouterConfig().trains and not RouterConfig(train=False).trains
