"""A study: named runs, and what each needs, made in order and never twice.

Each run is `STUDY/NAME/`, a run folder; `STUDY/study.json` records from which results each was made, so that
a run whose needs have been made anew is not taken for current.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Literal, TypeAlias

from phalanx.errors import CorruptError, InputError
from phalanx.runs.atomic import remove_stray_temporaries, write_json
from phalanx.runs.canonical import JSON, sha256_json
from phalanx.runs.folder import RUN_NAME, RunFolder
from phalanx.runs.lock import LOCK_NAME, RunLock
from phalanx.runs.manifest import read_manifest

STUDY_SCHEMA = 1
STUDY_NAME = "study.json"
Step: TypeAlias = Literal["skipped", "running", "finished"]

_NODE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_RESERVED = frozenset({STUDY_NAME.casefold(), LOCK_NAME.casefold()})


@dataclass(frozen=True)
class Node:
    """One run of a study."""

    name: str
    needs: tuple[str, ...]
    config: Mapping[str, JSON]
    """The resolved configuration that the run folder is bound to."""
    action: Callable[[Path, Mapping[str, Path]], None]
    """Given the run's own folder, which is prepared, and the folders of what it needs. It must be able to
    resume, may lock, prepare (with the same configuration) and finish the folder itself, and returns when the
    run is done."""


class Study:
    """Runs under `folder`. Raises InputError naming a bad or doubled name, an unknown need, or a cycle."""

    def __init__(self, folder: Path, nodes: Sequence[Node]) -> None:
        self.folder = Path(folder)
        self._order = _ordered(nodes)

    def order(self) -> tuple[Node, ...]:
        """The runs, each after everything it needs."""
        return self._order

    def run(self, progress: Callable[[str, Step], None] | None = None) -> None:
        """Make every run that is not finished; verify and skip those that are.

        `progress` is called with each run's name and step.
        Raises what an action raises (the runs before it stay finished), InputError if a finished run has
        another configuration or was made from other results, CorruptError if one is damaged, LockedError.
        """
        self._refuse_foreign()
        with RunLock(self.folder):
            remove_stray_temporaries(self.folder)
            for node in self._order:
                for step in self._make(node):
                    if progress is not None:
                        progress(node.name, step)

    def _make(self, node: Node) -> Iterator[Step]:
        folder = RunFolder(self.folder / node.name)
        needs = {name: self.folder / name for name in node.needs}
        self._bind_to_needs(node.name, folder, {name: _result_sha256(path) for name, path in needs.items()})
        # held only in between: the action may be a training run, which takes the lock itself
        with folder.lock():
            folder.prepare(node.config)
        if folder.status() == "finished":
            folder.verify()
            yield "skipped"
            return
        yield "running"
        with folder.records_outcome():
            node.action(folder.path, needs)
        if folder.status() != "finished":
            with folder.lock():
                folder.finish()
        yield "finished"

    def _bind_to_needs(self, name: str, folder: RunFolder, needs: dict[str, str]) -> None:
        made_from = self._read()
        if folder.status() != "new" and name in made_from:
            changed = sorted(
                need for need in {*needs, *made_from[name]} if needs.get(need) != made_from[name].get(need)
            )
            if changed:
                raise InputError(
                    f"{folder.path} was made from another result of {', '.join(changed)}; "
                    f"remove {folder.path} to make it again, or choose another --out"
                )
        if made_from.get(name) != needs:
            made_from[name] = needs
            write_json(self.folder / STUDY_NAME, {"schema": STUDY_SCHEMA, "made_from": made_from})

    def _read(self) -> dict[str, dict[str, str]]:
        path = self.folder / STUDY_NAME
        if not path.exists():
            return {}
        try:
            record = json.loads(path.read_bytes())
            schema, made_from = int(record["schema"]), record["made_from"]
            found = {
                str(name): {str(need): str(sha) for need, sha in needs.items()} for name, needs in made_from.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CorruptError(f"{path} is damaged: it is no record of a study; restore it from a copy") from None
        if schema > STUDY_SCHEMA:
            raise InputError(
                f"{path} has schema {schema}, this version reads up to {STUDY_SCHEMA}; use a newer phalanx"
            )
        return found

    def _refuse_foreign(self) -> None:
        if self.folder.is_symlink() or (self.folder.exists() and not self.folder.is_dir()):
            raise InputError(f"{self.folder} is a link or a file, not a study's folder; give a folder")


def _result_sha256(folder: Path) -> str:
    """What a finished run made. Its record is left out: made anew with the same result, it is the same."""
    return sha256_json({name: file.sha256 for name, file in read_manifest(folder).items() if name != RUN_NAME})


def _ordered(nodes: Sequence[Node]) -> tuple[Node, ...]:
    by_name: dict[str, Node] = {}
    folded: set[str] = set()
    for node in nodes:
        _check_name(node.name)
        # some file systems do not tell upper from lower case
        if node.name.casefold() in folded:
            raise InputError(f"two runs of the study are named {node.name!r}; rename one")
        folded.add(node.name.casefold())
        by_name[node.name] = node
    for node in nodes:
        for need in node.needs:
            if need not in by_name:
                raise InputError(
                    f"run {node.name!r} needs {need!r}, which the study does not have; it has {sorted(by_name)}"
                )
    try:
        order = TopologicalSorter({node.name: node.needs for node in nodes}).static_order()
        return tuple(by_name[name] for name in order)
    except CycleError as error:
        raise InputError(f"the study's runs need each other in a circle: {' -> '.join(error.args[1])}") from None


def _check_name(name: str) -> None:
    if not _NODE_NAME.fullmatch(name) or ".." in name or name.casefold() in _RESERVED:
        raise InputError(
            f"{name!r} cannot name a run: use letters, digits, '.', '_' and '-', starting with a letter or "
            "digit, "
            f"at most 100, without '..', and not {STUDY_NAME} or {LOCK_NAME}"
        )
