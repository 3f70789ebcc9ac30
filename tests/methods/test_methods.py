"""What every method must do on every kind of model, and each one's own arithmetic."""

# B batch, E experts

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toy_networks import LogOdds

import tiny
from phalanx.attacks import FGSM, PGD
from phalanx.attacks.target import Target
from phalanx.attacks.tracker import Found
from phalanx.data import Batch
from phalanx.errors import InputError
from phalanx.experts import TwoHeaded
from phalanx.methods import AT, METHODS, ST, TRADES, Method
from phalanx.methods.base import NO_LOGS, Loss, Stateless, check_weight, classification_loss
from phalanx.rng import Rng, SampleRng
from phalanx.routing import DualModel, MixtureOfExperts, SynergyOfExperts, load_balance
from phalanx.threat import ThreatModel
from phalanx.training.config import SGD
from phalanx.training.players import build_optimizers, moving

RNG = Rng(5)


def _batch(size: int = 16) -> Batch:
    return next(tiny.digits().train.batches(size))


def _loss(method: Method, model: Any, batch: Batch | None = None, rng: Rng = RNG) -> Tensor:
    (update,) = method.updates(model, {"train": batch or _batch()}, rng)
    return update.loss().value


def _step(model: Any, method: Method) -> None:
    """One step as the loop does it: momentum and decay would move whoever is not left out."""
    players = {name: list(parameters) for name, parameters in model.players().items()}
    optimizers = build_optimizers(SGD(lr=0.1), players)
    model.train()
    for update in method.updates(model, {stream: _batch() for stream in method.streams}, RNG):
        names = moving(update.player, players)
        model.zero_grad()
        update.loss().value.backward()
        for name in names:
            optimizers[name].step()


LAYOUTS: dict[str, Callable[[], Any]] = {
    "experts and router": lambda: tiny.mixture(2),
    "frozen router": lambda: tiny.mixture(2, train_router=False),
    "frozen experts": lambda: tiny.mixture(2, train_experts=False),
    "one expert": lambda: tiny.mixture(1),
    "soft gate": lambda: tiny.mixture(3, "all"),
    "two of three": lambda: tiny.mixture(3, 2),
    "dual": lambda: DualModel(tiny.mixture(3, 2), tiny.mixture(2, seed=1, train_router=False), 0.5),
}

# RT-ER needs one gate that leaves an expert idle, JTDMoE two halves, SOE sub-models with two heads (see test_soe)
REFUSED = {("rt_er", "one expert"), ("rt_er", "soft gate"), ("rt_er", "dual")}
REFUSED |= {("jtdmoe", layout) for layout in LAYOUTS if layout != "dual"}
REFUSED |= {("soe", layout) for layout in LAYOUTS}
# adaptive smoothing has a model of its own (see test_adaptive_smoothing)
REFUSED |= {("adaptive_smoothing", layout) for layout in LAYOUTS}
# closed_ranks wants a robust router (see test_closed_ranks)
REFUSED |= {("closed_ranks", layout) for layout in LAYOUTS}
# AdvMoE moves a router and experts in turn
REFUSED |= {("advmoe", layout) for layout in ("frozen router", "frozen experts", "one expert", "dual")}


