"""Experts and routers made to be certified: what a recipe can ask for, and what no attack can take back."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch

from certified_attacks import fallen_inside
from phalanx.certification import certify
from phalanx.config import LayersConfig, MixtureConfig, RouterConfig
from phalanx.data import ImageSet, load_data
from phalanx.errors import InputError
from phalanx.experts import build_expert
from phalanx.methods import METHODS, ST
from phalanx.methods.base import Method
from phalanx.models import build, build_mixture
from phalanx.nn import spec_of
from phalanx.rng import Rng
from phalanx.routing import LipschitzRouter, MixtureOfExperts
from phalanx.threat import Norm, ThreatModel
from phalanx.training import CertifiedTraining
from phalanx.training.certified import with_certified_loss

_SHAPE: dict[str, Any] = {"num_classes": 10, "image_size": 8, "channels": 1}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lipschitz_mlp", {"hidden": [8, 7]}, "widths must be even, MaxMin sorts features in pairs, got 7"),
        ("lipschitz_cnn", {"width": 5}, "widths must be even, MaxMin sorts features in pairs, got 5"),
        ("lipschitz_cnn", {"hidden": 3}, "widths must be even, MaxMin sorts features in pairs, got 3"),
        ("lipschitz_mlp", {"norm": "L1"}, "norm must be one of L2, Linf, got 'L1'"),
        ("lipschitz_cnn", {"logit_scale": 0}, "logit_scale must be positive, got 0"),
        ("lipschitz_cnn", {"image_size": 3}, "image_size must be at least 4, got 3; it is halved twice"),
    ],
)
def test_options_that_do_not_fit(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_expert(name, **{**_SHAPE, **options})


def test_a_router_of_a_recipe_is_lipschitz_in_the_threats_norm() -> None:
    data = load_data("digits", train_limit=20, val_limit=10, test_limit=10)

    def router(config: RouterConfig, threat: ThreatModel) -> LipschitzRouter:
        model = build_mixture(MixtureConfig(expert="mlp", experts=3, router=config), data, 0, threat)
        assert isinstance(model.router, LipschitzRouter)
        return model.router

    chosen = RouterConfig(name="lipschitz", hidden=(6, 4))
    for norm in ("L2", "Linf"):
        made = router(chosen, ThreatModel(norm, 0.1))  # type: ignore[arg-type]
        assert [layer.norm for layer in made if hasattr(layer, "norm")] == [norm] * 3
    assert router(replace(chosen, norm="L2"), ThreatModel("Linf", 0.1))[2].norm == "L2"
    with pytest.raises(InputError, match=r"model\.router\.norm: .* the threat is L1; set norm"):
        router(chosen, ThreatModel("L1", 0.1))
    spec = spec_of(made)
    assert spec is not None
    again = build(spec.to_json())
    again.load_state_dict(made.state_dict())
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(again(x), made(x)) and made(x).shape == (2, 3)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: RouterConfig(name="lipschitz", norm="L1"), "norm of a lipschitz router must be L2 or Linf, got L1"),
        (lambda: RouterConfig(name="lipschitz", hidden=(4, 5)), r"must hold even widths, got \(4, 5\)"),
        (lambda: RouterConfig(name="lipschitz", eps=0.1), "eps is of a robust router, got a lipschitz one"),
        (lambda: RouterConfig(norm="L2"), "norm is of a robust router, got a linear one"),
        (
            lambda: LayersConfig(router=RouterConfig(name="lipschitz")),
            "router of a layer-level mixture cannot be lipschitz",
        ),
        (lambda: LipschitzRouter((1, 8, 8), 2, hidden=(3,)), "hidden must hold even widths, .* got 3"),
    ],
)
def test_router_settings_that_mean_nothing(made: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made()


# -- certificates --------------------------------------------------------------------------------------------------


@lru_cache
def _test_images() -> ImageSet:
    return load_data("digits", train_limit=600, test_limit=50).test


@lru_cache
def _trained(expert: str, norm: Norm, gate: int | str) -> MixtureOfExperts:
    """A mixture of two, trained for a moment on clean images and on its certified margin."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden": [24]} if expert == "lipschitz_mlp" else {"width": 4, "hidden": 8}
    options = {**_SHAPE, **sizes, "norm": norm, "logit_scale": {"L2": 4.0, "Linf": 30.0}[norm]}
    router = LipschitzRouter((1, 8, 8), 2, hidden=(8,), norm=norm)
    model = MixtureOfExperts(router, [build_expert(expert, **options) for _ in range(2)], gate, temperature=3.0)
    settings = CertifiedTraining(bound="margin", weight=0.5, norm=norm, eps={"L2": 0.3, "Linf": 0.03}[norm])
    batch = next(iter(load_data("digits", train_limit=600, test_limit=50).train.batches(600)))
    optimizer, method = torch.optim.Adam(model.parameters(), 0.02), ST()
    for step in range(30 if expert == "lipschitz_mlp" else 25):
        for update in method.updates(model, {"train": batch}, Rng(step)):
            optimizer.zero_grad()
            with_certified_loss(update, model, batch, settings, 1.0).loss().value.backward()
            optimizer.step()
    return model.eval()


