from __future__ import annotations

import builtins
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_samples import encoded, noise

from phalanx.data.parquet import scan_parquet
from phalanx.data.problems import DataProblems, Problems
from phalanx.errors import InputError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

Make = Callable[..., Path]


def images(count: int, start: int = 0) -> list[bytes]:
    return [encoded(noise(start + index, 4, 4)) for index in range(count)]


def test_the_splits_of_a_folder(make_parquet: Make) -> None:
    for name, count in (("train", 6), ("test", 4), ("validation", 2)):
        folder = make_parquet(f"{name}.parquet", images(count), [0, 1] * (count // 2))
    source = scan_parquet(folder)
    assert (source.title, source.class_names) == ("parquet:set", ("cat", "dog"))
    assert dict(source.counts) == {"train": 6, "val": 2, "test": 4}


def test_rows_come_in_order_across_row_groups_and_shards(make_parquet: Make) -> None:
    data = images(20)
    make_parquet("train-00000-of-00002.parquet", data[:15], [0, 1, 0] * 5)
    source = scan_parquet(make_parquet("train-00001-of-00002.parquet", data[15:], [1] * 5))
    rows = list(source.rows("train", Problems("t")))
    assert [row.data for row in rows] == data
    assert [row.label for row in rows] == [0, 1, 0] * 5 + [1] * 5
    assert rows[16].where == "train-00001-of-00002.parquet row 1 (from 0)"


def test_a_single_file_other_columns_and_no_names(make_parquet: Make) -> None:
    folder = make_parquet("birds.parquet", images(2), [0, 1], None, ("image", "fine_label"))
    source = scan_parquet(folder / "birds.parquet")
    assert (source.title, source.class_names, dict(source.counts)) == ("parquet:birds", None, {"train": 2})


def test_the_identity_is_the_content(make_parquet: Make, tmp_path: Path) -> None:
    folder = make_parquet("train.parquet", images(2), [0, 1])
    before = scan_parquet(folder).digest
    moved = folder.rename(tmp_path / "elsewhere")
    assert scan_parquet(moved).digest == before
    make_parquet("train.parquet", images(2), [1, 0])
    assert scan_parquet(folder).digest != before


@pytest.mark.parametrize(
    ("data", "labels", "names", "message"),
    [
        ([None], [0], ("cat", "dog"), "row 1 (from 0): column img holds no bytes; store the image itself"),
        (
            [encoded(noise(0, 4, 4))],
            [2],
            ("cat", "dog"),
            "row 1 (from 0): column label must be in 0..1, got 2",
        ),
        (
            [encoded(noise(0, 4, 4))],
            [-1],
            ("cat", "dog"),
            "row 1 (from 0): column label must be in 0..1, got -1",
        ),
        ([encoded(noise(0, 4, 4))], [10**9], None, "column label must be in 0..99999, got 1000000000"),
        (
            [encoded(noise(0, 4, 4))],
            [None],
            ("cat", "dog"),
            "row 1 (from 0): column label is null; give it a label",
        ),
    ],
)
def test_a_bad_row_is_named(
    make_parquet: Make, data: list[Any], labels: list[Any], names: tuple[str, ...] | None, message: str
) -> None:
    folder = make_parquet("train.parquet", [*images(1), *data], [0, *labels], names)
    problems = Problems("t")
    assert len(list(scan_parquet(folder).rows("train", problems))) == 1
    assert len(problems.found) == 1 and problems.found[0].startswith("train.parquet row 1")
    assert message in problems.found[0]


def write(folder: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), folder / "train.parquet")
    return folder


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": [0]}, "no image column (img or image); there are: label"),
        ({"img": [{"bytes": b"x"}]}, "no label column (label or fine_label); there are: img"),
        ({"img": [b"x"], "label": [0]}, "column img must be a struct with a field 'bytes', got binary"),
        ({"img": [{"bytes": b"x"}], "label": ["cat"]}, "column label must hold whole numbers, got string"),
    ],
)
def test_a_wrong_schema_is_named(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(DataProblems) as caught:
        scan_parquet(write(tmp_path, **columns))
    assert f"train.parquet: {message}" in str(caught.value)


def test_a_damaged_file_is_named(make_parquet: Make) -> None:
    folder = make_parquet("train.parquet", images(9), [0] * 9)
    path = folder / "train.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(DataProblems, match=r"train\.parquet: not a readable Parquet file .*; fetch it again"):
        scan_parquet(folder)
    path.write_bytes(whole[:4] + b"\xff" * 60 + whole[64:])
    problems = Problems("t")
    list(scan_parquet(folder).rows("train", problems))
    assert problems.found and problems.found[0].startswith("train.parquet")


def test_classes_must_agree_and_differ(make_parquet: Make) -> None:
    make_parquet("train.parquet", images(2), [0, 1])
    with pytest.raises(DataProblems, match=r"test\.parquet: its class names differ from those of train\.parquet"):
        scan_parquet(make_parquet("test.parquet", images(2), [0, 1], ("dog", "cat")))
    with pytest.raises(DataProblems, match="must be 2 or more and differ, got"):
        scan_parquet(make_parquet("test.parquet", images(2), [0, 1], ("cat", "cat")))


def test_no_file_two_validation_files_and_no_rows(make_parquet: Make, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere does not exist; name a Parquet file"):
        scan_parquet(tmp_path / "nowhere")
    folder = make_parquet("data.parquet", images(1), [0])
    with pytest.raises(InputError, match=r"no train\.parquet .*\(there is: data\.parquet\); rename the file"):
        scan_parquet(folder)
    make_parquet("train.parquet", [], [])
    with pytest.raises(DataProblems, match=r"train\.parquet: holds no rows; remove it"):
        scan_parquet(folder)
    make_parquet("val.parquet", images(1), [0])
    make_parquet("validation.parquet", images(1), [0])
    with pytest.raises(InputError, match=r"has validation\.parquet and val\.parquet.*same split; keep one"):
        scan_parquet(folder)


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"needs pyarrow; install it with: pip install phalanx\[table\]"):
        scan_parquet(tmp_path)
