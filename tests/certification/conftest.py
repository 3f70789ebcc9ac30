"""Networks here are so small that threads wait for each other longer than they work."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from phalanx.workflow.compute import cpu_threads


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    with cpu_threads(1):
        yield
