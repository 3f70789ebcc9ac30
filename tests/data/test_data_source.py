from __future__ import annotations

import dataclasses

from phalanx.data.source import Source


def test_the_digest_follows_the_identity_alone() -> None:
    source = Source("t", ("a", "b"), {"train": 1}, {"x": 1, "y": [2]}, lambda split, problems: iter(()))
    assert source.digest == dataclasses.replace(source, identity={"y": [2], "x": 1}, title="other").digest
    assert source.digest != dataclasses.replace(source, identity={"x": 1, "y": [3]}).digest
