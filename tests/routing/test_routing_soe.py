from __future__ import annotations

import json
import math
import re
from collections import Counter
from typing import Any

import pytest
import torch
from routing_samples import images, small_network
from torch import Tensor, nn

from phalanx.attacks import PGD, SURFACES, RouteSteering
from phalanx.attacks.objectives import OBJECTIVES
from phalanx.experts import TwoHeaded, build_expert
from phalanx.models import build
from phalanx.nn import spec_of
from phalanx.routing import DualModel, MixtureOfExperts, Route, RoutedModel, SynergyOfExperts, dense, leaves, only, pin

# B batch, M sub-models, C classes


def _small(submodels: int = 3, seed: int = 0, **options: Any) -> SynergyOfExperts:
    torch.manual_seed(seed)
    parts = [TwoHeaded(small_network()) for _ in range(submodels)]
    for part in parts:
        # differing and steep enough for every sub-model to be chosen by some image
        nn.init.normal_(part.confidence.weight, 0, 3)
        nn.init.normal_(part.classifier.weight, 0, 2)
    model = SynergyOfExperts(parts, **options).double().eval()
    with torch.no_grad():
        for part, bias in zip(parts, model.submodels(images(64))[1].mean(0), strict=True):
            part.confidence.bias -= bias
    return model


def _reference(model: SynergyOfExperts, image: Tensor, temperature: float) -> tuple[list[float], Tensor]:
    """R of each sub-model for one image (1, ...), and the logits (C,) of the best: one number at a time."""
    rectified, answers = [], []
    for submodel in model.experts:
        features = submodel.features(image)
        z = submodel.classifier(features)[0]
        a = float(submodel.confidence(features).detach())
        exps = [math.exp(v / temperature) for v in z.tolist()]
        rectified.append(max(exps) / sum(exps) / (1 + math.exp(-a)))
        answers.append(z)
    return rectified, answers[rectified.index(max(rectified))]


@pytest.mark.parametrize("temperature", [1.0, 0.3, 5.0])
def test_one_image_at_a_time(temperature: float) -> None:
    model, x = _small(temperature=temperature), images(40)
    logits, route = model.routed(x)
    assert isinstance(route, Route) and route.scores.shape == (40, 3) and route.experts.shape == (40, 1)
    chosen = []
    for row, image in enumerate(x.split(1)):
        rectified, answer = _reference(model, image, temperature)
        torch.testing.assert_close(route.scores[row].exp(), torch.tensor(rectified, dtype=torch.float64))
        assert int(route.experts[row]) == rectified.index(max(rectified))
        torch.testing.assert_close(logits[row], answer)
        chosen.append(int(route.experts[row]))
    assert set(chosen) == {0, 1, 2}
    assert torch.equal(model(x), logits) and torch.equal(model.gate(x).experts, route.experts)
    assert (route.weights == 1).all() and not route.weights.requires_grad


def test_the_temperature_can_change_who_answers() -> None:
    x = images(40)
    assert not torch.equal(_small().gate(x).experts, _small(temperature=5.0).gate(x).experts)


