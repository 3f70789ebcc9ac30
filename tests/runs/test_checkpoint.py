from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from phalanx.errors import CorruptError, DiskError, DivergedError, InputError
from phalanx.runs import checkpoint
from phalanx.runs.atomic import stray_temporaries
from phalanx.runs.checkpoint import load_latest, load_tensors, save_checkpoint, save_tensors


def _tensors(step: int) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "model": {"weight": torch.full((3, 4), float(step)), "steps": torch.tensor(step)},
        "optimizer": {"0.exp_avg": torch.arange(5) * step},
    }


def _save(folder: Path, step: int, keep: int = 2) -> Path:
    return save_checkpoint(folder, step, _tensors(step), {"epoch": step, "lr": 0.1 * step}, keep=keep)


def _assert_is(folder: Path, step: int) -> tuple[str, ...]:
    """The latest checkpoint is that of `step`, bit for bit; gives its notes."""
    found = load_latest(folder)
    assert found is not None
    assert found.step == step
    assert found.state == {"epoch": step, "lr": 0.1 * step}
    assert found.tensors.keys() == _tensors(step).keys()
    for group, members in _tensors(step).items():
        for name, tensor in members.items():
            assert torch.equal(found.tensors[group][name], tensor)
            assert found.tensors[group][name].dtype == tensor.dtype
    return found.notes


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_nothing_saved_is_none(tmp_path: Path) -> None:
    assert load_latest(tmp_path / "missing") is None
    assert load_latest(tmp_path) is None


def test_the_latest_comes_back_and_older_ones_go(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        assert _save(tmp_path, step) == tmp_path / f"step-{step:08d}"
        assert _assert_is(tmp_path, step) == ()
    assert _names(tmp_path) == ["LATEST", "step-00000002", "step-00000003"]
    assert _names(tmp_path / "step-00000003") == [
        "MANIFEST.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]


def test_one_can_be_kept(tmp_path: Path) -> None:
    for step in (1, 2):
        _save(tmp_path, step, keep=1)
    assert _names(tmp_path) == ["LATEST", "step-00000002"]


def test_going_back_removes_the_abandoned_future(tmp_path: Path) -> None:
    for step in (10, 20):
        _save(tmp_path, step)
    _save(tmp_path, 15)
    assert _assert_is(tmp_path, 15) == ()
    assert _names(tmp_path) == ["LATEST", "step-00000010", "step-00000015"]


def test_dtypes_tied_and_strided_tensors(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "tied": base,
        "again": base,
        "transposed": base.T,
        "row": base[1],
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.empty(0, 3),
        "none": torch.empty(0),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "eighth": torch.ones(2, dtype=torch.float8_e4m3fn),
        "flags": torch.tensor([True, False]),
        "rng": torch.arange(8, dtype=torch.uint8),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    save_checkpoint(tmp_path, 0, {"model": tensors, "nothing": {}}, {})
    found = load_latest(tmp_path)
    assert found is not None
    assert found.tensors["nothing"] == {}
    assert found.tensors["model"].keys() == tensors.keys()
    for name, tensor in tensors.items():
        loaded = found.tensors["model"][name]
        assert loaded.dtype == tensor.dtype
        assert torch.equal(loaded.double(), tensor.detach().double())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_nothing_non_finite_is_ever_saved(tmp_path: Path, bad: float, dtype: torch.dtype) -> None:
    _save(tmp_path, 1)
    tensors = {**_tensors(2), "ema": {"conv.weight": torch.tensor([1.0, bad, bad], dtype=dtype)}}
    with pytest.raises(DivergedError, match=r"ema tensor 'conv\.weight' of shape \(3,\) holds 2 non-finite"):
        save_checkpoint(tmp_path, 2, tensors, {})
    with pytest.raises(DivergedError, match=r"state 'losses\.1' is not finite at step 2"):
        save_checkpoint(tmp_path, 2, _tensors(2), {"losses": [1.0, bad]})
    assert _names(tmp_path) == ["LATEST", "step-00000001"]


def test_a_kill_at_every_step_leaves_a_verifiable_checkpoint(tmp_path: Path, in_child, failpoints) -> None:
    for step in (1, 2):
        _save(tmp_path / "traced", step)
    steps = failpoints(lambda: _save(tmp_path / "traced", 3))
    assert {name.partition("/")[0] for name in steps} == {
        *("save.open", "save.sync", "save.rename", "save.after_rename", "save.latest", "save.prune"),
        *("save.remove", "save.end"),
        *("write.open", "write.half", "write.fsync", "write.rename", "write.after_rename"),
    }
    for number, name in enumerate(steps):
        folder = tmp_path / str(number)
        for step in (1, 2):
            _save(folder, step)
        assert in_child(lambda folder=folder: _save(folder, 3), f"{name}:kill") == -9
        found = load_latest(folder)
        assert found is not None and found.step in (2, 3)
        assert _assert_is(folder, found.step) == ()
        _save(folder, 3)
        _save(folder, 4)
        assert _assert_is(folder, 4) == ()
        assert _names(folder) == ["LATEST", "step-00000003", "step-00000004"]


@pytest.mark.parametrize("keep", [1, 2])
def test_a_kill_while_the_same_step_is_saved_again(tmp_path: Path, in_child, failpoints, keep: int) -> None:
    _save(tmp_path / "traced", 5, keep)
    steps = failpoints(lambda: _save(tmp_path / "traced", 5, keep))
    assert len(steps) > 20
    for number, name in enumerate(steps):
        folder = tmp_path / str(number)
        _save(folder, 5, keep)
        assert in_child(lambda folder=folder: _save(folder, 5, keep), f"{name}:kill") == -9
        assert _assert_is(folder, 5) == ()
        _save(folder, 5, keep)
        assert _names(folder) == ["LATEST", "step-00000005"]


def test_a_full_disk_at_every_step_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failpoints
) -> None:
    _save(tmp_path, 1)
    for name in failpoints(lambda: _save(tmp_path / "traced", 2)):
        monkeypatch.setenv("PHALANX_FAILPOINT", f"{name}:enospc")
        with pytest.raises(DiskError, match=r"No space left on device \(\d+ bytes needed, \d+ free\)"):
            _save(tmp_path, 2)
        monkeypatch.delenv("PHALANX_FAILPOINT")
        found = load_latest(tmp_path)
        assert found is not None and found.step in (1, 2)
        assert stray_temporaries(tmp_path) == []
        _save(tmp_path, 1)
    assert _assert_is(tmp_path, 1) == ()


def test_a_really_full_disk(tiny_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_disk / "checkpoints"
    _save(folder, 1)
    tensors = {"model": {"weight": torch.zeros(150_000)}}  # 600 kB; twice that does not fit into 1 MiB
    with pytest.raises(DiskError, match=r"12\d{5} bytes needed \(twice its size\), \d+ free; free space"):
        save_checkpoint(folder, 2, tensors, {})
    (tiny_disk / "filler").write_bytes(b"x" * 600_000)
    monkeypatch.setattr(checkpoint, "_require_space", lambda folder, size: None)
    with pytest.raises(DiskError, match="No space left on device"):
        save_checkpoint(folder, 2, tensors, {})
    assert _assert_is(folder, 1) == ()
    assert stray_temporaries(folder) == []
    (tiny_disk / "filler").unlink()
    save_checkpoint(folder, 2, tensors, {})
    found = load_latest(folder)
    assert found is not None and found.step == 2


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "MANIFEST.json"])
def test_every_damage_falls_back_and_says_so(tmp_path: Path, each_damage, name: str) -> None:
    _save(tmp_path, 1)
    newest = _save(tmp_path, 2)
    for _ in each_damage(newest / name):
        notes = _assert_is(tmp_path, 1)
        assert any(name in note and "sha256" in note for note in notes)
    assert _assert_is(tmp_path, 2) == ()


def test_a_damaged_pointer_never_goes_back(tmp_path: Path, each_damage) -> None:
    _save(tmp_path, 1)
    _save(tmp_path, 2)
    for _ in each_damage(tmp_path / "LATEST", flips=10_000, cuts=10_000):
        _assert_is(tmp_path, 2)


def test_all_damaged_names_file_and_sha256(tmp_path: Path) -> None:
    for step in (1, 2):
        path = _save(tmp_path, step) / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptError, match=r"no checkpoint in .* verifies: .*model\.safetensors.*sha256"):
        load_latest(tmp_path)
    for step in (1, 2):
        shutil.rmtree(tmp_path / f"step-{step:08d}")
    with pytest.raises(CorruptError, match="names no sound checkpoint"):
        load_latest(tmp_path)


