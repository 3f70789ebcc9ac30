"""The page that most tests of reports start from."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_sample import make_source, page_of

from phalanx.report import Page


@pytest.fixture
def page(tmp_path: Path) -> Page:
    """One finished row: 8 of 10 images right when clean, 5 of 10 held under pgd-50."""
    return page_of(make_source(tmp_path))
