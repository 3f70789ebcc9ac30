"""What reaches an attack that sees scores or labels alone, and what it may spend."""

from __future__ import annotations

import pytest
import torch
from attack_samples import CLASSES, MODELS, build, images, labels_for, pixels_for
from torch import Tensor, nn

from phalanx.attacks import Attack, CarliniWagner, HopSkipJump, RayS, Square, Target, labels_only, scores_only
from phalanx.attacks.black_box import NO_ANSWER, LabelSearch
from phalanx.threat import ThreatModel


class Nan(nn.Module):
    """NaN where the first pixel is above a limit; else class 0."""

    def __init__(self, limit: float = 0.5) -> None:
        super().__init__()
        self.limit = limit
        self.anchor = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        bright = x.flatten(1)[:, :1] > self.limit
        logits = x.new_tensor([[1.0, 0.0]]).expand(len(x), -1) + self.anchor
        return logits.masked_fill(bright, float("nan"))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("wrapper", [scores_only, labels_only])
def test_nothing_but_answers_gets_out(wrapper, name: str) -> None:
    model, x = build(name), pixels_for(name, 9).requires_grad_()
    ask = wrapper(model)
    modes = [m.training for m in model.modules()] if isinstance(model, nn.Module) else []
    buffers = [b.clone() for b in model.buffers()] if isinstance(model, nn.Module) else []
    answer = ask(x)
    assert not answer.requires_grad and answer.grad_fn is None
    assert answer.shape == ((9, CLASSES) if wrapper is scores_only else (9,))
    assert type(answer) is Tensor and (wrapper is scores_only or answer.dtype == torch.int64)
    if isinstance(model, nn.Module):
        assert modes == [m.training for m in model.modules()]
        assert all(map(torch.equal, buffers, model.buffers()))
        with torch.no_grad():
            expected = model.eval()(x)
        assert torch.equal(answer, expected if wrapper is scores_only else expected.argmax(-1))
    public = [getattr(ask, attribute) for attribute in dir(ask) if not attribute.startswith("_")]
    assert not public and not isinstance(ask, nn.Module) and not hasattr(ask, "routed") and not vars(ask).get("model")


def test_the_answers_are_copies() -> None:
    kept = torch.zeros(3, 2)
    scores_only(lambda x: kept)(torch.rand(3, 1)).add_(1)
    assert not kept.any()


def test_an_answer_that_is_not_finite_has_no_label() -> None:
    assert labels_only(Nan())(torch.tensor([[0.2], [0.7]])).tolist() == [0, NO_ANSWER]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.06), ("L2", 0.4)])
def test_square_needs_no_more_than_scores(name: str, norm, eps: float) -> None:
    model, x = build(name), pixels_for(name, 24)
    y = labels_for(model, x)
    attack = Square(eps=eps, norm=norm, queries=60)
    whole, blind = attack.run(model, x, y), attack.run(scores_only(model), x, y)
    assert torch.equal(whole.broken, blind.broken) and torch.equal(whole.predicted, blind.predicted)
    assert whole.broken.sum() > 6 and not whole.broken.all() and blind.flipped is None


LABEL_ATTACKS: list[Attack] = [
    RayS(eps=0.06, queries=80),
    RayS(eps=0.4, norm="L2", queries=80),
    HopSkipJump(eps=0.06, queries=150, evaluations=10),
    HopSkipJump(eps=0.4, norm="L2", queries=150, evaluations=10),
]


@pytest.mark.parametrize("attack", LABEL_ATTACKS, ids=lambda attack: f"{attack.name}-{attack.norm or 'Linf'}")
def test_label_attacks_need_no_more_than_labels(attack: Attack) -> None:
    model, x = build("top-1"), images(16)
    y = labels_for(model, x)

    def hard(x: Tensor) -> Tensor:
        return nn.functional.one_hot(labels_only(model)(x), CLASSES).float()

    whole, blind = attack.run(model, x, y), attack.run(hard, x, y)
    assert torch.equal(whole.x_adv, blind.x_adv) and torch.equal(whole.queries, blind.queries)
    assert whole.broken.sum() > 4 and whole.loss.isnan().all()


@pytest.mark.parametrize("attack", LABEL_ATTACKS, ids=lambda attack: f"{attack.name}-{attack.norm or 'Linf'}")
def test_what_is_not_finite_is_found_and_never_held(attack: Attack) -> None:
    x = torch.full((5, 1, 2, 2), 0.48)
    result = attack.run(Nan(), x, torch.zeros(5, dtype=torch.int64))
    assert result.invalid.all() and not result.broken.any() and (result.first_success > 0).all()


