from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from phalanx.errors import CorruptError, InputError
from phalanx.runs.atomic import render_json
from phalanx.runs.canonical import sha256_json
from phalanx.runs.manifest import FileRecord, verify_manifest, write_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "sub" / "b.bin").write_bytes(bytes(range(100)))
    write_manifest(tmp_path, ["a.txt", "sub/b.bin"])
    return tmp_path


def test_the_manifest_records_and_verifies(folder: Path) -> None:
    assert verify_manifest(folder) == {
        "a.txt": FileRecord(hashlib.sha256(b"abc").hexdigest(), 3),
        "sub/b.bin": FileRecord(hashlib.sha256(bytes(range(100))).hexdigest(), 100),
    }
    assert json.loads((folder / "MANIFEST.json").read_text())["schema"] == 1


def test_the_message_names_file_and_both_digests(folder: Path) -> None:
    (folder / "a.txt").write_text("abd")
    expected, found = hashlib.sha256(b"abc").hexdigest(), hashlib.sha256(b"abd").hexdigest()
    with pytest.raises(CorruptError, match=rf"a\.txt is damaged: expected sha256 {expected}.*found {found}"):
        verify_manifest(folder)
    (folder / "a.txt").unlink()
    with pytest.raises(CorruptError, match=rf"a\.txt is missing: expected sha256 {expected}"):
        verify_manifest(folder)


@pytest.mark.parametrize("name", ["a.txt", "sub/b.bin", "MANIFEST.json"])
def test_every_damage_is_found(folder: Path, each_damage, name: str) -> None:
    for _ in each_damage(folder / name):
        with pytest.raises(CorruptError, match=Path(name).name):
            verify_manifest(folder)
    verify_manifest(folder)


def test_not_even_space_may_change(folder: Path) -> None:
    path = folder / "MANIFEST.json"
    content = path.read_bytes()
    for changed in (
        content[:-1],
        content + b" ",
        content.replace(b"\n", b"\r\n"),
        json.dumps(json.loads(content)).encode(),
    ):
        path.write_bytes(changed)
        with pytest.raises(CorruptError, match=r"MANIFEST\.json is damaged: expected sha256 \w{64}, found \w{64}"):
            verify_manifest(folder)


def test_a_manifest_cannot_reach_outside(folder: Path) -> None:
    (folder.parent / "outside").write_text("secret")
    with pytest.raises(InputError, match="no name inside"):
        write_manifest(folder, ["../outside"])
    content = {"schema": 1, "files": {"../outside": {"sha256": "0" * 64, "bytes": 6}}}
    (folder / "MANIFEST.json").write_bytes(render_json({**content, "sha256": sha256_json(content)}))
    with pytest.raises(InputError, match="no name inside"):
        verify_manifest(folder)


def test_a_newer_schema_is_said_to_be_newer(folder: Path) -> None:
    content = {"schema": 2, "files": {}}
    (folder / "MANIFEST.json").write_bytes(render_json({**content, "sha256": sha256_json(content)}))
    with pytest.raises(InputError, match="schema 2, this version reads up to 1; use a newer phalanx"):
        verify_manifest(folder)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b'{"schema": 1}', b"\xff", b"[" * 5000])
def test_what_is_no_manifest_is_refused(folder: Path, content: bytes) -> None:
    (folder / "MANIFEST.json").write_bytes(content)
    with pytest.raises(CorruptError, match="no manifest"):
        verify_manifest(folder)
