"""Public sets, on small archives in upstream's layout."""

from __future__ import annotations

import dataclasses
import gzip
import io
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import upstream
from typer.testing import CliRunner

from phalanx.cli import app
from phalanx.data import DataConfig, fetch, load_data
from phalanx.data import named as module
from phalanx.data.archives import opened
from phalanx.data.config import NAMED
from phalanx.data.describe import check_source
from phalanx.data.named import SETS, Upstream, md5_of
from phalanx.data.problems import DataProblems
from phalanx.errors import CorruptError, InputError


@pytest.fixture(autouse=True)
def accept_small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Archives made here are not upstream's byte for byte; and nothing is looked for in the user's folders."""
    sets = {name: dataclasses.replace(known, files=()) for name, known in SETS.items()}
    monkeypatch.setattr(module, "SETS", sets)
    monkeypatch.setenv("PHALANX_DATA", str(tmp_path / "sets"))


@pytest.mark.parametrize("packed", [True, False])
def test_mnist(tmp_path: Path, packed: bool) -> None:
    files = upstream.mnist(tmp_path / "mnist/MNIST/raw", packed=packed)
    data = load_data(f"mnist:{tmp_path / 'mnist'}", val_fraction=0.5)
    assert (data.name, data.shape, data.num_classes) == ("mnist", (1, 28, 28), 10)
    assert np.array_equal(data.test.pixels[:, 0], files["t10k-images-idx3-ubyte"])
    assert data.test.labels.tolist() == list(range(10))[::-1]
    assert np.array_equal(data.train.pixels[:, 0], files["train-images-idx3-ubyte"][data.train.ids])
    assert data.train.labels.tolist() == (data.train.ids % 10).tolist()


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("archive", [True, False])
def test_cifar(tmp_path: Path, classes: int, archive: bool) -> None:
    files, root = upstream.cifar_files(classes), tmp_path / "sets" / f"cifar{classes}"
    if archive:
        upstream.tar(root / f"cifar-{classes}-binary.tar.gz", files)
    else:
        upstream.unpacked(root, files)
    data = load_data(f"cifar{classes}", val_fraction=0.5)
    record = np.frombuffer(next(value for name, value in files.items() if "/test" in name), np.uint8)
    record = record.reshape(-1, 3073 if classes == 10 else 3074)
    assert np.array_equal(data.test.pixels, record[:, -3072:].reshape(-1, 3, 32, 32))
    # of two label bytes the second is the fine one
    assert data.test.labels.tolist() == list(range(classes))
    assert data.class_names[3] == ("cat" if classes == 10 else "thing3")
    assert len(data.train) + len(data.val) == (50 if classes == 10 else 400)


def test_svhn_calls_ten_zero(tmp_path: Path) -> None:
    upstream.svhn(tmp_path / "sets/svhn")
    data = load_data("svhn")
    assert (data.shape, data.class_names[0]) == ((3, 32, 32), "0")
    assert data.test.labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    assert np.array_equal(data.test.pixels, upstream.noise(10, 32, 32, 3, 10).transpose(3, 2, 0, 1))


@pytest.mark.parametrize("how", ["zip", "folder", "sorted"])
def test_tiny_imagenets_validation_labels_are_right(tmp_path: Path, how: str) -> None:
    files, root = upstream.tiny_imagenet_files(), tmp_path / "sets/tiny-imagenet"
    if how == "zip":
        upstream.zipped(root / "tiny-imagenet-200.zip", files)
    else:
        upstream.unpacked(root, files)
    if how == "sorted":  # as several published scripts leave it
        val = root / "tiny-imagenet-200/val"
        for line in (val / "val_annotations.txt").read_text().splitlines():
            image, wnid, *_ = line.split("\t")
            (val / wnid / "images").mkdir(parents=True, exist_ok=True)
            shutil.move(val / "images" / image, val / wnid / "images" / image)
    data = load_data("tiny-imagenet")
    assert data.shape == (3, 64, 64)
    assert data.class_names == ("crane (n00000007)", "goldfish", "crane (n00000005)")
    assert data.test.labels.tolist() == [1, 0, 2, 1, 0, 2]
    # and each label is the brightness's, in training and in validation images alike
    for split in (data.train, data.val, data.test):
        assert ((split.pixels.mean(axis=(1, 2, 3)) - 40) // 60 == split.labels).all()
    assert any("test labels are not public" in note for note in data.notes)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda files: files.pop("tiny-imagenet-200/val/val_annotations.txt"), "val_annotations.txt is missing"),
        (lambda files: files.pop("tiny-imagenet-200/val/images/val_2.JPEG"), "val_annotations.txt:3:"),
        (lambda files: files.update({"tiny-imagenet-200/val/images/x.JPEG": b""}), "1 validation images have no label"),
        (lambda files: files.update({"tiny-imagenet-200/train/n1/images/x.JPEG": b""}), "train/n1 is no class"),
        (
            lambda files: files.update(
                {"tiny-imagenet-200/wnids.txt": files["tiny-imagenet-200/wnids.txt"] + b"n00000009"}
            ),
            "n00000009 of wnids.txt has no training image",
        ),
        (
            lambda files: files.update(
                {"tiny-imagenet-200/val/val_annotations.txt": files["tiny-imagenet-200/val/val_annotations.txt"] * 2}
            ),
            "twice",
        ),
    ],
)
def test_a_tiny_imagenet_that_is_not_whole_is_named(tmp_path: Path, change: object, problem: str) -> None:
    files = upstream.tiny_imagenet_files()
    change(files)  # type: ignore[operator]
    upstream.zipped(tmp_path / "tiny-imagenet-200.zip", files)
    with pytest.raises(DataProblems, match=problem):
        load_data(f"tiny-imagenet:{tmp_path}")


def test_imagenet_tests_on_its_validation_folder(tmp_path: Path) -> None:
    root = upstream.imagenet(tmp_path / "imagenet")
    with pytest.raises(DataProblems, match=r"set data\.size"):
        load_data(f"imagenet:{root}")
    data = load_data(f"imagenet:{root}", size=32)
    assert (data.name, data.class_names) == ("imagenet", ("n01440764", "n01443537"))
    assert (len(data.train) + len(data.val), len(data.test)) == (8, 4)
    assert load_data(f"imagenet:{root}", size="auto").shape == (3, 40, 40)


def test_size_and_colour_hold_for_stored_pixels(tmp_path: Path) -> None:
    upstream.mnist(tmp_path)
    assert load_data(f"mnist:{tmp_path}", size=32, color="rgb").shape == (3, 32, 32)
    upstream.svhn(tmp_path)
    grey = load_data(f"svhn:{tmp_path}", color="grey")
    assert grey.shape == (1, 32, 32) and "all images brought to grey" in grey.notes


def test_a_missing_set_says_where_it_was_looked_for_and_how_to_get_it(tmp_path: Path, monkeypatch: object) -> None:
    for name in NAMED:
        with pytest.raises(InputError, match=f"{name} is not at {tmp_path}/sets/{name}") as caught:
            load_data(name)
        assert f"data.name={name}:PATH" in str(caught.value)
    assert "phalanx data get cifar10 downloads it" in module.how_to_get("cifar10") or not module.SETS["cifar10"].files
    assert check_source(DataConfig(name="svhn")) != []


def test_the_python_version_of_cifar_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py/data_batch_1").write_bytes(b"cos\nsystem\n(S'touch x'\ntR.")
    with pytest.raises(InputError, match="which is pickled and not opened; phalanx data get cifar10"):
        load_data(f"cifar10:{tmp_path}")


def test_every_set_but_imagenet_has_checksums_and_no_other_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {name for name, known in SETS.items() if not known.files} == {"imagenet"}
    assert all(len(file.md5) == 32 for known in SETS.values() for file in known.files)
    monkeypatch.setattr(module, "SETS", SETS)
    upstream.tar(tmp_path / "cifar-10-binary.tar.gz", upstream.cifar_files(10))
    with pytest.raises(CorruptError, match="upstream's has c32a1d4ab5d03f1284b67883e8d87530"):
        load_data(f"cifar10:{tmp_path}")


# -- damaged and hostile files ---------------------------------------------------------------------------------------


def test_damaged_files_are_named(tmp_path: Path) -> None:
    upstream.mnist(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    for broken in (whole[:-40], b"<html>not found</html>", gzip.compress(upstream.idx(np.zeros((3, 3)))), whole[:50]):
        path.write_bytes(broken)
        with pytest.raises(CorruptError, match=r"train-images-idx3-ubyte\.gz"):
            load_data(f"mnist:{tmp_path}")
    path.write_bytes(gzip.compress(upstream.idx(upstream.noise(0, 39, 28, 28))))
    with pytest.raises(CorruptError, match=r"39 images, .* 40 labels"):
        load_data(f"mnist:{tmp_path}")


@pytest.mark.parametrize("name", ["cifar-10-binary.tar.gz", "tiny-imagenet-200.zip"])
def test_an_archive_cut_short_or_replaced_by_a_page_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith("zip"):
        upstream.zipped(path, upstream.tiny_imagenet_files())
    else:
        upstream.tar(path, upstream.cifar_files(10))
    whole = path.read_bytes()
    kind = "cifar10" if "cifar" in name else "tiny-imagenet"
    for broken in (whole[: len(whole) // 2], b"<html>quota exceeded</html>", b""):
        path.write_bytes(broken)
        with pytest.raises(CorruptError, match=name.replace(".", r"\.")):
            load_data(f"{kind}:{tmp_path}")


def test_a_label_out_of_range_is_named_with_its_image(tmp_path: Path) -> None:
    files = upstream.cifar_files(10)
    files["cifar-10-batches-bin/data_batch_2.bin"] = b"\x0a" + files["cifar-10-batches-bin/data_batch_2.bin"][1:]
    upstream.tar(tmp_path / "cifar-10-binary.tar.gz", files)
    with pytest.raises(DataProblems, match=r"data_batch_2\.bin image 0 \(from 0\): label must be in 0\.\.9, got 10"):
        load_data(f"cifar10:{tmp_path}")
    files["cifar-10-batches-bin/data_batch_2.bin"] += b"x"
    upstream.tar(tmp_path / "cifar-10-binary.tar.gz", files)
    with pytest.raises(CorruptError, match=r"no multiple of 3073"):
        load_data(f"cifar10:{tmp_path}")


def test_a_matlab_file_of_other_things_is_refused(tmp_path: Path) -> None:
    upstream.svhn(tmp_path)
    upstream.savemat(tmp_path / "train_32x32.mat", {"X": np.array(["no", "pixels"], object), "y": np.zeros((2, 1))})
    with pytest.raises(CorruptError, match="must hold uint8 arrays X"):
        load_data(f"svhn:{tmp_path}")
    (tmp_path / "train_32x32.mat").write_bytes(b"MATLAB" + bytes(300))
    with pytest.raises(CorruptError, match="no readable MATLAB file"):
        load_data(f"svhn:{tmp_path}")


@pytest.mark.parametrize("name", ["../escape.bin", "/etc/escape.bin", "a/../../escape.bin", "C:\\escape.bin"])
def test_names_that_lead_out_of_an_archive_are_refused(tmp_path: Path, name: str) -> None:
    root = tmp_path / "in"
    files = {**upstream.cifar_files(10), name: b"x"}
    upstream.tar(root / "cifar-10-binary.tar.gz", files)
    with pytest.raises(CorruptError, match="leads out of the archive"):
        load_data(f"cifar10:{root}")
    upstream.zipped(root / "tiny-imagenet-200.zip", {**upstream.tiny_imagenet_files(), name: b"x"})
    with pytest.raises(CorruptError, match="leads out of the archive"):
        load_data(f"tiny-imagenet:{root}")
    assert not list(tmp_path.rglob("escape.bin"))


def test_links_in_archives_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        info = tarfile.TarInfo("data_batch_1.bin")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(info, io.BytesIO())
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as zipped:
        link = zipfile.ZipInfo("wnids.txt")
        link.external_attr = 0o120777 << 16
        zipped.writestr(link, "/etc/passwd")
    for name in ("x.tar.gz", "x.zip"):
        with pytest.raises(CorruptError, match="is a link"), opened(tmp_path / name):
            pass
    folder = tmp_path / "cifar10"
    upstream.unpacked(folder, upstream.cifar_files(10))
    secret = tmp_path / "secret.bin"
    secret.write_bytes(bytes(3073))
    target = folder / "cifar-10-batches-bin/data_batch_1.bin"
    target.unlink()
    target.symlink_to(secret)
    with pytest.raises(CorruptError, match="is a link that leaves the folder"):
        load_data(f"cifar10:{folder}")


def test_bombs_are_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phalanx.data.archives.MAX_FILE", 20_000)
    upstream.mnist(tmp_path)
    with pytest.raises(CorruptError, match="unpacks to more than 20000 bytes"):
        load_data(f"mnist:{tmp_path}")
    upstream.tar(tmp_path / "cifar-10-binary.tar.gz", upstream.cifar_files(10))
    with pytest.raises(CorruptError, match="more than 20000"):
        load_data(f"cifar10:{tmp_path}")
    monkeypatch.setattr("phalanx.data.decode.MAX_PIXELS", 64 * 64 - 1)
    monkeypatch.setattr("phalanx.data.archives.MAX_FILE", 10**6)
    upstream.zipped(tmp_path / "tiny-imagenet-200.zip", upstream.tiny_imagenet_files())
    with pytest.raises(DataProblems, match="more than 4095 pixels"):
        load_data(f"tiny-imagenet:{tmp_path}")


# -- fetching --------------------------------------------------------------------------------------------------------


@pytest.fixture
def publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An upstream of one file, which the downloader copies from a folder."""
    source = tmp_path / "upstream.bin"
    source.write_bytes(b"the data")
    sets = {**SETS, "cifar10": dataclasses.replace(SETS["cifar10"], files=(Upstream("a.bin", "u", md5_of(source)),))}
    monkeypatch.setattr(module, "SETS", sets)
    monkeypatch.setattr(fetch, "SETS", sets)

    def download(url: str, folder: str, name: str) -> None:
        if not source.exists():
            raise OSError("no route to host")
        # as the real one: what is there already is not fetched again
        if not (Path(folder) / name).exists():
            shutil.copy(source, Path(folder) / name)

    monkeypatch.setattr(fetch, "_download_url", lambda: download)
    return source


