"""The ledger of verdicts: one SQLite file, bound to one model, one data set and one threat.

Write-ahead logging with full synchronisation: a row whose `add` returned survives kill -9 and a power cut.
Every row and header entry carries a CRC-32 of its content, and a sealed ledger a sha256 of the whole file.
WAL needs a local disk; on a cluster each writer has a ledger of its own, merged by
`merged.add(other.rows())`.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, cast
from urllib.parse import quote

from phalanx.errors import CorruptError, DiskError, InputError, LockedError
from phalanx.runs.atomic import disk_errors, failpoint, free_bytes, sync_folder, temporary_in
from phalanx.runs.canonical import JSON, canonical_json, parse_json, sha256_json
from phalanx.runs.sidecar import sidecar_path, verify_sidecar, write_sidecar
from phalanx.runs.verdict import Outcome, Record, Verdict, canonical_record, worst_by_sample

__all__ = ["LEDGER_SCHEMA", "Binding", "Ledger", "Verdict"]

LEDGER_SCHEMA = 1

_APPLICATION_ID = 0x50484C58  # "PHLX", so that `file` and we can tell a ledger from any other database
_BUSY_SECONDS = 30.0
_COLUMNS = (
    "sample, label, attack, surface, restart, verdict, predicted, clean_predicted, flipped, loss, distance, "
    "queries, first_success"
)
_CREATE = (
    f"PRAGMA application_id = {_APPLICATION_ID}",
    "PRAGMA journal_mode = WAL",
    """CREATE TABLE entries (
        kind TEXT NOT NULL, name TEXT NOT NULL, value TEXT NOT NULL, crc INTEGER NOT NULL,
        PRIMARY KEY (kind, name)
    )""",
    """CREATE TABLE verdicts (
        sample INTEGER NOT NULL, label INTEGER NOT NULL, attack TEXT NOT NULL, surface TEXT NOT NULL,
        restart INTEGER NOT NULL, verdict TEXT NOT NULL, predicted INTEGER NOT NULL,
        clean_predicted INTEGER NOT NULL, flipped INTEGER, loss REAL, distance REAL NOT NULL,
        queries INTEGER NOT NULL, first_success INTEGER NOT NULL, crc INTEGER NOT NULL,
        PRIMARY KEY (sample, attack, surface, restart)
    )""",
)
_INSERT = (
    f"INSERT INTO verdicts ({_COLUMNS}, crc) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) "
    "ON CONFLICT (sample, attack, surface, restart) DO NOTHING"
)
_SELECT = f"SELECT {_COLUMNS}, crc FROM verdicts"


@dataclass(frozen=True)
class Binding:
    """What every verdict of a ledger is about."""

    model_sha256: str
    data_sha256: str
    norm: str
    eps: str
    """The text as given, such as "8/255"."""
    evaluation_version: int
    versions: Mapping[str, str] = field(default_factory=dict, compare=False)
    """Versions of the software: recorded each time they change, not bound."""

    def bound(self) -> dict[str, JSON]:
        """The fields that must stay the same, and the schema."""
        fields = asdict(self)
        del fields["versions"]
        return {"schema": LEDGER_SCHEMA, **fields}


@contextmanager
def _sqlite_errors(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into a full disk, a lock or, since the statements are fixed, damage."""
    try:
        yield
    except sqlite3.ProgrammingError:
        raise
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise LockedError(f"{path} is in use by another process ({error}); wait for it or stop it") from error
        if code in (
            sqlite3.SQLITE_FULL,
            sqlite3.SQLITE_IOERR,
            sqlite3.SQLITE_READONLY,
            sqlite3.SQLITE_CANTOPEN,
            sqlite3.SQLITE_PERM,
        ):
            raise DiskError(
                f"cannot use the ledger {path}: {error} ({free_bytes(path)} bytes free); free space or allow "
                "writing there, then start again: every verdict acknowledged so far is kept"
            ) from error
        raise CorruptError(f"the ledger {path} is damaged: {error}; restore it from a copy") from error
    except UnicodeDecodeError as error:
        # a damaged name, quoted in SQLite's own message
        raise CorruptError(f"the ledger {path} is damaged: {error}; restore it from a copy") from error


def _connect(path: Path, query: str) -> sqlite3.Connection:
    return sqlite3.connect(
        f"file:{quote(str(path.absolute()))}?{query}", uri=True, timeout=_BUSY_SECONDS, isolation_level=None
    )


def _create(path: Path, binding: Binding) -> None:
    """Make an empty ledger, named when complete; where two processes try, the first one's stays."""
    temporary = temporary_in(path.parent)
    with _sqlite_errors(path), disk_errors(path, 0):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with Ledger(temporary, _connect(temporary, "mode=rwc")) as ledger:
                for statement in _CREATE:
                    ledger._connection.execute(statement)
                ledger._put("binding", "", binding.bound())
            failpoint("ledger.create")
            os.link(temporary, path)
        except FileExistsError:
            pass
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)


