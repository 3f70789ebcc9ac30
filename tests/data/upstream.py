"""Small data sets in the layout that upstream publishes."""

from __future__ import annotations

import gzip
import io
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from data_samples import encoded, noise
from PIL import Image
from scipy.io import savemat


def idx(array: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes((0, 0, 8, array.ndim)) + sizes + array.astype(np.uint8).tobytes()


def mnist(root: Path, *, packed: bool = True) -> dict[str, np.ndarray]:
    """40 training and 10 test images; the arrays by file name."""
    root.mkdir(parents=True, exist_ok=True)
    files = {
        "train-images-idx3-ubyte": noise(0, 40, 28, 28),
        "train-labels-idx1-ubyte": np.arange(40) % 10,
        "t10k-images-idx3-ubyte": noise(1, 10, 28, 28),
        "t10k-labels-idx1-ubyte": np.arange(10)[::-1],
    }
    for name, array in files.items():
        if packed:
            (root / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        else:
            (root / name).write_bytes(idx(array))
    return files


def cifar_files(classes: int) -> dict[str, bytes]:
    """By path within the archive: four images of a class to train on and one to test on."""
    names = [f"data_batch_{k}.bin" for k in range(1, 6)] + ["test_batch.bin"]
    folder = "cifar-10-batches-bin" if classes == 10 else "cifar-100-binary"
    names = names if classes == 10 else ["train.bin", "test.bin"]
    files: dict[str, bytes] = {}
    for seed, name in enumerate(names):
        fine = np.arange(400 if name == "train.bin" else classes) % classes
        coarse = [] if classes == 10 else [(fine // 5)[:, None]]
        records = [*coarse, fine[:, None], noise(seed, len(fine), 3072)]
        files[f"{folder}/{name}"] = np.concatenate(records, axis=1).astype(np.uint8).tobytes()
    if classes == 100:
        files[f"{folder}/fine_label_names.txt"] = "\n".join(f"thing{k}" for k in range(100)).encode() + b"\n"
    return files


def tar(path: Path, files: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def svhn(root: Path, **other: object) -> None:
    """30 training and 10 test images; upstream's label of the digit 0 is 10."""
    root.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", 30), ("test", 10)):
        labels = (np.arange(count) % 10 + 1).astype(np.uint8)[:, None]
        savemat(root / f"{split}_32x32.mat", {"X": noise(count, 32, 32, 3, count), "y": labels, **other})


def jpeg(seed: int, level: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.clip(noise(seed, 64, 64, 3) // 16 + level, 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def tiny_imagenet_files(classes: int = 3, train: int = 4, val: int = 6) -> dict[str, bytes]:
    """By path within the zip. Class k's images have brightness 40 + 60 k; validation images come in an order of no
    class, as upstream's do."""
    wnids = [f"n{k:08d}" for k in (7, 3, 5)][:classes]
    top = "tiny-imagenet-200"
    files = {
        f"{top}/wnids.txt": "\n".join(wnids).encode() + b"\n",
        f"{top}/words.txt": b"n00000003\tgoldfish, Carassius auratus\nn00000005\tcrane\nn00000007\tcrane\n",
    }
    lines = []
    for label, wnid in enumerate(wnids):
        for index in range(train):
            files[f"{top}/train/{wnid}/images/{wnid}_{index}.JPEG"] = jpeg(index, 40 + 60 * label)
        files[f"{top}/train/{wnid}/{wnid}_boxes.txt"] = b""
    for index in range(val):
        label = (2 * index + 1) % classes
        files[f"{top}/val/images/val_{index}.JPEG"] = jpeg(100 + index, 40 + 60 * label)
        lines.append(f"val_{index}.JPEG\t{wnids[label]}\t0\t0\t62\t62")
        files[f"{top}/test/images/test_{index}.JPEG"] = jpeg(200 + index, 0)
    files[f"{top}/val/val_annotations.txt"] = "\n".join(lines).encode() + b"\n"
    return files


def zipped(path: Path, files: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def unpacked(root: Path, files: Mapping[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def imagenet(root: Path) -> Path:
    for split, count in (("train", 4), ("val", 2)):
        for seed, wnid in enumerate(("n01440764", "n01443537")):
            folder = root / split / wnid
            folder.mkdir(parents=True)
            for index in range(count):
                (folder / f"{wnid}_{index}.JPEG").write_bytes(encoded(noise(10 * seed + index, 40 + index, 50, 3)))
    return root
