"""Add verdicts to a finished evaluation's folder, so that a kill at any moment loses neither the old nor the new.

    challenges/NAME.json          what was submitted, and what ledger and manifest were before: their sha256
    challenges/NAME.npz           the images that broke the model, in the form in which they can be submitted again
    challenges/.pending.json      only while merging: the manifest that is being replaced

Until the new manifest is written the folder counts as unfinished; what is left of a killed merge is closed from the
ledger, which holds the old verdicts or the new ones, and vouches for itself.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from phalanx.errors import CorruptError, InputError
from phalanx.evaluation.evaluate import versions
from phalanx.report.records import read_object
from phalanx.runs import Binding, Ledger, RunFolder, Verdict, sha256_file, write_bytes, write_json
from phalanx.runs.atomic import failpoint, remove, remove_stray_temporaries, sync_folder, temporary_in
from phalanx.runs.folder import RUN_NAME
from phalanx.runs.manifest import MANIFEST_NAME, read_manifest, verify_files
from phalanx.runs.sidecar import sidecar_path, write_protected, write_sidecar
from phalanx.runs.summary import aside_attacks
from phalanx.runs.verdict import CLEAN
from phalanx.threat import ThreatModel, parse_norm
from phalanx.workflow.measuring import EVALUATION_NAME, LEDGER_NAME, threats_json

CHALLENGES_NAME = "challenges"
PENDING_NAME = f"{CHALLENGES_NAME}/.pending.json"
CHALLENGE_SCHEMA = 1
_REWRITTEN = (LEDGER_NAME, sidecar_path(Path(LEDGER_NAME)).name, EVALUATION_NAME, RUN_NAME)
"""What a merge, or closing one that was killed, writes anew."""


@dataclass(frozen=True)
class Book:
    """A ledger that nobody writes."""

    binding: Binding
    attacks: Mapping[str, Mapping[str, Any]]
    rows: list[Verdict]

    @classmethod
    def of(cls, folder: Path) -> Book:
        with Ledger.read(folder / LEDGER_NAME) as ledger:
            return cls(ledger.binding(), ledger.attacks(), ledger.rows())

    @property
    def threat(self) -> ThreatModel:
        return ThreatModel(parse_norm(self.binding.norm), self.binding.eps)

    @property
    def aside(self) -> tuple[str, ...]:
        return aside_attacks(self.attacks, self.binding.norm, self.binding.eps)

    @property
    def right(self) -> set[int]:
        """Samples that are right when clean."""
        return {row.sample for row in self.rows if row.attack == CLEAN and row.verdict == "held"}


def merge(target: RunFolder, attack: str, spec: Mapping[str, Any], rows: Sequence[Verdict], npz: bytes) -> None:
    """Adds the rows of "external:NAME" to a settled evaluation whose lock is held, and seals it again.

    Everything new is made beside the old first; then the manifest steps aside, and the ledger is replaced. `npz` are
    the images that broke the model.
    """
    folder, name = target.path, attack.partition(":")[2]
    content = _appended(folder, attack, spec, rows)
    record: dict[str, Any] = {
        "schema": CHALLENGE_SCHEMA,
        "attack": attack,
        "spec": dict(spec),
        "ledger_sha256_before": sha256_file(folder / LEDGER_NAME),
        "manifest_sha256_before": sha256_file(folder / MANIFEST_NAME),
    }
    (folder / CHALLENGES_NAME).mkdir(exist_ok=True)
    write_bytes(folder / CHALLENGES_NAME / f"{name}.npz", npz)
    write_json(folder / CHALLENGES_NAME / f"{name}.json", record)
    failpoint("challenge.written")
    (folder / MANIFEST_NAME).replace(folder / PENDING_NAME)
    for changed in (folder / CHALLENGES_NAME, folder):
        sync_folder(changed)
    failpoint("challenge.opened")
    write_protected(folder / LEDGER_NAME, content)
    failpoint("challenge.merged")
    _close(target)


def _appended(folder: Path, attack: str, spec: Mapping[str, Any], rows: Sequence[Verdict]) -> bytes:
    """The ledger with these rows, made and sealed in a copy."""
    work = temporary_in(folder)
    work.mkdir()
    try:
        copy = work / LEDGER_NAME
        for path in (folder / LEDGER_NAME, sidecar_path(folder / LEDGER_NAME)):
            shutil.copyfile(path, work / path.name)
        with Ledger.read(copy) as ledger:
            binding = replace(ledger.binding(), versions=versions())
        with Ledger.open(copy, binding) as ledger:
            ledger.declare_attack(attack, spec)
            ledger.add(rows)
            ledger.seal()
        return copy.read_bytes()
    finally:
        remove(work)


def settle(target: RunFolder) -> None:
    """For one who holds the lock: verifies a finished folder, closes one whose merge was killed.

    Raises InputError for an evaluation that has not ended, CorruptError for a folder that is damaged.
    """
    folder, pending = target.path, target.path / PENDING_NAME
    remove_stray_temporaries(folder)
    if target.status() == "finished":
        files = target.verify()
        if pending.is_file() and PENDING_NAME not in files:
            pending.unlink()
        return
    if not pending.is_file() or not sidecar_path(folder / LEDGER_NAME).is_file():
        raise InputError(
            f"{folder} is not finished (status {target.status()}); give its phalanx evaluate command again, it goes on"
        )
    before = read_manifest(folder, PENDING_NAME)
    verify_files(folder, {name: file for name, file in before.items() if name not in _REWRITTEN})
    _close(target)


def _close(target: RunFolder) -> None:
    """Everything that follows from the ledger, and the manifest last."""
    folder = target.path
    book = Book.of(folder)
    # its sidecar may still vouch for the old ledger, too
    write_sidecar(folder / LEDGER_NAME)
    evaluation = folder / EVALUATION_NAME
    record = read_object(evaluation, missing="evaluate again").values
    if record.get("model_sha256") != book.binding.model_sha256:
        raise CorruptError(f"{evaluation} is not this ledger's; restore both from one copy, or evaluate again")
    write_json(evaluation, {**record, "threats": threats_json(folder, book.rows, book.attacks, book.threat)})
    for path in sorted((folder / CHALLENGES_NAME).iterdir()):
        if path.name != Path(PENDING_NAME).name and f"external:{path.stem}" not in book.attacks:
            remove(path)
    failpoint("challenge.closing")
    target.finish(name for name in target.files() if name != PENDING_NAME)
    failpoint("challenge.closed")
    (folder / PENDING_NAME).unlink(missing_ok=True)
