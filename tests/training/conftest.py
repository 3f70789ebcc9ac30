from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests stop a run, never the machine: what is written counts, not when it reaches the platter."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
