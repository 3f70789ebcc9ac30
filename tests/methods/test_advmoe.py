from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from advmoe_samples import EPSILON, MODELS, RNG, batch, bits, layered, method, part, passes, same, streams, updates
from torch import Tensor, nn

import tiny
from phalanx.attacks import FGSM, PGD
from phalanx.attacks.target import Target
from phalanx.attacks.tracker import Found
from phalanx.data import Batch
from phalanx.errors import DivergedError, InputError
from phalanx.methods import RTER, TRADES, AdvMoE, JTDMoE
from phalanx.methods.advmoe import PRESETS, Preset
from phalanx.rng import SampleRng
from phalanx.routing import DualModel, MixtureOfExperts, leaves
from phalanx.training import SGD
from phalanx.training.loop import Loader
from phalanx.training.players import build_optimizers
from reference.advmoe import advmoe_attack, experts_loss, router_loss

NAMES: tuple[Preset, ...] = get_args(Preset)
OTHER = {"experts": "router", "router": "experts"}


def _backward(model: Any, chosen: AdvMoE, player: str) -> dict[str, Tensor]:
    """The gradients that one update gives, by name."""
    model.zero_grad(set_to_none=True)
    updates(chosen, model)[player].loss().value.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# -- who moves, and what is left alone ---------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["fixed", "paper"])
@pytest.mark.parametrize("name", MODELS)
def test_an_update_moves_its_player_and_leaves_every_bit_of_the_other(name: str, preset: Preset) -> None:
    model, chosen = MODELS[name](), method(preset=preset)
    optimizers = build_optimizers(SGD(lr=0.05), model.players())
    model.train()
    moved = []
    for update in chosen.updates(model, streams(), RNG):
        player = update.player
        before = {each: bits(part(model, each)) for each in OTHER}
        model.zero_grad(set_to_none=True)
        loss = update.loss()
        loss.value.backward()
        assert all(parameter.grad is None for parameter in model.players()[OTHER[player]])
        # nothing that a loss leaves behind keeps the other from being trained next
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert all(module.training for module in model.modules())
        optimizers[player].step()
        assert same(before[OTHER[player]], part(model, OTHER[player])), player
        assert not same(before[player], part(model, player)), player
        assert all(log.isfinite().all() and not log.requires_grad for log in {**update.logs, **loss.logs}.values())
        moved.append(player)
    assert moved == ["router", "experts"]


# an expert that is a network leaves its statistics alone where it got fewer than 8 images
@pytest.mark.parametrize("name", [name for name in MODELS if name != "mixture"])
def test_batchnorm_of_the_player_moves_once_for_each_of_two_passes(name: str) -> None:
    model = MODELS[name]()
    ready = updates(method(steps=3), model)
    assert passes(model) == {0}
    ready["experts"].loss()
    assert passes(part(model, "experts")) == {2} and passes(part(model, "router")) <= {0}
    ready["router"].loss()
    assert passes(part(model, "experts")) == {2} and passes(part(model, "router")) <= {2}
    assert name != "layers, shared" or passes(part(model, "router")) == {2}


