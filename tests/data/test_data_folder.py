from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from data_samples import encoded, noise

from phalanx.data.folder import interleave, scan_folder
from phalanx.data.problems import DataProblems, Problems
from phalanx.errors import InputError

Make = Callable[..., Path]


def test_a_flat_folder_is_one_split_with_sorted_classes(make_folder: Make) -> None:
    source = scan_folder(make_folder({"dogs": 2, "cats": 4}))
    assert (source.title, source.class_names) == ("folder:pictures", ("cats", "dogs"))
    assert dict(source.counts) == {"train": 6}
    rows = list(source.rows("train", Problems("t")))
    assert rows[0].data.startswith(b"\x89PNG")


def test_every_prefix_holds_the_classes_in_proportion() -> None:
    cats, dogs = [Path(f"c{i}") for i in range(4)], [Path(f"d{i}") for i in range(2)]
    # positions: cats 1/8 3/8 5/8 7/8, dogs 1/4 3/4
    assert [path.name for path, _ in interleave([cats, dogs])] == ["c0", "d0", "c1", "c2", "d1", "c3"]


@pytest.mark.parametrize("validation", ["val", "valid", "Validation"])
def test_split_folders_are_recognised(make_folder: Make, validation: str) -> None:
    counts = {f"{split}/{name}": 2 for split in ("train", "test", validation) for name in ("a", "b")}
    assert dict(scan_folder(make_folder(counts)).counts) == {"train": 4, "val": 4, "test": 4}


def test_extensions_have_no_case_and_strangers_are_noted(make_folder: Make) -> None:
    root = make_folder({"a": 1, "b": 1})
    (root / "a" / "X.PNG").write_bytes(encoded(noise(5, 5, 6)))
    (root / "a" / "notes.txt").write_text("hello")
    (root / "a" / ".DS_Store").write_text("hidden")
    (root / ".git").mkdir()
    source = scan_folder(root)
    assert dict(source.counts) == {"train": 3}
    assert source.notes == ("ignored 1 entries that are not PNG or JPEG files, such as a/notes.txt",)


def test_the_identity_follows_the_files(make_folder: Make) -> None:
    root = make_folder({"a": 2, "b": 2})
    before = scan_folder(root).digest
    assert scan_folder(root).digest == before
    os.utime(root / "a" / "000.png", ns=(1, 1))
    assert scan_folder(root).digest != before


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"only": 3}, r"pictures/ has 1 class folder \(only\); a classifier needs 2"),
        ({"a": 1, "b": 0}, "b/ holds no PNG or JPEG image; add some or remove it"),
        ({"test/a": 1, "test/b": 1}, "there is test/ but no train/; add train/"),
        ({"train/a": 1, "train/b": 1, "cats": 1}, "cats/ lies beside train/ and is no split; move it"),
        (
            {f"{s}/{c}": 1 for s in ("train", "val", "valid") for c in "ab"},
            "val/ and valid/ are the same split; keep one",
        ),
        (
            {"train/a": 1, "train/b": 1, "test/a": 1, "test/c": 1},
            "class b is in train/ but not in the test folder(.|\n)*class c is in the test folder but not in",
        ),
    ],
)
def test_a_wrong_layout_is_named(make_folder: Make, counts: dict[str, int], message: str) -> None:
    with pytest.raises(DataProblems, match=message):
        scan_folder(make_folder(counts))


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="file is not a folder; name a folder"):
        scan_folder(tmp_path / "file")
    with pytest.raises(InputError, match="nowhere does not exist; name a folder"):
        scan_folder(tmp_path / "nowhere")


@pytest.mark.parametrize("place", ["a/outside.png", "outside"])
def test_links_that_leave_the_folder_are_refused(make_folder: Make, tmp_path: Path, place: str) -> None:
    root = make_folder({"a": 1, "b": 1})
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "x.png").write_bytes(encoded(noise(0, 5, 6)))
    (root / place).symlink_to(tmp_path / "secret" / "x.png" if place.endswith("png") else tmp_path / "secret")
    with pytest.raises(DataProblems, match=f"{place} is a link that leaves the folder; copy the file in"):
        scan_folder(root)


def test_links_within_the_folder_are_followed(make_folder: Make) -> None:
    root = make_folder({"a": 1, "b": 1})
    (root / "a" / "again.png").symlink_to(root / "b" / "000.png")
    assert dict(scan_folder(root).counts) == {"train": 3}


def test_a_pipe_is_not_opened(make_folder: Make) -> None:
    root = make_folder({"a": 1, "b": 1})
    os.mkfifo(root / "a" / "pipe.png")
    assert dict(scan_folder(root).counts) == {"train": 2}


def test_names_with_control_characters_are_escaped(make_folder: Make) -> None:
    root = make_folder({"a": 1, "b": 1, "c\x1b[31m": 0})
    with pytest.raises(DataProblems) as caught:
        scan_folder(root)
    assert "\x1b" not in str(caught.value) and "c\\x1b[31m" in str(caught.value)


def test_a_file_that_vanishes_is_named(make_folder: Make) -> None:
    root = make_folder({"a": 1, "b": 1})
    source, problems = scan_folder(root), Problems("t")
    (root / "b" / "000.png").unlink()
    assert len(list(source.rows("train", problems))) == 1
    assert problems.found == ["b/000.png: cannot be read (No such file or directory); check its permissions"]
