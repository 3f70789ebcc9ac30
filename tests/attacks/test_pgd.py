from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from attack_samples import CLASSES, Counting, Linear, answers, build, images, labels_for, pixels_for
from torch import nn

from phalanx.attacks import FGSM, PGD
from phalanx.rng import SampleRng

DUAL = {"Linf": 1.0, "L2": 2.0, "L1": math.inf}


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.1), ("L2", 0.2), ("L1", 0.3)])
@pytest.mark.parametrize("objective", ["cross_entropy", "margin"])
@pytest.mark.parametrize("random_start", [True, False])
def test_a_linear_model_breaks_exactly_within_its_margin(norm, eps: float, objective: str, random_start: bool) -> None:
    # logits [w.x + b, 0]: the smallest margin in the ball is w.x + b - eps * |w| in the dual norm, since pixels in
    # .4 ... .6 stay clear of 0 and 1
    generator = torch.Generator().manual_seed(2)
    w = torch.randn(12, generator=generator, dtype=torch.float64)
    x = 0.4 + 0.2 * torch.rand(1, 12, generator=generator, dtype=torch.float64)
    reach = eps * float(w.norm(p=DUAL[norm]))
    attack = PGD(eps=eps, norm=norm, steps=60, objective=objective, random_start=random_start)
    for share in (0.5, 0.9, 0.99, 1.01, 1.1, 3.0):
        model = Linear([w.tolist(), [0.0] * 12], [share * reach - float(x @ w), 0.0])
        result = attack.run(model, x, torch.tensor([0]))
        assert bool(result.broken) == (share < 1)
        if share > 1:  # the worst point itself was found: the objective there is known
            worst = (1 - share) * reach
            expected = worst if objective == "margin" else math.log1p(math.exp(worst))
            assert float(result.loss) == pytest.approx(expected, rel=1e-3)


def one_pixel(*values: float) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """Logits [x - 1/2, 0]: class 0 from 1/2 upwards (a tie goes to it)."""
    return (
        Linear([[1.0], [0.0]], [-0.5, 0.0]),
        torch.tensor(values, dtype=torch.float64)[:, None],
        torch.zeros(len(values), dtype=torch.int64),
    )


def test_queries_and_first_success_by_hand() -> None:
    # steps of 1/16 in a ball of 3/16: .625 passes .5625 and .5 (a tie, still right) and is wrong at .4375 after 3;
    # .9375 ends at .75; .25 was wrong already
    model, x, y = one_pixel(0.625, 0.9375, 0.25)
    counted = Counting(model)
    result = PGD(eps="3/16", step_size="1/16", steps=5, random_start=False).run(counted, x, y)
    assert result.x_adv.flatten().tolist() == [0.4375, 0.75, 0.25]
    assert result.broken.tolist() == [True, False, True] and result.first_success.tolist() == [3, -1, 0]
    # two verdicts each; the first is seen at 0, 1, 2, 3 steps, the second at 0 to 5
    assert result.queries.tolist() == [2 + 4, 2 + 6, 2]
    assert counted.sizes == [3, 2, 2, 2, 2, 1, 1, 3] and sum(counted.sizes) == int(result.queries.sum())
    # log(1 + exp(-(x - 1/2))) at .4375 and .75
    assert result.loss.tolist() == pytest.approx(
        [math.log1p(math.exp(0.0625)), math.log1p(math.exp(-0.25)), math.nan], nan_ok=True
    )
    assert result.predicted.tolist() == [1, 0, 1] and result.clean_predicted.tolist() == [0, 0, 1]


def test_without_early_drop_the_walk_goes_on() -> None:
    model, x, y = one_pixel(0.625, 0.9375)
    result = PGD(eps="3/16", step_size="1/16", steps=5, random_start=False, early_drop=False).run(model, x, y)
    assert result.x_adv.flatten().tolist() == [0.4375, 0.75]
    assert result.queries.tolist() == [8, 8] and result.first_success.tolist() == [3, -1]