class Ledger:
    """An open ledger; a context manager that closes it. Made by `Ledger.open` or `Ledger.read`."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection = connection

    @classmethod
    def open(cls, path: Path, binding: Binding) -> Ledger:
        """Create the ledger, or take it up again (a sealed one is verified, then unsealed).

        Raises InputError naming each field in which the ledger is bound to something else; CorruptError if it
        is damaged; DiskError; LockedError.
        """
        path = Path(path)
        if not path.exists():
            _create(path, binding)
        with cls.read(path) as existing:
            existing._refuse_other(binding)
        with disk_errors(path, 0):
            sidecar_path(path).unlink(missing_ok=True)
        with _sqlite_errors(path):
            connection = _connect(path, "mode=rw")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA journal_mode = WAL")
        ledger = cls(path, connection)
        ledger._put("versions", sha256_json(dict(binding.versions)), dict(binding.versions))
        return ledger

    @classmethod
    def read(cls, path: Path) -> Ledger:
        """Open for reading only, and check everything; a sealed ledger is not even touched.

        Raises InputError if there is no such file, CorruptError if any part of it is damaged.
        """
        path = Path(path)
        if not path.is_file():
            raise InputError(f"there is no ledger {path}; check the name, or evaluate first")
        sealed = sidecar_path(path).exists()
        if sealed:
            verify_sidecar(path)
        with _sqlite_errors(path):
            ledger = cls(path, _connect(path, "mode=ro&immutable=1" if sealed else "mode=ro"))
        try:
            ledger._verify()
        except BaseException:
            ledger.close()
            raise
        return ledger

    def _verify(self) -> None:
        with _sqlite_errors(self.path):
            (mark,) = self._connection.execute("PRAGMA application_id").fetchone()
            if mark != _APPLICATION_ID:
                raise CorruptError(f"{self.path} is no ledger of verdicts, or its header is damaged (mark {mark:#x})")
            (result,) = self._connection.execute("PRAGMA integrity_check(1)").fetchone()
        if result != "ok":
            raise CorruptError(f"the ledger {self.path} is damaged: {' '.join(result.split())}; restore it from a copy")
        self._entries("")
        for _ in self._records():
            pass

    def _refuse_other(self, binding: Binding) -> None:
        found = self._entries("binding")[""]
        expected = binding.bound()
        differing = [
            f"{name}: ledger {found.get(name)!r}, now {expected.get(name)!r}"
            for name in {**found, **expected}
            if found.get(name) != expected.get(name)
        ]
        if differing:
            raise InputError(
                f"the ledger {self.path} is bound to something else ({'; '.join(differing)}); "
                "verdicts cannot be mixed: use another ledger file"
            )

    def _entries(self, kind: str) -> dict[str, Any]:
        """The checked header entries of a kind, by name; every kind is checked."""
        entries = {}
        with _sqlite_errors(self.path):
            rows = self._connection.execute("SELECT kind, name, value, crc FROM entries ORDER BY kind, name").fetchall()
        for row_kind, name, value, crc in rows:
            if crc != _entry_crc(row_kind, name, value):
                raise CorruptError(
                    f"the ledger {self.path} is damaged: header entry {row_kind!r} {name!r} fails its CRC"
                )
            if row_kind == kind:
                try:
                    entries[name] = parse_json(value)
                except (ValueError, TypeError):
                    raise CorruptError(f"the ledger {self.path} is damaged: header entry {name!r} is no JSON") from None
        return entries

    def _put(self, kind: str, name: str, value: Mapping[str, JSON]) -> None:
        """Write a header entry once. Raises InputError if it is there with another value."""
        text = canonical_json(value).decode()
        with self._transaction():
            self._connection.execute(
                "INSERT INTO entries VALUES (?, ?, ?, ?) ON CONFLICT (kind, name) DO NOTHING",
                (kind, name, text, _entry_crc(kind, name, text)),
            )
            (found,) = self._connection.execute(
                "SELECT value FROM entries WHERE kind = ? AND name = ?", (kind, name)
            ).fetchone()
            if found != text:
                raise InputError(
                    f"the ledger {self.path} already has {kind} {name!r} as {found}, got {text}; "
                    "give it another name, or use another ledger file"
                )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All or nothing, durable when it ends."""
        with _sqlite_errors(self.path), disk_errors(self.path, 0):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                failpoint("ledger.commit")
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def add(self, rows: Iterable[Verdict]) -> None:
        """Write rows in one transaction: durable when it returns. Rows that are there already are left.

        Raises CorruptError, and writes none of them, if one contradicts a row with the same key.
        """
        records = [row.record() for row in rows]
        with self._transaction():
            before = self._connection.total_changes
            self._connection.executemany(_INSERT, [(*record, _crc(record)) for record in records])
            if self._connection.total_changes - before < len(records):
                self._refuse_contradiction(records)

    def _refuse_contradiction(self, records: Iterable[Record]) -> None:
        for record in records:
            sample, _, attack, surface, restart, *_ = record
            (*found, _crc_found) = self._connection.execute(
                f"{_SELECT} WHERE sample = ? AND attack = ? AND surface = ? AND restart = ?",
                (sample, attack, surface, restart),
            ).fetchone()
            if tuple(found) != record:
                raise CorruptError(
                    f"{self.path}: two verdicts for sample {sample}, attack {attack!r}, surface {surface!r}, "
                    f"restart {restart}: the ledger has {tuple(found)}, got {record}; evaluate again into "
                    "another ledger"
                )

    def declare_attack(self, name: str, spec: Mapping[str, JSON]) -> None:
        """Say what an attack's name means (its kind and whole budget). Saying the same again is fine.

        Raises InputError if the name already means something else.
        """
        self._put("attack", name, spec)

    def attacks(self) -> dict[str, dict[str, Any]]:
        """What each declared attack's name means."""
        return self._entries("attack")

    def binding(self) -> Binding:
        """What the ledger is bound to; what wrote to it, `versions()` tells."""
        bound = {name: value for name, value in self._entries("binding")[""].items() if name != "schema"}
        return Binding(**bound)

    def versions(self) -> list[dict[str, str]]:
        """Every set of software versions that wrote to the ledger."""
        return list(self._entries("versions").values())

    def done(self, attack: str, surface: str, restart: int | None = None) -> set[int]:
        """The samples that have a verdict (of this restart, or of any)."""
        with _sqlite_errors(self.path):
            found = self._connection.execute(
                "SELECT DISTINCT sample FROM verdicts "
                "WHERE attack = ? AND surface = ? AND restart = ifnull(?, restart)",
                (attack, surface, restart),
            )
            return {sample for (sample,) in found}

    def outcomes(self, attack: str, surface: str) -> dict[int, Outcome]:
        """By sample the worst outcome of its restarts, for those that have a verdict."""
        with _sqlite_errors(self.path):
            rows = self._connection.execute(
                "SELECT sample, verdict FROM verdicts WHERE attack = ? AND surface = ?", (attack, surface)
            ).fetchall()
        return worst_by_sample(rows)

    def declare_size(self, images: int) -> None:
        """Say of how many images the evaluation is. Raises InputError if another number was said."""
        self._put("size", "", {"images": images})

    def size(self) -> int | None:
        """Of how many images the evaluation is; None where nobody said."""
        said = self._entries("size").get("")
        return None if said is None else int(said["images"])

    def _records(self) -> Iterator[Record]:
        """Every row, sorted by key and checked against its CRC."""
        with _sqlite_errors(self.path):
            for *values, crc in self._connection.execute(f"{_SELECT} ORDER BY sample, attack, surface, restart"):
                record = cast(Record, tuple(values))
                if crc != _crc(record):
                    raise CorruptError(f"the ledger {self.path} is damaged: row {record} fails its CRC; restore a copy")
                yield record

    def rows(self) -> list[Verdict]:
        """Every verdict, sorted by sample, attack, surface, restart. Raises CorruptError."""
        return [Verdict.from_record(record) for record in self._records()]

    def table_sha256(self) -> str:
        """Hexadecimal sha256 of all verdicts: the same whatever the order, batches, shards or resumes."""
        digest = hashlib.sha256()
        for record in self._records():
            digest.update(canonical_record(record) + b"\n")
        return digest.hexdigest()

    def seal(self) -> str:
        """Fold the log into the one file, close it, record its sha256 beside it and return that.

        Raises LockedError if another process still has the ledger open.
        """
        with _sqlite_errors(self.path):
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            failpoint("ledger.seal")
            (mode,) = self._connection.execute("PRAGMA journal_mode = DELETE").fetchone()
        if mode != "delete":
            raise LockedError(f"cannot seal {self.path}: another process has it open; wait for it")
        self.close()
        failpoint("ledger.sidecar")
        return write_sidecar(self.path)

    def close(self) -> None:
        """Close the file; the ledger cannot be used afterwards."""
        self._connection.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _crc(record: Record) -> int:
    try:
        return zlib.crc32(canonical_record(record))
    except TypeError:
        # damage can turn a number's type into bytes, which JSON refuses: no CRC of ours
        return -1


def _entry_crc(kind: str, name: str, value: str) -> int:
    return zlib.crc32("\x1f".join(map(str, (kind, name, value))).encode())
