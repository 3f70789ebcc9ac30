"""Certificates of whole models on digits: nothing breaks them, and what has none is refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import phalanx as px
from certified_attacks import fallen_inside
from phalanx.certification import METHODS, certify, lower_margins
from phalanx.certification.models import Reader, read_model
from phalanx.certification.networks import Answers, Network
from phalanx.data import ImageSet, load_data
from phalanx.errors import InputError
from phalanx.experts import build_expert
from phalanx.experts.resnet import BasicBlock
from phalanx.nn import PlainLayers
from phalanx.nn.routed import Width
from phalanx.routing import (
    DualModel,
    Ensemble,
    MixtureOfExperts,
    MLPRouter,
    RobustRouter,
    SynergyOfExperts,
    UniformRouter,
)
from phalanx.threat import Norm, ThreatModel
from phalanx.workflow.as_printed import attacked
from tiny import mixture

_GATES: tuple[int | str, ...] = (1, 2, "all")


@lru_cache
def _images() -> ImageSet:
    return load_data("digits", train_limit=600, test_limit=60).test


@lru_cache
def _trained(gate: int | str, seed: int = 0) -> MixtureOfExperts:
    """Three small experts that get most digits right."""
    data = load_data("digits", train_limit=600, test_limit=60)
    batch = next(iter(data.train.batches(600)))
    model: MixtureOfExperts = mixture(3, gate, seed=seed)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(40):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(batch.x), batch.y).backward()
        optimizer.step()
    return model.eval()


def _dual(alpha: float) -> DualModel:
    return DualModel(_trained("all"), _trained(1, 1), alpha).eval()


@pytest.mark.parametrize("norm", ["L2", "Linf"])
@pytest.mark.parametrize("gate", _GATES)
def test_no_attack_breaks_a_certified_image(gate: int | str, norm: Norm) -> None:
    model = _trained(gate)
    found = certify(model, _images(), norm=norm)
    assert found.counts["certified"] > 40
    assert fallen_inside(model, _images(), found, 0.999999, alike=12) == 0
    # the attack is no straw man, nor the bound
    assert fallen_inside(model, _images(), found, 4.0, alike=12) > 20


def test_no_attack_breaks_a_certified_dual_model() -> None:
    model = _dual(0.8)
    found = certify(model, _images(), norm="L2")
    assert found.counts["certified"] > 30 and float(found.radius.mean()) > 0.01
    assert fallen_inside(model, _images(), found, 0.999999, alike=12) == 0


@pytest.mark.parametrize("gate", _GATES)
def test_more_work_certifies_more(gate: int | str) -> None:
    found = {method: certify(_trained(gate), _images(), norm="Linf", method=method).radius for method in METHODS}
    for method in METHODS:
        assert bool((found["auto"] >= found[method] * 0.98).all())
    assert float(found["auto"].mean()) > 1.5 * float(found["lipschitz"].mean())


def test_certified_is_at_most_attacked_is_at_most_clean() -> None:
    model = _trained(1)
    found = certify(model, _images(), norm="Linf")
    for eps in (0.0, 0.02, 0.05, 0.1):
        attacked = px.evaluate(model, _images(), protocol="pgd-20", eps=eps, norm="Linf")
        assert found.accuracy_at(eps) <= attacked.robust_acc <= attacked.clean_acc
    low, high = found.interval_at(0.02)
    assert low < found.accuracy_at(0.02) < high


def test_the_worst_case_radius_grows_with_alpha() -> None:
    standard, robust = mixture(1, seed=4).eval(), _trained(1, 1)
    # a layer that no bound is known for: its half counts as always wrong
    standard.experts[0] = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.GELU()).eval()
    batch = next(iter(_images().batches(100)))
    margins = []
    for alpha in (0.6, 0.8, 0.95):
        model = DualModel(standard, robust, alpha).eval()
        low = lower_margins(model, batch.x, batch.y, "L2", 0.05)
        margins.append((low > 0).all(1))
        assert "always wrong" in certify(model, _images().first(5)).notes[0]
    assert bool((margins[0] <= margins[1]).all() and (margins[1] <= margins[2]).all())
    assert int(margins[0].sum()) < int(margins[2].sum())
    with pytest.raises(InputError, match=r"standard\.experts\.0\.2"):
        certify(DualModel(standard, robust, 0.8, mix="logits").eval(), _images())


def test_a_dual_model_of_one_half_is_that_half() -> None:
    for alpha, half in ((0.0, _trained("all")), (1.0, _trained(1, 1))):
        assert torch.equal(certify(_dual(alpha), _images()).radius, certify(half, _images()).radius)


def test_batches_change_nothing() -> None:
    model = _trained(2)
    whole = certify(model, _images(), norm="Linf")
    alone = certify(model, _images(), norm="Linf", batch_size=7)
    assert torch.allclose(whole.radius, alone.radius, rtol=1e-6)
    assert whole.reasons == alone.reasons and whole.limits == alone.limits


def test_permuted_pixels_change_nothing() -> None:
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    model: Any = _trained(1)
    moved: Any = copy.deepcopy(model)
    for linear in (moved.router[2], *(expert[2] for expert in moved.experts)):
        linear.weight.data = linear.weight.data[:, order]
    batch = next(iter(_images().batches(20)))
    first = lower_margins(model, batch.x, batch.y, "L2", 0.1)
    other = batch.x.flatten(1)[:, order].reshape_as(batch.x)
    assert torch.allclose(first, lower_margins(moved, other, batch.y, "L2", 0.1), atol=1e-4)


def _constant(logits: list[float]) -> nn.Module:
    linear = nn.Linear(64, len(logits))
    nn.init.zeros_(linear.weight)
    linear.bias.data = torch.tensor(logits)
    return nn.Sequential(nn.Flatten(), linear).eval()


def _zeros(n: int = 3) -> ImageSet:
    return ImageSet(np.zeros((n, 1, 8, 8), np.uint8), np.zeros(n, np.int64), np.arange(n, dtype=np.int64), 16)


@pytest.mark.parametrize(
    ("logits", "reason"),
    [
        ([1.0, 0.0], "certified"),
        ([0.0, 1.0], "misclassified"),
        ([1.0, 1.0], "tied"),
        ([1.0, 1.0 - 1e-7], "tied"),
        ([float("nan"), 0.0], "non-finite"),
        ([float("inf"), 0.0], "non-finite"),
    ],
)
def test_every_image_says_why(logits: list[float], reason: str) -> None:
    found = certify(_constant(logits), _zeros())
    assert set(found.reasons) == {reason}
    # nothing moves a constant: the ball is everything
    assert found.radius.tolist() == [8.0 if reason == "certified" else 0.0] * 3
    assert found.accuracy_at(0) == (reason == "certified")
    assert found.certified(8.0) == 3 * (reason == "certified")


def test_no_answer_without_a_label() -> None:
    with pytest.raises(InputError, match="at least 0"):
        certify(_constant([1.0, 0.0]), _zeros()).accuracy_at(-1)


def test_limits_name_class_and_expert() -> None:
    found = certify(_trained(1), _images())
    for limit, reason in zip(found.limits, found.reasons, strict=True):
        assert limit.startswith("class ") == (reason == "certified")
    assert {limit.split(" through ")[1] for limit in found.limits if limit} <= {f"experts.{i}" for i in range(3)}


def test_a_deep_network_has_a_vacuous_bound_and_says_so() -> None:
    torch.manual_seed(0)
    network = build_expert("resnet18", num_classes=10, image_size=8, channels=1, width=4).eval()
    found = certify(MixtureOfExperts(None, [network]).eval(), _labelled(network), norm="Linf", method="lipschitz")
    assert found.counts["certified"]
    assert found.vacuous is not None and "vacuous" in found.vacuous
    assert f"{found.constants['experts.0']:.2g}" in found.vacuous and found.constants["experts.0"] > 1e3


def test_crown_is_for_residual_networks_that_are_small() -> None:
    torch.manual_seed(0)
    wide = Width.whole(4)
    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), BasicBlock(PlainLayers(), wide, wide, 2), nn.MaxPool2d(2)]
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 10)).eval()
    images = _labelled(network)
    radii = {method: certify(network, images, norm="Linf", method=method).radius for method in ("lipschitz", "crown")}
    assert float(radii["crown"].mean()) > 3 * float(radii["lipschitz"].mean())
    assert attacked(network, images, radii["crown"], "Linf").broken == 0
    assert Network.read(network, (1, 8, 8), "L2", "").methods("auto") == ("lipschitz", "crown")
    large = build_expert("resnet18", num_classes=10, image_size=32, channels=3, width=16).eval()
    assert Network.read(large, (3, 32, 32), "L2", "").methods("auto") == ("lipschitz", "ibp")


def _labelled(network: nn.Module) -> ImageSet:
    """The images with the network's own answers."""
    images = _images().first(10)
    labels = network(images.images(slice(0, 10))).argmax(1).numpy().astype(np.int64)
    return ImageSet(images.pixels, labels, images.ids, images.levels)


