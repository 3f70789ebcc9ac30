from __future__ import annotations

import torch
from torch import nn

from phalanx.training.ema import Average


def _set(model: nn.Linear, value: float) -> None:
    with torch.no_grad():
        model.weight.fill_(value)


def test_by_hand() -> None:
    model = nn.Linear(1, 1, bias=False).double()
    _set(model, 1.0)
    average = Average(model, decay=0.5)
    seen = []
    for step, value in enumerate([11.0, 0.0, 8.0]):
        _set(model, value)
        average.update(model, step)
        seen.append(average.model.weight.item())
    # decays min(0.5, 1/10) = 0.1, min(0.5, 2/11), min(0.5, 3/12) = 0.25
    first = 0.1 * 1 + 0.9 * 11
    second = 2 / 11 * first
    third = 0.25 * second + 0.75 * 8
    assert torch.allclose(torch.tensor(seen), torch.tensor([first, second, third]), rtol=1e-6)


def test_late_steps_use_the_given_decay() -> None:
    model = nn.Linear(1, 1, bias=False).double()
    _set(model, 0.0)
    average = Average(model, decay=0.5)
    _set(model, 4.0)
    average.update(model, 10**6)
    assert average.model.weight.item() == 2.0


def test_statistics_are_averaged_counters_copied_and_nothing_is_trained() -> None:
    model = nn.BatchNorm1d(2)
    average = Average(model, decay=0.5)
    model(torch.tensor([[0.0, 2.0], [2.0, 6.0]]))
    # running mean 0.1 * batch mean (1, 4); the average follows with weight 1 - 1/10
    average.update(model, 0)
    assert torch.allclose(average.model.running_mean, 0.9 * torch.tensor([0.1, 0.4]))
    assert average.model.num_batches_tracked.item() == 1
    assert not average.model.training
    assert not any(parameter.requires_grad for parameter in average.model.parameters())
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())


def test_until_its_start_it_is_the_model() -> None:
    model = nn.Linear(1, 1, bias=False).double()
    _set(model, 1.0)
    average = Average(model, decay=0.5, start=2)
    seen = []
    for step, value in enumerate([11.0, 3.0, 10.0, 0.0]):
        _set(model, value)
        average.update(model, step)
        seen.append(average.model.weight.item())
    # steps 2 and 3 are its first: decays 1/10 and 2/11
    late = 0.1 * 3 + 0.9 * 10
    assert torch.allclose(torch.tensor(seen), torch.tensor([11.0, 3.0, late, 2 / 11 * late]))


def test_a_shared_weight_is_averaged_once() -> None:
    first = nn.Linear(1, 1, bias=False)
    model = nn.Sequential(first, nn.Linear(1, 1, bias=False))
    model[1].weight = first.weight
    _set(first, 0.0)
    average = Average(model, decay=0.5)
    _set(first, 4.0)
    average.update(model, 10**6)
    assert [layer.weight.item() for layer in average.model] == [2.0, 2.0]