def test_restarts_count_their_steps_and_stop_at_success() -> None:
    model, x, y = one_pixel(0.9375, 0.53)
    result = PGD(eps="3/16", steps=5, restarts=3).run(model, x, y)
    assert result.broken.tolist() == [False, True]
    assert int(result.queries[0]) == 2 + 3 * 6 and int(result.queries[1]) < 2 + 6
    assert PGD(steps=5, restarts=3).gradient_steps == 15


def test_each_restart_starts_elsewhere_and_as_its_stream_says() -> None:
    model, x, y = one_pixel(0.75)
    seen: list[torch.Tensor] = []

    def watched(images: torch.Tensor) -> torch.Tensor:
        seen.append(images.detach().clone())
        return model(images)

    attack, rng = PGD(eps="3/16", steps=1, restarts=3), SampleRng.for_batch(1, seed=2)
    attack.run(watched, x, y, rng=rng)
    # the clean image, then the start and the end of each restart, then the verdict
    starts = seen[1:7:2]
    assert len(seen) == 8 and len({float(start) for start in starts}) == 3
    for restart, start in enumerate(starts):
        assert torch.equal(start, attack.threat.random_start(x, rng, restart=restart))


def test_the_default_step_is_a_quarter_of_the_radius() -> None:
    model, x, y = one_pixel(0.9)
    x_adv = PGD(eps=0.2, steps=1, random_start=False)(model, x, y)
    assert float(x_adv) == pytest.approx(0.85)


def bumpy(centre: float) -> Any:
    """Logits [1 - bump, 0] of one pixel: the loss is largest at `centre` and never reaches an error."""

    def model(x: torch.Tensor) -> torch.Tensor:
        bump = 0.5 * torch.exp(-100 * (x[:, 0] - centre) ** 2)
        return torch.stack([1 - bump, torch.zeros_like(bump)], 1)

    return model


def test_best_keeps_the_largest_loss_and_last_the_last_point() -> None:
    # one step of .25 up, then one down, and so on: the loss at .5 is smaller than at .75, where 3 steps end
    x, y = torch.tensor([[0.5]]), torch.tensor([0])
    walk = {"eps": 0.25, "step_size": 0.25, "random_start": False}
    model = bumpy(0.7)
    ends = [float(PGD(steps=steps, keep="last", **walk).run(model, x, y).x_adv) for steps in (1, 2, 3)]
    assert ends == [0.75, 0.5, 0.75]
    assert [float(PGD(steps=steps, keep="best", **walk).run(model, x, y).x_adv) for steps in (1, 2, 3)] == [0.75] * 3
    # a search without a verdict keeps the last point by default, a search for a verdict the best
    attack = PGD(steps=2, **walk)
    assert float(attack(model, x, y)) == 0.5 and float(attack.run(model, x, y).x_adv) == 0.75
    assert float(attack.search(model, x, y).x_adv) == 0.5
    kept = PGD(steps=2, keep="best", **walk).search(model, x, y)
    assert float(kept.x_adv) == 0.75 and float(kept.loss) == pytest.approx(
        -math.log(1 / (1 + math.exp(-1 + 0.5 * math.exp(-0.25))))
    )


@pytest.mark.parametrize("name", ["top-1", "top-2", "soft", "batchnorm-in-training"])
@pytest.mark.parametrize("objective", ["cross_entropy", "margin"])
def test_more_effort_never_breaks_fewer(name: str, objective: str) -> None:
    model = build(name)
    assert isinstance(model, nn.Module)
    x = images(40, torch.float64)
    y = labels_for(model.double(), x)
    effort = {"eps": 0.05, "step_size": 0.01, "objective": objective}
    base = PGD(steps=3, **effort).run(model, x, y).broken
    assert 8 < int(base.sum()) < 40
    for more in (PGD(steps=6, **effort), PGD(steps=3, restarts=4, **effort), PGD(steps=12, restarts=2, **effort)):
        result = more.run(model, x, y)
        assert not (base & ~result.broken).any()
        # the first restart does not know how many follow
        assert (result.restart[base] == 0).all()


