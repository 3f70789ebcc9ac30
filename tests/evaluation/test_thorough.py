"""The protocols that depend on what a model has, on planted weaknesses and on small trained mixtures."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from known_answers import FIVE, THREAT, Bright
from torch import Tensor, nn

import tiny
from phalanx.attacks.autoattack import VERSIONS
from phalanx.data import ImageSet
from phalanx.errors import InputError
from phalanx.evaluation import Evaluation, Limits, Member, Protocol, Shard, evaluate, protocol
from phalanx.evaluation.model_parts import parts_of, protocol_for
from phalanx.evaluation.suites import Parts
from phalanx.routing import DualModel, MixtureOfExperts, Routed, RouteTree, pin
from phalanx.runs.summary import AUTOATTACK
from phalanx.threat import ThreatModel

SMALL = ThreatModel("Linf", "1/32")


def names(name: str, norm: str = "Linf", **parts: bool) -> list[str]:
    return [member.name for member in protocol(name, ThreatModel(norm, "1/2"), **parts).members]


def shortened(found: Protocol, threat: ThreatModel) -> Protocol:
    """The same attacks in the same cascade, with small budgets."""
    few = {"steps": 4, "queries": 30, "restarts": 1, "targets": 2, "classes": 2}

    def small(member: Member) -> Member:
        own = {field.name: getattr(member.attack, field.name) for field in fields(member.attack)}
        less = {name: min(own[name], most) for name, most in few.items() if name in own}
        return replace(member, attack=replace(member.attack, **less))

    return Protocol(found.name, tuple(map(small, found.members)))


# -- what they hold ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
@pytest.mark.parametrize(
    "parts", [{"gates": False}, {"gates": True}, {"gates": True, "halves": True}, {"gates": False, "halves": True}]
)
def test_thorough_is_standard_and_then_one_cascade(norm: str, parts: dict[str, bool]) -> None:
    threat = ThreatModel(norm, "1/2")
    standard, found = protocol("standard", threat).members, protocol("thorough", threat, **parts).members
    # the very same members: AutoAttack's number can be read, and its ledger continued
    assert found[: len(standard)] == standard and len(found) > len(standard)
    assert all(member.after == tuple(other.name for other in found[:place]) for place, member in enumerate(found))
    assert found == protocol("standard,thorough", threat, **parts).members


def test_thorough_aims_at_what_there_is() -> None:
    single, routed = names("thorough", gates=False), names("thorough")
    dual = names("thorough", halves=True)
    assert not any("@" in name or "steer" in name or "joint" in name for name in single) and "pgd-50x10" in single
    for surface in ("pinned", "straight-through", "dense", "dense-t0.1", "experts", "router"):
        assert {f"apgd-100@{surface}", f"apgd-margin-50@{surface}"} <= set(routed)
    assert {"steer-50", "steer-50x9", "steer-apgd-50", "steer-apgd-50x9", "experts-apgd-100"} <= set(routed)
    for surface in ("standard", "robust", "geometric", "softened-t3", "softened-t10"):
        assert {f"apgd-100@{surface}", f"apgd-margin-50@{surface}"} <= set(dual) - set(routed)
    assert {"joint-50x9", "joint-apgd-50x9"} <= set(dual) - set(routed)
    assert set(routed) - set(dual) == {"steer-apgd-50x9"} and "steer-apgd-50x3" in dual
    halves_alone = names("thorough", gates=False, halves=True)
    assert set(halves_alone) < set(dual) and not any("steer" in name for name in halves_alone)
    assert set(names("thorough", halves=True, mixing=True)) - set(dual) == {"mislead-50"}
    assert {"apgd-100-eot:20", "apgd-100-eot:20@dense"} <= set(names("thorough", random=True)) - set(routed)


def test_a_suite_is_a_name_among_others() -> None:
    with pytest.raises(InputError, match="protocol names 'quick' twice"):
        protocol("quick,quick", THREAT)
    assert names("quick,fgsm")[-1] == "fgsm" and len(set(names("quick,thorough"))) == len(names("quick,thorough"))


class Noisy(nn.Module):
    """Other logits with every pass."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        logits = self.inner(x)
        return logits + torch.randn_like(logits)


def test_parts_are_found_on_the_model() -> None:
    x = FIVE.images(slice(0, 3))
    mixture, other = tiny.mixture(3), tiny.mixture(2, seed=1)
    digits = tiny.digits().test.images(slice(0, 3))
    assert parts_of(Bright(), x) == Parts(gates=False)
    assert parts_of(lambda images: Bright()(images), x) == Parts(gates=False)
    assert parts_of(MixtureOfExperts(None, [Bright()]), x) == Parts(gates=False)
    assert parts_of(mixture, digits) == Parts()
    assert parts_of(DualModel(mixture, other, 0.7), digits) == Parts(halves=True)
    assert parts_of(Noisy(mixture), digits).random
    assert protocol_for("thorough", THREAT, Bright(), x).members == protocol("thorough", THREAT, gates=False).members
    # without images nothing is known of the gates, and everything is tried
    assert protocol_for("thorough", THREAT, Bright()).members == protocol("thorough", THREAT).members


