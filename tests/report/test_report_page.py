from __future__ import annotations

from pathlib import Path

import pytest
from report_sample import make_source, page_of

from phalanx.report import Page
from phalanx.runs.rate import Rate


def test_a_rate_carries_its_wilson_interval() -> None:
    # z = 1.96: centre (0.5 + 1.92/10) / (1 + 3.84/10) = 0.5, half 1.96 / 1.384 * sqrt(0.025 + 3.84/400) = 0.2634
    low, high = Rate(5, 10).interval
    assert (Rate(5, 10).share, low, high) == pytest.approx((0.5, 0.2366, 0.7634), abs=1e-4)


def test_no_images_are_no_share_and_the_widest_interval() -> None:
    assert (Rate(0, 0).share, Rate(0, 0).interval) == (0.0, (0.0, 1.0))


def test_invalid_answers_add_up_over_clean_and_attacks(tmp_path: Path) -> None:
    # two clean ones, one under pgd-50
    page = page_of(make_source(tmp_path, clean="hhhhiib", attacks={"pgd-50": "hhbi"}))
    assert (page.rows[0].clean_invalid, page.rows[0].invalid) == (2, 3)


def test_the_largest_load(page: Page) -> None:
    assert page.rows[0].largest_load == 0.4
