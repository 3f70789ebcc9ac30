from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from phalanx.errors import CorruptError, DivergedError, InputError, LockedError
from phalanx.runs.folder import RunFolder
from phalanx.runs.lock import RunLock
from phalanx.runs.study import Node, Study


def _node(name: str, *needs: str, log: list[str] | None = None, **config: int) -> Node:
    def action(own: Path, folders: Mapping[str, Path]) -> None:
        if log is not None:
            log.append(name)
        inputs = sorted((folder / "out.txt").read_text() for folder in folders.values())
        (own / "out.txt").write_text(f"{name}{''.join(map(str, config.values()))}({','.join(inputs)})")

    return Node(name, needs, config, action)


def _dual(log: list[str] | None = None) -> list[Node]:
    return [_node("dual", "st", "rt-er", log=log), _node("st", log=log), _node("rt-er", "st", log=log)]


def test_runs_are_made_in_order_and_never_twice(tmp_path: Path) -> None:
    log: list[str] = []
    study = Study(tmp_path / "study", _dual(log))
    assert [node.name for node in study.order()] == ["st", "rt-er", "dual"]
    steps: list[tuple[str, str]] = []
    study.run(lambda name, step: steps.append((name, step)))
    assert log == ["st", "rt-er", "dual"]
    assert steps == [(name, step) for name in log for step in ("running", "finished")]
    assert (tmp_path / "study" / "dual" / "out.txt").read_text() == "dual(rt-er(st()),st())"
    steps.clear()
    study.run(lambda name, step: steps.append((name, step)))
    assert len(log) == 3
    assert steps == [(name, "skipped") for name in log]


def test_a_failed_run_stops_the_study_and_is_taken_up_again(tmp_path: Path) -> None:
    log: list[str] = []
    nodes = _dual(log)

    def diverge(own: Path, folders: Mapping[str, Path]) -> None:
        (own / "half.txt").write_text("half")
        raise DivergedError("loss is NaN")

    broken = [nodes[0], nodes[1], Node("rt-er", ("st",), {}, diverge)]
    with pytest.raises(DivergedError, match="loss is NaN"):
        Study(tmp_path, broken).run()
    assert RunFolder(tmp_path / "st").status() == "finished"
    assert RunFolder(tmp_path / "rt-er").status() == "diverged"
    assert RunFolder(tmp_path / "dual").status() == "new"
    Study(tmp_path, nodes).run()
    assert log == ["st", "rt-er", "dual"]


def test_a_kill_at_every_step_ends_in_the_same_study(tmp_path: Path, in_child, failpoints) -> None:
    nodes = [_node("a", x=1), _node("b", "a")]
    steps = failpoints(Study(tmp_path / "traced", nodes).run)
    expected = (tmp_path / "traced" / "b" / "out.txt").read_text()
    for number, step in enumerate(steps):
        study = Study(tmp_path / str(number), nodes)
        assert in_child(study.run, f"{step}:kill") == -9
        study.run()
        study.run()
        assert (tmp_path / str(number) / "b" / "out.txt").read_text() == expected
        assert RunFolder(tmp_path / str(number) / "a").status() == "finished"


def test_an_action_may_run_the_folder_itself(tmp_path: Path) -> None:
    def action(own: Path, folders: Mapping[str, Path]) -> None:
        run = RunFolder(own)
        with run.lock():
            run.prepare({"lr": 0.1})
            run.resolve("model.bin").write_bytes(b"model")
            run.finish(["model.bin"])
            run.resolve("report.html").write_text("made later")

    node = Node("st", (), {"lr": 0.1}, action)
    Study(tmp_path, [node]).run()
    assert sorted(RunFolder(tmp_path / "st").verify()) == ["model.bin", "run.json"]
    Study(tmp_path, [node]).run()


def test_a_finished_run_is_verified(tmp_path: Path) -> None:
    Study(tmp_path, _dual()).run()
    (tmp_path / "rt-er" / "out.txt").write_text("changed")
    with pytest.raises(CorruptError, match=r"rt-er/out\.txt is damaged"):
        Study(tmp_path, _dual()).run()


def test_another_configuration_of_a_run_is_refused(tmp_path: Path) -> None:
    Study(tmp_path, [_node("st", lr=1)]).run()
    with pytest.raises(InputError, match=r"st holds a run of another configuration \(lr: 1 -> 2\)"):
        Study(tmp_path, [_node("st", lr=2)]).run()


def test_a_run_made_from_another_result_is_not_current(tmp_path: Path) -> None:
    Study(tmp_path, _dual()).run()
    with RunFolder(tmp_path / "st").lock():
        RunFolder(tmp_path / "st").clear()
    changed = [*_dual()[:1], _node("st", seed=1), *_dual()[2:]]
    with pytest.raises(InputError, match=r"rt-er was made from another result of st; remove .*rt-er"):
        Study(tmp_path, changed).run()
    with RunFolder(tmp_path / "rt-er").lock():
        RunFolder(tmp_path / "rt-er").clear()
    with pytest.raises(InputError, match=r"dual was made from another result of rt-er, st"):
        Study(tmp_path, changed).run()


def test_a_run_made_anew_with_the_same_result_leaves_the_others_current(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Study(tmp_path, _dual()).run()
    monkeypatch.setattr("phalanx.runs.folder._now", lambda: "later")
    with RunFolder(tmp_path / "st").lock():
        RunFolder(tmp_path / "st").clear()
    log: list[str] = []
    Study(tmp_path, _dual(log)).run()
    assert log == ["st"]


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        (lambda: [_node("a"), _node("a")], "two runs of the study are named 'a'"),
        (lambda: [_node("a"), _node("A")], "two runs of the study are named 'A'"),
        (lambda: [_node("a", "b")], r"run 'a' needs 'b', which the study does not have; it has \['a'\]"),
        (lambda: [_node("a", "b"), _node("b", "a")], r"in a circle: (a -> b -> a|b -> a -> b)"),
        (lambda: [_node("a", "a")], "in a circle: a -> a"),
        *(
            (lambda name=name: [_node(name)], "cannot name a run: use letters")
            for name in ("..", "a/b", "", ".a", "a..b")
        ),
        *(
            (lambda name=name: [_node(name)], "cannot name a run")
            for name in ("/a", "LOCK", "study.json", "é", "a" * 101)
        ),
    ],
)
def test_bad_graphs_are_refused(tmp_path: Path, nodes: Callable[[], list[Node]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Study(tmp_path / "study", nodes())
    assert not (tmp_path / "study").exists()


def test_two_processes_do_not_run_one_study(tmp_path: Path) -> None:
    with RunLock(tmp_path), pytest.raises(LockedError):
        Study(tmp_path, _dual()).run()


def test_a_damaged_record_of_the_study(tmp_path: Path) -> None:
    Study(tmp_path, _dual()).run()
    (tmp_path / "study.json").write_text('{"schema": 1, "made_from": []}')
    with pytest.raises(CorruptError, match=r"study\.json is damaged"):
        Study(tmp_path, _dual()).run()


def test_a_linked_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(InputError, match="link or a file"):
        Study(tmp_path / "link", _dual()).run()
