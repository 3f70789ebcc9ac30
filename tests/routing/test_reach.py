"""The reachable set: no perturbation ever leaves it, and where it is exact some perturbation fills it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from phalanx.attacks import PGD, RouteSteering
from phalanx.attacks.target import Target
from phalanx.rng import SampleRng
from phalanx.routing import (
    CNNRouter,
    LinearRouter,
    MixtureOfExperts,
    RobustRouter,
    reachable,
)
from phalanx.routing.reach import Regions, in_chunks
from phalanx.threat import NORMS, Norm, ThreatModel

SHAPE = (1, 3, 3)
TREES = {2: [[[0], [1]]], 3: [[[0, 1], [2]], [[0], [1]]], 4: [[[0, 1], [2, 3]], [[0], [1]], [[2], [3]]]}
RADII = st.sampled_from([0.0, 0.01, 0.1, 0.4, 1.0])


def _network(classes: int = 3) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(9, classes))


def _images(seed: int, size: int = 16) -> Tensor:
    """Many pixels at an end of their range."""
    x = torch.rand(size, *SHAPE, generator=torch.Generator().manual_seed(seed)) * 1.6 - 0.3
    return x.clamp(0, 1)


def _router(kind: str, experts: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    if kind == "linear":
        return LinearRouter(SHAPE, experts, mean=(0.4,), std=(0.3,))
    tree = {"layout": "tree", "sides": TREES[experts]} if kind == "tree" else {"layout": "flat"}
    router = RobustRouter(SHAPE, experts, **tree)  # type: ignore[arg-type]
    # close enough to the boundary for a route to be in reach of some images and out of reach of others
    router.linear.bias.mul_(0.1)
    return router


def _mixture(router: nn.Module, experts: int) -> MixtureOfExperts:
    return MixtureOfExperts(router, [_network() for _ in range(experts)], train_router=False).eval()


def _climb(model: MixtureOfExperts, x: Tensor, expert: int, threat: ThreatModel) -> Tensor:
    """The point that ascent on one expert's lead over the best other one comes to."""
    point = x
    for _ in range(30):
        leaf = point.detach().requires_grad_()
        scores = model.gate(leaf).scores
        others = scores.clone()
        others[:, expert] = -torch.inf
        (gradient,) = torch.autograd.grad((scores[:, expert] - others.amax(1)).sum(), leaf)
        point = threat.step(leaf.detach(), gradient, threat.epsilon / 4 + 1e-3, x)
    return point


@settings(deadline=None, max_examples=40)
@given(
    kind=st.sampled_from(["linear", "flat", "tree"]),
    experts=st.integers(2, 4),
    seed=st.integers(0, 2**31 - 1),
    norm=st.sampled_from(NORMS),
    radius=RADII,
)
def test_no_point_of_the_ball_leaves_the_set(kind: str, experts: int, seed: int, norm: Norm, radius: float) -> None:
    model, x, threat = _mixture(_router(kind, experts, seed), experts), _images(seed), ThreatModel(norm, radius)
    found = reachable(model, x, threat)
    assert found is not None and found.shape == (len(x), experts) and found.any(1).all()
    points = [_climb(model, x, expert, threat) for expert in range(experts)]
    points += [threat.random_start(x, SampleRng.for_batch(len(x), seed), restart=restart) for restart in range(5)]
    for point in [x, *points]:
        chosen = model.gate(point).experts[:, 0]
        assert found[torch.arange(len(x)), chosen].all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", ["linear", "flat", "tree"])
def test_of_two_experts_it_is_exact(kind: str, norm: Norm) -> None:
    model, x, threat = _mixture(_router(kind, 2, 1), 2), _images(0, 200), ThreatModel(norm, 0.15)
    found = reachable(model, x, threat)
    assert found is not None
    reached = torch.stack(
        [model.gate(_climb(model, x, expert, threat)).experts[:, 0] == expert for expert in (0, 1)], 1
    )
    # ascent may stop short of a boundary that is only just in reach
    assert (reached == found).float().mean() > 0.97 and (reached <= found).all()
    assert 0.1 < (found.sum(1) == 1).float().mean() < 0.99


def test_a_wrong_threat_is_not_proved() -> None:
    """Twice the radius reaches more: the test above is able to fail."""
    model, x = _mixture(_router("flat", 2, 1), 2), _images(0, 200)
    near, far = (reachable(model, x, ThreatModel("Linf", eps)) for eps in (0.1, 0.2))
    assert near is not None and far is not None and near.sum() < far.sum() and (near <= far).all()


def test_the_score_of_a_tree_is_its_leaf() -> None:
    router = _router("tree", 4, 3)
    assert isinstance(router, RobustRouter)
    x = _images(5, 100)
    splits = router.linear(x.flatten(1) - 0.5) >= 0
    leaf = torch.where(splits[:, 0], torch.where(splits[:, 1], 0, 1), torch.where(splits[:, 2], 2, 3))
    torch.testing.assert_close(router(x).argmax(1), leaf)