def test_the_names_that_reports_read_autoattack_from() -> None:
    assert dict(AUTOATTACK) == dict(VERSIONS["standard"])


# -- what they find ------------------------------------------------------------------------------------------------


class Reads(nn.Module):
    """Logits or scores (x - .5) @ weight.T."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) - 0.5) @ self.weight.T


class ArgmaxRouted(MixtureOfExperts):
    """A hard route that no gradient of the answer goes through, as where a router ends in an argmax."""

    def routed(self, x: Tensor, route: RouteTree | None = None) -> Routed:
        return super().routed(x, pin(self.gate(x)) if route is None else route)


FILTER = torch.tensor([1.0, -1.0]).repeat(96)
FILTER[0] = 0.0


def planted() -> ArgmaxRouted:
    """Pixel 0 says the class; expert 0 is always right by far, expert 1 always wrong by far. All other pixels, through
    a filter of ones and minus ones, say the route."""
    right = torch.zeros(4, 192)
    right[:, 0] = torch.tensor([-20.0, 20.0, 1.0, -1.0])
    return ArgmaxRouted(Reads(torch.stack([FILTER, -FILTER])), [Reads(right), Reads(-right)], 1).eval()


def planted_images() -> ImageSet:
    """24 images whose route is 5 of the radius's 8 levels away, in every pixel at once: no random step gets there."""
    bright = torch.arange(24) % 2 == 0
    pixels = (127.5 + 0.5 + 5 * FILTER).expand(24, 192).clone()
    pixels[:, 0] = torch.where(bright, 230.0, 26.0)
    shaped = pixels.reshape(24, 3, 8, 8).to(torch.uint8).numpy()
    return ImageSet(shaped, bright.long().numpy(), np.arange(24), 255)


def test_a_planted_route_is_missed_by_standard_and_found_by_thorough_and_quick() -> None:
    threat, images, model = ThreatModel("Linf", "8/255"), planted_images(), planted()
    # the whole of AutoAttack, but for Square's last 4,000 queries
    standard = protocol("apgd-100,apgd-t-100x9,fab-t-100x9,square-1000", threat)
    found = evaluate(model, images, standard, threat)
    assert found.clean_acc == found.robust_acc == 1.0
    for name in ("thorough", "quick"):
        tried = shortened(protocol_for(name, threat, model, images.images(slice(0, 8))), threat)
        assert evaluate(model, images, tried, threat).robust_acc == 0.0, name


def _held(found: Evaluation, attack: str) -> set[int]:
    return {row.sample for row in found.rows if row.attack == attack and row.verdict == "held"}


def test_never_above_any_component(trained: MixtureOfExperts) -> None:
    """Per sample: who stands under thorough stands under each of its members on everything, and under standard."""
    test = tiny.digits().test.first(24)
    whole = shortened(protocol("thorough", SMALL), SMALL)
    found = evaluate(trained, test, whole, SMALL)
    last = _held(found, whole.members[-1].name)
    standard = evaluate(trained, test, shortened(protocol("standard", SMALL), SMALL), SMALL)
    assert last <= _held(standard, "square-5000") and found.robust_acc <= standard.robust_acc
    alone = Protocol("alone", tuple(Member(member.name, member.attack) for member in whole.members))
    each = evaluate(trained, test, alone, SMALL)
    for member in whole.members:
        assert last <= _held(each, member.name), member.name
    assert found.robust_acc == each.robust_acc == len(last) / len(test)
    assert 0 < found.robust_acc < found.clean_acc


def test_verdicts_do_not_depend_on_batches_or_shards(trained: MixtureOfExperts, tmp_path: Path) -> None:
    test = tiny.digits().test.first(12)
    model = DualModel(trained, tiny.mixture(2, seed=5).eval(), 0.8).eval()
    tried = shortened(protocol("thorough", SMALL, halves=True), SMALL)
    whole = evaluate(model, test, tried, SMALL, batch_size=12)
    path = tmp_path / "ledger.sqlite"
    for number in (1, 2):
        limits = Limits(shard=Shard(number, 2))
        found = evaluate(model, test, tried, SMALL, batch_size=5, ledger=path, limits=limits)
    assert [(row.key, row.verdict) for row in found.rows] == [(row.key, row.verdict) for row in whole.rows]
