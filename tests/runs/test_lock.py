from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from phalanx.errors import InputError, LockedError
from phalanx.runs.lock import Owner, RunLock


def _hold_until_killed(folder: Path) -> int:
    """Fork a process that takes the lock; returns when it has it."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with RunLock(folder):
                os.write(writer, b"1")
                time.sleep(60)
        finally:
            os._exit(1)
    os.close(writer)
    assert os.read(reader, 1) == b"1"
    os.close(reader)
    return pid


def test_the_lock_names_its_owner_and_goes_when_released(tmp_path: Path) -> None:
    with RunLock(tmp_path / "run"):
        record = json.loads((tmp_path / "run" / "LOCK").read_text())
        assert (record["host"], record["pid"]) == (socket.gethostname(), os.getpid())
        assert not Owner(**record).is_gone()
    assert not (tmp_path / "run" / "LOCK").exists()
    with RunLock(tmp_path / "run"):
        pass


def test_a_second_opener_is_refused_at_once_and_told_who(tmp_path: Path) -> None:
    holder = _hold_until_killed(tmp_path)
    try:
        start = time.monotonic()
        with (
            pytest.raises(LockedError, match=f"process {holder} on host {socket.gethostname()}"),
            RunLock(tmp_path),
        ):
            pass
        assert time.monotonic() - start < 1
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
    # the dead holder left its file; its lock is taken over
    assert json.loads((tmp_path / "LOCK").read_text())["pid"] == holder
    with RunLock(tmp_path):
        assert json.loads((tmp_path / "LOCK").read_text())["pid"] == os.getpid()


def test_the_same_process_is_refused_too(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        with pytest.raises(LockedError), RunLock(tmp_path):
            pass
        assert (tmp_path / "LOCK").exists()


def test_a_forked_child_does_not_release_its_parents_lock(tmp_path: Path, in_child) -> None:
    with RunLock(tmp_path) as lock:
        assert in_child(lambda: lock.__exit__(None, None, None)) == 0
        assert (tmp_path / "LOCK").exists()
        with pytest.raises(LockedError), RunLock(tmp_path):
            pass


def test_a_lock_of_another_host_is_never_taken_over(tmp_path: Path) -> None:
    content = json.dumps({"host": "elsewhere", "pid": 7, "started": "1"})
    (tmp_path / "LOCK").write_text(content)
    with (
        pytest.raises(LockedError, match=r"process 7 on host elsewhere.*if that process has ended, remove .*LOCK"),
        RunLock(tmp_path),
    ):
        pass
    assert (tmp_path / "LOCK").read_text() == content


def test_nobody_waits_for_a_lock_that_never_clears(tmp_path: Path) -> None:
    (tmp_path / "LOCK.turn").write_text(json.dumps({"host": "elsewhere", "pid": 7, "started": "1"}))
    start = time.monotonic()
    with pytest.raises(LockedError, match="on host elsewhere"), RunLock(tmp_path, "turn", wait=30):
        pass
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("content", ["", "{", '{"host": 1}', "[]", "null"])
def test_a_cut_lock_file_does_not_block(tmp_path: Path, content: str) -> None:
    (tmp_path / "LOCK").write_text(content)
    with RunLock(tmp_path):
        pass


def test_a_linked_lock_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("kept")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "LOCK").symlink_to(tmp_path / "target")
    with (
        pytest.raises(InputError, match="link or a folder where a lock file belongs"),
        RunLock(tmp_path / "run"),
    ):
        pass
    assert (tmp_path / "target").read_text() == "kept"


def test_a_reused_process_id_is_not_the_owner() -> None:
    current = Owner.current()
    assert not current.is_gone()
    assert Owner(current.host, current.pid, "1").is_gone() == bool(current.started)
    assert Owner(current.host, 2**22 + 5, "1").is_gone()
