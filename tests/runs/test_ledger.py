from __future__ import annotations

import math
import os
import random
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.errors import CorruptError, DiskError, InputError, LockedError
from phalanx.runs.ledger import Binding, Ledger, Verdict

_BINDING = Binding("m" * 64, "d" * 64, "Linf", "8/255", 1, {"torch": "2.15.0"})

_WORDS = st.text(max_size=8).filter(lambda text: text.isprintable())
_NUMBERS = st.floats(allow_nan=True, allow_infinity=True)


@st.composite
def _verdicts(draw: st.DrawFn) -> Verdict:
    label = draw(st.integers(0, 9))
    outcome = draw(st.sampled_from(["held", "broken", "invalid", "timeout"]))
    return Verdict(
        sample=draw(st.integers(0, 20)),
        label=label,
        attack=draw(_WORDS),
        surface=draw(st.sampled_from(["whole", "router", "expert 1"])),
        restart=draw(st.integers(0, 2)),
        verdict=outcome,
        predicted=label if outcome == "held" else draw(st.integers(-1, 9)),
        clean_predicted=label,
        flipped=draw(st.sampled_from([None, True, False])),
        loss=draw(st.none() | _NUMBERS),
        distance=draw(_NUMBERS),
        queries=draw(st.integers(0, 2**62)),
        first_success=draw(st.integers(-1, 100)),
    )


def _row(sample: int, attack: str = "pgd-50", restart: int = 0, **changes: object) -> Verdict:
    row = Verdict(sample, 1, attack, "whole", restart, "held", 1, 1, None, 0.125 * sample, 0.03, 50, -1)
    return replace(row, **changes)


def _fill(path: Path, count: int = 40) -> Ledger:
    ledger = Ledger.open(path, _BINDING)
    ledger.declare_attack("pgd-50", {"steps": 50})
    ledger.add([_row(sample) for sample in range(count)])
    return ledger


@settings(max_examples=15, deadline=None)
@given(rows=st.lists(_verdicts(), unique_by=lambda row: row.key, max_size=12), seed=st.integers(0, 99))
def test_rows_come_back_whatever_order_and_batches(tmp_path_factory, rows: list[Verdict], seed: int) -> None:
    folder = tmp_path_factory.mktemp("ledger")
    with Ledger.open(folder / "a.db", _BINDING) as ledger:
        ledger.add(rows)
        assert ledger.rows() == sorted(rows, key=lambda row: row.key)
        digest = ledger.table_sha256()
    shuffled = random.Random(seed).sample(rows, len(rows))
    with Ledger.open(folder / "b.db", _BINDING) as ledger:
        for start in range(0, len(shuffled), 3):
            ledger.add(shuffled[start : start + 5])  # batches overlap: identical rows may come twice
        assert ledger.table_sha256() == digest
        ledger.seal()
    with Ledger.read(folder / "b.db") as ledger:
        assert ledger.table_sha256() == digest
        assert ledger.rows() == sorted(rows, key=lambda row: row.key)
        for row in rows:
            assert row.sample in ledger.done(row.attack, row.surface)
            assert row.sample in ledger.done(row.attack, row.surface, row.restart)


def test_the_table_hash_sees_every_field(tmp_path: Path) -> None:
    digests = set()
    changes: list[dict[str, object]] = [
        {},
        {"sample": 4},
        {"verdict": "broken"},
        {"flipped": False},
        {"loss": 0.1250000001},
        {"loss": None},
        {"queries": 51},
    ]
    for number, change in enumerate(changes):
        with Ledger.open(tmp_path / f"{number}.db", _BINDING) as ledger:
            ledger.add([replace(_row(1), **change)])
            digests.add(ledger.table_sha256())
    assert len(digests) == len(changes)


def test_done_tells_restarts_apart(tmp_path: Path) -> None:
    with Ledger.open(tmp_path / "a.db", _BINDING) as ledger:
        ledger.add([_row(1), _row(2), _row(2, restart=1), _row(3, attack="apgd")])
        assert ledger.done("pgd-50", "whole") == {1, 2}
        assert ledger.done("pgd-50", "whole", 1) == {2}
        assert ledger.done("pgd-50", "router") == set()


def test_a_contradiction_is_refused_and_nothing_written(tmp_path: Path) -> None:
    with Ledger.open(tmp_path / "a.db", _BINDING) as ledger:
        ledger.add([_row(1)])
        with pytest.raises(
            CorruptError, match=r"two verdicts for sample 1, attack 'pgd-50', surface 'whole', restart 0"
        ):
            ledger.add([_row(0), replace(_row(1), verdict="broken", predicted=2)])
        with pytest.raises(CorruptError, match="two verdicts for sample 5"):
            ledger.add([_row(5), _row(5, queries=1)])
        ledger.add([_row(1)])
        assert ledger.rows() == [_row(1)]


