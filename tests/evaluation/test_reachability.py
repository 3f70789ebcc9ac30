"""What an evaluation says of proved routes."""

from __future__ import annotations

from dataclasses import replace

import torch

import tiny
from phalanx.evaluation.reachability import reachability
from phalanx.routing import MixtureOfExperts, RobustRouter
from phalanx.runs import Verdict
from phalanx.threat import ThreatModel

THREAT = tiny.THREAT


def _model() -> MixtureOfExperts:
    """Behind a split of the digits by their brightness."""
    router = RobustRouter((1, 8, 8), 2, layout="tree", sides=[[[0], [1]]], norm="Linf", eps="3/16")
    router.linear.weight.fill_(1 / 64)
    router.linear.bias.fill_(0.195)
    return MixtureOfExperts(router, list(tiny.mixture(2).experts), train_router=False).eval()


def _verdict(sample: int, *, flipped: bool, attack: str = "pgd-2") -> Verdict:
    return Verdict(sample, 0, attack, "whole", 0, "held", 0, 0, flipped, None, 0.1, 1, -1)


def test_it_counts_what_the_router_proves() -> None:
    model, images = _model(), tiny.digits().test
    found = model.router.reachable(images.images(slice(None)), ThreatModel("Linf", "1/64"))  # type: ignore[union-attr, operator]
    said = reachability(model, images, ThreatModel("Linf", "1/64"))
    assert said is not None and said.n == len(images) == 40
    assert (said.unflippable, said.reachable) == (int((found.sum(1) == 1).sum()), int(found.sum()))
    assert 0 < said.unflippable < 40 and said.contradicted == 0


def test_a_flip_of_a_proved_route_is_counted() -> None:
    model, images, threat = _model(), tiny.digits().test, ThreatModel("Linf", "1/64")
    reach = model.router.reachable(images.images(slice(None)), threat).sum(1)  # type: ignore[union-attr, operator]
    safe, open_ = (int(images.ids[int((reach == count).nonzero()[0])]) for count in (1, 2))
    rows = [
        _verdict(safe, flipped=True),
        _verdict(safe, flipped=True, attack="fgsm:1/2"),
        _verdict(open_, flipped=True),
    ]
    said = reachability(model, images, threat, rows, aside=("fgsm:1/2",))
    assert said is not None and said.contradicted == 1
    honest = [replace(rows[0], flipped=False), *rows[1:]]
    said = reachability(model, images, threat, honest, aside=("fgsm:1/2",))
    assert said is not None and said.contradicted == 0


def test_where_nothing_is_proved_nothing_is_said() -> None:
    assert reachability(tiny.mixture(1), tiny.digits().test, THREAT) is None
    assert reachability(tiny.mixture(2, "all"), tiny.digits().test, THREAT) is None
    assert reachability(torch.nn.Flatten(), tiny.digits().test, THREAT) is None
