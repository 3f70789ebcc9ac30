"""Surfaces of a routed model and route steering, on mixtures whose weakness is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from phalanx.attacks import APGD, PGD, SURFACES, ExpertTransfer, Found, RouteSteering
from phalanx.attacks.objectives import OBJECTIVES, STEER_HINGE
from phalanx.attacks.routing_attacks import combinations
from phalanx.attacks.surfaces import named_experts
from phalanx.attacks.target import Target
from phalanx.routing import DualModel, DualRoute, MixtureOfExperts, Route, Routed, dense, leaves, only, pin

# B batch, E experts, D pixels


class Answers(nn.Module):
    """An expert on images (B, 1, 1, D): logits read off fixed weights on the pixels."""

    def __init__(self, weight_CD: list[list[float]]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight_CD, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) - 0.5) @ self.weight.T


class Scores(Answers):
    """A linear router."""


@pytest.fixture
def flawed() -> MixtureOfExperts:
    """Pixel 0 decides the class, pixel 1 the route. Expert 0 answers right, expert 1 wrong, both with a wide margin.

    Images have pixel 0 at .9 or .1 and pixel 1 at .56: the route's margin, .06, is 60 % of what eps = .1 can move.
    """
    right, wrong = [[-10.0, 0.0], [10.0, 0.0]], [[10.0, 0.0], [-10.0, 0.0]]
    return MixtureOfExperts(Scores([[0.0, 1.0], [0.0, -1.0]]), [Answers(right), Answers(wrong)], top_k=1)


X = torch.tensor([[0.9, 0.56], [0.1, 0.56], [0.9, 0.56], [0.1, 0.56]], dtype=torch.float64).reshape(4, 1, 1, 2)
Y = torch.tensor([1, 0, 1, 0])


def test_gradient_attacks_do_not_see_the_route_and_steering_does(
    flawed: MixtureOfExperts,
) -> None:
    for surface in ("pinned", "experts"):
        assert not PGD(eps=0.1, steps=50, surface=surface, random_start=False).run(flawed, X, Y).broken.any()
    result = RouteSteering(eps=0.1, steps=10).run(flawed, X, Y)
    assert result.broken.all() and result.flipped is not None and result.flipped.all()
    # reached through the second expert, after ten steps on the first, but for the starts that lie beyond the boundary
    assert (result.restart == 1).any() and (result.first_success[result.restart == 1] >= 10).all()


def test_steering_cannot_reach_further_than_the_ball(flawed: MixtureOfExperts) -> None:
    # the route turns at .5: .06 away
    assert not RouteSteering(eps=0.059, steps=40).run(flawed, X, Y).broken.any()
    assert RouteSteering(eps=0.061, steps=40).run(flawed, X, Y).broken.all()


def test_steering_at_classes(flawed: MixtureOfExperts) -> None:
    # two classes: one wrong class to aim at, however many are asked for
    assert RouteSteering(eps=0.1, steps=10, classes=5).run(flawed, X, Y).broken.all()


def test_steering_a_model_without_a_route_is_pgd_on_the_margin() -> None:
    model = Answers([[-1.0, 0.0], [1.0, 0.0]])
    steered = RouteSteering(eps=0.1, steps=5).run(model, X, Y)
    plain = PGD(eps=0.1, steps=5, objective="margin").run(model, X, Y)
    # the pass on the clean images, which tells that there is no route, is one query more
    same = steered._replace(queries=steered.queries - 1)
    assert all(torch.equal(a, b) for a, b in zip(same, plain, strict=True) if isinstance(a, Tensor))


def test_steering_a_mixture_of_one_attacks_its_expert() -> None:
    model = MixtureOfExperts(None, [Answers([[-1.0, 0.0], [1.0, 0.0]])])
    assert RouteSteering(eps=0.5, steps=10).run(model, X, Y).broken.all()
    assert not RouteSteering(eps=0.3, steps=10).run(model, X, Y).broken.any()


def test_more_classes_never_hold_more(flawed: MixtureOfExperts) -> None:
    torch.manual_seed(0)
    model = MixtureOfExperts(
        nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), [nn.Sequential(nn.Flatten(), nn.Linear(16, 4)) for _ in range(3)]
    )
    x = torch.rand(60, 1, 4, 4)
    y = model(x).argmax(-1)
    broken = [int(RouteSteering(eps=0.02, steps=8, classes=n).run(model, x, y).broken.sum()) for n in (1, 2, 3)]
    assert broken == sorted(broken) and broken[0] > 0


def _both(model: MixtureOfExperts, name: str, x_adv: Tensor) -> Routed:
    with torch.no_grad():
        clean = model.routed(X)
    return SURFACES[name](model, x_adv, X, clean)


def test_surfaces_are_what_their_formulas_say(flawed: MixtureOfExperts) -> None:
    x_adv = (X + 0.07 * torch.tensor([0.0, -1.0])).requires_grad_()  # every route turns
    gate = flawed.gate(x_adv)
    expected = {
        "whole": flawed.routed(x_adv),
        "pinned": flawed.routed(x_adv, pin(gate)),
        "experts": flawed.routed(x_adv, pin(flawed.gate(X))),
        "router": flawed.routed(X, dense(gate)),
        "dense": flawed.routed(x_adv, dense(gate)),
        "expert-0": flawed.routed(x_adv, only(gate, 0)),
        "expert-1": flawed.routed(x_adv, only(gate, 1)),
    }
    for name, routed in expected.items():
        assert torch.equal(_both(flawed, name, x_adv).logits, routed.logits), name
    right = _both(flawed, "experts", x_adv).logits.argmax(-1)
    assert torch.equal(right, Y) and not (flawed(x_adv).argmax(-1) == Y).any()


def test_only_the_named_part_has_a_gradient(flawed: MixtureOfExperts) -> None:
    def moved(name: str) -> list[bool]:
        leaf = X.clone().requires_grad_()
        objective = OBJECTIVES["cross_entropy"](_both(flawed, name, leaf), None, Y)
        (gradient,) = torch.autograd.grad(objective.sum(), leaf)
        return (gradient.flatten(1) != 0).any(0).tolist()

    # pixel 0 feeds the experts, pixel 1 the router
    assert moved("pinned") == moved("experts") == moved("expert-1") == [True, False]
    assert moved("router") == [False, True]
    assert moved("whole") == moved("dense") == [True, True]


def test_steer_by_hand() -> None:
    # scores (0, 2): std 1, lead of expert 0 is -2; logits (0, 0, 3): std sqrt 2, label 0 leads by -3/sqrt 2, hinged
    route = Route(torch.tensor([[0.0, 2.0]]), torch.tensor([[0]]), torch.ones(1, 1))
    attacked = Routed(torch.tensor([[0.0, 0.0, 3.0]]), route)
    gain = OBJECTIVES["steer"](attacked, None, torch.tensor([0]))
    torch.testing.assert_close(gain, torch.tensor([-2.0 + STEER_HINGE]))
    # class 2 leads by 3/sqrt 2, hinged; a targeted attack climbs the negative
    torch.testing.assert_close(-OBJECTIVES["steer_to"](attacked, None, torch.tensor([2])), gain)
    # label 2: it leads by 3/sqrt 2
    gain = OBJECTIVES["steer"](attacked, None, torch.tensor([2]))
    torch.testing.assert_close(gain, torch.tensor([-2.0 - 3 / 2**0.5]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"surface": "dense"}, "surface of route steering is fixed, got 'dense'; leave it out"),
        ({"objective": "margin"}, "objective of route steering is fixed"),
        ({"targeted": True}, "targeted of route steering is fixed"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"classes": -1}, "classes must be at least 0"),
        ({"step_size": "1/0"}, "step_size must be"),
        ({"search_rule": "adam"}, "search_rule must be pgd or apgd, got 'adam'"),
        ({"search_rule": "apgd", "step_size": 0.1}, "step_size is 0.1, but Auto-PGD finds its own"),
    ],
)
def test_mistakes(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RouteSteering(eps=0.1, **arguments)  # type: ignore[arg-type]


def test_found_keeps_its_shape(flawed: MixtureOfExperts) -> None:
    found = RouteSteering(eps=0.1, steps=3).search(flawed, X, Y)
    assert isinstance(found, Found) and all(len(field) == 4 for field in found)


# -- Auto-PGD, combinations of gates, straight-through, experts ---------------------------------------------------


def test_steering_by_apgd_reaches_as_far(flawed: MixtureOfExperts) -> None:
    attack = RouteSteering(eps=0.061, steps=20, search_rule="apgd")
    assert attack.run(flawed, X, Y).broken.all()
    assert not RouteSteering(eps=0.059, steps=20, search_rule="apgd").run(flawed, X, Y).broken.any()
    combined = RouteSteering(eps=0.061, steps=20, search_rule="apgd", combine=True).run(flawed, X, Y)
    # of one gate the combinations are its experts
    assert combined.broken.all() and torch.equal(combined.restart, attack.run(flawed, X, Y).restart)


def test_a_search_by_pgd_is_what_it_was_in_a_ledger() -> None:
    spec = RouteSteering(eps=0.1).spec()
    assert "search_rule" not in spec and "combine" not in spec
    both = RouteSteering(eps=0.1, search_rule="apgd", combine=True).spec()
    assert both == {**spec, "search_rule": "apgd", "combine": True}


def test_the_expert_that_answers_already_is_attacked_too() -> None:
    """Expert 0 answers and no other can be reached: steering must break it none the less."""
    weak, other = [[-1.0, 0.0], [1.0, 0.0]], [[-10.0, 0.0], [10.0, 0.0]]
    model = MixtureOfExperts(Scores([[0.0, 100.0], [0.0, -100.0]]), [Answers(weak), Answers(other)], top_k=1)
    x = X.clone()
    x[..., 1] = 1.0
    for combine in (False, True):
        result = RouteSteering(eps=0.42, steps=20, combine=combine).run(model, x, Y)
        assert result.flipped is not None and not result.flipped.any()
        assert result.broken.all() and (result.restart == 0).all()


def test_combinations_of_gates() -> None:
    assert combinations([3]) == [(0,), (1,), (2,)]
    assert len(combinations([4, 4])) == 16 and len(set(combinations([4, 4]))) == 16
    # too many: together, then each alone; a gate of one expert has nothing to be forced to
    found = combinations([2, 3, 2, 2, 1])
    assert found[:3] == [(0, 0, 0, 0, 0), (1, 1, 1, 1, None), (None, 2, None, None, None)]
    assert len(found) == 3 + (2 + 3 + 2 + 2) - 1 and all(len(choice) == 5 for choice in found)
    assert (None, None, 1, None, None) in found


def test_forced_gates_answer_and_the_others_decide(flawed: MixtureOfExperts) -> None:
    model = DualModel(flawed, MixtureOfExperts(None, [Answers([[-1.0, 0.0], [1.0, 0.0]])]), 0.5)
    x_adv = (X + 0.02).requires_grad_()
    clean = model.routed(X)
    named = Routed(clean.logits, named_experts(clean.route, (1, None)))
    found = SURFACES["forced"](model, x_adv, X, named)
    gates = model.gate(x_adv)
    expected = model.routed(x_adv, DualRoute(only(gates.standard, 1), gates.robust))
    assert torch.equal(found.logits, expected.logits)
    # only the gate that is steered is in the route, with a gradient in its scores
    (leaf,) = leaves(found.route)
    assert torch.equal(leaf.scores, gates.standard.scores) and leaf.scores.requires_grad
    target = Target(model, model, "forced", "steer", X, Y, clean=named)
    part = target[torch.tensor([2, 0])]
    assert torch.equal(part.look(x_adv[[2, 0]]).gain, target.look(x_adv).gain[[2, 0]])


def test_every_combination_of_two_halves_is_tried() -> None:
    """Either half alone holds the answer; only with S's second expert and R's first one does the mixture err."""
    right, wrong, unsure = [[-20.0, 0.0], [20.0, 0.0]], [[20.0, 0.0], [-20.0, 0.0]], [[-0.1, 0.0], [0.1, 0.0]]
    router = [[0.0, 50.0], [0.0, -50.0]]
    standard = MixtureOfExperts(Scores(router), [Answers(right), Answers(wrong)], top_k=1)
    # of R the first expert is the unsure one, and answers at the other side of the same boundary
    robust = MixtureOfExperts(Scores([[0.0, -50.0], [0.0, 50.0]]), [Answers(unsure), Answers(right)], top_k=1)
    model = DualModel(standard, robust, 0.6)
    assert torch.equal(model(X).argmax(-1), Y)
    steered = RouteSteering(eps=0.07, steps=20, combine=True).run(model, X, Y)
    assert steered.broken.all() and (steered.restart[steered.first_success >= 20] == 2).all()


def test_straight_through_is_the_deployed_answer_with_a_soft_gradient(flawed: MixtureOfExperts) -> None:
    leaf = X.clone().requires_grad_()
    found = SURFACES["straight-through"](flawed, leaf, X, None)
    assert torch.equal(found.logits, flawed(X))
    (gradient,) = torch.autograd.grad(found.logits[:, 0].sum(), leaf)
    other = X.clone().requires_grad_()
    (soft,) = torch.autograd.grad(flawed.routed(other, dense(flawed.gate(other))).logits[:, 0].sum(), other)
    assert torch.equal(gradient, soft) and (gradient.flatten(1) != 0).all()
    # it is seen as an error wherever the deployed model errs, without asking again
    attack = APGD(eps=0.1, steps=10, surface="straight-through")
    assert attack.run(flawed, X, Y).broken.all()


def test_straight_through_goes_on_where_an_expert_that_was_not_chosen_is_not_finite(flawed: MixtureOfExperts) -> None:
    class Overflowing(Answers):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.where(x.flatten(1)[:, :1] > 0.51, torch.inf, 0.0)

    weights = [[-1.0, 0.0], [1.0, 0.0]]
    experts = [Answers(weights), Overflowing(weights)]
    model = MixtureOfExperts(Scores([[0.0, 1.0], [0.0, -1.0]]), experts, top_k=1)
    x = torch.stack([torch.linspace(0.5, 0.55, 6), torch.ones(6)], 1).reshape(6, *X.shape[1:]).to(X)
    assert (model.gate(x).experts == 0).all()
    leaf = x.clone().requires_grad_()
    found = SURFACES["straight-through"](model, leaf, x, None)
    assert torch.equal(found.logits, model(x)) and found.logits.isfinite().all()
    (gradient,) = torch.autograd.grad(found.logits[:, 0].sum(), leaf)
    other = x.clone().requires_grad_()
    (own,) = torch.autograd.grad(model(other)[:, 0].sum(), other)
    (soft,) = torch.autograd.grad(model.routed(other[:2], dense(model.gate(other[:2]))).logits[:, 0].sum(), other)
    bad = (x.flatten(1)[:, 0] > 0.51).tolist()
    assert bad == [False, False, True, True, True, True]
    assert torch.equal(gradient[2:], own[2:]) and torch.equal(gradient[:2], soft[:2]) and gradient.isfinite().all()
    # so that it is attacked, not given up as invalid
    result = PGD(eps=0.4, steps=10, surface="straight-through").run(model, x, model(x).argmax(-1))
    assert (result.broken | result.invalid).all()


def test_what_breaks_an_expert_may_carry_over() -> None:
    """Expert 0 answers and has no gradient at all; expert 1, of the same mistakes, shows the way."""

    class Rounded(Answers):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward((x.detach() * 20).round() / 20)

    weights = [[-1.0, 0.0], [1.0, 0.0]]
    model = MixtureOfExperts(Scores([[0.0, 1.0], [0.0, -1.0]]), [Rounded(weights), Answers(weights)], top_k=1)
    x = X.clone()
    x[..., 1] = 1.0
    whole = APGD(eps=0.45, steps=10, surface="pinned").run(model, x, Y)
    assert not whole.broken.any() and whole.zero_gradient.all()
    result = ExpertTransfer(eps=0.45, steps=10).run(model, x, Y)
    assert result.broken.all() and (result.restart == 1).all()


@pytest.mark.parametrize("arguments", [{"search_rule": "pgd"}, {"classes": 2}, {"surface": "dense"}])
def test_mistakes_of_expert_transfer(arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="of expert transfer is fixed"):
        ExpertTransfer(eps=0.1, **arguments)  # type: ignore[arg-type]
