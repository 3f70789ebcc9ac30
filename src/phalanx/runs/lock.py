"""One process at a time in a run folder, or several that each do a part of the work."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from phalanx.errors import DiskError, InputError, LockedError
from phalanx.runs.atomic import disk_errors, render_json
from phalanx.runs.canonical import parse_json

LOCK_NAME = "LOCK"
_POLL_SECONDS = 0.02


def is_lock(path: Path) -> bool:
    """Whether a file is the lock of a folder, or of a part of its work."""
    return path.name == LOCK_NAME or path.name.startswith(f"{LOCK_NAME}.")


@dataclass(frozen=True, slots=True)
class Owner:
    """The process that holds a lock."""

    host: str
    pid: int
    started: str
    """When the process started, in clock ticks since boot ("" where the system does not tell): a process id
    alone may have been given to another process since."""

    @classmethod
    def current(cls) -> Owner:
        """This process."""
        pid = os.getpid()
        return cls(socket.gethostname(), pid, _start_time(pid) or "")

    @classmethod
    def parse(cls, content: bytes) -> Owner | None:
        """The owner that a lock file names; None for an empty or cut file."""
        try:
            record = parse_json(content)
            return cls(str(record["host"]), int(record["pid"]), str(record["started"]))
        except (ValueError, TypeError, KeyError):
            return None

    def is_here(self) -> bool:
        """Whether the process ran on this host."""
        return self.host == socket.gethostname()

    def is_gone(self) -> bool:
        """Whether a process of this host has ended."""
        started = _start_time(self.pid)
        return started is None or (bool(self.started) and started != self.started)

    def __str__(self) -> str:
        return f"process {self.pid} on host {self.host}"


def _start_time(pid: int) -> str | None:
    """Ticks since boot, "" if the system does not tell, None if there is no such process."""
    try:
        # the second field, the command in parentheses, may itself hold spaces and parentheses
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except (PermissionError, OverflowError):
        pass
    return ""


class _OtherHostError(LockedError):
    """The lock file is another host's: from here it is never seen to clear."""


class RunLock:
    """Context manager holding `folder/LOCK`, made with the folder if need be; of a `part` `folder/LOCK.PART`.

    Different parts are held side by side; nobody holds the whole beside a part. The kernel's lock (flock) ends with
    the process that took it, so a dead holder of this host is simply succeeded. A lock file left by another host
    cannot be checked from here and is never taken over.
    Raises LockedError naming host and process id of the holder: at once, or after so many seconds of `wait` where
    waiting can help.
    """

    def __init__(self, folder: Path, part: str = "", *, wait: float = 0.0) -> None:
        self.path = Path(folder) / (f"{LOCK_NAME}.{part}" if part else LOCK_NAME)
        self._wait = wait
        self._held: tuple[int, Owner] | None = None

    def __enter__(self) -> RunLock:
        end = time.monotonic() + self._wait
        while True:
            try:
                return self._take()
            except _OtherHostError:
                raise
            except LockedError:
                if time.monotonic() > end:
                    raise
            time.sleep(_POLL_SECONDS)

    def _take(self) -> RunLock:
        with disk_errors(self.path, 0):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = _open_locked(self.path)
            try:
                _refuse_other_host(self.path, descriptor)
                os.ftruncate(descriptor, 0)
                owner = Owner.current()
                os.pwrite(descriptor, render_json(asdict(owner)), 0)
                # its own lock first: of two that want whole and part at once, at least one sees the other
                self._refuse_others()
            except BaseException:
                os.close(descriptor)
                raise
        self._held = descriptor, owner
        return self

    def _refuse_others(self) -> None:
        """Refuses the whole while a part is held, and a part while the whole is."""
        whole = self.path.parent / LOCK_NAME
        others = self.path.parent.glob(f"{LOCK_NAME}.*") if self.path == whole else [whole]
        for other in others:
            _refuse_held(other)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._held is None:
            return
        descriptor, owner = self._held
        self._held = None
        # a forked child has a copy of this object, and must not release its parent's lock
        if owner.pid == os.getpid():
            # removed while still held: a process that opened the old file sees that it is no longer there
            self.path.unlink(missing_ok=True)
        os.close(descriptor)


def _open_locked(path: Path) -> int:
    while True:
        descriptor = _open(path)
        try:
            _flock(path, descriptor, fcntl.LOCK_EX)
            if _is_current(path, descriptor):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _refuse_held(path: Path) -> None:
    """Raises LockedError if someone holds the lock file, which need not exist."""
    try:
        descriptor = _open(path, create=False)
    except FileNotFoundError:
        return
    try:
        # shared: of several that look at once, none holds up another
        _flock(path, descriptor, fcntl.LOCK_SH)
        _refuse_other_host(path, descriptor)
    finally:
        os.close(descriptor)


def _open(path: Path, *, create: bool = True) -> int:
    try:
        flags = os.O_RDWR | (os.O_CREAT if create else 0) | os.O_CLOEXEC | os.O_NOFOLLOW
        return os.open(path, flags, 0o644)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR):
            raise InputError(f"{path} is a link or a folder where a lock file belongs; remove it") from None
        raise


def _flock(path: Path, descriptor: int, kind: int) -> None:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise LockedError(_held_message(path, Owner.parse(_content(descriptor)))) from None
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise DiskError(
                f"cannot lock {path}: the file system has no file locks; choose a folder on a local disk"
            ) from error
        raise


def _content(descriptor: int) -> bytes:
    return os.pread(descriptor, 4096, 0)


def _is_current(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _held_message(path: Path, owner: Owner | None) -> str:
    part = path.name.removeprefix(LOCK_NAME).removeprefix(".")
    held = f"{part} of {path.parent}" if part else str(path.parent)
    if owner is None:
        return f"{held} is in use by a process that has just started; wait, or choose another folder"
    if owner.is_here() and owner.is_gone():
        return (
            f"{held} is still in use: {owner} has ended, but a process that it started lives on; "
            "wait a moment, or end that process"
        )
    return f"{held} is in use by {owner}; wait for it, stop it, or choose another folder"


def _refuse_other_host(path: Path, descriptor: int) -> None:
    owner = Owner.parse(_content(descriptor))
    if owner is not None and not owner.is_here():
        raise _OtherHostError(
            f"{path.parent} was locked by {owner}, which cannot be checked from host {socket.gethostname()}; "
            f"if that process has ended, remove {path} and start again"
        )
