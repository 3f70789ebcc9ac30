"""Fixtures of this room."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Command, commands


@pytest.fixture(scope="module")
def command() -> Iterator[Command]:
    """Runs a command line in this process, up to where the work would start."""
    with commands() as run:
        yield run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where nothing else is."""
    return tmp_path_factory.mktemp("fuzz")
