from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from phalanx.errors import CorruptError, InputError
from phalanx.runs import sidecar
from phalanx.runs.atomic import write_text


def test_the_sidecar_is_what_sha256sum_writes(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    sidecar.write_protected(path, b"abc")
    assert (tmp_path / "a.bin.sha256").read_text() == f"{hashlib.sha256(b'abc').hexdigest()}  a.bin\n"
    assert sidecar.read_protected(path) == b"abc"
    assert sidecar.verify_sidecar(path) == hashlib.sha256(b"abc").hexdigest()


@pytest.mark.parametrize("name", ["a.bin", "a.bin.sha256"])
def test_every_damage_is_found(tmp_path: Path, each_damage, name: str) -> None:
    path = tmp_path / "a.bin"
    sidecar.write_protected(path, bytes(range(256)))
    for _ in each_damage(tmp_path / name):
        with pytest.raises(CorruptError, match=r"a\.bin"):
            sidecar.read_protected(path)
    assert sidecar.read_protected(path) == bytes(range(256))


def test_a_kill_at_every_step_leaves_old_or_new_verifiable(tmp_path: Path, in_child, failpoints) -> None:
    path = tmp_path / "a.bin"
    sidecar.write_protected(path, b"old")
    steps = failpoints(lambda: sidecar.write_protected(path, b"old"))
    assert len(steps) == 10
    seen = set()
    for step in steps:
        sidecar.write_protected(path, b"old")
        assert in_child(lambda: sidecar.write_protected(path, b"new"), f"{step}:kill") == -9
        seen.add(sidecar.read_protected(path))
    assert seen == {b"old", b"new"}


def test_replacing_does_not_bless_a_damaged_file(tmp_path: Path, in_child) -> None:
    path = tmp_path / "a.bin"
    sidecar.write_protected(path, b"old")
    path.write_bytes(b"bad")
    assert in_child(lambda: sidecar.write_protected(path, b"new"), "write.open/a.bin:kill") == -9
    with pytest.raises(CorruptError, match="expected sha256"):
        sidecar.read_protected(path)


def test_missing_files_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist; check the name"):
        sidecar.read_protected(tmp_path / "a.bin")
    write_text(tmp_path / "a.bin", "alone")
    with pytest.raises(CorruptError, match=r"no a\.bin\.sha256 beside it"):
        sidecar.read_protected(tmp_path / "a.bin")