@pytest.mark.parametrize(
    ("expert", "norm", "gate"),
    [
        ("lipschitz_mlp", "L2", 1),
        ("lipschitz_mlp", "L2", "all"),
        ("lipschitz_mlp", "Linf", 1),
        ("lipschitz_mlp", "Linf", "all"),
        ("lipschitz_cnn", "L2", 1),
    ],
)
def test_no_attack_breaks_what_global_constants_certify(expert: str, norm: Norm, gate: int | str) -> None:
    model = _trained(expert, norm, gate)
    found = certify(model, _test_images(), norm=norm, method="lipschitz")
    assert found.counts["certified"] >= 30 and found.vacuous is None
    # far from vacuous, in milliseconds
    assert float(found.radius.mean()) > {"L2": 0.05, "Linf": 0.01}[norm]
    assert fallen_inside(model, _test_images(), found, 0.999999, alike=8) == 0
    # neither the attack nor the bound is a straw man
    assert fallen_inside(model, _test_images(), found, 3.0, alike=8) >= 10


def test_better_bounds_certify_more_and_hold_as_well() -> None:
    model = _trained("lipschitz_mlp", "L2", "all")
    plain, better = (certify(model, _test_images(), norm="L2", method=method) for method in ("lipschitz", "auto"))
    assert bool((better.radius >= plain.radius * 0.98).all())
    assert float(better.radius.mean()) > float(plain.radius.mean())
    assert fallen_inside(model, _test_images(), better, 0.999999, alike=8) == 0


def test_the_scale_of_logits_changes_no_certificate_of_a_single_network() -> None:
    small = _trained("lipschitz_mlp", "L2", 1).experts[0]
    large = build_expert("lipschitz_mlp", **_SHAPE, hidden=[24], logit_scale=16.0).eval()
    large.load_state_dict(small.state_dict())
    with torch.no_grad():
        # biases are no part of what is scaled
        large[-1].bias *= 16 / 4
    images = _test_images().first(20)
    first, second = (certify(network, images, norm="L2", method="lipschitz") for network in (small, large))
    torch.testing.assert_close(first.radius, second.radius, rtol=1e-3, atol=1e-4)
    assert bool((first.radius > 0).any())
    assert second.constants["the network"] == pytest.approx(4 * first.constants["the network"])


def test_any_method_trains_them() -> None:
    batch = next(iter(load_data("digits", train_limit=600, test_limit=50).train.batches(32)))
    for name in ("at", "rt_er", "trades"):
        model = _small()
        method: Method = METHODS[name]().within(ThreatModel("L2", 0.2))
        before = [parameter.detach().clone() for parameter in model.parameters()]
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for update in method.updates(model, {"train": batch}, Rng(0)):
            optimizer.zero_grad()
            update.loss().value.backward()
            optimizer.step()
        assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def _small() -> MixtureOfExperts:
    """Two tiny experts behind a Lipschitz router."""
    torch.manual_seed(0)
    experts = [build_expert("lipschitz_mlp", **_SHAPE, hidden=[8]) for _ in range(2)]
    return MixtureOfExperts(LipschitzRouter((1, 8, 8), 2, hidden=(6,)), experts)
