from __future__ import annotations

from phalanx.report.grouping import NoticeGroup, grouped
from phalanx.report.page import Notice


def test_warnings_alike_share_a_place_and_lose_nothing() -> None:
    notices = [
        Notice("fail", "A", "check M1: it is broken"),
        Notice("fail", "B", "check M1: it is broken"),
        Notice("warn", "A", "check E10: square breaks 2; use more"),
        Notice("warn", "A", "no colon"),
        Notice("warn", "B", "check E10: square breaks 3; use more"),
        Notice("warn", "B", "no colon"),
        Notice("warn", "A", "check E10: once more"),
    ]
    assert grouped(notices) == [
        NoticeGroup("fail", "A", "check M1: it is broken"),
        NoticeGroup("fail", "B", "check M1: it is broken"),
        NoticeGroup(
            "warn",
            "A and B",
            "check E10",
            (("A", "square breaks 2; use more"), ("B", "square breaks 3; use more"), ("A", "once more")),
        ),
        NoticeGroup("warn", "A", "no colon"),
        NoticeGroup("warn", "B", "no colon"),
    ]