def test_another_binding_is_refused_field_by_field(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    _fill(path).seal()
    before = path.read_bytes()
    changes = {"model_sha256": "x", "data_sha256": "x", "norm": "L2", "eps": "4/255", "evaluation_version": 2}
    for name, value in changes.items():
        message = rf"bound to something else \({name}: ledger {getattr(_BINDING, name)!r}, now {value!r}\)"
        with pytest.raises(InputError, match=message):
            Ledger.open(path, replace(_BINDING, **{name: value}))
    with pytest.raises(InputError, match=r"eps: .*; norm: "):
        Ledger.open(path, replace(_BINDING, norm="L2", eps="0.5"))
    assert path.read_bytes() == before
    assert Path(f"{path}.sha256").exists()


def test_versions_are_recorded_not_bound(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    _fill(path).close()
    with Ledger.open(path, replace(_BINDING, versions={"torch": "2.16.0"})) as ledger:
        assert sorted(versions["torch"] for versions in ledger.versions()) == ["2.15.0", "2.16.0"]
        assert ledger.binding() == _BINDING


def test_attacks_are_declared_once_and_may_be_added(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    with Ledger.open(path, _BINDING) as ledger:
        ledger.declare_attack("pgd-50", {"steps": 50, "eps": "8/255"})
        ledger.declare_attack("pgd-50", {"eps": "8/255", "steps": 50})
        with pytest.raises(InputError, match=r"already has attack 'pgd-50' as .*50.*, got .*20.*another name"):
            ledger.declare_attack("pgd-50", {"steps": 20, "eps": "8/255"})
        ledger.seal()
    with Ledger.open(path, _BINDING) as ledger:
        ledger.declare_attack("square", {"queries": 5000})
        assert ledger.attacks() == {"pgd-50": {"eps": "8/255", "steps": 50}, "square": {"queries": 5000}}


def test_sealing_leaves_one_file_that_nobody_writes(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    _fill(path).seal()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.db", "a.db.sha256"]
    before = path.read_bytes()
    with Ledger.read(path) as ledger:
        assert len(ledger.rows()) == 40
        with pytest.raises(DiskError, match="readonly"):
            ledger.add([_row(99)])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.db", "a.db.sha256"]
    assert path.read_bytes() == before


def test_an_open_ledger_can_be_read_but_not_sealed_by_another(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    with _fill(path), Ledger.read(path) as reader:
        assert len(reader.rows()) == 40
        assert reader.attacks() == {"pgd-50": {"steps": 50}}
        other = Ledger.open(path, _BINDING)
        other._connection.execute("PRAGMA busy_timeout = 10")
        with pytest.raises(LockedError, match="another process"):
            other.seal()
        other.close()


def test_every_damage_of_a_sealed_ledger_is_found(tmp_path: Path, each_damage) -> None:
    path = tmp_path / "a.db"
    _fill(path).seal()
    for name in ("a.db", "a.db.sha256"):
        for _ in each_damage(tmp_path / name):
            with pytest.raises(CorruptError, match=r"a\.db"):
                Ledger.read(path)
    with pytest.raises(CorruptError):
        for _ in each_damage(path, flips=1, cuts=0):
            Ledger.open(path, _BINDING)


def test_damage_of_an_unsealed_ledger_never_changes_a_verdict(tmp_path: Path, each_damage) -> None:
    path = tmp_path / "a.db"
    with _fill(path, count=150) as ledger:
        rows, digest = ledger.rows(), ledger.table_sha256()
    detected = 0
    for _ in each_damage(path):
        try:
            with Ledger.read(path) as ledger:
                assert (ledger.rows(), ledger.table_sha256()) == (rows, digest)
                assert ledger.binding() == _BINDING
        except CorruptError as error:
            assert "\n" not in str(error)
            detected += 1
    # the rest fell on unused bytes of pages
    assert detected > 120


def test_a_row_changed_behind_our_back_fails_its_crc(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    _fill(path).close()
    for statement in (
        "UPDATE verdicts SET distance = 0.01 WHERE sample = 3",
        "UPDATE verdicts SET loss = CAST('x' AS BLOB) WHERE sample = 3",
        "UPDATE entries SET value = replace(value, '8/255', '4/255')",
    ):
        copy = tmp_path / "copy.db"
        copy.write_bytes(path.read_bytes())
        connection = sqlite3.connect(copy)
        connection.execute(statement)
        connection.commit()
        connection.close()
        with pytest.raises(CorruptError, match="fails its CRC"):
            Ledger.read(copy)


def test_what_is_no_ledger_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no ledger .*a\.db; check the name"):
        Ledger.read(tmp_path / "a.db")
    (tmp_path / "text.db").write_text("not a database, but long enough to look at" * 20)
    (tmp_path / "empty.db").write_text("")
    connection = sqlite3.connect(tmp_path / "foreign.db")
    connection.execute("CREATE TABLE verdicts (a)")
    connection.close()
    for name in ("text.db", "empty.db", "foreign.db"):
        with pytest.raises(CorruptError, match=name):
            Ledger.open(tmp_path / name, _BINDING)


def test_a_path_with_url_characters(tmp_path: Path) -> None:
    path = tmp_path / "100%?mode=ro#1.db"
    _fill(path).seal()
    assert path.exists()
    with Ledger.read(path) as ledger:
        assert len(ledger.rows()) == 40


@pytest.mark.parametrize("step", ["ledger.create", "ledger.commit"])
def test_a_kill_loses_nothing_acknowledged(tmp_path: Path, in_child, step: str) -> None:
    path = tmp_path / "a.db"
    if step == "ledger.commit":
        _fill(path, count=5).close()
    assert in_child(lambda: _fill(path), f"{step}:kill") == -9
    with Ledger.open(path, _BINDING) as ledger:
        assert len(ledger.rows()) == (5 if step == "ledger.commit" else 0)
    with _fill(path) as ledger:
        assert len(ledger.rows()) == 40


def test_a_kill_after_add_keeps_the_rows(tmp_path: Path, in_child) -> None:
    path = tmp_path / "a.db"

    def add_and_die() -> None:
        _fill(path)
        os.kill(os.getpid(), 9)

    assert in_child(add_and_die) == -9
    with Ledger.read(path) as ledger:
        assert len(ledger.rows()) == 40


@pytest.mark.parametrize("step", ["ledger.seal", "ledger.sidecar", "write.half", "write.after_rename"])
def test_a_kill_while_sealing_keeps_the_rows(tmp_path: Path, in_child, step: str) -> None:
    path = tmp_path / "a.db"
    _fill(path).close()
    assert in_child(lambda: Ledger.open(path, _BINDING).seal(), f"{step}:kill") == -9
    with Ledger.read(path) as ledger:
        assert len(ledger.rows()) == 40
    with Ledger.open(path, _BINDING) as ledger:
        ledger.add([_row(99)])
        ledger.seal()
    with Ledger.read(path) as ledger:
        assert len(ledger.rows()) == 41


def test_a_full_disk_keeps_every_acknowledged_row(tiny_disk: Path) -> None:
    path = tiny_disk / "a.db"
    added = 0
    with Ledger.open(path, _BINDING) as ledger, pytest.raises(DiskError, match=r"a\.db.*free"):
        while True:
            ledger.add([_row(sample) for sample in range(added, added + 500)])
            added += 500
    copy = tiny_disk.parent / "a.db"
    for suffix in ("", "-wal"):
        source = Path(f"{path}{suffix}")
        if source.exists():
            Path(f"{copy}{suffix}").write_bytes(source.read_bytes())
    with Ledger.open(copy, _BINDING) as ledger:
        assert added > 0
        assert ledger.done("pgd-50", "whole") == set(range(added))


def test_an_injected_full_disk_is_a_disk_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with _fill(tmp_path / "a.db") as ledger:
        monkeypatch.setenv("PHALANX_FAILPOINT", "ledger.commit:enospc")
        with pytest.raises(DiskError, match="No space left"):
            ledger.add([_row(99)])
        monkeypatch.delenv("PHALANX_FAILPOINT")
        assert 99 not in ledger.done("pgd-50", "whole")


def _written_by(path: Path, writers: int, rows: int) -> None:
    """Forks writers that write so many rows each, every tenth of them also by the next one."""
    pids = []
    for writer in range(writers):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                with Ledger.open(path, _BINDING) as ledger:
                    for start in range(writer * rows, (writer + 1) * rows, 25):
                        own = range(start, start + 25)
                        ledger.add([_row((s + rows) % (writers * rows) if s % 10 == 0 else s) for s in own])
                        ledger.add([_row(s) for s in own])
                code = 0
            finally:
                os._exit(code)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * writers
    with Ledger.open(path, _BINDING) as ledger:
        assert [row.sample for row in ledger.rows()] == list(range(writers * rows))
        ledger.seal()


def test_four_processes_write_every_row_exactly_once(tmp_path: Path) -> None:
    _written_by(tmp_path / "a.db", writers=4, rows=1000)


@pytest.mark.nightly
def test_sixteen_processes_write_every_row_exactly_once(tmp_path: Path) -> None:
    _written_by(tmp_path / "a.db", writers=16, rows=1000)


def test_outcomes_and_the_size_are_read_back(tmp_path: Path) -> None:
    with Ledger.open(tmp_path / "a.db", _BINDING) as ledger:
        assert ledger.size() is None
        ledger.add([_row(1, restart=0), _row(1, restart=1, verdict="broken", predicted=0), _row(2)])
        attack, surface = _row(1).attack, _row(1).surface
        assert ledger.outcomes(attack, surface) == {1: "broken", 2: "held"}
        assert ledger.outcomes("other", surface) == {}
        ledger.declare_size(40)
        ledger.declare_size(40)
        assert ledger.size() == 40
        with pytest.raises(InputError, match="already has size"):
            ledger.declare_size(41)


def test_ledgers_merge(tmp_path: Path) -> None:
    with Ledger.open(tmp_path / "a.db", _BINDING) as a, Ledger.open(tmp_path / "b.db", _BINDING) as b:
        a.add([_row(1), _row(2)])
        b.add([_row(2), _row(3, distance=math.inf, verdict="broken", predicted=0)])
        a.add(b.rows())
        assert [row.sample for row in a.rows()] == [1, 2, 3]
