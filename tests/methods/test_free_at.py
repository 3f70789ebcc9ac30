"""Free adversarial training: weights and images move by one backward pass."""

# B batch

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from phalanx.data import Batch
from phalanx.methods import FreeAT
from phalanx.rng import Rng
from phalanx.routing import MixtureOfExperts
from phalanx.threat import NORMS, ThreatModel
from phalanx.training import SGD, Constant
from reference.free_at import free_at

RNG = Rng(5)


def _batches(*sizes: int) -> Iterator[Batch]:
    (whole,) = tiny.digits().train.batches(100)
    parts = zip(*(tensor.split([*sizes, 100 - sum(sizes)]) for tensor in whole), strict=True)
    for x, y, ids in list(parts)[: len(sizes)]:
        yield Batch(x.double(), y, ids)


def _descend(model: nn.Module, method: FreeAT, batch: Batch, lr: float = 0.5) -> None:
    """A step as the loop makes it, in plain gradient descent."""
    for update in method.updates(model, {"train": batch}, RNG):
        model.zero_grad()
        update.loss().value.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= lr * parameter.grad


@pytest.mark.parametrize(("replays", "step_size"), [(1, None), (3, None), (2, "1/32")])
def test_it_is_algorithm_1_over_batches_of_any_size(replays: int, step_size: str | None) -> None:
    model, reference = (tiny.mixture(1).double().train() for _ in range(2))
    method = FreeAT(replays=replays, step_size=step_size).within(tiny.THREAT)
    batches = list(_batches(6, 9, 4))
    for batch in batches:
        _descend(model, method, batch)
    length = 3 / 16 if step_size is None else 1 / 32
    left = free_at(reference.experts[0], [(batch.x, batch.y) for batch in batches], replays, 3 / 16, length, 0.5)
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, msg=name)
    # the last batch of four left the other five places as they were
    torch.testing.assert_close(method.state_dict()["perturbation"], left)
    assert left[4:].abs().amax() > 0


class _Counting(MixtureOfExperts):
    """Remembers the images of every pass, and in which mode it was."""

    def __init__(self, expert: nn.Module) -> None:
        super().__init__(None, [expert])
        self.seen: list[tuple[Tensor, bool]] = []

    def routed(self, x: Tensor, route: Any = None) -> Any:
        self.seen.append((x.detach(), self.training))
        return super().routed(x, route)


def test_a_replay_is_one_pass_in_training_mode() -> None:
    model = _Counting(tiny.mixture(1).experts[0].double()).train()
    method, (batch,) = FreeAT(replays=4).within(tiny.THREAT), _batches(8)
    _descend(model, method, batch)
    assert [training for _, training in model.seen] == [True] * 4
    # the perturbation starts at zero and moves with every replay
    assert torch.equal(model.seen[0][0], batch.x)
    assert all((a[0] != b[0]).any() for a, b in zip(model.seen, model.seen[1:], strict=False))


@pytest.mark.parametrize("norm", NORMS)
def test_images_stay_in_the_ball_and_in_the_range_of_their_own_pixels(norm) -> None:
    model = _Counting(tiny.mixture(1).experts[0].double()).train()
    threat = ThreatModel(norm, 0.3)
    method = FreeAT(replays=3, step_size=0.7).within(threat)
    for batch in _batches(8, 8):
        model.seen.clear()
        _descend(model, method, batch)
        assert len(model.seen) == 3
        assert all(threat.contains(x_adv, batch.x).all() for x_adv, _ in model.seen)
    assert any((x_adv != batch.x).any() for x_adv, _ in model.seen[:1])


def test_gradients_of_a_pass_that_does_not_count_are_not_added() -> None:
    model, other = (tiny.mixture(1).double().train() for _ in range(2))
    twice, once = (FreeAT(replays=2, norm="L2", eps=1.0) for _ in range(2))
    (batch,) = _batches(8)
    for update in twice.updates(model, {"train": batch}, RNG):
        # as adversarial weight perturbation does
        (update.loss().value * -100).backward()
        model.zero_grad()
        update.loss().value.backward()
    for update in once.updates(other, {"train": batch}, RNG):
        other.zero_grad()
        update.loss().value.backward()
    assert torch.equal(twice.state_dict()["perturbation"], once.state_dict()["perturbation"])


def test_a_model_that_ignores_its_images_moves_none_and_says_so() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(10, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return self.bias.expand(len(x), -1)

    method, (batch,) = FreeAT(replays=2).within(tiny.THREAT), _batches(8)
    logs = []
    model = MixtureOfExperts(None, [Constant()]).train()
    for update in method.updates(model, {"train": batch}, RNG):
        update.loss().value.backward()
        logs.append(update.logs)
    assert logs[0] == {} and logs[1]["zero_gradient"].item() == 1.0
    assert not method.state_dict()["perturbation"].any()


def test_what_it_carries_is_its_state() -> None:
    method, (first, second) = FreeAT(replays=2).within(tiny.THREAT), _batches(8, 8)
    assert method.state_dict() == {}
    _descend(tiny.mixture(1).double().train(), method, first)
    other = FreeAT(replays=2).within(tiny.THREAT)
    other.load_state_dict(method.state_dict())
    models = [tiny.mixture(1).double().train() for _ in range(2)]
    for each, model in zip((method, other), models, strict=True):
        _descend(model, each, second)
    assert torch.equal(models[0].experts[0][2].weight, models[1].experts[0][2].weight)
    # a method that a recipe's threat is given to begins anew
    assert method.within(tiny.THREAT).state_dict() == {} and method == other


def test_in_the_loop_a_batch_is_several_updates(tmp_path: Path) -> None:
    def distance(replays: int) -> float:
        model, before = tiny.mixture(1), tiny.mixture(1).experts[0][2].weight
        folder = tmp_path / str(replays)
        method = FreeAT(replays=replays).within(tiny.THREAT)
        optimizer = SGD(lr=0.01, momentum=0.0, weight_decay=0.0)
        tiny.run_training(folder, model, method, epochs=1, optimizer=optimizer, schedule=Constant())
        assert tiny.metrics(folder)[0]["step"] == 3
        return float((model.experts[0][2].weight - before).norm().detach())

    assert distance(4) > 3 * distance(1)
    record = tiny.metrics(tmp_path / "4")[0]
    assert record["adversarial_accuracy"] == record["accuracy"] and record["zero_gradient"] == 0.0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FreeAT(replays=0), "replays must be at least 1, got 0; 8 is the paper's"),
        (lambda: FreeAT(balance=-1), "balance must be at least 0, got -1"),
        (lambda: FreeAT(step_size="2/x"), "step_size must be a number or a fraction such as '2/255'"),
        (lambda: FreeAT(eps="8/0"), "eps must be a number or a fraction such as '8/255'"),
        (lambda: FreeAT(eps=8, norm="Linf"), r"eps must be at most 1 for Linf"),
        (lambda: FreeAT().threat, r"eps must be given, for example FreeAT\(eps='8/255'\), got None"),
    ],
)
def test_a_bad_value_is_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
