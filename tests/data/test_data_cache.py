from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phalanx.data import cache as module
from phalanx.data.cache import MANIFEST, cache_key, cache_root, load_cached, open_cache
from phalanx.data.config import DataConfig
from phalanx.data.folder import scan_folder
from phalanx.data.problems import DataProblems
from phalanx.data.source import Source
from phalanx.errors import CorruptError, DiskError

Make = Callable[..., Path]


@pytest.fixture
def pictures(make_folder: Make) -> tuple[Source, DataConfig]:
    root = make_folder({f"{split}/{name}": 3 for split in ("train", "test") for name in ("a", "b")})
    return scan_folder(root), DataConfig(name=f"folder:{root}")


def cache_folder(source: Source, config: DataConfig) -> Path:
    return cache_root(config) / cache_key(source, config)


def test_a_cache_is_built_once_and_mapped_read_only(
    pictures: tuple[Source, DataConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_cached(*pictures)
    monkeypatch.setattr(module, "convert", lambda *_: pytest.fail("converted again"))
    again = load_cached(*pictures)
    assert isinstance(again.pixels["train"], np.memmap) and not again.pixels["train"].flags.writeable
    assert again.pixels["train"].shape == (6, 1, 5, 6) and again.class_names == ("a", "b")
    for split in ("train", "test"):
        assert np.array_equal(first.pixels[split], again.pixels[split])
        assert again.labels[split].tolist() == [0, 1] * 3
    assert sorted(path.name for path in cache_folder(*pictures).iterdir()) == sorted(
        [MANIFEST, *(f"{split}.{kind}.npy" for split in ("train", "test") for kind in ("pixels", "labels"))]
    )


def test_the_cache_goes_where_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_root(DataConfig(cache=str(tmp_path))) == tmp_path
    monkeypatch.setenv("PHALANX_CACHE", "~/elsewhere")
    assert cache_root(DataConfig()) == Path.home() / "elsewhere"
    monkeypatch.delenv("PHALANX_CACHE")
    assert cache_root(DataConfig()) == Path.home() / ".cache/phalanx"


def test_the_key_follows_the_source_and_its_decoding(pictures: tuple[Source, DataConfig]) -> None:
    source, config = pictures
    others = [DataConfig(name=config.name, size=8), DataConfig(name=config.name, color="rgb")]
    keys = {cache_key(source, each) for each in (config, *others)}
    assert len(keys) == 3
    # splitting happens after the cache
    assert cache_key(source, DataConfig(name=config.name, seed=5, val_fraction=0.2)) in keys


def damages(path: Path, rng: np.random.Generator) -> list[bytes]:
    whole = path.read_bytes()
    flipped = []
    for position in rng.integers(0, len(whole), 12):
        data = bytearray(whole)
        data[position] ^= 1 << int(rng.integers(8))
        flipped.append(bytes(data))
    return [*flipped, b"", whole[: len(whole) // 2], whole[:-1], whole + b"\0"]


def test_every_flipped_bit_and_every_cut_is_detected(pictures: tuple[Source, DataConfig]) -> None:
    load_cached(*pictures)
    folder = cache_folder(*pictures)
    rng = np.random.default_rng(0)
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for damaged in damages(path, rng):
            path.write_bytes(damaged)
            with pytest.raises(CorruptError, match=rf"{path.name} .*; delete the folder {folder}"):
                open_cache(folder)
        path.unlink()
        with pytest.raises(CorruptError, match=path.name):
            open_cache(folder)
        path.write_bytes(whole)
    open_cache(folder)


def test_a_damaged_cache_is_rebuilt_and_says_so(pictures: tuple[Source, DataConfig]) -> None:
    before = load_cached(*pictures)
    path = cache_folder(*pictures) / "train.pixels.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.unlink()  # the map of `before` keeps the old file
    path.write_bytes(data)
    rebuilt = load_cached(*pictures)
    assert np.array_equal(rebuilt.pixels["train"], before.pixels["train"])
    assert rebuilt.notes[-1].startswith("the data cache was damaged (data cache file ")
    assert "train.pixels.npy has sha256" in rebuilt.notes[-1]
    assert load_cached(*pictures).notes == before.notes


def test_a_manifest_rewritten_with_pickled_arrays_runs_nothing(pictures: tuple[Source, DataConfig]) -> None:
    load_cached(*pictures)
    folder = cache_folder(*pictures)
    np.save(folder / "train.labels.npy", np.array([print], dtype=object), allow_pickle=True)
    manifest = json.loads((folder / MANIFEST).read_text())
    path = folder / "train.labels.npy"
    manifest["files"][path.name] = {"bytes": path.stat().st_size, "sha256": module._sha256(path)}
    del manifest["sha256"]
    (folder / MANIFEST).write_text(json.dumps({**manifest, "sha256": module._sha256_json(manifest)}))
    with pytest.raises(CorruptError, match="Object arrays cannot be loaded"):
        open_cache(folder)


def test_bad_images_leave_nothing_behind(pictures: tuple[Source, DataConfig]) -> None:
    source, config = pictures
    (config.path / "train/a/001.png").write_bytes(b"junk")
    with pytest.raises(DataProblems, match=r"train/a/001\.png: not a PNG"):
        load_cached(source, config)
    assert [path.suffix for path in cache_root(config).iterdir()] == [".lock"]


def test_a_full_disk_is_named_and_leaves_nothing(
    pictures: tuple[Source, DataConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module._PixelFiles, "write", full)
    with pytest.raises(DiskError, match="No space left on device; free some space or name another folder"):
        load_cached(*pictures)
    assert [path.suffix for path in cache_root(pictures[1]).iterdir()] == [".lock"]


def test_space_is_checked_before_writing(pictures: tuple[Source, DataConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    # 12 images of 1 x 5 x 6 bytes
    with pytest.raises(DiskError, match="360 bytes are needed, 100 are free"):
        load_cached(*pictures)


def test_a_cache_that_cannot_be_made_is_named(pictures: tuple[Source, DataConfig], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    source, config = pictures
    with pytest.raises(DiskError, match=r"data cache .*file/sub.*name another folder with\s+cache"):
        load_cached(source, DataConfig(name=config.name, cache=str(tmp_path / "file/sub")))


@pytest.mark.parametrize("moment", ["convert", "_write_manifest", "_flush"])
def test_a_builder_killed_anywhere_leaves_no_half_cache(
    pictures: tuple[Source, DataConfig], monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    child = os.fork()
    if child == 0:
        try:
            setattr(module, moment, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            load_cached(*pictures)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert not cache_folder(*pictures).exists()
    assert len(load_cached(*pictures).pixels["train"]) == 6
    assert not list(cache_root(pictures[1]).glob("*.building"))


def test_two_builders_build_once(pictures: tuple[Source, DataConfig], tmp_path: Path) -> None:
    log = tmp_path / "log"
    real = module.convert

    def counted(*args: Any) -> Any:
        with log.open("a") as file:
            file.write("built\n")
        time.sleep(0.1)  # long enough for the others to arrive
        return real(*args)

    children = []
    for _ in range(3):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                module.convert = counted
                code = 0 if len(load_cached(*pictures).pixels["train"]) == 6 else 1
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert log.read_text() == "built\n"
