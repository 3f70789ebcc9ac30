"""The table of proved routes."""

from __future__ import annotations

import pytest

from phalanx.errors import CorruptError
from phalanx.report.reach import Reach, read_reach
from phalanx.report.records import Fields


def _evaluation(reach: object) -> Fields:
    return Fields("evaluation.json", {"reach": reach})


def test_it_is_read_from_the_evaluation() -> None:
    found = read_reach(_evaluation({"n": 40, "unflippable": 30, "reachable": 52, "contradicted": 0}))
    assert found == Reach(40, 30, 52, 0)
    assert found is not None and found.mean == pytest.approx(1.3) and found.proved.share == 0.75


@pytest.mark.parametrize("evaluation", [None, _evaluation(None), Fields("evaluation.json", {})])
def test_where_nothing_is_proved_there_is_nothing(evaluation: Fields | None) -> None:
    assert read_reach(evaluation) is None


def test_a_damaged_record_is_named() -> None:
    with pytest.raises(CorruptError, match=r"evaluation.json"):
        read_reach(_evaluation({"n": 40, "unflippable": "many", "reachable": 52, "contradicted": 0}))