@pytest.mark.parametrize("layout", ["flat", "tree"])
def test_robust_routers(layout: str) -> None:
    torch.manual_seed(1)
    sides = [[[0], [1, 2]], [[1], [2]]] if layout == "tree" else []
    router = RobustRouter((1, 8, 8), 3, layout=layout, sides=sides)  # type: ignore[arg-type]
    model = MixtureOfExperts(router, list(_trained(1).experts)).eval()
    found = certify(model, _images(), norm="L2", method="lipschitz")
    assert found.counts["certified"] > 10
    assert fallen_inside(model, _images(), found, 0.999999, alike=12) == 0
    # at each radius nobody enters whom the router itself rules out
    batch = next(iter(_images().batches(100)))
    for eps in (0.01, 0.1):
        low = lower_margins(model, batch.x, batch.y, "L2", eps, method="lipschitz")
        alone = router.reachable(batch.x, ThreatModel("L2", eps)).sum(1) == 1
        routed = model.gate(batch.x).experts[:, 0]
        for index in alone.nonzero()[:, 0].tolist():
            expert = model.experts[routed[index]]
            own = lower_margins(expert, batch.x[[index]], batch.y[[index]], "L2", eps, method="lipschitz")
            assert bool((low[index] <= own[0] + 1e-4).all())


