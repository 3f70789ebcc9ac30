from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from phalanx.errors import CorruptError, DivergedError, InputError, Interrupted, LockedError
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


# -- side by side --------------------------------------------------------------------------------------------------

PATIENCE_SECONDS = 10.0


def _does(name: str, *needs: str, work: Callable[[], None]) -> Node:
    return Node(name, needs, {}, lambda own, folders: work())


def _wait(event: threading.Event) -> None:
    assert event.wait(PATIENCE_SECONDS), "it did not happen in time"


def _raises(error: BaseException) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


def test_runs_that_do_not_need_each_other_go_on_at_once(tmp_path: Path) -> None:
    barrier = threading.Barrier(2)
    nodes = [_does(name, work=lambda: barrier.wait(PATIENCE_SECONDS)) for name in ("a", "b")]
    Study(tmp_path, nodes).run(workers=2)
    assert {RunFolder(tmp_path / name).status() for name in ("a", "b")} == {"finished"}


def test_never_more_at_once_than_workers(tmp_path: Path) -> None:
    lock, now, most = threading.Lock(), 0, 0
    both = threading.Barrier(2)

    def work() -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        both.wait(PATIENCE_SECONDS)
        with lock:
            now -= 1

    Study(tmp_path, [_does(f"n{i}", work=work) for i in range(6)]).run(workers=2)
    assert most == 2


def test_a_run_waits_for_what_it_needs_and_the_next_ready_one_goes_before(tmp_path: Path) -> None:
    log: list[str] = []
    other = threading.Event()

    def slow() -> None:
        _wait(other)
        log.append("slow")

    def quick() -> None:
        log.append("quick")
        other.set()

    late = _does("late", "slow", work=lambda: log.append("late"))
    nodes = [_does("slow", work=slow), late, _does("quick", work=quick)]
    Study(tmp_path, nodes).run(workers=2)
    assert log == ["quick", "slow", "late"]


def test_the_given_order_decides_between_ready_runs(tmp_path: Path) -> None:
    other, begun = threading.Event(), []
    nodes = [_does("block", work=lambda: _wait(other)), _node("x"), _node("x.e", "x"), _node("y"), _node("y.e", "y")]
    nodes.append(_does("last", "x.e", "y.e", work=other.set))

    def progress(name: str, step: str) -> None:
        if step == "running":
            begun.append(name)

    Study(tmp_path, nodes).run(progress, workers=2)
    assert begun == ["block", "x", "x.e", "y", "y.e", "last"]


def test_a_result_does_not_depend_on_the_workers(tmp_path: Path) -> None:
    steps: list[tuple[str, str]] = []
    for workers in (1, 2, 3):
        study = Study(tmp_path / str(workers), _dual())
        study.run(lambda name, step: steps.append((name, step)), workers)
    assert steps == 3 * [(name, step) for name in ("st", "rt-er", "dual") for step in ("running", "finished")]
    made = {(tmp_path / str(workers) / "study.json").read_bytes() for workers in (1, 2, 3)}
    assert len(made) == 1
    assert (tmp_path / "3/dual/out.txt").read_text() == "dual(rt-er(st()),st())"


def test_only_several_workers_need_threads(tmp_path: Path) -> None:
    threads: list[threading.Thread] = []

    def work() -> None:
        threads.append(threading.current_thread())

    Study(tmp_path / "one", [_does("a", work=work)]).run()
    Study(tmp_path / "two", [_does("a", work=work)]).run(workers=2)
    assert threads[0] is threading.main_thread() and threads[1] is not threading.main_thread()


def test_everything_but_the_actions_is_done_in_the_calling_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: set[threading.Thread] = set()
    for name in ("prepare", "verify", "finish", "mark"):
        real = getattr(RunFolder, name)

        def noted(*args: object, real: Callable[..., object] = real) -> object:
            threads.add(threading.current_thread())
            return real(*args)

        monkeypatch.setattr(RunFolder, name, noted)
    nodes = [_node("a"), _node("b"), _does("c", "a", "b", work=_raises(DivergedError("loss is NaN")))]
    for _ in range(2):
        with pytest.raises(DivergedError):
            Study(tmp_path, nodes).run(lambda name, step: threads.add(threading.current_thread()), 2)
    assert threads == {threading.current_thread()}


def test_after_an_error_nothing_starts_and_what_goes_on_is_finished(tmp_path: Path) -> None:
    failed = threading.Event()

    def fail() -> None:
        failed.set()
        raise DivergedError("loss is NaN")

    def go_on() -> None:
        _wait(failed)
        # the study hears of the error before this ends
        threading.Event().wait(0.1)

    steps: list[tuple[str, str]] = []
    nodes = [_does("bad", work=fail), _does("good", work=go_on), _node("never"), _node("after", "good")]
    with pytest.raises(DivergedError, match="loss is NaN"):
        Study(tmp_path, nodes).run(lambda name, step: steps.append((name, step)), workers=2)
    assert steps == [("bad", "running"), ("good", "running"), ("good", "finished")]
    statuses = {node.name: RunFolder(tmp_path / node.name).status() for node in nodes}
    assert statuses == {"bad": "diverged", "good": "finished", "never": "new", "after": "new"}


def test_the_first_error_is_raised_and_each_is_recorded(tmp_path: Path) -> None:
    first = threading.Event()

    def interrupted() -> None:
        first.set()
        raise Interrupted(signal.SIGTERM, "stopped")

    def diverged() -> None:
        _wait(first)
        threading.Event().wait(0.1)
        raise DivergedError("loss is NaN")

    with pytest.raises(Interrupted, match="stopped"):
        Study(tmp_path, [_does("b", work=diverged), _does("a", work=interrupted)]).run(workers=2)
    assert RunFolder(tmp_path / "a").status() == "interrupted"
    assert RunFolder(tmp_path / "b").status() == "diverged"


def test_a_run_that_cannot_be_prepared_waits_for_those_that_go_on(tmp_path: Path) -> None:
    Study(tmp_path, [_node("b", lr=1)]).run()
    release = threading.Event()
    nodes = [_does("a", work=lambda: _wait(release)), _node("b", lr=2)]
    threading.Timer(0.1, release.set).start()
    with pytest.raises(InputError, match="another configuration"):
        Study(tmp_path, nodes).run(workers=2)
    assert RunFolder(tmp_path / "a").status() == "finished"


def test_a_signal_given_to_another_thread_is_handled(tmp_path: Path) -> None:
    heard = threading.Event()
    before = signal.signal(signal.SIGUSR1, lambda signum, frame: heard.set())

    def work() -> None:
        # by then the study waits
        threading.Event().wait(0.1)
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
        _wait(heard)

    try:
        Study(tmp_path, [_does("a", work=work)]).run(workers=2)
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_no_workers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="workers must be at least 1, got 0"):
        Study(tmp_path / "study", _dual()).run(workers=0)
    assert not (tmp_path / "study").exists()
