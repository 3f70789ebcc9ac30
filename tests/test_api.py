"""`import phalanx as px`: the names of the README, and what they do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import phalanx as px
from phalanx.errors import InputError
from phalanx.runs.checkpoint import load_tensors


@pytest.fixture(scope="module")
def data() -> px.Splits:
    return px.load_data("digits", train_limit=300, test_limit=60)


def _mixture(data: px.Splits) -> px.MixtureOfExperts:
    torch.manual_seed(0)
    experts = [
        px.build_expert("mlp", num_classes=data.num_classes, image_size=8, channels=1, hidden=(16,)) for _ in range(2)
    ]
    return px.MixtureOfExperts(px.LinearRouter(data.shape, 2), experts, top_k=1)


def test_every_public_name_is_there() -> None:
    from phalanx import api

    assert [name for name in api.__all__ if not hasattr(px, name)] == []
    assert set(api.__all__) <= set(dir(px))
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = px.nonsense


def test_train_evaluate_load_attack(data: px.Splits, tmp_path: Path) -> None:
    run = px.train(_mixture(data), "at", data, epochs=2, eps="3/16", out=tmp_path / "run")
    again = px.train(_mixture(data), "at", data, epochs=2, eps="3/16", out=tmp_path / "run")
    loaded = px.load(tmp_path / "run")
    for model in (run.model, again.model):
        assert all(
            torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
        )
    result = px.evaluate(run.model, data.test, protocol="pgd-5", eps="3/16", norm="inf", out=tmp_path / "ledger.sqlite")
    assert result.n == 60 and 0 <= result.robust_acc <= result.clean_acc <= 1
    assert px.evaluate(run.model, data.test, protocol="pgd-5", eps="3/16").robust_acc == result.robust_acc
    assert "under pgd-5, Linf 3/16, n = 60" in str(result)
    x, y = next(data.test.batches(16)).xy
    x_adv = px.attacks.PGD(eps="8/255", steps=3)(run.model, x, y)
    assert (x_adv - x).abs().max() <= 8 / 255 + 1e-6


def test_whose_weights_are_where(data: px.Splits, tmp_path: Path) -> None:
    model = _mixture(data)
    run = px.train(model, "st", data, epochs=1, out=tmp_path / "run")
    last = load_tensors(tmp_path / "run/last.safetensors")[0]
    assert run.model is not model and all(torch.equal(value, last[key]) for key, value in model.state_dict().items())
    # a finished run trains nobody
    again, untrained = _mixture(data), _mixture(data)
    px.train(again, "st", data, epochs=1, out=tmp_path / "run")
    assert all(map(torch.equal, again.parameters(), untrained.parameters()))


def test_the_seconds_of_a_run_are_those_of_all_its_sessions(
    data: px.Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phalanx.workflow.training.trained_seconds", lambda run: 3600.0)
    px.train(_mixture(data), "st", data, epochs=1, out=tmp_path / "run")
    recorded = json.loads((tmp_path / "run/environment.json").read_text())["seconds"]
    assert recorded >= 3600


def test_a_hand_built_model_needs_a_factory(data: px.Splits, tmp_path: Path) -> None:
    def factory() -> nn.Module:
        return px.MixtureOfExperts(None, [nn.Sequential(nn.Flatten(), nn.Linear(64, 10))])

    with pytest.raises(InputError, match=r"built by hand.*train\(\.\.\., factory=\.\.\.\)"):
        px.train(factory(), "st", data, epochs=1, out=tmp_path / "run")
    px.train(factory(), "st", data, epochs=1, out=tmp_path / "run", factory=factory)
    with pytest.raises(InputError, match=r"built by hand; give load\(\.\.\., factory=\.\.\.\)"):
        px.load(tmp_path / "run")
    assert px.load(tmp_path / "run", factory=factory)(torch.rand(2, 1, 8, 8)).shape == (2, 10)


def test_mistakes_are_named(data: px.Splits, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"method must be one of .*\bat\b.*\bst\b.*, got 'attt'"):
        px.train(_mixture(data), "attt", data, out=tmp_path / "run")
    with pytest.raises(InputError, match=r"no routed model.*MixtureOfExperts\(None, \[network\]\)"):
        px.train(nn.Linear(2, 2), "st", data, out=tmp_path / "other", factory=lambda: nn.Linear(2, 2))
    for wrong, message in (({"norm": "L3"}, "norm must be one of Linf, L2, L1, got 'L3'"), ({"eps": 8}, "8/255")):
        with pytest.raises(InputError, match=message):
            px.evaluate(_mixture(data), data.test, **wrong)
        with pytest.raises(InputError, match=message):
            px.train(_mixture(data), "st", data, out=tmp_path / "run", **wrong)
    with pytest.raises(InputError, match="protocol has no attack 'strongest'"):
        px.evaluate(_mixture(data), data.test, protocol="strongest")


def test_evaluate_stops_goes_on_and_tells(data: px.Splits, tmp_path: Path) -> None:
    class Sure(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.eye(10)[x.flatten(1).argmax(1) % 10]

    with pytest.raises(InputError, match="answers with probabilities"):
        px.evaluate(Sure(), data.test, protocol="fgsm", eps="1/16")
    assert px.evaluate(Sure(), data.test, protocol="fgsm", eps="1/16", allow=["probabilities"]).n == 60
    half = {"protocol": "pgd-2", "eps": "3/16", "out": tmp_path / "ledger.sqlite", "batch_size": 10}
    begun = px.evaluate(_mixture(data), data.test, limits=px.Limits(seconds=1e-9), **half)
    assert begun.n == 10 and not begun.finished
    assert px.evaluate(_mixture(data), data.test, **half).finished
    with pytest.warns(UserWarning, match="training mode"):
        px.evaluate(_mixture(data).train(), data.test.first(2), protocol="fgsm", eps="1/16")
