from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from phalanx.errors import DiskError, InputError
from phalanx.runs import atomic


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_new_content_replaces_the_old(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    atomic.write_text(path, "old")
    atomic.write_json(path, {"b": 1, "a": None})
    assert path.read_text() == '{\n  "a": null,\n  "b": 1\n}\n'
    assert json.loads(path.read_text()) == {"a": None, "b": 1}
    assert _names(tmp_path) == ["a.json"]


def test_sha256_of_a_file(tmp_path: Path) -> None:
    # FIPS 180-2, example B.1
    atomic.write_bytes(tmp_path / "abc", b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert atomic.sha256_file(tmp_path / "abc") == expected


def test_a_kill_at_every_step_leaves_old_or_new(tmp_path: Path, in_child, failpoints) -> None:
    path = tmp_path / "a.txt"
    steps = failpoints(lambda: atomic.write_text(path, "old content"))
    assert [step.partition("/")[0] for step in steps] == [
        "write.open",
        "write.half",
        "write.fsync",
        "write.rename",
        "write.after_rename",
    ]
    for step in steps:
        atomic.write_text(path, "old content")
        assert in_child(lambda: atomic.write_text(path, "new content"), f"{step}:kill") == -9
        assert path.read_text() == ("new content" if "after" in step else "old content")
        strays = atomic.stray_temporaries(tmp_path)
        assert len(strays) == (0 if "after" in step else 1)
        assert atomic.remove_stray_temporaries(tmp_path) == strays
        assert _names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("step", ["write.open", "write.half", "write.fsync", "write.rename"])
def test_a_full_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = tmp_path / "a.txt"
    atomic.write_text(path, "old")
    monkeypatch.setenv(atomic.FAILPOINT_VARIABLE, f"{step}:enospc")
    with pytest.raises(DiskError, match=r"a\.txt: No space left on device \(11 bytes needed, \d+ free\); free"):
        atomic.write_text(path, "new content")
    assert path.read_text() == "old"
    assert _names(tmp_path) == ["a.txt"]


def test_a_really_full_disk(tiny_disk: Path) -> None:
    path = tiny_disk / "a.bin"
    atomic.write_bytes(path, b"x" * 600_000)
    with pytest.raises(DiskError, match="700000 bytes needed"):
        atomic.write_bytes(path, b"y" * 700_000)
    assert path.read_bytes() == b"x" * 600_000
    assert _names(tiny_disk) == ["a.bin"]


@pytest.mark.parametrize("place", ["missing/a.txt", "file/a.txt", "a" * 300])
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=rf"cannot write .*{place}: .*; choose another place"):
        atomic.write_text(tmp_path / place, "text")


def test_errors_that_are_not_the_disks_pass_through(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught, atomic.disk_errors(tmp_path, 1):
        raise OSError(errno.EIO, "broken")
    assert not isinstance(caught.value, DiskError)


def test_a_link_is_replaced_not_followed(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("target")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    atomic.write_text(tmp_path / "link", "new")
    assert (tmp_path / "target").read_text() == "target"
    assert (tmp_path / "link").read_text() == "new"


def test_failpoints_match_whole_names_or_their_first_part(monkeypatch: pytest.MonkeyPatch) -> None:
    atomic.failpoint("write.half/a")
    monkeypatch.setenv(atomic.FAILPOINT_VARIABLE, "write.half/b:raise")
    atomic.failpoint("write.half/a")
    monkeypatch.setenv(atomic.FAILPOINT_VARIABLE, "write.half:raise")
    with pytest.raises(atomic.InjectedFault, match=r"write\.half/a"):
        atomic.failpoint("write.half/a")
    monkeypatch.setenv(atomic.FAILPOINT_VARIABLE, "write.half:explode")
    with pytest.raises(InputError, match="kill, raise or enospc, got 'explode'"):
        atomic.failpoint("write.half/a")


def test_strays_are_ours_alone_and_links_are_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in (".tmp-notes", "a.tmp", ".tmp-0123456789abcdef0"):
        (folder / name).write_text("not ours")
    (folder / ".tmp-0123456789abcdef").symlink_to(outside)
    (folder / ".tmp-0123456789abcde0").mkdir()
    (folder / ".tmp-0123456789abcde1-journal").write_text("")
    assert len(atomic.remove_stray_temporaries(folder)) == 3
    assert len(list(folder.iterdir())) == 3
    assert (outside / "kept").exists()
