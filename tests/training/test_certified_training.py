"""The loss that enlarges certificates is what certificates say, moves who moves anyway, and can be taken up again."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from method_samples import TurnByTurn
from torch import Tensor, nn

import tiny
from phalanx.certification import lower_margins
from phalanx.config import bound_config, load_run
from phalanx.data import Batch
from phalanx.errors import InputError
from phalanx.experts import TwoHeaded, build_expert
from phalanx.loading import to_plain
from phalanx.methods import ST, AdvMoE
from phalanx.methods.base import Loss, Update
from phalanx.rng import Rng, SampleRng
from phalanx.routing import CNNRouter, DualModel, LinearRouter, MixtureOfExperts, SynergyOfExperts
from phalanx.threat import NORMS, Norm, ThreatModel
from phalanx.training import CertifiedTraining, TrainingConfig
from phalanx.training.certified import check_certified, with_certified_loss, worst_logits
from phalanx.training.config import Bound
from phalanx.workflow import train_run

BOUNDS: tuple[Bound, ...] = get_args(Bound)
RADIUS: dict[Norm, float] = {"Linf": 0.03, "L2": 0.2, "L1": 0.5}


def _batch(size: int = 16) -> Batch:
    return next(tiny.digits().train.batches(size))


def _settings(
    bound: Bound = "crown-ibp", norm: Norm = "Linf", weight: float = 0.5, **options: Any
) -> CertifiedTraining:
    return CertifiedTraining(bound=bound, norm=norm, eps=RADIUS[norm], weight=weight, **options)


def _linear(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def _worst(model: Any, bound: Bound, norm: Norm, batch: Batch) -> Tensor:
    return worst_logits(model, batch.x, batch.y, _settings(bound, norm), RADIUS[norm])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bound", BOUNDS)
def test_one_linear_expert_by_hand(bound: Bound, norm: Norm) -> None:
    model, batch = MixtureOfExperts(None, [_linear(0)]), _batch()
    # away from the ends of the pixels' range, where a ball is smaller
    batch = Batch(0.3 + 0.4 * batch.x, batch.y, batch.ids)
    linear = model.experts[0][1]
    differences = linear.weight - linear.weight[batch.y][:, None]
    dual = {"Linf": 1.0, "L2": 2.0, "L1": torch.inf}[norm]
    logits = model(batch.x)
    expected = logits - logits.gather(1, batch.y[:, None]) + RADIUS[norm] * differences.norm(dual, dim=2)
    if bound != "ibp" or norm == "Linf":
        torch.testing.assert_close(_worst(model, bound, norm, batch), expected, rtol=1e-4, atol=1e-5)


def test_a_mixture_mixes_its_selected_experts_worst_logits() -> None:
    batch, experts = _batch(), [_linear(seed) for seed in range(3)]
    torch.manual_seed(9)
    router = LinearRouter((1, 8, 8), 3)
    alone = [_worst(MixtureOfExperts(None, [expert]), "ibp", "Linf", batch) for expert in experts]
    for top_k in (1, 2, 3):
        model = MixtureOfExperts(router, experts, top_k)
        route = model.gate(batch.x)
        assert len(route.experts.unique()) > 1
        expected = torch.zeros(16, 10)
        for place in range(top_k):
            chosen = torch.stack(alone, 1)[torch.arange(16), route.experts[:, place]]
            expected += route.weights[:, place : place + 1] * chosen
        torch.testing.assert_close(_worst(model, "ibp", "Linf", batch), expected)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("expert", ["mlp", "small_cnn", "lipschitz_mlp"])
def test_no_point_of_the_ball_is_worse(expert: str, bound: Bound, norm: Norm) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"small_cnn": {"width": 4}}.get(expert, {"hidden": [12, 8]})
    network = build_expert(expert, num_classes=10, image_size=8, channels=1, **options)
    batch = _batch()
    network(batch.x)
    # in training mode, and read as it will be in evaluation mode
    model = MixtureOfExperts(None, [network]).train()
    worst = _worst(model, bound, norm, batch)
    assert worst.dtype == torch.float32 and worst.gather(1, batch.y[:, None]).abs().max() < 1e-6
    model.eval()
    for restart in range(10):
        rng = SampleRng.for_batch(16, 3)
        point = ThreatModel(norm, RADIUS[norm]).random_start(batch.x, rng, restart=restart)
        logits = model(point)
        assert bool((logits - logits.gather(1, batch.y[:, None]) <= worst + 1e-4).all())
    # a certificate is searched for with these bounds or better ones
    certified = lower_margins(model, batch.x, batch.y, norm, RADIUS[norm], method="lipschitz")
    if bound == "margin":
        others = torch.ones_like(worst).scatter(1, batch.y[:, None], 0).bool()
        torch.testing.assert_close(certified[others].float(), -worst[others], rtol=1e-3, atol=1e-3)


def _update(value: float = 2.0) -> Update:
    return Update(lambda: Loss(torch.tensor(value), {"accuracy": torch.tensor(0.5)}), "experts")


@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
def test_the_share_and_the_radius_rise_together(progress: float) -> None:
    model, batch = tiny.mixture(3), _batch()
    settings = _settings("ibp", weight=0.6)
    update = with_certified_loss(_update(), model, batch, settings, progress)
    found = update.loss()
    worst = worst_logits(model, batch.x, batch.y, settings, RADIUS["Linf"] * progress)
    expected = (1 - 0.6 * progress) * 2 + 0.6 * progress * F.cross_entropy(worst, batch.y)
    torch.testing.assert_close(found.value, expected)
    assert update.player == "experts" and set(found.logs) == {"accuracy", "certified_loss", "certified_accuracy"}
    assert float(found.logs["certified_accuracy"]) == float((worst.argmax(1) == batch.y).float().mean())
    assert not any(log.requires_grad for log in found.logs.values())


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("expert", ["mlp", "lipschitz_mlp"])
@pytest.mark.parametrize("gate", [1, "all"])
def test_experts_and_router_get_finite_gradients_at_every_radius(gate: int | str, expert: str, bound: Bound) -> None:
    model = tiny.mixture(2, gate)
    if expert != "mlp":
        own = {"num_classes": 10, "image_size": 8, "channels": 1, "hidden": [6]}
        model = MixtureOfExperts(model.router, [build_expert(expert, **own) for _ in range(2)], gate)
    # an image that is one point of every interval, too: black stays black
    batch = _batch()
    batch.x[0] = 0
    for radius in (0.0, 0.05):
        model.zero_grad()
        worst = worst_logits(model, batch.x, batch.y, _settings(bound), radius)
        F.cross_entropy(worst, batch.y).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
        assert float(model.router[2].weight.grad.abs().sum()) > 0


@pytest.mark.parametrize(("bound", "method"), [("ibp", "ibp"), ("crown-ibp", "crown")])
def test_it_enlarges_certificates(tmp_path: Path, bound: Bound, method: str) -> None:
    batch, radius = _batch(60), 0.08
    held = {}
    for name, settings in (("plain", None), ("certified", CertifiedTraining(bound=bound, eps=radius, norm="Linf"))):
        model = tiny.mixture(1)
        tiny.run_training(tmp_path / name, model, epochs=20, certified=settings)
        low = lower_margins(model.eval(), batch.x, batch.y, "Linf", radius, method=method)
        held[name] = int((low > 0).all(1).sum())
    assert held["certified"] > held["plain"] + 5
    record = tiny.metrics(tmp_path / "certified")[-1]
    assert {"certified_loss", "certified_accuracy"} <= record.keys()
    assert not {"certified_loss"} & tiny.metrics(tmp_path / "plain")[-1].keys()


def test_an_interrupted_run_warms_up_where_it_was(tmp_path: Path) -> None:
    settings = {"epochs": 4, "certified": _settings("ibp", warmup=0.75)}
    tiny.run_training(tmp_path / "whole", **settings)
    with pytest.raises(tiny.Stop):
        tiny.run_training(tmp_path / "cut", reporter=tiny.StopAt(5), checkpoint_seconds=0.0, **settings)
    tiny.run_training(tmp_path / "cut", **settings)
    assert tiny.result(tmp_path / "whole")["last.safetensors"] == tiny.result(tmp_path / "cut")["last.safetensors"]
    first, *_, last = (record["certified_loss"] for record in tiny.metrics(tmp_path / "whole"))
    assert first != last


def test_only_updates_that_move_the_experts_have_it(tmp_path: Path) -> None:
    model, method = tiny.mixture(), TurnByTurn()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tiny.run_training(tmp_path, model, method, epochs=1, certified=_settings("ibp"))
    (record,) = (record for record in tiny.metrics(tmp_path) if record["kind"] == "train")
    assert "experts.certified_loss" in record and "router.certified_loss" not in record
    assert all(not torch.equal(tensor, before[name]) for name, tensor in model.named_parameters())


@pytest.mark.parametrize("part", ["router", "standard"])
def test_whoever_does_not_move_stays(tmp_path: Path, part: str) -> None:
    if part == "router":
        model: Any = tiny.mixture(2, train_router=False)
        still = model.router
    else:
        model = DualModel(tiny.mixture(2, train_router=False), tiny.mixture(2, seed=1), 0.5)
        still = model.standard.router
    before = [parameter.clone() for parameter in still.parameters()]
    tiny.run_training(tmp_path, model, epochs=1, certified=_settings())
    assert all(torch.equal(a, b) for a, b in zip(before, still.parameters(), strict=True))


@pytest.mark.parametrize("method", [ST(), AdvMoE(order="experts_first").within(tiny.THREAT)])
def test_it_moves_no_statistics_of_the_router(method: Any) -> None:
    batch, found = _batch(), []
    for settings in (None, _settings("ibp")):
        model = tiny.mixture(2)
        torch.manual_seed(0)
        model = MixtureOfExperts(CNNRouter((1, 8, 8), 2, hidden=(4,)), model.experts).train()
        update = next(iter(method.updates(model, {"train": batch, "router": batch}, Rng(0))))
        if settings is not None:
            update = with_certified_loss(update, model, batch, settings, 1.0)
        update.loss().value.backward()
        assert all(module.training for module in model.modules())
        found.append({name: tensor.clone() for name, tensor in model.named_buffers()})
    assert found[0].keys() == found[1].keys() and any("running_mean" in name for name in found[0])
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


def test_of_a_dual_model_it_is_the_robust_half_that_is_certified() -> None:
    dual, batch = DualModel(tiny.mixture(2), tiny.mixture(2, seed=1), 0.5), _batch()
    found = with_certified_loss(_update(0.0), dual, batch, _settings(weight=0.5), 1.0).loss()
    expected = worst_logits(dual.robust, batch.x, batch.y, _settings(), RADIUS["Linf"])  # type: ignore[arg-type]
    torch.testing.assert_close(found.value, 0.5 * F.cross_entropy(expected, batch.y))


def test_models_that_it_is_not_for() -> None:
    synergy = SynergyOfExperts([TwoHeaded(network) for network in tiny.mixture(2).experts])
    with pytest.raises(InputError, match=r"training\.certified is for mixtures of whole .* got a SynergyOfExperts"):
        check_certified(synergy, (1, 8, 8))
    with pytest.raises(InputError, match=r"moves experts, and this mixture's are frozen; leave it out"):
        check_certified(tiny.mixture(2, train_experts=False), (1, 8, 8))
    unknown = MixtureOfExperts(None, [nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.GELU())])
    with pytest.raises(InputError, match=r"^training\.certified: no bound is known for experts\.0\.2, which is GELU"):
        check_certified(unknown, (1, 8, 8))
    with pytest.raises(InputError, match=r"^training\.certified: no bound is known for experts\.0"):
        check_certified(tiny.mixture(1, expert="resnet18"), (1, 8, 8))


def test_folders_from_before_there_was_a_choice_go_on() -> None:
    plain = to_plain(load_run("digits-st").value)
    assert "certified" in plain["training"] and "certified" not in bound_config(plain)["training"]
    certified = bound_config(to_plain(load_run("digits-certified-linf").value))["training"]["certified"]
    assert certified == {"bound": "crown-ibp", "weight": 0.5, "eps": 0.08, "norm": None, "warmup": 0.33}


def test_a_recipe_is_refused_before_its_folder_exists(tmp_path: Path) -> None:
    settings = ("training.certified={weight: 0.5}", "data.train_limit=64", "device=cpu", "threads=1")
    config = load_run("digits-at-moe", (*settings, "training.batch_size=32")).value
    with pytest.raises(InputError, match=r"training\.certified is for mixtures of whole networks"):
        train_run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_recipes_threat_is_the_ball_unless_it_is_said() -> None:
    threat = ThreatModel("L2", 0.5)
    settings = TrainingConfig(certified=CertifiedTraining()).within(threat).certified
    assert settings is not None and (settings.norm, settings.eps) == ("L2", 0.5)
    own = CertifiedTraining(eps="1/255", norm="Linf")
    assert own.within(threat) == own and own.threat_within(threat).epsilon == 1 / 255
    assert TrainingConfig().within(threat) == TrainingConfig()


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: CertifiedTraining(weight=0), r"weight must be in \(0, 1\), got 0: the method's own loss has the rest"),
        (lambda: CertifiedTraining(weight=1.0), r"weight must be in \(0, 1\), got 1.0"),
        (lambda: CertifiedTraining(eps="-1/255"), "eps must be at least 0"),
        (lambda: CertifiedTraining(eps=8, norm="Linf"), "eps must be at most 1 for Linf"),
        (lambda: CertifiedTraining(warmup=1.0), r"warmup must be in \[0, 1\), got 1.0"),
    ],
)
def test_settings_that_mean_nothing(made: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made()