@pytest.mark.parametrize("attack", LABEL_ATTACKS, ids=lambda attack: f"{attack.name}-{attack.norm or 'Linf'}")
def test_no_sample_is_asked_more_than_its_budget(attack: Attack) -> None:
    model, x = build("callable"), images(20)
    y = labels_for(model, x)
    sent: list[int] = []

    def counted(x: Tensor) -> Tensor:
        sent.append(len(x))
        return model(x)

    result = attack.run(counted, x, y)
    searched = result.queries - 2
    assert (searched <= attack.gradient_steps).all() and (searched[~result.broken] == attack.gradient_steps).all()
    # those sent along with a sample's first error are not counted
    assert sum(sent) >= int(result.queries.sum())
    assert max(sent) <= 20
    broken = result.broken & (result.first_success > 0)
    assert torch.equal(result.first_success[broken], searched[broken])


def search_for(size: int, budget: int, judged: bool = True) -> LabelSearch:
    """The label is 0 up to a first pixel of 0.5, every clean image 0.4, the radius 0.2."""

    def model(x: Tensor) -> Tensor:
        above = x.flatten(1)[:, :1] > 0.5
        return torch.cat([~above, above], 1).double()

    x = torch.full((size, 1), 0.4, dtype=torch.float64)
    target = Target(model, model, "whole", "margin", x, torch.zeros(size, dtype=torch.int64), judged=judged)
    return LabelSearch(target, ThreatModel("Linf", 0.2), budget)


def test_a_search_ends_at_the_first_error_inside_the_ball() -> None:
    search = search_for(2, 10)
    points = torch.tensor([[0.45, 0.9, 0.55, 0.51], [0.45, 0.9, 0.8, 0.3]]).double()[:, :, None]
    error, sent = search.asked(points)
    assert error.tolist() == [[False, True, True, True], [False, True, True, False]] and sent.all()
    assert search.found.queries.tolist() == [3, 4] and search.found.first_success.tolist() == [3, -1]
    # the nearest error of each; what came after the first one inside does not count
    torch.testing.assert_close(search.found.x_adv.squeeze(1), torch.tensor([0.55, 0.8]).double())
    stay = search.narrowed()
    assert stay is not None and stay.tolist() == [False, True] and search.rows.tolist() == [1]
    assert search.left.tolist() == [6]
    assert search.asked(torch.full((1, 1, 1), 0.52).double())[0].all()
    assert search.found.first_success.tolist() == [3, 5]


def test_a_search_without_a_verdict_goes_on() -> None:
    search = search_for(1, 10, judged=False)
    search.asked(torch.tensor([[[0.55], [0.51]]]).double())
    assert search.found.queries.tolist() == [2] and search.narrowed() is None
    assert search.found.x_adv.item() == pytest.approx(0.51) and search.found.first_success.tolist() == [2]


def test_a_budget_is_spent_in_order() -> None:
    search = search_for(2, 2)
    wanted = torch.tensor([[True, False, True, True], [False, False, False, True]])
    error, sent = search.asked(torch.full((2, 4, 1), 0.9).double(), wanted)
    assert sent.tolist() == [[True, False, True, False], [False, False, False, True]]
    assert torch.equal(error, sent) and search.left.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("build_attack", "message"),
    [
        (lambda: RayS(queries=0), "queries must be at least 1"),
        (lambda: RayS(tolerance=0), "tolerance must be between 0 and 1"),
        (lambda: RayS(surface="dense"), "surface of RayS is fixed"),
        (lambda: HopSkipJump(norm="L1", eps=1.0), "norm must be L2 or Linf"),
        (lambda: HopSkipJump(evaluations=0), "evaluations must be at least 1"),
        (lambda: HopSkipJump(targeted=True), "targeted of HopSkipJump is fixed"),
        (lambda: CarliniWagner(steps=0), "steps must be at least 1"),
        (lambda: CarliniWagner(searches=0), "searches must be at least 1"),
        (lambda: CarliniWagner(norm="L1"), "norm must be L2 or Linf"),
        (lambda: CarliniWagner(learning_rate=0.0), "learning_rate must be positive"),
        (lambda: CarliniWagner(objective="dlr"), "objective of CarliniWagner is fixed"),
    ],
)
def test_bad_fields_are_named(build_attack, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_attack()