def test_loading_changes_nothing(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    (tmp_path / ".tmp-0123456789abcdef").mkdir()
    before = sorted(tmp_path.rglob("*"))
    load_latest(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["../model", "a/b", "", ".hidden"])
def test_groups_cannot_leave_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="tensor groups are named by"):
        save_checkpoint(tmp_path, 1, {name: {}}, {})


def test_single_files_carry_metadata_and_are_protected(tmp_path: Path, each_damage) -> None:
    path = tmp_path / "model.safetensors"
    save_tensors(path, _tensors(3)["model"], {"spec": "resnet18"})
    tensors, metadata = load_tensors(path)
    assert metadata == {"spec": "resnet18"}
    assert torch.equal(tensors["weight"], _tensors(3)["model"]["weight"])
    for name in ("model.safetensors", "model.safetensors.sha256"):
        for _ in each_damage(tmp_path / name):
            with pytest.raises(CorruptError, match=r"model\.safetensors"):
                load_tensors(path)
    with pytest.raises(InputError, match="does not exist"):
        load_tensors(tmp_path / "other.safetensors")
    with pytest.raises(DivergedError, match="model tensor 'w'"):
        save_tensors(path, {"w": torch.tensor(float("nan"))}, {})
    load_tensors(path)


@pytest.mark.parametrize("content", [b"", b"\x80\x04pickle", b"\xff" * 8 + b"{}", b"\x02" + b"\0" * 7 + b"[]"])
def test_a_hostile_file_with_a_valid_sha256_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    checkpoint.write_protected(path, content)
    with pytest.raises(CorruptError, match="no safetensors file"):
        load_tensors(path)


def test_equal_tensors_make_equal_files_whatever_the_metadata(tmp_path: Path) -> None:
    metadata = {name: name for name in ("spec", "epoch", "weights", "seed", "label")}
    contents = set()
    for i in range(8):
        save_tensors(tmp_path / f"{i}.safetensors", {"w": torch.ones(2)}, metadata)
        contents.add((tmp_path / f"{i}.safetensors").read_bytes())
    assert len(contents) == 1