def test_as_released_batchnorm_sees_three_clean_images_for_one_attacked() -> None:
    # backbone 3 to 1, router 4 to 2 (T5)
    seen: dict[str, list[Tensor]] = {"experts": [], "router": []}
    model, data = layered(), streams()

    def watch(player: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            if module.training:
                seen[player].append(args[0].detach().clone())

        return hook

    part(model, "experts").register_forward_pre_hook(watch("experts"))
    part(model, "router").register_forward_pre_hook(watch("router"))
    for update in updates(method(preset="released"), model, data).values():
        update.loss()
    # the network sees the batch in the order of its experts
    pixels = data["train"].x.sum().item()
    clean = {player: [math.isclose(x.sum().item(), pixels, rel_tol=1e-6) for x in own] for player, own in seen.items()}
    assert {player: (sum(own), len(own) - sum(own)) for player, own in clean.items()} == {
        "experts": (3, 1),
        "router": (4, 2),
    }
    assert (passes(part(model, "experts")), passes(part(model, "router"))) == ({4}, {6})


@pytest.mark.parametrize(("settings", "router_passes"), [({}, 0), ({"clean_scores": "training"}, 2)])
def test_training_scores_alone_cost_the_router_one_pass_an_attack(settings: Any, router_passes: int) -> None:
    model = layered()
    updates(method(**settings), model)
    assert (passes(part(model, "experts")), passes(part(model, "router"))) == ({0}, {router_passes})


# -- the losses --------------------------------------------------------------------------------------------------------


class _Given(PGD):
    """Finds x + eps."""

    def perturb(self, target: Target, rng: SampleRng) -> Found:
        return super().perturb(target, rng)._replace(x_adv=(target.x + self.threat.epsilon).clamp(0, 1))


def _smooth(experts: int = 3) -> MixtureOfExperts:
    """In float64, steep enough that no gradient is lost, every expert with images, no BatchNorm."""
    model = tiny.mixture(experts).double()
    x = batch().x.double()
    with torch.no_grad():
        for expert in model.experts:
            expert[-1].weight *= 4
        model.router[2].weight *= 30
        model.router[2].bias -= model.router(x).mean(0)
    assert len(model.gate(x).experts.unique()) == experts
    return model  # type: ignore[no-any-return]


def _double(data: dict[str, Batch]) -> dict[str, Batch]:
    return {stream: Batch(own.x.double(), own.y, own.ids) for stream, own in data.items()}


@pytest.mark.parametrize("preset", NAMES)
def test_one_step_by_the_reference(preset: Preset) -> None:
    model, data = _smooth(), _double(streams())
    chosen = AdvMoE(
        attack=_Given(steps=1, objective="kl"), beta=3.0, router_label_weight=2.0, router_beta=5.0, preset=preset
    ).within(tiny.THREAT)
    ready = updates(chosen, model, data)
    read = {"experts": data["train"], "router": data["train" if preset == "released" else "router"]}
    for player, update in ready.items():
        x, y = read[player].x, read[player].y
        x_adv = (x + EPSILON).clamp(0, 1)
        expected = (
            router_loss(model.router, x, x_adv, y, alpha=2.0, beta=5.0)
            if player == "router" and preset != "paper"
            else experts_loss(model.router, model.experts, x, x_adv, y, beta=3.0)
        )
        parameters = model.players()[player]
        wanted = torch.autograd.grad(expected, parameters)
        loss = update.loss()
        torch.testing.assert_close(loss.value, expected)
        torch.testing.assert_close(torch.autograd.grad(loss.value, parameters), wanted)


@pytest.mark.parametrize("preset", NAMES)
def test_the_attack_by_the_reference(preset: Preset) -> None:
    # released: clean scores of training mode, which are evaluation mode's where there is no BatchNorm
    model, data = _smooth(), _double(streams())
    x, y, ids = data["train"]
    noise = RNG.fold("attack", "experts").samples(ids).normal("start.gaussian", x.shape[1:]).double()
    expected = advmoe_attack(
        model.router, list(model.experts), x, x + 0.001 * noise,
        epsilon=EPSILON, step=0.1, steps=2, attack_router=preset != "paper",
    )  # fmt: skip
    seen: list[Tensor] = []
    chosen = method(steps=2, preset=preset)
    classes_alone = chosen.attack.search(model, x, y, rng=RNG.fold("attack", "experts").samples(ids)).x_adv
    ready = updates(chosen, model, data)["experts"]
    routed = model.routed

    def spy(images: Tensor, route: Any = None) -> Any:
        seen.append(images)
        return routed(images, route)

    model.routed = spy  # type: ignore[method-assign, assignment]
    ready.loss()
    assert torch.equal(seen[0], x)
    torch.testing.assert_close(seen[1], expected)
    # the router's term matters, where there is one
    assert torch.allclose(seen[1], classes_alone) is (preset == "paper")


def test_the_gates_gradient_reaches_the_router_end_to_end_only() -> None:
    # T7: without its own terms the fixed router has no gradient at all
    only_classes: dict[str, Any] = {"router_label_weight": 0.0, "router_beta": 0.0}
    for name in MODELS:
        fixed = _backward(MODELS[name](), method(**only_classes), "router")
        paper = _backward(MODELS[name](), method(preset="paper", **only_classes), "router")
        assert not any(bool(gradient.any()) for gradient in fixed.values()), name
        assert paper.keys() == fixed.keys() and any(bool(gradient.any()) for gradient in paper.values()), name
        assert all(key.startswith("router") for key in paper), name


def test_the_weights_are_separate() -> None:
    # T8: each weighs one term
    def values(**settings: Any) -> tuple[float, float]:
        ready = updates(method(**settings), layered())
        return ready["experts"].loss().value.item(), ready["router"].loss().value.item()

    experts, router = values()
    assert values(beta=7.0)[0] > experts and values(beta=7.0)[1] == pytest.approx(router)
    for weight in ("router_label_weight", "router_beta"):
        assert values(**{weight: 7.0})[0] == pytest.approx(experts) and values(**{weight: 7.0})[1] > router
    assert values(balance=1.0)[0] == pytest.approx(experts) and values(balance=1.0)[1] > router


# -- presets, streams, order -------------------------------------------------------------------------------------------


def test_what_the_presets_settle() -> None:
    assert AdvMoE().choices == PRESETS["fixed"]
    for name in NAMES:
        assert AdvMoE(preset=name).choices == PRESETS[name]
    mixed = AdvMoE(preset="released", attack_router=False, extra_passes=False, batches="independent").choices
    assert mixed == PRESETS["released"]._replace(attack_router=False, extra_passes=False, batches="independent")


@pytest.mark.parametrize("preset", NAMES)
def test_the_order_and_the_streams_of_a_step(preset: Preset) -> None:
    seen: list[Tensor] = []

    class Spy(PGD):
        def perturb(self, target: Target, rng: SampleRng) -> Found:
            seen.append(target.x)
            return super().perturb(target, rng)

    chosen = AdvMoE(attack=Spy(steps=1, objective="kl"), preset=preset).within(tiny.THREAT)
    data, order = streams(), list(updates(chosen, layered()))
    assert order == (["experts", "router"] if preset == "released" else ["router", "experts"])
    read = ["train", "train"] if preset == "released" else ["router", "train"]
    assert all(torch.equal(x, data[stream].x) for x, stream in zip(seen, read, strict=True))


def test_the_two_streams_are_independent() -> None:
    # T3: other images in each step, all of them in both
    loaders = [Loader(tiny.digits().train, batch_size=32, seed=1, stream=stream) for stream in AdvMoE().streams]
    for step in range(3):
        first, second = (loader.batch(step).ids for loader in loaders)
        assert len(first) == len(second) == 32 and len(set(first.tolist()) & set(second.tolist())) < 24


def test_the_same_images_are_loaded_once() -> None:
    assert AdvMoE().streams == ("train", "router")
    assert AdvMoE(preset="released").streams == AdvMoE(batches="same").streams == ("train",)


def test_the_second_update_attacks_the_model_that_the_first_has_moved() -> None:
    found: list[Tensor] = []
    for move in (False, True):
        model = layered().train()
        steps = method(order="experts_first", steps=3).updates(model, streams(), RNG)
        update = next(steps)
        assert update.player == "experts"
        with torch.no_grad():
            for parameter in part(model, "router").parameters():
                parameter.add_(0.3 * move * torch.randn_like(parameter))
        found.append(next(steps).loss().value)
    assert found[0] != found[1]


def test_training_mode_scores_attack_another_target() -> None:
    # T4: with the clean scores of training mode the divergence is not zero at x' = x
    gains: dict[str, Tensor] = {}

    class Spy(PGD):
        def perturb(self, target: Target, rng: SampleRng) -> Found:
            assert target.clean is not None and not target.clean.logits.requires_grad
            assert all(not leaf.scores.requires_grad for leaf in leaves(target.clean.route))  # type: ignore[arg-type]
            gains[target.objective] = target.look(target.x).gain
            return super().perturb(target, rng)

    def gain(**settings: Any) -> Tensor:
        attack = Spy(steps=1, objective="kl")
        updates(AdvMoE(attack=attack, **settings).within(tiny.THREAT), layered())
        return gains["kl_route"]

    assert gain().abs().max() < 1e-5
    assert gain(clean_scores="training").mean() > 1e-3
    assert gain(preset="released").mean() > 1e-3


def test_the_attack_leaves_no_trace() -> None:
    # T15, T22: no graph, no gradients of weights, no mode, no statistics
    model = layered().train()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = bits(model)
    updates(method(steps=3), model)
    assert same(before, model) and all(module.training for module in model.modules())
    assert all(bool((parameter.grad == 1).all()) for parameter in model.parameters() if parameter.grad is not None)


def test_a_sample_is_attacked_alike_in_both_updates_but_not_from_the_same_start() -> None:
    starts: list[Tensor] = []

    class Spy(PGD):
        def perturb(self, target: Target, rng: SampleRng) -> Found:
            starts.append(rng.normal("start.gaussian", target.x.shape[1:]))
            return super().perturb(target, rng)

    updates(AdvMoE(attack=Spy(steps=1, objective="kl"), preset="released").within(tiny.THREAT), layered())
    assert not torch.equal(*starts)


# -- in the loop -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", NAMES)
def test_a_run_logs_both_players(tmp_path: Path, preset: Preset) -> None:
    tiny.run_training(tmp_path, layered(), method(preset=preset))
    epoch = tiny.metrics(tmp_path)[0]
    experts = {"experts.loss", "experts.kl", "experts.accuracy", "experts.adversarial_accuracy", "experts.load"}
    router = {"loss", "kl", "route_accuracy", "adversarial_route_accuracy", "route_flips", "score_gap", "load"}
    assert experts | {f"router.{name}" for name in router} <= set(epoch)
    assert ("router.accuracy" in epoch) is (preset == "paper")


@pytest.mark.parametrize("routers", ["shared", "block"])
def test_a_killed_run_ends_with_the_same_bytes(tmp_path: Path, routers: str) -> None:
    tiny.run_training(tmp_path / "whole", layered(routers), method())
    with pytest.raises(tiny.Stop):
        tiny.run_training(tmp_path / "cut", layered(routers), method(), reporter=tiny.StopAt(4), checkpoint_seconds=0.0)
    tiny.run_training(tmp_path / "cut", layered(routers), method())
    assert tiny.result(tmp_path / "cut") == tiny.result(tmp_path / "whole")


def test_both_players_have_the_optimizers_settings() -> None:
    # T9: nothing of the router's is silently the experts'
    optimizers = build_optimizers(SGD(lr=0.3, momentum=0.7, weight_decay=0.2, nesterov=True), layered().players())
    assert set(optimizers) == {"experts", "router"}
    for optimizer in optimizers.values():
        (group,) = optimizer.param_groups
        assert [group[key] for key in ("lr", "momentum", "weight_decay", "nesterov")] == [0.3, 0.7, 0.2, True]


def test_a_router_whose_scores_overflow_stops_the_run(tmp_path: Path) -> None:
    model = layered()
    with torch.no_grad():
        part(model, "router")[-1].weight.fill_(math.nan)  # type: ignore[index]
    with pytest.raises(DivergedError, match="training diverged at step 0"):
        tiny.run_training(tmp_path, model, method())


def test_the_router_survives_a_score_gap_of_500() -> None:
    # T1: the released form has a NaN gradient from a gap of about 104 on
    model = layered()
    with torch.no_grad():
        part(model, "router")[-1].weight.mul_(2000)  # type: ignore[index]
    update = updates(method(), model)["router"]
    loss = update.loss()
    loss.value.backward()
    assert loss.logs["score_gap"] > 500 and loss.value.isfinite()
    assert all(
        parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.players()["router"]
    )


def test_trades_is_the_papers_joint_baseline() -> None:
    # AT (MoE): one loss, one batch, router and experts at once
    attack = PGD(steps=2, step_size="5/255", gaussian_start=0.001, objective="kl")
    model = layered().train()
    (update,) = TRADES(attack=attack, balance=0.0).within(tiny.THREAT).updates(model, {"train": batch()}, RNG)
    assert update.player == "all"
    update.loss().value.backward()
    for player, parameters in model.players().items():
        assert all(parameter.grad is not None for parameter in parameters), player
        assert any(bool(parameter.grad.any()) for parameter in parameters if parameter.grad is not None), player


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: tiny.mixture(1), "got a mixture of one expert, which has no router; give it more experts, or use"),
        (lambda: layered(experts=1), "got a mixture of one expert, which has no router"),
        (lambda: tiny.mixture(2, train_router=False), "got a mixture whose router is frozen; set model.router.train"),
        (lambda: layered(train_router=False), "got a mixture whose router is frozen; set model.router.train to true"),
        (lambda: tiny.mixture(2, train_experts=False), "got a mixture whose experts are frozen; set model.train_exp"),
        (lambda: DualModel(tiny.mixture(2), tiny.mixture(2, seed=1), 0.5), "got a DualModel; use another method"),
    ],
)
def test_a_model_without_both_players_is_refused(model: Any, message: str) -> None:
    message = f"advmoe needs a router and experts to move in turn, {message}"
    with pytest.raises(InputError, match=message):
        AdvMoE().check(model(), 10)
    with pytest.raises(InputError, match=message):
        next(method().updates(model(), streams(), RNG))