def test_steering_cannot_flip_what_is_proved() -> None:
    model, x = _mixture(_router("flat", 3, 2), 3), _images(1, 60)
    y, threat = model(x).argmax(1), ThreatModel("Linf", 0.1)
    found = reachable(model, x, threat)
    assert found is not None
    safe = found.sum(1) == 1
    for attack in (RouteSteering(eps=0.1, steps=20), PGD(eps=0.1, steps=20, restarts=3)):
        flipped = attack.run(model, x, y).flipped
        assert flipped is not None and flipped.any() and not (flipped & safe).any()
    assert 0 < safe.sum() < len(x)


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 16), (torch.bfloat16, 15), (torch.float16, 46)])
@pytest.mark.parametrize("kind", ["linear", "flat", "tree"])
def test_a_precision_that_cannot_sum_so_many_pixels_proves_nothing(kind: str, dtype: torch.dtype, size: int) -> None:
    # n u = 260 / 256, 229 / 256 and 2,120 / 2,048: the bound's denominator turns negative beyond 1
    shape = (1, size, size)
    torch.manual_seed(0)
    tree = {"layout": "tree", "sides": TREES[3]} if kind == "tree" else {"layout": "flat"}
    router = LinearRouter(shape, 3) if kind == "linear" else RobustRouter(shape, 3, **tree)  # type: ignore[arg-type]
    experts = [nn.Sequential(nn.Flatten(), nn.Linear(size**2, 3)) for _ in range(3)]
    model = MixtureOfExperts(router, experts, train_router=False).eval().to(dtype)
    x = torch.rand(8, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = reachable(model, x, ThreatModel("L2", 0.001))
    assert found is not None and found.all()


@pytest.mark.parametrize("kind", ["linear", "flat"])
def test_the_expert_that_answers_is_reachable_whatever_the_bound_says(kind: str) -> None:
    router = _router(kind, 3, 0)
    linear = router[2] if isinstance(router, nn.Sequential) else router.linear
    linear.weight.data[:], linear.bias.data[:] = torch.nan, torch.nan
    x = _images(0)
    found = reachable(_mixture(router, 3), x, ThreatModel("Linf", 0.01))
    assert found is not None and found.all()
    bound = Regions(torch.ones(1, 9), torch.full((1,), -10.0), torch.tensor([[1, -1]]), torch.zeros(1))
    # that this router says 0 where its conditions say 1 is for the proof to give way to
    assert in_chunks(bound, x, ThreatModel("Linf", 0.0), torch.zeros(len(x), dtype=torch.int64)).all()


def test_steering_in_half_precision_searches_every_expert() -> None:
    torch.manual_seed(0)
    router = RobustRouter((1, 16, 16), 2)
    experts = [nn.Sequential(nn.Flatten(), nn.Linear(256, 3)) for _ in range(2)]
    model = MixtureOfExperts(router, experts, train_router=False).eval().bfloat16()
    x = torch.rand(4, 1, 16, 16).bfloat16()
    result = RouteSteering(eps=0.03, steps=1).run(model, x, model(x).argmax(1))
    # two verdicts, the look at the clean image, and for each expert two points, each shown to the model as well
    assert not result.broken.all() and (result.queries[~result.broken] == 2 + 1 + 2 * 4).all()


def test_where_nothing_can_be_proved_there_is_no_set() -> None:
    threat, x = ThreatModel("Linf", 0.1), _images(0)
    linear = _router("linear", 2, 0)
    assert reachable(_mixture(CNNRouter(SHAPE, 2), 2), x, threat) is None
    assert reachable(MixtureOfExperts(linear, [_network(), _network()], "all"), x, threat) is None
    assert reachable(MixtureOfExperts(None, [_network()]), x, threat) is None
    assert reachable(_network(), x, threat) is None


def test_a_proof_holds_for_any_size_of_batch_and_none() -> None:
    model, x, threat = _mixture(_router("tree", 4, 3), 4), _images(0, 50), ThreatModel("L2", 0.3)
    whole, parts = reachable(model, x, threat), [reachable(model, part, threat) for part in x.split(7)]
    assert whole is not None and torch.equal(whole, torch.cat([part for part in parts if part is not None]))
    empty = reachable(model, x[:0], threat)
    assert empty is not None and empty.shape == (0, 4)


def test_steering_searches_reachable_experts_alone() -> None:
    """As many searches as experts, none of them towards an expert that is proved out of reach."""
    model, x = _mixture(_router("tree", 4, 3), 4), _images(1, 40)
    attack, clean = RouteSteering(eps=0.02, steps=2), model.routed(x)
    target = Target(model, model, "whole", "steer", x, clean.logits.argmax(1), clean=clean)
    found = model.router.reachable(x, attack.threat)  # type: ignore[union-attr, operator]
    sent = [aim.clean.route.experts[:, 0] for aim in attack._aims(target)]  # type: ignore[union-attr]
    assert len(sent) == 4 and found.sum() < found.numel()
    for row in range(len(x)):
        assert {int(experts[row]) for experts in sent} == set(found[row].nonzero()[:, 0].tolist())
    # a learned linear router is steered as it always was
    learned = _mixture(_router("linear", 3, 0), 3)
    routed = learned.routed(x)
    plain = Target(learned, learned, "whole", "steer", x, routed.logits.argmax(1), clean=routed)
    assert [aim.surface for aim in attack._aims(plain)] == ["expert-0", "expert-1", "expert-2"]
