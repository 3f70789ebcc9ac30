"""Targeted success on models where it is known which class is in reach."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tiny
from phalanx.data import ImageSet
from phalanx.errors import InputError
from phalanx.evaluation.targeted import drawn_targets, targeted_success
from phalanx.rng import SampleRng
from phalanx.threat import ThreatModel

THREAT = ThreatModel("Linf", "3/16")


class Lines(nn.Module):
    """Three classes by one pixel t in sixteenths: 0 up to 9, 1 between, 2 above 10. At 8, class 2 is 2 away, and the
    way there leads through class 1; above 12 the answers may be lost."""

    def __init__(self, nan_above: float = 99.0) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.ones(()))
        self.nan_above = nan_above

    def forward(self, x: Tensor) -> Tensor:
        t = 16 * x.flatten(1)[:, :1] * self.slope
        logits = torch.cat([0 * t, t - 9, 2 * t - 19], 1)
        return logits.masked_fill(t > self.nan_above, float("nan"))


def pixels(*greys: int, label: int = 0) -> ImageSet:
    array = np.array(greys, dtype=np.uint8).reshape(-1, 1, 1, 1)
    return ImageSet(array, np.full(len(greys), label, dtype=np.int64), np.arange(len(greys)), 16)


def measured(model: nn.Module, images: ImageSet, **changes: object):
    settings = {"num_classes": 3, "batch_size": 8, "seed": 0, "device": "cpu", **changes}
    return targeted_success(model, images, THREAT, 20, **settings)  # type: ignore[arg-type]


def test_it_goes_past_another_error_to_the_class_drawn() -> None:
    found = measured(Lines(), pixels(*[8] * 40))
    assert found.n == found.reached == 40 and found.already == found.invalid == 0 and found.rate == 1
    (first, second) = found.cells
    assert first[:2] == (0, 1) and second[:2] == (0, 2) and first[2] + second[2] == 40
    assert first[2] == first[3] > 10 and second[2] == second[3] > 10


def test_only_exactly_that_class_counts() -> None:
    # at 7 three grey levels reach class 1 alone: they end on the boundary to class 2
    found = measured(Lines(), pixels(*[7] * 40))
    cells = {(label, target): (n, reached) for label, target, n, reached in found.cells}
    assert cells[0, 1][0] == cells[0, 1][1] and cells[0, 2][1] == 0 and found.reached == cells[0, 1][0]


def test_what_is_answered_so_already_and_what_is_lost() -> None:
    already = measured(Lines(), pixels(*[15] * 20))
    assert already.reached > 0 and already.already == already.reached == {c[1]: c[2] for c in already.cells}[2]
    lost = measured(Lines(nan_above=4.0), pixels(*[15] * 20))
    assert (lost.reached, lost.invalid) == (0, 20)


def test_targets_are_drawn_from_the_others_evenly() -> None:
    y = torch.arange(4).repeat(1000)
    drawn = drawn_targets(y, 4, SampleRng.for_batch(4000))
    assert (drawn != y).all()
    for label in range(4):
        share = torch.bincount(drawn[y == label], minlength=4) / 1000
        assert ((share - torch.tensor([0.0 if k == label else 1 / 3 for k in range(4)])).abs() < 0.06).all()
    with pytest.raises(InputError, match="needs 2 classes"):
        drawn_targets(y[:1], 1, SampleRng.for_batch(1))


def test_it_does_not_depend_on_batches_and_leaves_the_model_as_it_was(trained) -> None:
    images, threat = tiny.digits().test, ThreatModel("Linf", "1/8")
    settings = {"num_classes": 10, "seed": 3, "device": "cpu"}
    trained.train()
    seen: list[tuple[int, int, str]] = []
    whole = targeted_success(
        trained, images, threat, 8, batch_size=64, progress=lambda *told: seen.append(told), **settings
    )
    assert trained.training and all(parameter.requires_grad for parameter in trained.parameters())
    trained.eval()
    assert whole == targeted_success(trained, images, threat, 8, batch_size=7, **settings)
    assert 0 < whole.reached < whole.n == 40 and seen == [(40, 40, "targeted apgd-8")]
    assert sum(n for _, _, n, _ in whole.cells) == 40 and sum(r for *_, r in whole.cells) == whole.reached
    record = json.loads(json.dumps(whole.to_json()))
    assert record["schema"] == 1 and record["reached"] == whole.reached and len(record["cells"]) == len(whole.cells)


def test_the_model_answers_in_evaluation_mode() -> None:
    torch.manual_seed(0)
    model = tiny.noisy_cnn(10, 8, 1).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = {"num_classes": 10, "batch_size": 64, "seed": 3, "device": "cpu"}
    found = targeted_success(model, tiny.digits().test, ThreatModel("Linf", "1/4"), 5, **settings)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert found == targeted_success(model.eval(), tiny.digits().test, ThreatModel("Linf", "1/4"), 5, **settings)


def test_the_data_must_be_the_model_s(trained) -> None:
    with pytest.raises(InputError, match="num_classes must be 10"):
        measured(trained, tiny.digits().test)