@pytest.mark.parametrize("model", [lambda: layered(experts=4), lambda: tiny.mixture(4)])
def test_more_experts_than_classes_are_refused_where_labels_name_them(model: Any) -> None:
    with pytest.raises(InputError, match="sends class y to expert y mod 4, so 1 of 4 experts would have no class of 3"):
        AdvMoE().check(model(), 3)
    AdvMoE(preset="paper").check(model(), 3)
    AdvMoE().check(model(), 4)


def test_more_experts_than_classes_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="so 1 of 11 experts would have no class of 10; use at most 10 experts"):
        tiny.run_training(tmp_path, layered(experts=11), method())
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("chosen", [RTER(), JTDMoE()])
def test_methods_of_whole_networks_refuse_routed_layers(chosen: Any) -> None:
    model = layered() if chosen.name == "rt_er" else DualModel(tiny.mixture(2), layered(), 0.5)
    with pytest.raises(
        InputError, match=f"{chosen.name} trains a mixture of whole networks, got a network with routed"
    ):
        chosen.check(model, 10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": -1}, "beta must be at least 0, got -1"),
        ({"router_label_weight": -1}, "router_label_weight must be at least 0, got -1"),
        ({"router_beta": -1}, "router_beta must be at least 0, got -1"),
        ({"balance": -1}, "balance must be at least 0, got -1"),
        ({"attack": PGD()}, "attack.objective must be 'kl', the term that advmoe climbs, got 'cross_entropy'"),
        ({"attack": FGSM(objective="kl")}, "attack must start at random, got fgsm from the clean image"),
        ({"attack": PGD(objective="kl", surface="dense")}, "attack.surface must be 'whole', got 'dense'; leave it out"),
    ],
)
def test_a_bad_value_is_refused(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdvMoE(**settings)


def test_the_defaults_are_the_papers() -> None:
    chosen = AdvMoE()
    attack = chosen.attack
    assert isinstance(attack, PGD)
    assert (attack.steps, attack.step_size, attack.gaussian_start) == (2, "5/255", 0.001)
    assert (chosen.beta, chosen.router_label_weight, chosen.router_beta) == (6.0, 6.0, 6.0)
    assert str(chosen.within(tiny.THREAT).attack.eps) == "3/16"
