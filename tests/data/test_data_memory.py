from __future__ import annotations

import pytest
import torch

from phalanx.data import memory


def test_free_memory_is_a_plausible_number_of_bytes() -> None:
    assert 2**20 < memory.free_memory(torch.device("cpu")) < 2**50


def test_a_set_fits_under_a_quarter_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: 400)
    assert memory.fits(99, torch.device("cpu")) and not memory.fits(100, torch.device("cpu"))
