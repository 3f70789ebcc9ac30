from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest

from phalanx.errors import CorruptError, DiskError
from phalanx.runs.metrics import MetricsLog, read_metrics


def test_records_come_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    with MetricsLog(path) as log:
        log.append({"step": 1, "loss": np.float32(0.5), "loads": [np.int64(3), 4]})
        log.append({"step": 2, "text": "two\nlines\r\u2028"})
    with MetricsLog(path) as log:
        log.append({"step": 3})
    assert read_metrics(path) == [
        {"step": 1, "loss": 0.5, "loads": [3, 4]},
        {"step": 2, "text": "two\nlines\r\u2028"},
        {"step": 3},
    ]


def test_non_finite_numbers_are_null_and_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.append({"loss": math.nan, "experts": {"loads": [1.0, -math.inf]}})
        with pytest.raises(ValueError, match="reserved"):
            log.append({"nonfinite": {}})

    def refuse(name: str) -> None:
        raise AssertionError(f"not strict JSON: {name}")

    assert json.loads(path.read_text(), parse_constant=refuse) == {
        "loss": None,
        "experts": {"loads": [1.0, None]},
        "nonfinite": {"loss": "nan", "experts.loads.1": "-inf"},
    }


@pytest.mark.parametrize("tail", [b'{"step": 3', b"\0\0\0\0", b'{"step": 3\0\n', b"\xff\xfe"])
def test_a_torn_last_line_is_passed_over_and_cut_on_opening(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = b'{"step":1}\n{"step":2}\n'
    path.write_bytes(whole + tail)
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]
    with MetricsLog(path) as log:
        assert log.offset() == len(whole)
        log.append({"step": 3})
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_damage_before_the_last_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step":1}\n{"st\n{"step":3}\n')
    with pytest.raises(CorruptError, match=r"metrics\.jsonl, line 2"):
        read_metrics(path)


def test_a_resume_cuts_back_to_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.append({"step": 1})
        offset = log.offset()
        digest = log.digest(offset)
        assert digest == hashlib.sha256(b'{"step":1}\n').hexdigest()
        log.append({"step": 2})
    with MetricsLog(path) as log:
        log.truncate_to(offset)
        assert log.digest(log.offset()) == digest
        log.append({"step": 2, "again": True})
        assert read_metrics(path) == [{"step": 1}, {"step": 2, "again": True}]
        with pytest.raises(CorruptError, match=r"its checkpoint was made at 999: lines are lost"):
            log.truncate_to(999)
        with pytest.raises(CorruptError, match="no line ends at byte 3"):
            log.truncate_to(3)
        log.truncate_to(0)
    assert read_metrics(path) == []


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, tiny_disk: Path) -> None:
    path = tiny_disk / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.append({"pad": "x" * 500_000})
        with pytest.raises(DiskError, match=r"metrics\.jsonl: No space"):
            log.append({"pad": "y" * 800_000})
        log.append({"step": 2})
    assert [len(record.get("pad", "")) for record in read_metrics(path)] == [500_000, 0]


def test_a_kill_while_appending_loses_no_earlier_line(tmp_path: Path, in_child) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.append({"step": 1})
    assert in_child(lambda: log.append({"step": 2}), "metrics.append:kill") == -9
    assert read_metrics(path) == [{"step": 1}]
    log.close()
