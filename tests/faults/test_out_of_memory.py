"""A step that does not fit into the memory: training stops, names the batch that would fit, and nothing is lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from phalanx.errors import InputError
from phalanx.methods import ST, FreeAT, Method
from phalanx.nn.memory import RoomForWeights, attempted
from phalanx.routing import MixtureOfExperts
from phalanx.runs import RunFolder
from phalanx.runs.checkpoint import load_latest

METHODS: dict[str, Callable[[], Method]] = {
    "st": ST,
    "at": tiny.at,
    "free": lambda: FreeAT(replays=2).within(tiny.THREAT),
}
AFTER = 4
"""Steps that are done when the memory gets short."""


class Full(nn.Module):
    """A network with BatchNorm and dropout that has room for so many images in training mode; None for any number."""

    room: int | None = None
    error: type[RuntimeError] = torch.OutOfMemoryError

    def __init__(self) -> None:
        super().__init__()
        self.network = tiny.noisy_cnn(10, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.room is not None and len(x) > self.room:
            raise self.error("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        answer: Tensor = self.network(x)
        return answer


def _model() -> tuple[nn.Module, Full]:
    torch.manual_seed(0)
    network = Full()
    return MixtureOfExperts(None, [network]), network


def _train(folder: Path, method: str, room: int | None, after: int = AFTER, **error: Any) -> None:
    model, network = _model()
    vars(network).update(error)

    def shrink() -> None:
        network.room = room

    if not after:
        shrink()
    reporter = tiny.StopAt(after, shrink)
    tiny.run_training(folder, model, METHODS[method](), checkpoint_seconds=0.0, ema_decay=0.9, reporter=reporter)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_training_stops_and_names_the_batch_that_would_fit(
    tmp_path: Path, method: str, error: type[RuntimeError]
) -> None:
    _train(tmp_path / "whole", method, None)
    run = tmp_path / "run"
    with pytest.raises(InputError) as caught:
        _train(run, method, 11, error=error)
    assert caught.value.key == "training.batch_size" and caught.value.exit_code == 2
    assert str(caught.value) == (
        f"a step of 32 images does not fit into the memory of cpu (step {AFTER}); 8 images at once do: set "
        "training.batch_size=8, take narrower experts, or free memory and give the same command again"
    )
    # what smaller batches did to weights and statistics while they were tried is nowhere
    kept = load_latest(run / "checkpoints")
    assert kept is not None and not kept.notes and kept.step == AFTER
    assert RunFolder(run).status() == "running"
    _train(run, method, None)
    assert tiny.result(run) == tiny.result(tmp_path / "whole")


def test_not_even_one_image(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not even one image does, take narrower experts"):
        _train(tmp_path / "run", "st", 0, after=0)


def test_other_errors_are_not_taken_for_it(tmp_path: Path) -> None:
    class Broken(RuntimeError):
        def __init__(self, message: str) -> None:
            super().__init__("shapes differ")

    with pytest.raises(Broken, match="shapes differ"):
        _train(tmp_path / "run", "st", 11, error=Broken)


def test_what_suffices_is_given_back() -> None:
    assert attempted(lambda: None) == (None,)


def test_weights_that_do_not_fit_are_refused_before_they_are_allocated() -> None:
    with RoomForWeights(4 * (8 * 5 + 5)):
        nn.Linear(8, 5)
    with RoomForWeights(4 * (8 * 5 + 4)), pytest.raises(InputError, match="weights do not fit into the memory"):
        nn.Linear(8, 5)
    with RoomForWeights(10**9), pytest.raises(InputError, match="weights do not fit"):
        nn.Linear(10**12, 10**3)
    with RoomForWeights(None):
        nn.Linear(8, 5)
