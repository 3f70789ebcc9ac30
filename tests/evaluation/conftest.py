"""What several tests of evaluation measure."""

from __future__ import annotations

import pytest
import torch

import tiny
from phalanx.routing import MixtureOfExperts


@pytest.fixture(scope="module")
def trained() -> MixtureOfExperts:
    """A mixture that is right about most digits and robust on some."""
    model: MixtureOfExperts = tiny.mixture(3, seed=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    (batch,) = tiny.digits().train.batches(100)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(batch.x), batch.y).backward()
        optimizer.step()
    return model.eval()