def test_other_routers_and_ensembles() -> None:
    experts = list(_trained(1).experts)
    for router in (MLPRouter((1, 8, 8), 3, hidden=(8,)), UniformRouter(3)):
        for gate in (1, "all"):
            model = MixtureOfExperts(router, experts, gate).eval()
            assert (
                fallen_inside(model, _images(), certify(model, _images(), method="lipschitz"), 0.999999, alike=12) == 0
            )
    for mix in ("probabilities", "logits"):
        ensemble = Ensemble([_trained(1), _trained("all", 1)], mix=mix).eval()  # type: ignore[arg-type]
        found = certify(ensemble, _images())
        assert found.counts["certified"] > 40 and fallen_inside(ensemble, _images(), found, 0.999999, alike=12) == 0


def _submodels() -> SynergyOfExperts:
    from phalanx.experts import TwoHeaded

    return SynergyOfExperts(
        [TwoHeaded(build_expert("mlp", num_classes=10, image_size=8, channels=1)) for _ in range(2)]
    )


def test_what_has_no_certificate_is_refused() -> None:
    with pytest.raises(InputError, match="training mode"):
        certify(mixture(2).train(), _images())
    with pytest.raises(InputError, match="confidence"):
        certify(_submodels().eval(), _images())
    noisy = mixture(2).eval()
    noisy.router = nn.Sequential(nn.Flatten(), nn.Linear(64, 2), nn.RReLU()).eval()
    with pytest.raises(InputError, match=r"router\.2"):
        certify(noisy, _images())
    hidden = mixture(2).eval()
    hidden.experts[1] = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Softmax(1)).eval()
    with pytest.raises(InputError, match=r"experts\.1\.2.*Softmax"):
        certify(hidden, _images())
    with pytest.raises(InputError, match="top_k 1"):
        tree = RobustRouter((1, 8, 8), 2, layout="tree", sides=[[[0], [1]]])
        certify(MixtureOfExperts(tree, list(mixture(2).experts), "all").eval(), _images())
    with pytest.raises(InputError, match="norm must be one of"):
        certify(mixture(2).eval(), _images(), norm="L3")
    with pytest.raises(InputError, match="method must be one of"):
        certify(mixture(2).eval(), _images(), method="power")


def test_margins_refuse_what_is_no_image_or_radius() -> None:
    model, x, y = mixture(2).eval(), torch.rand(2, 1, 8, 8), torch.tensor([0, 1])
    assert lower_margins(model, x, y, "L2", 0.1).shape == (2, 10)
    assert torch.isinf(lower_margins(model, x, y, "L2", 0.1).gather(1, y[:, None])).all()
    with pytest.raises(InputError, match=r"\[0, 1\]"):
        lower_margins(model, x + 1, y, "L2", 0.1)
    with pytest.raises(InputError, match="at least 0"):
        lower_margins(model, x, y, "L2", -0.1)
    with pytest.raises(InputError, match="labels"):
        lower_margins(model, x, y + 20, "L2", 0.1)


def test_margins_of_a_fraction() -> None:
    model, batch = _trained("all"), next(_images().batches(5))
    x, y = batch.xy
    assert torch.equal(lower_margins(model, x, y, "Linf", "8/255"), lower_margins(model, x, y, "Linf", 8 / 255))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model, x, y: lower_margins(model, x, y[:1], "L2", 0.1), r"labels must have shape \(5,\).*got \(1,\)"),
        (lambda model, x, y: lower_margins(model, x, y, "L2", "eight"), "eps must be a number or a fraction"),
        (lambda model, x, y: lower_margins(model, x, y, "L2", x.new_zeros(3)), "one for each of 5 images"),
        (lambda model, x, y: lower_margins(model, x[..., :6], y, "L2", 0.1), "takes 64 features .* given 48.* shape"),
        (lambda model, x, y: certify(model, _images().select([])), "no images to certify"),
        (lambda model, x, y: certify(lambda z: z, _images()), "got a function; certify_smoothed takes any"),
    ],
)
def test_mistakes_are_named(call: Any, message: str) -> None:
    x, y = next(_images().batches(5)).xy
    with pytest.raises(InputError, match=message):
        call(_trained("all"), x, y)