def test_fetching_verifies_and_does_not_fetch_again(publish: Path, tmp_path: Path) -> None:
    heard: list[str] = []
    folder = fetch.fetch("cifar10", tell=heard.append)
    assert folder == tmp_path / "sets/cifar10" and [path.name for path in folder.iterdir()] == ["a.bin"]
    publish.unlink()
    assert fetch.fetch("cifar10", tell=heard.append) == folder
    assert [message.split(",")[0] for message in heard] == ["a.bin: fetched", "a.bin: there already"]
    (folder / "a.bin").write_bytes(b"flipped")
    with pytest.raises(CorruptError, match="remove it and fetch it again"):
        fetch.fetch("cifar10")


def test_a_failed_or_wrong_download_leaves_nothing(publish: Path, tmp_path: Path) -> None:
    publish.write_bytes(b"<html>quota exceeded</html>")
    with pytest.raises(InputError, match="an error page, or cut short"):
        fetch.fetch("cifar10", tmp_path / "here")
    publish.unlink()
    with pytest.raises(InputError, match="no route to host"):
        fetch.fetch("cifar10", tmp_path / "here")
    assert list((tmp_path / "here").iterdir()) == []


def test_what_a_killed_download_left_is_fetched_again(publish: Path, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here/a.bin.part").write_bytes(b"the d")
    assert fetch.fetch("cifar10", tmp_path / "here") == tmp_path / "here"
    assert (tmp_path / "here/a.bin").read_bytes() == b"the data"


def test_what_cannot_be_fetched_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="there are mnist, cifar10"):
        fetch.fetch("cifar11")
    with pytest.raises(InputError, match="not to be had without an account"):
        fetch.fetch("imagenet")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--root"):
        fetch.fetch("mnist", tmp_path / "file/x")
    monkeypatch.setitem(sys.modules, "torchvision.datasets.utils", None)
    with pytest.raises(InputError, match=r"pip install phalanx\[vision\]"):
        fetch.fetch("mnist", tmp_path / "none")


def test_the_command_fetches(publish: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["data", "get", "cifar10", "--root", str(tmp_path / "x")], catch_exceptions=False)
    assert done.exit_code == 0 and f"cifar10: {tmp_path / 'x'}" in done.output
