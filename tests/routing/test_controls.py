"""Gates that know nothing, over the experts of a trained mixture."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from routing_samples import SHAPE, images, small_mixture, small_network
from torch import nn

from phalanx.errors import InputError
from phalanx.experts import build_expert
from phalanx.models import build
from phalanx.nn import spec_of
from phalanx.routing import HierarchicalRouter, LinearRouter, MixtureOfExperts, UniformRouter, leaves, with_gate


def test_the_uniform_gate_is_the_mean_of_all_experts() -> None:
    mixture, x = small_mixture(3), images(7)
    control = with_gate(mixture, "uniform")
    torch.testing.assert_close(control(x), sum(expert(x) for expert in mixture.experts) / 3)
    (leaf,) = leaves(control.gate(x))
    torch.testing.assert_close(leaf.weights, torch.full((7, 3), 1 / 3, dtype=torch.float64))


def test_the_random_gate_sends_each_image_to_one_expert_by_its_seed() -> None:
    mixture, x = small_mixture(3), images(40)
    before = torch.get_rng_state()
    control, again, other = (with_gate(mixture, "random", seed=seed) for seed in (4, 4, 5))
    assert torch.equal(torch.get_rng_state(), before)
    route = control.gate(x)
    assert route.experts.shape == (40, 1) and len(route.experts.unique()) > 1
    assert torch.equal(route.experts, again.gate(x).experts)
    assert not torch.equal(route.experts, other.gate(x).experts)
    assert not torch.equal(route.experts, mixture.gate(x).experts)
    rows = torch.stack([mixture.experts[int(e)](x[b : b + 1])[0] for b, e in enumerate(route.experts[:, 0])])
    torch.testing.assert_close(control(x), rows)


@pytest.mark.parametrize("gate", ["uniform", "random"])
def test_the_experts_are_shared_and_untouched(gate: Any) -> None:
    mixture = small_mixture(2).train()
    mixture.experts[1].eval()
    modes = [module.training for module in mixture.modules()]
    control = with_gate(mixture, gate)
    assert all(mine is theirs for mine, theirs in zip(control.experts, mixture.experts, strict=True))
    assert [module.training for module in mixture.modules()] == modes and control.training
    assert not with_gate(mixture.eval(), gate).router.training
    # an untrained gate stays untrained
    assert list(control.players()) == ["experts"]
    assert {p.dtype for p in control.parameters()} == {torch.float64}


def test_the_random_router_reads_what_the_mixtures_own_router_read() -> None:
    mixture = MixtureOfExperts(LinearRouter(SHAPE, 2, mean=[0.3], std=[0.7]), [small_network(), small_network()])
    normalize = with_gate(mixture, "random").router[0]
    assert (normalize.mean.item(), normalize.std.item()) == pytest.approx((0.3, 0.7))
    tree = HierarchicalRouter(LinearRouter(SHAPE, 2, mean=[0.4]), [LinearRouter(SHAPE, 1), UniformRouter(1)])
    mixture = MixtureOfExperts(tree, [small_network(), small_network()])
    assert with_gate(mixture, "random").router[0].mean.item() == pytest.approx(0.4)


@pytest.mark.parametrize("gate", ["uniform", "random"])
def test_built_from_its_record_bit_for_bit(gate: Any) -> None:
    experts = [build_expert("mlp", num_classes=3, image_size=4, channels=1, hidden=[5]) for _ in range(2)]
    model, x = with_gate(MixtureOfExperts(LinearRouter(SHAPE, 2), experts).eval(), gate), images(6).float()
    spec = spec_of(model)
    assert spec is not None
    again = build(json.loads(json.dumps(spec.to_json()))).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x)) and list(again.players()) == ["experts"]


def test_mistakes() -> None:
    mixture = small_mixture(2)
    with pytest.raises(InputError, match="gate must be one of uniform, random, got 'oracle'"):
        with_gate(mixture, "oracle")
    with pytest.raises(InputError, match="another gate needs a MixtureOfExperts, got a Sequential"):
        with_gate(small_network(), "uniform")
    with pytest.raises(InputError, match="needs at least 2 experts to choose from, got 1"):
        with_gate(MixtureOfExperts(None, [small_network()]), "uniform")
    by_hand = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).double()
    mixture = MixtureOfExperts(by_hand, list(mixture.experts))
    assert len(with_gate(mixture, "uniform")(images(3))) == 3
    with pytest.raises(InputError, match=r"router was built by hand, .* build MixtureOfExperts\(LinearRouter"):
        with_gate(mixture, "random")