class _Says(nn.Module):
    """The same answer for every image: logits (C,) and a confidence logit."""

    def __init__(self, logits: list[float], confidence: float) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))
        self.confidence = nn.Parameter(torch.tensor(confidence))

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self(x), self.confidence.expand(len(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.expand(len(x), -1)


def test_rectified_confidence_by_hand() -> None:
    # softmax([0, ln 3]) = [.25, .75], sigmoid(0) = .5: R = .375; softmax([ln 4, 0]) = [.8, .2], sigmoid(-ln 3) = .25
    model = SynergyOfExperts([_Says([0.0, math.log(3)], 0.0), _Says([math.log(4), 0.0], -math.log(3))])
    logits, route = model.routed(torch.rand(2, 1))
    torch.testing.assert_close(route.scores.exp(), torch.tensor([[0.375, 0.2]] * 2))
    torch.testing.assert_close(logits, torch.tensor([[0.0, math.log(3)]] * 2))


def test_scores_tell_apart_what_rounds_to_one_and_to_zero() -> None:
    # sigmoid(20) and sigmoid(30) are both 1 in float32, sigmoid(-200) and sigmoid(-300) both 0
    for confident in ((20.0, 30.0), (-300.0, -200.0)):
        model = SynergyOfExperts([_Says([200.0, 0.0], each) for each in confident])
        route = model.gate(torch.rand(1, 1))
        assert route.scores.isfinite().all() and route.experts.tolist() == [[1]]
    tie = SynergyOfExperts([_Says([1.0, 0.0], 0.5), _Says([0.0, 1.0], 0.5)])
    assert tie.gate(torch.rand(3, 1)).experts.flatten().tolist() == [0, 0, 0]


def test_half_precision_does_not_decide() -> None:
    # sigmoid(6) and sigmoid(6.5) are the same number in bfloat16
    model = SynergyOfExperts([_Says([9.0, 0.0], 6.0), _Says([0.0, 9.0], 6.5)]).bfloat16()
    logits, route = model.routed(torch.rand(1, 1))
    assert route.scores.dtype == logits.dtype == torch.float32 and route.experts.item() == 1


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_non_finite_sub_model_shows(broken: float) -> None:
    # never hidden behind a finite one: an invalid answer must be seen as such
    model = SynergyOfExperts([_Says([9.0, 0.0], 9.0), _Says([broken, 0.0], 0.0)])
    assert not model(torch.rand(2, 1)).isfinite().all(-1).any()


def _count(model: SynergyOfExperts) -> Counter[tuple[int, int]]:
    """(sub-model, batch size) of every pass through a sub-model's features from now on."""
    counts: Counter[tuple[int, int]] = Counter()
    for number, submodel in enumerate(model.experts):

        def saw(_: nn.Module, inputs: tuple[Tensor, ...], __: Tensor, number: int = number) -> None:
            counts[number, len(inputs[0])] += 1

        submodel.features.register_forward_hook(saw)
    return counts


def test_each_sub_model_runs_once_and_under_a_route_only_the_named_ones() -> None:
    model, x = _small(), images(40)
    route = model.gate(x)
    groups = [int((route.experts == number).sum()) for number in range(3)]
    counts = _count(model)
    for call in (model, model.routed, model.gate):
        counts.clear()
        call(x)
        assert counts == {(number, 40): 1 for number in range(3)}
    counts.clear()
    model.routed(x, only(route, 1))
    assert counts == {(1, 40): 1}
    counts.clear()
    model.routed(x, pin(route))
    assert counts == dict.fromkeys(enumerate(groups), 1) and sum(groups) == 40


def test_given_routes() -> None:
    model, x = _small(), images(12)
    outputs = torch.stack([submodel(x) for submodel in model.experts], 1)
    route = model.gate(x)
    torch.testing.assert_close(model.routed(x, route).logits, model(x))
    assert model.routed(x, route).route is route
    for number in range(3):
        torch.testing.assert_close(model.routed(x, only(route, number)).logits, outputs[:, number])
    # a soft choice in proportion to R
    rectified = route.scores.exp()
    shares = rectified / rectified.sum(-1, keepdim=True)
    torch.testing.assert_close(model.routed(x, dense(route)).logits, (shares[..., None] * outputs).sum(1))
    with pytest.raises(TypeError, match="takes one Route, got tuple"):
        model.routed(x, (route,))


def test_the_answer_has_the_gradient_of_the_one_who_gives_it() -> None:
    model, x = _small(), images(20).requires_grad_()
    logits, route = model.routed(x)
    weights = torch.linspace(-1, 2, logits.numel(), dtype=torch.float64).reshape(logits.shape)
    ours = torch.autograd.grad((logits * weights).sum(), [x, *model.parameters()], allow_unused=True)
    rows = range(len(x))
    alone = torch.stack([model.experts[int(route.experts[row])](x[row : row + 1])[0] for row in rows])
    theirs = torch.autograd.grad((alone * weights).sum(), [x, *model.parameters()], allow_unused=True)
    for (name, parameter), our, their in zip([("x", x), *model.named_parameters()], ours, theirs, strict=True):
        # none reaches the confidence heads: the choice is hard
        assert (our is None) is (".confidence." in name), name
        zero = torch.zeros_like(parameter)
        torch.testing.assert_close(zero if our is None else our, zero if their is None else their)


def test_scores_are_differentiable_through_both_heads() -> None:
    model, x = _small(2), images(6).requires_grad_()
    scores = model.gate(x).scores
    step = 1e-6
    (gradient,) = torch.autograd.grad(scores[:, 1].sum(), x, retain_graph=True)
    assert (gradient.flatten(1) != 0).any(-1).all()
    direction = images(6, seed=5) - 0.5
    with torch.no_grad():
        ahead, behind = (model.gate(x + sign * step * direction).scores[:, 1] for sign in (1, -1))
    slope = (gradient * direction).flatten(1).sum(-1)
    torch.testing.assert_close(slope, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-7)
    heads = [model.experts[1].classifier.weight, model.experts[1].confidence.weight]
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(scores[:, 1].sum(), heads))


def test_players_and_protocol() -> None:
    model = _small()
    assert isinstance(model, RoutedModel) and model.players().keys() == {"experts"}
    assert {id(p) for p in model.players()["experts"]} == {id(p) for p in model.parameters()}
    assert len(model.players()["experts"]) == 3 * 6
    assert "temperature=1.0" in repr(model) and model.extra_repr() != _small(temperature=2.0).extra_repr()


def test_it_can_be_half_of_a_dual_model() -> None:
    model, x = _small(), images(5)
    dual = DualModel(MixtureOfExperts(None, [small_network().double()]), model, 0.9)
    assert [leaf.num_experts for leaf in leaves(dual.gate(x))] == [1, 3]
    assert dual(x).exp().sum(-1).allclose(torch.ones(5, dtype=torch.float64))


def test_the_spec_rebuilds_the_model() -> None:
    def part(width: int) -> TwoHeaded:
        return TwoHeaded(build_expert("small_cnn", num_classes=4, image_size=8, channels=1, width=width))

    model = SynergyOfExperts([part(2), part(3)], temperature=0.5).eval()
    spec = spec_of(model)
    assert spec is not None and spec.name == "soe"
    again = build(json.loads(json.dumps(spec.to_json()))).eval()
    assert isinstance(again, SynergyOfExperts) and spec_of(again) == spec and again.extra_repr() == model.extra_repr()
    again.load_state_dict(model.state_dict())
    x = torch.rand(3, 1, 8, 8)
    assert torch.equal(again(x), model(x)) and torch.equal(again.gate(x).scores, model.gate(x).scores)
    assert spec_of(_small()) is None


TWO = [_Says([1.0, 0.0], 0.0), _Says([1.0, 0.0], 0.0)]


@pytest.mark.parametrize(
    ("submodels", "options", "error", "message"),
    [
        (TWO[:1], {}, ValueError, "submodels must hold at least 2 networks to choose from, got 1; add some"),
        ([], {}, ValueError, "submodels must hold at least 2 networks to choose from, got 0; add some"),
        ([TWO[0]] * 2, {}, ValueError, "submodels must be 2 different networks, got one of them twice"),
        ([TWO[0], nn.Flatten()], {}, TypeError, "got a Flatten without one; wrap it: TwoHeaded(network)"),
        (TWO, {"temperature": 0}, ValueError, "temperature must be positive and finite, got 0"),
        (TWO, {"temperature": math.nan}, ValueError, "temperature must be positive and finite, got nan"),
    ],
)
def test_parts_that_do_not_fit(
    submodels: list[nn.Module], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        SynergyOfExperts(submodels, **options)


def test_sub_models_for_different_classes() -> None:
    model = SynergyOfExperts([_Says([1.0, 0.0], 0.0), _Says([1.0, 0.0, 0.0], 0.0)])
    with pytest.raises(ValueError, match=re.escape("logits for the same classes, got shapes (4, 2) and (4, 3)")):
        model(torch.rand(4, 1))


# -- attacks ---------------------------------------------------------------------------------------------------------


class _Planted(nn.Module):
    """On two pixels: the first decides the class, the second the confidence."""

    def __init__(self, right: bool, confidence: float) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor([10.0 if right else -10.0, confidence], dtype=torch.float64))

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shifted = (x.flatten(1) - 0.5) * self.slope
        return torch.stack([-shifted[:, 0], shifted[:, 0]], 1), shifted[:, 1]

    def forward(self, x: Tensor) -> Tensor:
        return self.both(x)[0]


def _flawed() -> SynergyOfExperts:
    """Sub-model 0 is right and sub-model 1 wrong, both with a wide margin and equal probabilities; the second pixel
    decides which is surer, and the choice turns at .5."""
    return SynergyOfExperts([_Planted(True, 5.0), _Planted(False, -5.0)])


X = torch.tensor([[0.9, 0.56], [0.1, 0.56], [0.9, 0.56], [0.1, 0.56]], dtype=torch.float64).reshape(4, 1, 1, 2)
Y = torch.tensor([1, 0, 1, 0])


def test_no_label_takes_part_in_the_answer() -> None:
    model = _flawed()
    turned = X + torch.tensor([0.0, -0.1])
    oracle = torch.stack([submodel(turned).argmax(-1) == Y for submodel in model.experts]).any(0)
    # some sub-model is right on every image, and the model is wrong on every one
    assert oracle.all() and not (model(turned).argmax(-1) == Y).any() and (model(X).argmax(-1) == Y).all()


def test_gradient_attacks_do_not_see_the_choice() -> None:
    for surface in ("whole", "pinned", "experts", "expert-0"):
        attack = PGD(eps=0.1, steps=50, surface=surface, random_start=False)
        assert not attack.run(_flawed(), X, Y).broken.any(), surface


@pytest.mark.parametrize("attack", [RouteSteering(eps=0.1, steps=10), RouteSteering(eps=0.1, steps=10, classes=1)])
def test_steering_turns_it(attack: RouteSteering) -> None:
    result = attack.run(_flawed(), X, Y)
    assert result.broken.all() and result.flipped is not None and result.flipped.all()


def test_the_soft_choice_turns_it() -> None:
    # the model is judged by its hard choice, whatever the surrogate
    result = PGD(eps=0.1, steps=50, surface="dense", random_start=False).run(_flawed(), X, Y)
    assert result.broken.all() and result.flipped is not None and result.flipped.all()


def test_steering_reaches_no_further_than_the_ball() -> None:
    assert not RouteSteering(eps=0.059, steps=40).run(_flawed(), X, Y).broken.any()
    assert RouteSteering(eps=0.061, steps=40).run(_flawed(), X, Y).broken.all()


def test_surfaces_are_what_their_formulas_say() -> None:
    model = _flawed()
    x_adv = (X + torch.tensor([0.0, -0.07])).requires_grad_()
    gate, clean = model.gate(x_adv), model.routed(X)
    right, wrong = (submodel(x_adv) for submodel in model.experts)
    soft = gate.scores.softmax(-1)
    mixed = soft[:, :1] * right.softmax(-1) + soft[:, 1:] * wrong.softmax(-1)
    expected = {
        "whole": wrong,
        "pinned": wrong,
        "experts": right,
        "expert-0": right,
        "expert-1": wrong,
        "dense": mixed.log(),
        "router": soft[:, :1] * model.experts[0](X) + soft[:, 1:] * model.experts[1](X),
    }
    moved = {}
    for name, logits in expected.items():
        found = SURFACES[name](model, x_adv, X, clean)
        torch.testing.assert_close(found.logits, logits, msg=name)
        (gradient,) = torch.autograd.grad(OBJECTIVES["cross_entropy"](found, None, Y).sum(), x_adv, retain_graph=True)
        moved[name] = (gradient.flatten(1) != 0).any(0).tolist()
    # the second pixel feeds the choice alone
    hard = {name: [True, False] for name in ("whole", "pinned", "experts", "expert-0", "expert-1")}
    assert {name: moved[name] for name in hard} == hard and moved["dense"] == [True, True] and moved["router"][1]
    steered = SURFACES["expert-1"](model, X.clone().requires_grad_(), X, clean)
    assert isinstance(steered.route, Route) and steered.route.scores.requires_grad


def test_attacks_on_batchnorm_leave_no_trace() -> None:
    torch.manual_seed(0)
    backbones = [build_expert("small_cnn", num_classes=3, image_size=4, channels=1, width=2) for _ in range(2)]
    model = SynergyOfExperts([TwoHeaded(backbone) for backbone in backbones]).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = images(6).float()
    for attack in (PGD(eps=0.1, steps=2), RouteSteering(eps=0.1, steps=2)):
        result = attack.run(model, x, torch.zeros(6, dtype=torch.int64))
        with torch.no_grad():
            assert torch.equal(result.predicted, model.eval()(result.x_adv).argmax(-1))
        model.train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
