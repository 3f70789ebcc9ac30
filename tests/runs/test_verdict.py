from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from phalanx.runs.verdict import Verdict, canonical_record

_HELD = {
    "sample": 3,
    "label": 5,
    "attack": "pgd-50",
    "surface": "whole",
    "restart": 0,
    "verdict": "held",
    "predicted": 5,
    "clean_predicted": 5,
    "flipped": False,
    "loss": 0.25,
    "distance": 0.5,
    "queries": 50,
    "first_success": -1,
}


def test_a_row_goes_to_a_record_and_back() -> None:
    row = Verdict(**_HELD)
    assert row.record() == (3, 5, "pgd-50", "whole", 0, "held", 5, 5, 0, 0.25, 0.5, 50, -1)
    assert Verdict.from_record(row.record()) == row
    assert row.key == (3, "pgd-50", "whole", 0)


def test_minus_zero_is_zero() -> None:
    minus = Verdict(**{**_HELD, "loss": -0.0, "distance": -0.0})
    assert canonical_record(minus.record()) == canonical_record(
        Verdict(**{**_HELD, "loss": 0.0, "distance": 0.0}).record()
    )


def test_scalars_of_libraries_become_plain() -> None:
    row = Verdict(
        **{
            **_HELD,
            "sample": np.int64(3),
            "label": torch.tensor(5),
            "loss": torch.tensor(0.25),
            "distance": np.float32(0.5),
            "flipped": np.bool_(False),
        }
    )
    assert canonical_record(row.record()) == canonical_record(Verdict(**_HELD).record())
    assert {type(value) for value in row.record()} == {int, str, float}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", ["loss", "distance"])
def test_what_is_not_finite_is_never_robust(bad: float, field: str) -> None:
    row = Verdict(**{**_HELD, field: bad})
    assert row.verdict == "invalid"
    assert (row.loss, row.distance) == ((None, 0.5) if field == "loss" else (0.25, math.inf))
    assert Verdict(**{**_HELD, field: bad, "verdict": "broken"}).verdict == "broken"


def test_contradictions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sample 3, attack 'pgd-50': held, but label 5 was predicted as 4"):
        Verdict(**{**_HELD, "predicted": 4})
    with pytest.raises(ValueError, match="one of held, broken, invalid, timeout, got 'robust'"):
        Verdict(**{**_HELD, "verdict": "robust"})
