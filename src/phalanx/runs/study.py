"""A study: named runs, and what each needs, made in order and never twice.

Each run is `STUDY/NAME/`, a run folder; `STUDY/study.json` records from which results each was made, so that
a run whose needs have been made anew is not taken for current.

Runs that do not need each other may be made side by side. Only their actions are: one thread alone prepares, verifies
and finishes run folders and writes `study.json`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Literal, TypeAlias

from phalanx.errors import CorruptError, InputError
from phalanx.runs.atomic import remove_stray_temporaries, write_json
from phalanx.runs.canonical import JSON, parse_json, sha256_json
from phalanx.runs.folder import RUN_NAME, RunFolder
from phalanx.runs.lock import LOCK_NAME, RunLock
from phalanx.runs.manifest import read_manifest

STUDY_SCHEMA = 1
STUDY_NAME = "study.json"
Step: TypeAlias = Literal["skipped", "running", "finished"]
Progress: TypeAlias = Callable[[str, Step], None]

WAKE_SECONDS = 0.2
"""So often the main thread looks up from waiting: a signal that the system gave to another thread waits for that."""

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
        self._nodes = tuple(nodes)
        self._order = _ordered(nodes)

    def order(self) -> tuple[Node, ...]:
        """The runs, each after everything it needs."""
        return self._order

    def run(self, progress: Progress | None = None, workers: int = 1) -> None:
        """Make every run that is not finished; verify and skip those that are.

        At most `workers` actions go on at once: with one, in the calling thread and in `order()`; with several, each
        in a thread of its own, and the next is the first of the given nodes whose needs are finished. After an error
        nothing is started, and the actions that go on are waited for.

        `progress` is called in the calling thread with each run's name and step.
        Raises the first error of an action (the runs finished by then stay finished), InputError if a finished run
        has another configuration or was made from other results, CorruptError if one is damaged, LockedError.
        """
        if workers < 1:
            raise InputError(f"workers must be at least 1, got {workers}")
        tell = progress or _tell_nobody
        self._refuse_foreign()
        with RunLock(self.folder):
            remove_stray_temporaries(self.folder)
            if workers == 1:
                self._in_turn(tell)
            else:
                self._side_by_side(tell, workers)

    def _in_turn(self, tell: Progress) -> None:
        for node in self._order:
            if self._prepare(node, tell):
                self._finish(node, lambda node=node: self._act(node), tell)  # type: ignore[misc]

    def _side_by_side(self, tell: Progress, workers: int) -> None:
        waiting = list(self._nodes)
        running: dict[Future[None], Node] = {}
        finished: set[str] = set()
        errors: list[BaseException] = []
        with ThreadPoolExecutor(workers) as threads:
            while True:
                while not errors and len(running) < workers and (node := _first_ready(waiting, finished)):
                    waiting.remove(node)
                    with _kept(errors):
                        if self._prepare(node, tell):
                            running[threads.submit(self._act, node)] = node
                        else:
                            finished.add(node.name)
                if not running:
                    break
                wait(running, WAKE_SECONDS, FIRST_COMPLETED)
                for future in [future for future in running if future.done()]:
                    node = running.pop(future)
                    with _kept(errors):
                        self._finish(node, future.result, tell)
                        finished.add(node.name)
        if errors:
            raise errors[0]

    def _prepare(self, node: Node, tell: Progress) -> bool:
        """Whether the run is still to be made; its folder is then ready for the action."""
        folder = self._folder(node)
        self._bind_to_needs(node.name, folder, {name: _result_sha256(path) for name, path in self._needs(node).items()})
        # held only in between: the action may be a training run, which takes the lock itself
        with folder.lock():
            folder.prepare(node.config)
        if folder.status() == "finished":
            folder.verify()
            tell(node.name, "skipped")
            return False
        tell(node.name, "running")
        return True

    def _act(self, node: Node) -> None:
        node.action(self._folder(node).path, self._needs(node))

    def _finish(self, node: Node, result: Callable[[], None], tell: Progress) -> None:
        """`result` returns when the action is done, or raises what it raised."""
        folder = self._folder(node)
        with folder.records_outcome():
            result()
        if folder.status() != "finished":
            with folder.lock():
                folder.finish()
        tell(node.name, "finished")

    def _folder(self, node: Node) -> RunFolder:
        return RunFolder(self.folder / node.name)

    def _needs(self, node: Node) -> dict[str, Path]:
        return {name: self.folder / name for name in node.needs}

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
            record = parse_json(path.read_bytes())
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


def _tell_nobody(name: str, step: Step) -> None:
    del name, step


def _first_ready(waiting: Sequence[Node], finished: set[str]) -> Node | None:
    return next((node for node in waiting if finished.issuperset(node.needs)), None)


@contextmanager
def _kept(errors: list[BaseException]) -> Iterator[None]:
    """An error in the block goes into `errors` instead of on."""
    try:
        yield
    except BaseException as error:
        errors.append(error)


def _result_sha256(folder: Path) -> str:
    """What a finished run made. Its record is left out: made anew with the same result, it is the same."""
    return sha256_json({name: file.sha256 for name, file in read_manifest(folder).items() if name != RUN_NAME})


def _ordered(nodes: Sequence[Node]) -> tuple[Node, ...]:
    by_name: dict[str, Node] = {}
    folded: set[str] = set()
    for node in nodes:
        check_name(node.name)
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


def check_name(name: str) -> None:
    """Raises InputError for what cannot be the name of a run's folder."""
    if not _NODE_NAME.fullmatch(name) or ".." in name or name.casefold() in _RESERVED:
        raise InputError(
            f"{name!r} cannot name a run: use letters, digits, '.', '_' and '-', starting with a letter or "
            "digit, "
            f"at most 100, without '..', and not {STUDY_NAME} or {LOCK_NAME}"
        )