def _mixtures(model: nn.Module) -> list[MixtureOfExperts]:
    return [module for module in model.modules() if isinstance(module, MixtureOfExperts)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", METHODS)
def test_every_player_moves_and_nobody_else(name: str, layout: str) -> None:
    model = LAYOUTS[layout]()
    # nobody loses its images to a router that moves first
    own: dict[str, Any] = {"order": "experts_first"} if name == "advmoe" else {}
    method = METHODS[name](**own).within(tiny.THREAT)
    assert method.name == name
    everyone = {id(parameter) for parameters in model.players().values() for parameter in parameters}
    for mixture in _mixtures(model):
        if mixture.router is None:
            continue
        assert (id(mixture.router[2].weight) in everyone) is mixture.train_router
        # centred scores: every expert gets images, so every expert gets a gradient
        with torch.no_grad():
            mixture.router[2].bias -= mixture.router(_batch().x).mean(0)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    if (name, layout) in REFUSED:
        for attempt in (lambda: method.check(model, 10), lambda: _step(model, method)):
            with pytest.raises(InputError, match=f"{name} (needs|trains) an? "):
                attempt()
        everyone = set()
    else:
        method.check(model, 10)
        _step(model, method)
    for key, parameter in model.named_parameters():
        # a player's every tensor moves; what belongs to no player keeps its bits
        assert torch.equal(parameter, before[key]) is (id(parameter) not in everyone), key
    for key, buffer in model.named_buffers():
        assert torch.equal(buffer, before[key]), key


class _Modes(nn.Module):
    """Remembers in which mode it was called, and whether images wanted a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[bool, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append((self.training, x.requires_grad))
        return x


def _watched(name: str, modes: list[_Modes]) -> nn.Module:
    """A model that the method trains, each of its three parts behind one of `modes`."""
    if name == "soe":
        networks = [nn.Sequential(mode, *tiny.mixture(1).experts[0]) for mode in modes]
        return SynergyOfExperts([TwoHeaded(network) for network in networks])
    model = tiny.mixture()
    model.router = nn.Sequential(modes[0], model.router)
    pairs = zip(modes[1:], model.experts, strict=True)
    model.experts = nn.ModuleList(nn.Sequential(mode, expert) for mode, expert in pairs)
    return DualModel(tiny.mixture(seed=1), model, 0.5) if name == "jtdmoe" else model


# adaptive smoothing's halves stay in evaluation mode; closed_ranks has a test of its own
@pytest.mark.parametrize("name", sorted({*METHODS} - {"adaptive_smoothing", "closed_ranks"}))
def test_attacks_see_evaluation_mode_losses_training_mode(name: str) -> None:
    modes = [_Modes() for _ in range(3)]
    _step(_watched(name, modes), METHODS[name]().within(tiny.THREAT))
    assert all(mode.training for mode in modes)
    for mode in modes:
        # free adversarial training is the one whose training pass gives the images' gradient
        assert {training for training, wanted in mode.seen if wanted} <= {name == "free_at"}
    # AdvMoE's router has moved by then, and is only evaluated while the experts do
    assert modes[0].seen[-1] == (name != "advmoe", name == "free_at")
    # PGD with 10 steps by default: so many gradients of the images
    assert name != "at" or sum(wanted for _, wanted in modes[0].seen) == 10


@pytest.mark.parametrize("gate", [1, "all"])
def test_batchnorm_sees_the_adversarial_batch_once_and_no_iterate(gate: int | str) -> None:
    method = tiny.at(steps=5)
    model, reference = (tiny.mixture(2, gate, expert="small_cnn").train() for _ in range(2))
    batch = _batch(32)
    _loss(method, model, batch)
    x_adv = method.attack(reference, batch.x, batch.y, rng=RNG.fold("attack").samples(batch.ids))
    reference.routed(x_adv)
    buffers = dict(reference.named_buffers())
    counted = 0
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
        counted += "num_batches_tracked" in name and int(buffer) == 1
    assert counted >= 3


@dataclass(frozen=True, kw_only=True)
class _Shift(PGD):
    """Finds x + eps, and records what it was asked."""

    asked: list[tuple[int, int]] = field(default_factory=list)

    def perturb(self, target: Target, rng: SampleRng) -> Found:
        self.asked.append((len(target), rng.seed))
        found = super().perturb(target, rng)
        return found._replace(x_adv=target.x + self.threat.epsilon, zero_gradient=torch.arange(len(target)) < 2)


@pytest.mark.parametrize(("share", "attacked"), [(1.0, 4), (0.5, 2), (0.75, 3), (0.01, 1)])
def test_adversarial_share_by_hand(share: float, attacked: int) -> None:
    # two pixels of 0.5 sum to 1; moved by 1/4 each they sum to 1.5
    batch = Batch(torch.full((4, 1, 1, 2), 0.5, dtype=torch.float64), torch.tensor([0, 1, 0, 1]), torch.arange(4))
    attack = _Shift(eps=0.25, steps=1)
    model = MixtureOfExperts(None, [LogOdds(0.25)])
    (update,) = AT(attack=attack, adversarial_share=share).updates(model, {"train": batch}, RNG)
    scores = [0.25 * (1.5 if i < attacked else 1.0) for i in range(4)]
    logits = torch.tensor([[score, 0.0] for score in scores], dtype=torch.float64)
    loss = update.loss()
    assert torch.allclose(loss.value, F.cross_entropy(logits, batch.y))
    # the first two are said to have had no gradient
    assert update.logs["zero_gradient"].item() == pytest.approx(min(2, attacked) / attacked)
    # every score is positive: class 0 is answered
    assert loss.logs["accuracy"].item() == 0.5
    assert loss.logs["adversarial_accuracy"].item() == pytest.approx(((attacked + 1) // 2) / attacked)
    assert attack.asked == [(attacked, RNG.fold("attack").seed)]


def test_the_attack_of_a_sample_does_not_depend_on_its_neighbours() -> None:
    found: list[Tensor] = []

    class Spy(MixtureOfExperts):
        def routed(self, x: Tensor, route: Any = None) -> Any:
            if self.training:
                found.append(x.detach())
            return super().routed(x, route)

    whole = tiny.mixture()
    model = Spy(whole.router, whole.experts).train()
    batch = _batch(16)
    _loss(tiny.at(3), model, batch)
    _loss(tiny.at(3), model, Batch(*(part[4:9] for part in batch)))
    assert torch.allclose(found[0][4:9], found[1], atol=1e-6)
    assert not torch.allclose(found[0], batch.x)
    assert float((found[0] - batch.x).abs().max()) <= 3 / 16 + 1e-6


def test_at_with_fgsm_of_one_network_is_fgsm_training() -> None:
    model = tiny.mixture(1).double().train()
    x, y, ids = _batch(8)
    batch = Batch(x.double(), y, ids)
    method = AT(attack=FGSM()).within(tiny.THREAT)
    x = batch.x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), x)
    x_adv = (batch.x + 3 / 16 * gradient.sign()).clamp(0, 1)
    assert torch.allclose(_loss(method, model, batch), F.cross_entropy(model(x_adv), y))


def test_at_trains_on_what_hurts() -> None:
    model = tiny.mixture().train()
    clean = _loss(ST(), model)
    weak, strong = (_loss(AT(attack=PGD(eps=eps, steps=5)), model) for eps in ("1/64", "1/4"))
    assert clean < weak < strong


def test_within_fills_what_the_recipe_left_open() -> None:
    threat = ThreatModel("L2", "1/2")
    assert ST(balance=0.3).within(threat) == ST(balance=0.3)
    filled = AT(attack=PGD(steps=3)).within(threat).attack
    assert (filled.norm, str(filled.eps), filled.steps) == ("L2", "1/2", 3)
    own = AT(attack=PGD(eps="8/255", norm="Linf")).within(threat).attack
    assert (own.norm, own.eps) == ("Linf", "8/255")
    half = AT(attack=PGD(norm="L1")).within(threat).attack
    assert (half.norm, str(half.eps)) == ("L1", "1/2")


def test_an_attack_without_eps_says_what_to_give() -> None:
    with pytest.raises(ValueError, match=r"eps must be given, for example PGD\(eps='8/255'\)"):
        _loss(AT(), tiny.mixture())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: AT(adversarial_share=1.7), r"adversarial_share must be in \(0, 1\], got 1.7; for 0 use method st"),
        (lambda: AT(adversarial_share=0), r"adversarial_share must be in \(0, 1\], got 0; for 0 use method st"),
        (lambda: AT(balance=-0.1), r"balance must be at least 0, got -0.1"),
        (lambda: ST(balance=-1), r"balance must be at least 0, got -1"),
        (lambda: check_weight("beta", -2), r"beta must be at least 0, got -2"),
        (lambda: TRADES(beta=math.nan), "beta must be at least 0, got nan"),
        (lambda: ST(noise=math.inf), "noise must be at least 0, got inf"),
    ],
)
def test_a_bad_value_is_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_the_loss_is_cross_entropy_plus_weighted_balance() -> None:
    model, batch = tiny.mixture(3), _batch()
    logits, route = model.routed(batch.x)
    for weight in (0.0, 0.7):
        value, logs = classification_loss(model, batch.x, batch.y, weight)
        assert torch.allclose(value, F.cross_entropy(logits, batch.y) + weight * load_balance(route))
        assert torch.allclose(logs["accuracy"], (logits.argmax(1) == batch.y).double().mean().float())
        expected = torch.stack([(route.experts == expert).float().mean() for expert in range(3)])
        assert torch.allclose(logs["load"], expected)
        assert not any(log.requires_grad for log in logs.values())


def test_a_dual_model_logs_the_load_of_each_half() -> None:
    batch = _batch()
    model = DualModel(tiny.mixture(3), tiny.mixture(2, seed=1), 0.5)
    value, logs = classification_loss(model, batch.x, batch.y, 0.7)
    logits, route = model.routed(batch.x)
    assert torch.allclose(value, F.cross_entropy(logits, batch.y) + 0.7 * load_balance(route))
    assert set(logs) == {"accuracy", "dual.standard.load", "dual.robust.load"}
    for half, experts in (("standard", 3), ("robust", 2)):
        own = classification_loss(getattr(model, half), batch.x, batch.y, 0.0).logs["load"]
        assert len(own) == experts
        assert torch.equal(logs[f"dual.{half}.load"], own)
    # a single network has no load
    alone = DualModel(tiny.mixture(1), tiny.mixture(2, seed=1), 0.5)
    assert set(classification_loss(alone, batch.x, batch.y, 0.7).logs) == {"accuracy", "dual.robust.load"}


def test_without_a_choice_there_is_no_balance() -> None:
    batch = _batch()
    model = tiny.mixture(1)
    value, logs = classification_loss(model, batch.x, batch.y, 100.0)
    assert torch.allclose(value, F.cross_entropy(model(batch.x), batch.y))
    assert set(logs) == {"accuracy"}


@pytest.mark.parametrize("name", METHODS)
def test_methods_are_frozen_and_a_stateless_one_refuses_state(name: str) -> None:
    method = METHODS[name]()
    with pytest.raises(AttributeError):
        method.name = "other"  # type: ignore[misc]
    if not isinstance(method, Stateless):
        return
    assert method.state_dict() == {}
    method.load_state_dict({})
    with pytest.raises(ValueError, match=rf"{type(method).__name__} keeps no state, got \['old'\]"):
        method.load_state_dict({"old": 1})


def test_a_loss_without_by_products_shares_nothing_mutable() -> None:
    assert Loss(torch.zeros(())).logs is NO_LOGS
    with pytest.raises(TypeError):
        NO_LOGS["x"] = 1  # type: ignore[index]
