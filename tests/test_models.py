"""Models from their configuration, from their record, and from a run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tiny
from phalanx.config import LayersConfig, MixtureConfig, RouterConfig
from phalanx.data import DataConfig, Splits, load_data
from phalanx.errors import CorruptError, InputError
from phalanx.models import MODEL_NAME, build, build_layers, build_mixture, load, read_description, save_description
from phalanx.nn import spec_of
from phalanx.routing import LayerMixture, MixtureOfExperts, leaves
from phalanx.runs.checkpoint import save_tensors
from phalanx.runs.sidecar import write_protected
from phalanx.threat import ThreatModel

CONFIGS = [
    MixtureConfig(expert="mlp", options={"hidden": (6,)}),
    MixtureConfig(expert="small_cnn", experts=2, top_k="all", temperature=2.0, options={"width": 2}),
    MixtureConfig(expert="mlp", experts=3, top_k=2, router=RouterConfig(name="mlp", hidden=(5,), train=False)),
    MixtureConfig(expert="mlp", experts=1),
    MixtureConfig(expert="tiny:noisy_cnn", experts=2, router=RouterConfig(name="cnn", hidden=(2,))),
    MixtureConfig(
        expert="mlp", experts=6, router=RouterConfig(name="hierarchical", groups=3, inner="mlp", hidden=(5,))
    ),
]


def _equal(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def _save(run: Path, model: nn.Module, weights: str = "best") -> None:
    run.mkdir(exist_ok=True)
    save_description(run / MODEL_NAME, model, tiny.digits())
    save_tensors(run / f"{weights}.safetensors", model.state_dict(), {})


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.expert)
def test_built_recorded_and_loaded_bit_for_bit(tmp_path: Path, config: MixtureConfig) -> None:
    data = tiny.digits()
    model = build_mixture(config, data, seed=3)
    assert len(model.experts) == config.experts and (model.router is None) is (config.experts == 1)
    assert model.top_k == (config.experts if config.top_k == "all" else config.top_k)
    assert (model.temperature, model.train_router) == (config.temperature, config.router.train)
    (batch,) = data.val.batches(30)
    _save(tmp_path, model)
    loaded = load(tmp_path)
    assert isinstance(loaded, MixtureOfExperts) and not loaded.training
    assert _equal(loaded, model) and torch.equal(loaded(batch.x), model.eval()(batch.x))
    # JSON and back is the same model
    mine, theirs = spec_of(model), spec_of(loaded)
    assert mine is not None and theirs is not None and json.dumps(mine.to_json()) == json.dumps(theirs.to_json())


def test_the_seed_is_all_that_decides() -> None:
    data, config = tiny.digits(), CONFIGS[0]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = build_mixture(config, data, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert _equal(build_mixture(config, data, seed=1), one)
    assert not _equal(build_mixture(config, data, seed=2), one)
    # each expert starts elsewhere
    assert not torch.equal(one.experts[0][2].weight, one.experts[1][2].weight)


def test_experts_and_router_normalise_with_the_datas_numbers() -> None:
    data = tiny.digits()
    model = build_mixture(CONFIGS[0], data, seed=0)
    for part in (model.router, *model.experts):
        assert part[0].mean.flatten().tolist() == pytest.approx(data.mean)
        assert part[0].std.flatten().tolist() == pytest.approx(data.std)


def _by_hand() -> nn.Module:
    return MixtureOfExperts(None, [nn.Sequential(nn.Flatten(), nn.Linear(64, 10))])


def test_a_hand_built_model_needs_its_factory(tmp_path: Path) -> None:
    model = _by_hand()
    _save(tmp_path, model)
    assert read_description(tmp_path)["spec"] is None
    with pytest.raises(InputError, match=r"was built by hand; give load\(\.\.\., factory=\.\.\.\) a function"):
        load(tmp_path)
    assert _equal(load(tmp_path, factory=_by_hand), model)
    with pytest.raises(InputError, match=r"weights in .*best\.safetensors do not fit the model"):
        load(tmp_path, factory=lambda: MixtureOfExperts(None, [nn.Sequential(nn.Flatten(), nn.Linear(64, 9))]))


def test_best_or_last(tmp_path: Path) -> None:
    best, last = (build_mixture(CONFIGS[0], tiny.digits(), seed) for seed in (0, 1))
    _save(tmp_path, best)
    with pytest.raises(InputError, match="has no last weights; the run has not got that far, or was not validated"):
        load(tmp_path, weights="last")
    _save(tmp_path, last, "last")
    assert _equal(load(tmp_path), best) and _equal(load(str(tmp_path), weights="last"), last)


def test_loading_draws_no_random_number(tmp_path: Path) -> None:
    _save(tmp_path, build_mixture(CONFIGS[0], tiny.digits(), 0))
    before = torch.get_rng_state()
    load(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", [MODEL_NAME, f"{MODEL_NAME}.sha256", "best.safetensors", "best.safetensors.sha256"])
def test_one_flipped_bit_is_found(tmp_path: Path, name: str) -> None:
    _save(tmp_path, build_mixture(CONFIGS[0], tiny.digits(), 0))
    content = bytearray((tmp_path / name).read_bytes())
    for position in {0, len(content) // 3, len(content) // 2, len(content) - 2}:
        damaged = content.copy()
        # the lowest bit turns a digit into its neighbour: JSON stays JSON, a width another width
        damaged[position] ^= 1
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(CorruptError) as caught:
            load(tmp_path)
        assert str(tmp_path / name.removesuffix(".sha256")) in str(caught.value) and caught.value.exit_code == 4


def _description(tmp_path: Path, **change: Any) -> None:
    _save(tmp_path, build_mixture(CONFIGS[0], tiny.digits(), 0))
    description = {**read_description(tmp_path), **change}
    write_protected(tmp_path / MODEL_NAME, json.dumps(description).encode())


def test_descriptions_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no trained model: it has no model\.json; check the name"):
        load(tmp_path / "nowhere")
    _description(tmp_path / "a", schema=2)
    with pytest.raises(InputError, match="has schema 2, this version reads up to 1; use a newer phalanx"):
        load(tmp_path / "a")
    _description(tmp_path / "b", spec={"name": "transformer", "arguments": {}})
    with pytest.raises(InputError, match="cannot build 'transformer'; it knows mixture"):
        load(tmp_path / "b")
    _description(tmp_path / "c", schema="new")
    with pytest.raises(CorruptError, match="is no description of a model"):
        load(tmp_path / "c")


def test_what_a_description_says(tmp_path: Path) -> None:
    data = tiny.digits()
    model = build_mixture(CONFIGS[3], data, seed=0)
    _save(tmp_path, model)
    description = read_description(tmp_path)
    # 64*128 + 128 + 128*64 + 64 + 64*10 + 10
    assert description["parameters"] == 17226
    assert description["data"]["fingerprint"] == data.fingerprint
    assert description["data"]["shape"] == [1, 8, 8] and len(description["data"]["class_names"]) == 10


def test_images_must_be_square() -> None:
    data = tiny.digits()
    flat = [images.__class__(images.pixels[:, :, :4], images.labels, images.ids, 16) for images in data.parts.values()]
    with pytest.raises(InputError, match=r"images must be square, got 4 x 8; set data\.size"):
        build_mixture(CONFIGS[0], Splits(*flat, data.name, data.class_names, data.mean, data.std), 0)


def test_an_own_expert_must_still_be_importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _save(tmp_path, build_mixture(CONFIGS[4], tiny.digits(), 0))
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "tiny")
        patch.setattr(sys, "path", [entry for entry in sys.path if not (Path(entry) / "tiny.py").exists()])
        with pytest.raises(InputError, match=r"cannot import module 'tiny' .*PYTHONPATH"):
            load(tmp_path)
    assert build(read_description(tmp_path)["spec"]) is not None


CNN = RouterConfig(name="cnn", hidden=(2,))


@pytest.mark.parametrize(
    ("config", "decisions"),
    [
        (LayersConfig(options={"width": 4}, router=CNN, straight_through="score"), 1),
        (LayersConfig(options={"width": 4}, routers="block", experts=3, top_k=2, temperature=2.0), 2),
        (LayersConfig(options={"width": 4}, routers="layer", experts=3, top_k="all"), 2),
        (LayersConfig(options={"width": 4}, router=CNN, batch_norm="per_expert", scale=0.75), 1),
        (LayersConfig(options={"width": 4}, router=RouterConfig(name="linear", train=False), overlap=True), 1),
        (LayersConfig(options={"width": 4}, experts=1), 1),
    ],
    ids=["shared", "block", "layer", "per_expert", "overlap", "one"],
)
def test_a_layer_level_mixture_is_recorded_and_loaded(tmp_path: Path, config: LayersConfig, decisions: int) -> None:
    data = tiny.digits()
    model = build_layers(config, data, seed=3)
    assert ("router" in model.players()) is (config.experts > 1 and config.router.train)
    (batch,) = data.val.batches(30)
    _save(tmp_path, model)
    loaded = load(tmp_path)
    assert isinstance(loaded, LayerMixture) and not loaded.training
    assert _equal(loaded, model) and torch.equal(loaded(batch.x), model.eval()(batch.x))
    assert len(list(leaves(loaded.gate(batch.x)))) == decisions
    assert _equal(build_layers(config, data, seed=3), model) and not _equal(build_layers(config, data, seed=4), model)
    assert spec_of(loaded) == spec_of(model)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LayersConfig(backbone="mlp"), "backbone of .* layers must be one of .*small_cnn.*, got 'mlp'"),
        (LayersConfig(options={"height": 3}), "expert 'small_cnn' has no option 'height'"),
        (LayersConfig(options={"scale": 0.5}), "scale belongs to the mixture"),
        (LayersConfig(options={"width": 4}, scale=0.1), "scale 0.1 leaves no channel of a layer of 4; raise it"),
    ],
)
def test_a_layer_level_mixture_that_cannot_be_built_says_why(config: LayersConfig, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_layers(config, tiny.digits(), seed=0)


def test_one_router_is_fitted_once_and_given_to_each_model(monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_data(DataConfig(name="digits", train_limit=200))
    config = MixtureConfig(
        expert="mlp", options={"hidden": [8]}, experts=2, router=RouterConfig(name="robust", attempts=1)
    )
    first = build_mixture(config, data, 0, ThreatModel("Linf", "1/16"))
    monkeypatch.setattr("phalanx.models.fit_robust_router", lambda *_, **__: pytest.fail("fitted again"))
    second = build_mixture(config, data, 0, ThreatModel("Linf", "1/16"))
    assert first.router is not second.router
    assert first.router is not None and second.router is not None and _equal(first.router, second.router)
    for seed, eps in ((1, "1/16"), (0, "1/8")):  # another fit
        with pytest.raises(pytest.fail.Exception, match="fitted again"):
            build_mixture(config, data, seed, ThreatModel("Linf", eps))
