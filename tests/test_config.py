"""Recipes as they are read: every mistake on one page, and what a run is bound to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phalanx.config import (
    AdaptiveConfig,
    AssembledConfig,
    DualConfig,
    DualView,
    EnsembleView,
    EvaluationConfig,
    LayersConfig,
    MixtureConfig,
    NutsView,
    ReproductionConfig,
    RouterConfig,
    RunConfig,
    StudyConfig,
    StudyRun,
    SynergyConfig,
    ValidationConfig,
    bound_config,
    find_recipe,
    is_study,
    load_run,
    load_study,
    shipped_recipes,
)
from phalanx.errors import InputError
from phalanx.loading import RecipeErrors, to_plain
from phalanx.methods import AT, ST
from phalanx.training import Adam, OneCycle

RUNS = {"a": StudyRun(recipe="digits-st"), "b": StudyRun(recipe="digits-at")}
AB = DualView(standard="a", robust="b")

FULL_OF_MISTAKES = """\
method:
  name: at
  adversarial_share: 1.7
  atack: {name: pgd}
model:
  experts: 4
  top_k: 5
  exprt: mlp
threat: {eps: 8/0}
training:
  epochs: many
  optimizer: {name: adam, momentum: 0.9}
seed: -1
"""


def _recipe(folder: Path, text: str, name: str = "mine.yaml") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def test_every_mistake_at_once_with_its_line(tmp_path: Path) -> None:
    path = _recipe(tmp_path, FULL_OF_MISTAKES)
    with pytest.raises(RecipeErrors) as caught:
        load_run(path, ("training.batch_size=none", "evaluation.wights=last"))
    page = str(caught.value)
    assert isinstance(caught.value, InputError) and caught.value.exit_code == 2
    by_key = {problem.key: problem for problem in caught.value.problems}
    lines = {
        "method.adversarial_share": (3, "(0, 1]", "1.7"),
        "method.atack": (4, "attack"),
        "model.top_k": (7, "1..experts=4", "got 5", "add experts"),
        "model.exprt": (8, "expert"),
        "threat.eps": (9, "8/0"),
        "training.epochs": (11, "many"),
        "training.optimizer.momentum": (12,),
        "seed": (13, "-1"),
    }
    for key, (line, *words) in lines.items():
        assert key in by_key, page
        assert by_key[key].place.line == line
        assert all(word in by_key[key].message for word in words), page
        assert f"mine.yaml:{line}" in page
    assert "none" in by_key["training.batch_size"].message and "weights" in by_key["evaluation.wights"].message
    assert by_key["evaluation.wights"].place.source == "--set"
    assert page.startswith("10 problems in the recipe:") and len(page.splitlines()) == 11


def _hierarchical(groups: int, **options: Any) -> RouterConfig:
    return RouterConfig(name="hierarchical", groups=groups, **options)


def _adaptive(**options: Any) -> AdaptiveConfig:
    return AdaptiveConfig(standard="a", robust="b", **options)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RouterConfig(hidden=(8,)), r"hidden cannot be set for a linear router, got \(8,\); choose mlp or cnn"),
        (lambda: RouterConfig(name="mlp", hidden=()), r"hidden must hold widths of at least 1, got \(\)"),
        (lambda: RouterConfig(name="cnn", hidden=(4, 0)), r"hidden must hold widths of at least 1, got \(4, 0\)"),
        (lambda: RouterConfig(groups=2), "groups and inner are of a hierarchical router, got a linear one"),
        (lambda: RouterConfig(name="mlp", inner="cnn"), "groups and inner are of a hierarchical router, got a mlp one"),
        (lambda: RouterConfig(name="hierarchical"), "groups must be given for a hierarchical router, for example 2"),
        (lambda: _hierarchical(2, hidden=(8,)), r"hidden cannot be set for a linear router, got \(8,\); choose mlp"),
        (lambda: MixtureConfig(router=_hierarchical(3)), "router.groups must be at least 2 and divide the 4 experts"),
        (lambda: MixtureConfig(router=_hierarchical(4)), "into groups of at least 2, got 4"),
        (lambda: MixtureConfig(router=_hierarchical(1)), "router.groups must be at least 2 .*, got 1"),
        (lambda: AssembledConfig(experts=("a", "b", "c"), router=_hierarchical(2)), "router.groups .* the 3 experts"),
        (lambda: LayersConfig(router=_hierarchical(2)), "router of a layer-level mixture cannot be hierarchical"),
        (lambda: AdaptiveConfig(standard="a", robust="a"), "standard and robust must be two runs, got 'a' twice"),
        (lambda: _adaptive(scales=(2.0, 0.0)), r"scales must be positive, got \(2.0, 0.0\)"),
        (lambda: _adaptive(alpha_range=(0.9, 0.8)), r"alpha_range must go up within \[0, 1\], got \(0.9, 0.8\)"),
        (lambda: _adaptive(hidden=0), "hidden must be at least 1, got 0"),
        (lambda: MixtureConfig(experts=0), "experts must be at least 1, got 0"),
        (lambda: MixtureConfig(experts=2, top_k=3), r"top_k must be in 1\.\.experts=2 or 'all', got 3; lower top_k"),
        (lambda: MixtureConfig(top_k=0), r"top_k must be in 1\.\.experts=4 or 'all', got 0"),
        (lambda: MixtureConfig(temperature=0), "temperature must be positive, got 0"),
        (lambda: MixtureConfig(expert="../mlp"), r"expert must be a name or 'module:factory', got '\.\./mlp'"),
        (lambda: MixtureConfig(expert="a:b:c"), "expert must be a name or 'module:factory', got 'a:b:c'"),
        (lambda: ValidationConfig(n=0), "n must be at least 1, got 0; leave it out for all images"),
        (lambda: ValidationConfig(protocol="fgsm,pgd-2"), "protocol must be one attack, got 'fgsm,pgd-2'"),
        (lambda: EvaluationConfig(n=-1), "n must be at least 1, got -1"),
        (lambda: EvaluationConfig(batch_size=0), "batch_size must be at least 1, got 0"),
        (lambda: EvaluationConfig(checks=-1), "checks must be at least 0, got -1"),
        (lambda: RunConfig(seed=2**31), r"seed must be in 0\.\.2\*\*31 - 1, got 2147483648"),
        (lambda: RunConfig(device="gpu"), "device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got 'gpu'"),
        (lambda: RunConfig(threads=0), r"threads must be in 1\.\.1024, got 0"),
        (lambda: EvaluationConfig(analysis="fgsm,pgd-2"), "analysis must be one attack, got 'fgsm,pgd-2'"),
        (lambda: DualConfig(standard="a", robust="a"), "standard and robust must be two runs, got 'a' twice"),
        (lambda: DualConfig(standard="a", robust="b", alpha=1.5), r"alpha must be in \[0, 1\], .*, got 1.5"),
        (lambda: DualView(standard="a", robust="a"), "standard and robust must be two runs, got 'a' twice"),
        (lambda: DualView(standard="a", robust="b", alpha=-0.1), r"alpha must be in \[0, 1\], .*, got -0.1"),
        (lambda: DualView(standard="a", robust="b", keep=0), r"keep must be in \(0, 1\], .*, got 0"),
        (lambda: AssembledConfig(experts=("a",)), "experts must name at least two runs, got 1"),
        (lambda: AssembledConfig(experts=("a", "b", "a")), "experts must be different runs, got one twice in a, b, a"),
        (lambda: AssembledConfig(experts=("a", "b"), top_k=3), r"top_k must be in 1\.\.experts=2 or 'all', got 3"),
        (lambda: SynergyConfig(experts=1), "experts must be at least 2, got 1"),
        (lambda: SynergyConfig(temperature=0), "temperature must be positive, got 0"),
        (lambda: LayersConfig(experts=0), "experts must be at least 1, got 0"),
        (lambda: LayersConfig(scale=0), r"scale must be in \(0, 1\], got 0"),
        (lambda: LayersConfig(top_k=3), r"top_k must be in 1\.\.experts=2 or 'all', got 3"),
        (
            lambda: LayersConfig(routers="block", router=RouterConfig(name="cnn")),
            "router is the shared one's kind and means nothing to routers 'block'; drop it",
        ),
        (
            lambda: LayersConfig(routers="layer", batch_norm="per_expert"),
            "batch_norm must be shared where every layer decides by itself",
        ),
        (lambda: LayersConfig(routers="block", overlap=True), "overlap needs routers 'shared', got 'block'"),
        (lambda: NutsView(standard="a", robust="b", keep=2), r"keep must be in \(0, 1\], .*, got 2"),
        (lambda: EnsembleView(runs=("a",)), "runs must be two different runs or more, got a"),
        (lambda: EnsembleView(runs=("a", "a")), "runs must be two different runs or more, got a, a"),
        (lambda: StudyConfig(), "runs must name at least one run"),
        (lambda: StudyConfig(runs=RUNS, views={"a": AB}), "'a' names a run already; rename one"),
        (lambda: StudyConfig(runs={"a": RUNS["a"]}, views={"d": AB}), "views.d: 'b' is no run of the study; it has a"),
        (lambda: StudyConfig(runs=RUNS, rows=("c",)), "rows: 'c' is neither a run nor a view of the study"),
        (lambda: ReproductionConfig(title="t", source="s", study="dual"), "rows must name at least one row"),
    ],
)
def test_a_bad_value_is_refused_by_name(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_what_digits_at_says() -> None:
    config = load_run("digits-at").value
    assert isinstance(config.method, AT) and config.method.attack.steps == 10
    assert (config.label, config.training.epochs, config.training.select) == ("AT", 100, "robust_accuracy")
    # from the recipe it extends
    assert (config.threads, str(config.threat), config.model.options) == (1, "Linf 3/16", {"hidden": (128, 64)})
    assert (config.training.optimizer, config.training.schedule) == (Adam(lr=3e-3), OneCycle())
    assert isinstance(load_run("digits-st").value.method, ST)


def test_a_recipe_of_ones_own_extends_a_shipped_one(tmp_path: Path) -> None:
    path = _recipe(tmp_path, "extends: digits-at\ntraining: {epochs: 3}\n")
    loaded = load_run(path, ("model.experts=8", "model.options.hidden=[5]"))
    assert loaded.value.training.epochs == 3 and isinstance(loaded.value.method, AT)
    assert loaded.value.model == MixtureConfig(expert="mlp", experts=8, options={"hidden": (5,)})
    assert loaded.sources["training.epochs"].endswith("mine.yaml:2") and loaded.sources["model.experts"] == "--set"


def test_finding_a_recipe(tmp_path: Path) -> None:
    assert find_recipe("quickstart") == shipped_recipes()["quickstart"]
    path = _recipe(tmp_path, "seed: 1\n")
    assert find_recipe(path) == Path(path)
    with pytest.raises(InputError, match=r"no recipe is named 'digits'; there are .*digits-at.*ends in \.yaml"):
        find_recipe("digits")
    with pytest.raises(InputError, match=r"gone\.yaml does not exist; give a YAML file, or one of .*digits-at"):
        find_recipe(str(tmp_path / "gone.yaml"))
    with pytest.raises(InputError, match="is no regular file"):
        find_recipe(str(tmp_path))
    with pytest.raises(InputError, match="no recipe is named ''"):
        find_recipe("")


def test_studies(tmp_path: Path) -> None:
    study = load_study("quickstart").value
    assert study.runs["st"] == StudyRun(recipe="digits-st") and study.title == "Quickstart"
    assert study.views["dual-0.7"] == DualView(standard="st", robust="rt-er", alpha=0.7)
    texts = [
        ("runs: {a: b}\n", True), ("# runs:\nseed: 1\n", False), ("model:\n  runs: 1\n", False),
        ("extends: quickstart\n", True), ("extends: digits-at\n", False), ("extends: mine.yaml\n", False),
    ]  # fmt: skip
    for text, yes in texts:
        assert is_study(Path(_recipe(tmp_path, text))) is yes, text
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe")
    assert not is_study(tmp_path / "binary.yaml") and not is_study(tmp_path / "gone.yaml")
    with pytest.raises(RecipeErrors, match="runs"):
        load_study(_recipe(tmp_path, "title: empty\nruns: {}\n"))


def test_a_run_is_bound_to_how_it_is_trained() -> None:
    plain = to_plain(load_run("digits-at").value)
    bound = bound_config(plain)
    assert set(plain) - set(bound) == {"label", "evaluation"}
    for override, same in [("evaluation.n=3", True), ("label=x", True), ("seed=1", False), ("validation.n=3", False),
                           ("training.sampling=shuffled", True),
                           ("training.sampling=class_balanced", False)]:  # fmt: skip
        other = bound_config(to_plain(load_run("digits-at", (override,)).value))
        assert (other == bound) is same, override
