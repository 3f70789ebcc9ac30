"""Standard training on noisy images, for randomised smoothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from phalanx.config import bound_config, load_run
from phalanx.data import Batch
from phalanx.loading import to_plain
from phalanx.methods import ST
from phalanx.rng import Rng
from phalanx.routing import MixtureOfExperts


class _Seen(nn.Module):
    """Keeps the images that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.x = torch.empty(0)
        self.last = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        self.x = x
        return self.last(x.flatten(1))


def _noise(sigma: float, batch: Batch, seed: int = 0) -> tuple[Tensor, Any]:
    """What is added to the batch, and the update's logs."""
    seen = _Seen()
    (update,) = ST(noise=sigma).updates(MixtureOfExperts(None, [seen]), {"train": batch}, Rng(seed))
    update.loss()
    first = seen.x
    update.loss()
    # perturbed weights (AWP) are judged on the same noise
    assert torch.equal(first, seen.x)
    return first - batch.x, update.logs


def test_noise_is_gaussian_unclamped_logged_and_of_the_sample() -> None:
    batch = next(tiny.digits().train.batches(64))
    noise, logs = _noise(0.5, batch)
    assert float(noise.std()) == pytest.approx(0.5, rel=0.05) == float(logs["noise"])
    assert abs(float(noise.mean())) < 0.03 and float((batch.x + noise).min()) < -0.5
    assert float((noise.abs() < 0.5).float().mean()) == pytest.approx(0.683, abs=0.03)
    half = Batch(batch.x[::2], batch.y[::2], batch.ids[::2])
    assert torch.allclose(_noise(0.5, half)[0], noise[::2], atol=1e-6)
    # another step is another seed
    assert not torch.allclose(_noise(0.5, batch, seed=1)[0], noise, atol=1e-3)


def test_without_noise_nothing_is_drawn_or_logged() -> None:
    noise, logs = _noise(0.0, next(tiny.digits().train.batches(8)))
    assert not noise.any() and not logs
    with pytest.raises(ValueError, match="noise must be at least 0"):
        ST(noise=-0.1)


def test_the_recipe_trains_with_noise_and_says_so(tmp_path: Path) -> None:
    method = load_run("digits-smoothing").value.method
    assert isinstance(method, ST) and method.noise == 0.25
    tiny.run_training(tmp_path / "run", method=method)
    logged = [record["noise"] for record in tiny.metrics(tmp_path / "run") if record["kind"] == "train"]
    assert len(logged) == 2 and all(0.24 < each < 0.26 for each in logged)


def test_a_run_without_noise_is_bound_as_before_there_was_any() -> None:
    assert "noise" not in bound_config(to_plain(load_run("digits-st").value))["method"]
    assert bound_config(to_plain(load_run("digits-smoothing").value))["method"]["noise"] == 0.25
