"""The run folder: everything one resolved configuration made, and nothing outside it.

    run.json        schema, phalanx version, configuration and its sha256, status, when created
    MANIFEST.json   only when finished: the sha256 of every file
    LOCK            only while a process works in it

A folder is finished when both say so: `run.json` is written first, so that a kill between them leaves it
running.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from phalanx import __version__
from phalanx.errors import CorruptError, DivergedError, InputError, Interrupted
from phalanx.runs.atomic import disk_errors, remove, remove_stray_temporaries, stray_temporaries, write_json
from phalanx.runs.canonical import JSON, canonical_json, leaves, non_finite, parse_json, sha256_json
from phalanx.runs.lock import LOCK_NAME, RunLock, is_lock
from phalanx.runs.manifest import MANIFEST_NAME, FileRecord, verify_manifest, write_manifest
from phalanx.runs.paths import inside

RUN_SCHEMA = 1
RUN_NAME = "run.json"
TURN_SECONDS = 3600.0
"""So long a process waits for another one's turn; the last turn reads every clean image once, and analyses."""
Status: TypeAlias = Literal["new", "running", "finished", "diverged", "interrupted"]

_ABSENT = "(absent)"
_SHOWN = 5


class RunFolder:
    """A run folder by its path; nothing is read or written before a method asks for it.

    Every method that writes expects the caller to hold `lock()`.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    def lock(self) -> RunLock:
        """The folder's lock, to be entered; a foreign folder is refused before anything is written."""
        self._refuse_foreign()
        return RunLock(self.path)

    def part(self, name: str) -> RunLock:
        """The lock of a part of the work, which other processes do other parts of."""
        self._refuse_foreign()
        return RunLock(self.path, name)

    def turn(self) -> RunLock:
        """For those who do parts: the moments in which only one of them may write the folder's records."""
        return RunLock(self.path, "turn", wait=TURN_SECONDS)

    def resolve(self, name: str) -> Path:
        """The path of a file of this run. Raises InputError for a name that leads out of the folder."""
        return inside(self.path, name)

    def prepare(self, config: Mapping[str, JSON], *, shared: bool = False) -> None:
        """Create the folder for a configuration, or take it up again; its status becomes running unless
        finished. What killed writers left is removed, unless the folder is `shared`: then a living one may be writing.

        Raises InputError if the folder is not a run folder, was made by a newer version, or holds a run of
        another configuration (up to five differing keys are named); CorruptError if `run.json` is damaged;
        DiskError.
        """
        self._refuse_foreign()
        where = non_finite(config)
        if where is not None:
            raise InputError(f"configuration key {where!r} is not finite; give a number that JSON can hold")
        with disk_errors(self.path, 0):
            self.path.mkdir(parents=True, exist_ok=True)
            if not shared:
                remove_stray_temporaries(self.path)
        if not self._has_record():
            self._write("running", config, _now())
        else:
            self._refuse_other(config)
            if self.status() != "finished":
                self.mark("running")

    def status(self) -> Status:
        """Where the run stands. A killed run still says running. Raises as `record()` does."""
        self._refuse_foreign()
        if not self._has_record():
            return "new"
        status: Status = self.record()["status"]
        if status == "finished" and not (self.path / MANIFEST_NAME).is_file():
            return "running"
        return status

    def record(self) -> dict[str, Any]:
        """The content of `run.json`. Raises InputError if there is none, CorruptError if it is damaged."""
        path = self.path / RUN_NAME
        try:
            record = parse_json(path.read_bytes())
            status, schema = record["status"], record["schema"]
            sound = record["config_sha256"] == sha256_json(record["config"]) and status in get_args(Status)
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"{self.path} is no run folder: it has no {RUN_NAME}; check the name") from None
        except (ValueError, KeyError, TypeError):
            raise CorruptError(f"{path} is damaged: it is no record of a run; restore it from a copy") from None
        if isinstance(schema, int) and schema > RUN_SCHEMA:
            raise InputError(f"{path} has schema {schema}, this version reads up to {RUN_SCHEMA}; use a newer phalanx")
        if not sound:
            raise CorruptError(
                f"{path} is damaged: its configuration should have sha256 {record['config_sha256']}, "
                f"found {sha256_json(record['config'])} (status {status!r}); restore it from a copy"
            )
        return dict(record)

    def mark(self, status: Status) -> None:
        """Record the status; `finish` alone records finished."""
        if status in ("new", "finished"):
            raise ValueError(f"a status to mark is running, diverged or interrupted, got {status!r}")
        record = self.record()
        self._write(status, record["config"], record["created"])

    @contextmanager
    def records_outcome(self) -> Iterator[None]:
        """Mark the run diverged or interrupted when the block ends so, and let the error pass on."""
        try:
            yield
        except DivergedError:
            self.mark("diverged")
            raise
        except (Interrupted, KeyboardInterrupt):
            self.mark("interrupted")
            raise

    def finish(self, files: Iterable[str] | None = None) -> dict[str, FileRecord]:
        """Record the run as finished, with the sha256 of `files` (default: all) and of `run.json`."""
        names = set(self.files() if files is None else files)
        record = self.record()
        self._write("finished", record["config"], record["created"])
        return write_manifest(self.path, sorted(names | {RUN_NAME}))

    def files(self) -> list[str]:
        """Every file of the run by its relative name, sorted; without lock, manifest and temporaries."""
        ignored = {self.path / MANIFEST_NAME, *self._locks(), *stray_temporaries(self.path)}
        return sorted(
            path.relative_to(self.path).as_posix()
            for path in self.path.rglob("*")
            if path.is_file() and path not in ignored
        )

    def verify(self) -> dict[str, FileRecord]:
        """Check every file of a finished run. Raises CorruptError naming file, expected and found sha256."""
        return verify_manifest(self.path)

    def clear(self) -> None:
        """Remove everything in the folder but its lock, as `--fresh` does. Only ever empties a run folder."""
        self._refuse_foreign()
        if not self.path.is_dir():
            return
        with disk_errors(self.path, 0):
            # run.json last: a kill half-way must leave a folder that is still known as ours
            for path in sorted(self.path.iterdir(), key=lambda path: path.name == RUN_NAME):
                if not is_lock(path):
                    remove(path)

    def _locks(self) -> set[Path]:
        return {path for path in self.path.glob(f"{LOCK_NAME}*") if is_lock(path)}

    def _has_record(self) -> bool:
        return (self.path / RUN_NAME).is_file()

    def _write(self, status: Status, config: Mapping[str, JSON], created: str) -> None:
        record: dict[str, JSON] = {
            "schema": RUN_SCHEMA,
            "phalanx": __version__,
            "config": config,
            "config_sha256": sha256_json(config),
            "status": status,
            "created": created,
        }
        write_json(self.path / RUN_NAME, record)

    def _refuse_foreign(self) -> None:
        if self.path.is_symlink():
            raise InputError(f"{self.path} is a symbolic link, not a run folder; give the folder itself")
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise InputError(f"{self.path} is a file, not a run folder; choose another folder")
        ours = {*self._locks(), *stray_temporaries(self.path)}
        if not self._has_record() and any(path not in ours for path in self.path.iterdir()):
            raise InputError(f"{self.path} is not a run folder: it holds other files; choose an empty or new folder")

    def _refuse_other(self, config: Mapping[str, JSON]) -> None:
        differences = config_differences(self.record()["config"], json.loads(canonical_json(config)))
        if not differences:
            return
        more = len(differences) - _SHOWN
        shown = differences[:_SHOWN] + ([f"and {more} more"] if more > 0 else [])
        raise InputError(
            f"{self.path} holds a run of another configuration ({'; '.join(shown)}); "
            "choose another --out, or remove the folder"
        )


def config_differences(old: Mapping[str, JSON], new: Mapping[str, JSON]) -> list[str]:
    """Each differing key as `optimizer.lr: 0.1 -> 0.2`, sorted."""
    before = {where: canonical_json(leaf).decode() for where, leaf in leaves(old)}
    after = {where: canonical_json(leaf).decode() for where, leaf in leaves(new)}
    return [
        f"{where}: {before.get(where, _ABSENT)} -> {after.get(where, _ABSENT)}"
        for where in sorted({*before, *after})
        if before.get(where) != after.get(where)
    ]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