@pytest.mark.parametrize("name", ["top-1", "soft", "batchnorm-in-training"])
@pytest.mark.parametrize("restarts", [1, 3])
def test_early_drop_changes_no_verdict(name: str, restarts: int) -> None:
    model = build(name)
    assert isinstance(model, nn.Module)
    x = images(40, torch.float64)
    y = labels_for(model.double(), x)
    settings = {"eps": 0.06, "steps": 5, "restarts": restarts}
    dropped, whole = (PGD(early_drop=drop, **settings).run(model, x, y) for drop in (True, False))
    assert torch.equal(dropped.broken, whole.broken) and torch.equal(dropped.first_success, whole.first_success)
    assert 8 < int(whole.broken.sum()) < 40
    assert int(dropped.queries.sum()) < int(whole.queries.sum())
    held = ~whole.broken
    torch.testing.assert_close(dropped.x_adv[held], whole.x_adv[held], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["callable", "top-1", "soft", "batchnorm-in-training", "float64"])
@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_nothing_breaks_at_radius_zero(name: str, norm) -> None:
    model = build(name)
    x = images(20, torch.float64 if name == "float64" else torch.float32)
    y = labels_for(model, x)
    result = PGD(eps=0, norm=norm, steps=3).run(model, x, y)
    assert torch.equal(result.x_adv, x)
    assert torch.equal(result.broken, result.clean_predicted != y) and int(result.broken.sum()) == 4


def test_everything_breaks_at_radius_one() -> None:
    torch.manual_seed(0)
    templates = torch.rand(CLASSES, 1, 4, 4)
    y = torch.arange(60) % CLASSES
    x = (templates[y] + 0.1 * torch.randn(60, 1, 4, 4)).clamp(0, 1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, CLASSES))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    result = PGD(eps=1, steps=20).run(model, x, y)
    assert (result.clean_predicted == y).all() and result.broken.all()
    broken = [int(PGD(eps=eps, steps=20).run(model, x, y).broken.sum()) for eps in (0, "4/255", "16/255", "64/255")]
    assert broken == sorted(broken) and broken[0] == 0 < broken[-1]


@pytest.mark.parametrize("name", ["top-1", "soft", "batchnorm-in-training", "float64"])
@pytest.mark.parametrize("surface", ["whole", "dense"])
def test_averaging_changes_nothing_on_a_deterministic_model(name: str, surface: str) -> None:
    model, x = build(name), pixels_for(name, 12)
    y = labels_for(model, x)
    once, averaged = (
        PGD(eps=0.05, steps=5, restarts=2, surface=surface, eot=eot).run(model, x, y)._asdict() for eot in (1, 3)
    )
    assert 0 < int(once["broken"].sum()) < 12
    for field in set(once) - {"queries"}:
        torch.testing.assert_close(averaged[field], once[field], rtol=0, atol=0, equal_nan=True)
    if surface == "whole":
        # all but the two verdicts are made three times
        assert torch.equal(averaged["queries"] - 2, 3 * (once["queries"] - 2))