@pytest.mark.parametrize("gate", [1, 2])
def test_experts_that_no_image_reaches_have_no_bounds_to_make(gate: int) -> None:
    own = {"num_classes": 10, "image_size": 8, "channels": 1}
    for expert, options in (("lipschitz_mlp", {"hidden": [8]}), ("lipschitz_cnn", {"width": 2, "hidden": 4})):
        torch.manual_seed(0)
        experts = [build_expert(expert, **own, **options) for _ in range(3)]
        model = MixtureOfExperts(mixture(3).router, experts, gate).eval()
        with torch.no_grad():
            model.router[2].bias.copy_(torch.tensor([50.0, 40.0, -50.0]))
        x = next(_images().batches(5)).x
        for method in METHODS:
            low = lower_margins(model, x, model(x).argmax(1), "L2", 0.05, method=method)
            assert low.shape == (5, 10) and not bool(low.isnan().any())


@pytest.mark.parametrize("gate", _GATES)
def test_experts_are_added_up_only_where_the_gate_does(monkeypatch: pytest.MonkeyPatch, gate: int | str) -> None:
    asked = []
    monkeypatch.setattr("phalanx.certification.moe.Joint.of", lambda *known: asked.append(known))
    x, y = next(_images().batches(5)).xy
    # so far that every expert can be reached
    lower_margins(_trained(gate), x, y, "L2", 5.0, method="crown")
    assert bool(asked) is (gate != 1)


def test_constants_of_another_device_are_read() -> None:
    # of a file they come back on the CPU
    x = torch.rand(4, 1, 2, 2, dtype=torch.float64)
    known = torch.ones(3, 3, dtype=torch.float64)
    network = Network(nn.Flatten(), (), (1, 2, 2), "L2", "", known)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        there = mode.from_tensor(x).to("cuda")
        answers = Answers(there.flatten(1)[:, :3], there.new_zeros(4))
        labels = torch.zeros(4, dtype=torch.int64, device="cuda")
        low = network.bounds(answers, there, labels, there.new_zeros(4), "lipschitz").margins
    assert low.shape == (4, 3) and low.device.type == "cuda"


def test_the_average_of_probabilities_is_allowed_the_deployed_precision() -> None:
    whole = DualModel(mixture(2), mixture(2), 0.8)
    halves = {"float32": whole, "float64": copy.deepcopy(whole).double(), "both": copy.deepcopy(whole)}
    halves["both"].robust.double()
    x, y = next(_images().batches(5)).xy
    found = {}
    for name, dual in halves.items():
        read = read_model(dual.eval(), Reader((1, 8, 8), "L2")).model
        least = read.low(read.see(x.double()), y, torch.zeros(5).double(), "lipschitz").margins
        unallowed = replace(read, rounding=0.0)  # type: ignore[type-var]
        exact = unallowed.low(unallowed.see(x.double()), y, torch.zeros(5).double(), "lipschitz").margins
        found[name] = float((exact - least).nan_to_num().max())
    # rounding is the less precise half's
    assert found["both"] == pytest.approx(found["float32"]) == pytest.approx(128 * 2**-23)
    assert found["float64"] == pytest.approx(128 * 2**-52, rel=0.1)


def test_a_network_that_computes_something_else_is_found_out() -> None:
    model = _constant([1.0, 0.0])
    model.forward = lambda x: torch.ones(len(x), 2)  # type: ignore[method-assign]
    with pytest.raises(InputError, match="answers otherwise"):
        certify(model, _zeros())


def test_a_mixture_that_computes_something_else_is_found_out() -> None:
    model = copy.deepcopy(_trained(1))
    model.forward = lambda x: -_trained(1)(x)  # type: ignore[method-assign]
    with pytest.raises(InputError, match="than its parts say"):
        certify(model, _images())
    hooked = copy.deepcopy(_trained(1))
    hooked.register_forward_hook(lambda module, given, out: -out)
    with pytest.raises(InputError, match="hook"):
        certify(hooked, _images())


@pytest.mark.parametrize("gate", _GATES)
def test_a_router_that_overflows_proves_nothing(gate: int | str) -> None:
    for value in (float("nan"), float("inf"), 1e38):
        model: Any = copy.deepcopy(_trained(gate))
        model.router[2].weight.data[0] = value
        found = certify(model, _images(), method="lipschitz")
        assert not found.counts["certified"]


def test_nothing_of_the_model_is_moved() -> None:
    model = _trained(1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    certify(model, _images().first(5))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters()) and not model.training