class Fickle(nn.Module):
    """Logits [c (x - 1/2) + 2, 0] with c = 3, -1, 3, -1, ... from pass to pass: on average x - 1/2 + 2."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        score = (3.0 if self.passes % 2 else -1.0) * (x[:, 0] - 0.5) + 2
        return torch.stack([score, torch.zeros_like(score)], 1)


@pytest.mark.parametrize(("eot", "moves"), [(1, [1, -1, 1, -1, 1]), (2, [-1] * 5), (4, [-1] * 5)])
def test_a_random_model_is_climbed_on_average(eot: int, moves: list[int]) -> None:
    # the clean verdict is the first pass, with c = 3: the first gradient of a single pass has c = -1
    model, x, y = Fickle(), torch.tensor([[0.5]], dtype=torch.float64), torch.tensor([0])
    attack = PGD(eps=0.25, step_size=1 / 64, steps=5, random_start=False, objective="margin", keep="last", eot=eot)
    result = attack.run(model, x, y)
    assert float(result.x_adv) == 0.5 + sum(moves) / 64
    assert not result.broken
    # six points, and two verdicts
    assert result.queries.tolist() == [2 + 6 * eot] == [model.passes]
    if eot > 1:  # the mean of the margin, not that of one pass
        assert float(result.loss) == pytest.approx(5 / 64 - 2)


@pytest.mark.parametrize("first", [3.0, -1.0])
def test_an_error_of_one_pass_is_none_of_the_mean(first: float) -> None:
    # two passes at each point answer 3 and -1, in this order or the other; the mean of 1 is right: none is dropped
    def model(x: torch.Tensor) -> torch.Tensor:
        passes.append(len(x))
        clean = len(passes) == 1
        score = (3.0 if clean else first if len(passes) % 2 == 0 else 2.0 - first) + 0 * x[:, 0]
        return torch.stack([score, torch.zeros_like(score)], 1)

    passes: list[int] = []
    x, y = torch.tensor([[0.5]], dtype=torch.float64), torch.tensor([0])
    result = PGD(eps=0.25, steps=3, random_start=False, eot=2).run(model, x, y)
    assert sum(passes) == 2 + 4 * 2 == int(result.queries)


def test_one_step_from_the_clean_image_of_full_length_is_fgsm() -> None:
    model, x = build("top-1"), images(9)
    y = labels_for(model, x)
    step = PGD(eps=0.05, step_size=0.05, steps=1, random_start=False, keep="last", early_drop=False)
    assert torch.equal(step.run(model, x, y).x_adv, FGSM(eps=0.05).run(model, x, y).x_adv)


# class scores 3, 2, 1 at pixels (1, 2/3, 1/3): the runner-up of class 0 is 1
THREE = Linear([[3.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 3.0]])
RAMP = torch.tensor([[0.75, 0.5, 0.25]], dtype=torch.float64)


@pytest.mark.parametrize("wanted", [1, 2])
@pytest.mark.parametrize("objective", ["cross_entropy", "margin"])
def test_targeted_reaches_the_class(wanted: int, objective: str) -> None:
    # .75 - t against .25 + t: a radius of .3 is enough for either class
    attack = PGD(eps=0.3, steps=20, targeted=True, objective=objective, early_drop=False)
    result = attack.run(THREE, RAMP, torch.tensor([0]), target=torch.tensor([wanted]))
    assert result.predicted.tolist() == [wanted] and result.broken.all()


def test_targeted_without_a_target_aims_at_the_runner_up() -> None:
    counted = Counting(THREE)
    attack = PGD(eps=0.3, steps=4, targeted=True, random_start=False, early_drop=False)
    result = attack.run(counted, RAMP, torch.tensor([0]))
    assert result.predicted.tolist() == [1]
    # two verdicts, five points, and the look at the clean image that names the runner-up
    assert result.queries.tolist() == [8] == [sum(counted.sizes)]


def test_the_random_start_follows_the_streams() -> None:
    model, x = build("top-1"), images(5)
    y = labels_for(model, x)
    attack = PGD(eps=0.05, steps=1)
    default, same, other = (
        attack(model, x, y, rng=rng) for rng in (None, SampleRng.for_batch(5), SampleRng.for_batch(5, 1))
    )
    assert torch.equal(default, same) and not torch.equal(default, other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"restarts": 0}, "restarts must be at least 1, got 0"),
        ({"eot": 0}, "eot must be at least 1, got 0"),
        (
            {"restarts": 2, "random_start": False},
            "restarts must be 1 without random_start, got 2: all would be",
        ),
        ({"gaussian_start": 0.0}, "gaussian_start must be positive and finite, got 0.0; leave it out for none"),
        ({"gaussian_start": math.inf}, "gaussian_start must be positive and finite, got inf"),
        (
            {"gaussian_start": 0.001, "random_start": False},
            "gaussian_start is 0.001, but random_start is false; leave one of them out",
        ),
        ({"step_size": "2/0"}, "step_size must be a positive number or a fraction such as '2/255', got '2/0'"),
        ({"step_size": -0.1}, "step_size must be a positive number or a fraction such as '2/255', got -0.1"),
        ({"step_size": 0}, "step_size must be a positive number or a fraction such as '2/255', got 0"),
        ({"objective": "kl", "targeted": True}, "objective 'kl' is for untargeted attacks alone, got targeted=True"),
        ({"objective": "kl_route", "targeted": True}, "objective 'kl_route' is for untargeted attacks alone"),
        ({"objective": "steer", "targeted": True}, "objective 'steer' is for untargeted attacks alone"),
        (
            {"objective": "mislead", "surface": "mixing", "targeted": True},
            "objective 'mislead' is for untargeted attacks alone",
        ),
        ({"objective": "steer_to"}, "objective 'steer_to' is for targeted attacks alone, got targeted=False; change"),
        ({"eps": "8/0"}, "eps must be a number or a fraction such as '8/255', got '8/0'"),
        ({"eps": -1}, "eps must be at least 0, got -1; pixels lie in [0, 1]"),
        (
            {"objective": "loss"},
            "objective must be one of cross_entropy, margin, dlr, dlr_targeted, kl, kl_route, steer, steer_to, "
            "mislead, joint-J, cross_entropy_fp16-J, cross_entropy_route-J, got 'loss'",
        ),
        ({"surface": "half"}, "surface must be one of whole"),
    ],
)
def test_settings_that_make_no_attack(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        PGD(**{"eps": 0.1, **arguments})


@pytest.mark.parametrize("judged", [False, True])
def test_a_gaussian_start_is_clipped_where_a_verdict_follows_only(judged: bool) -> None:
    seen: list[torch.Tensor] = []
    x = torch.zeros(400, 6, dtype=torch.float64)

    def model(images: torch.Tensor) -> torch.Tensor:
        seen.append(images.detach())
        return torch.stack([1 + images.sum(1), 0 * images.sum(1)], 1)

    attack = PGD(eps=0.05, steps=1, gaussian_start=0.02)
    y, rng = torch.zeros(400, dtype=torch.int64), SampleRng.for_batch(400, 3)
    (attack.run if judged else attack.search)(model, x, y, rng=rng)
    start = seen[1 if judged else 0]
    noise = 0.02 * rng.normal("start.gaussian", (6,)).double()
    assert torch.equal(start, noise.clamp(0, 0.05) if judged else noise)
    # of the size that was asked for, and some of it outside the ball
    assert noise.std().item() == pytest.approx(0.02, rel=0.05) and (noise > 0.05).any() and (noise < 0).any()


def test_restarts_count_without_a_verdict_too() -> None:
    model, x = build("top-1"), images(40)
    y = answers(model, x)
    options = {"eps": 0.15, "steps": 2, "step_size": 0.01}
    rng = SampleRng.for_batch(40, 5)
    several = PGD(**options, restarts=6).search(model, x, y, rng=rng)
    best = PGD(**options, restarts=6, keep="best").search(model, x, y, rng=rng)
    last = PGD(**options, restarts=6, keep="last").search(model, x, y, rng=rng)
    assert torch.equal(several.x_adv, best.x_adv) and several.restart.unique().numel() > 1
    assert (last.restart == 5).all()
    means = [torch.nn.functional.cross_entropy(model(found.x_adv), y) for found in (best, last)]
    assert means[0] > means[1]


def test_a_restart_has_a_gaussian_start_of_its_own() -> None:
    seen: list[torch.Tensor] = []
    x = torch.full((3, 6), 0.5, dtype=torch.float64)

    def model(images: torch.Tensor) -> torch.Tensor:
        seen.append(images.detach())
        return torch.stack([9 + images.sum(1), 0 * images.sum(1)], 1)

    PGD(eps=0.05, steps=1, restarts=2, gaussian_start=0.01, keep="last").search(model, x, torch.zeros(3).long())
    assert len(seen) == 2 and not torch.equal(*seen)
