"""Files that somebody made to do harm, signed with sums that fit: what a stranger's folder may hold."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from phalanx.runs.manifest import read_manifest, write_manifest
from phalanx.runs.sidecar import sidecar_path, write_sidecar


class Bomb:
    """Unpickled, it leaves a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def pickled(trace: Path) -> bytes:
    """What torch.load or numpy.load with pickles would run."""
    return pickle.dumps({"model": Bomb(trace)})


def signed(run: Path) -> None:
    """Every sum of a run's folder made to fit its files again."""
    for path in run.rglob("*"):
        if path.is_file() and sidecar_path(path).is_file():
            write_sidecar(path)
    write_manifest(run, sorted(read_manifest(run)))


def object_npz(trace: Path) -> bytes:
    """Adversarial images whose ids are pickled objects."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in (("x_adv", np.zeros((1, 1, 8, 8), np.float32)), ("ids", np.array([Bomb(trace)], object))):
            member = io.BytesIO()
            np.save(member, array, allow_pickle=True)
            archive.writestr(f"{name}.npy", member.getvalue())
    return buffer.getvalue()


def slipping_zip(name: str) -> bytes:
    """A data set's archive with a member that leads out of it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("tiny-imagenet-200/wnids.txt", "n01443537\n")
        archive.writestr(name, "x")
    return buffer.getvalue()


def linking_tar(target: Path) -> bytes:
    """The same with a link, and a member below it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        link = tarfile.TarInfo("cifar-10-batches-bin")
        link.type, link.linkname = tarfile.SYMTYPE, str(target)
        archive.addfile(link)
        member = tarfile.TarInfo("cifar-10-batches-bin/data_batch_1.bin")
        member.size = 4
        archive.addfile(member, io.BytesIO(b"evil"))
    return buffer.getvalue()


def safetensors(header: bytes, length: int | None = None, data: bytes = b"") -> bytes:
    """A file with any header, and a length of it that need not be true."""
    return struct.pack("<Q", len(header) if length is None else length) + header + data


HEADERS = {
    "longer than the file": safetensors(b"{}", 2**63),
    "no JSON": safetensors(b"\xff\xfe{{"),
    "offsets beyond the end": safetensors(b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'),
    "offsets going back": safetensors(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[8,4]}}', data=bytes(8)),
    "a shape that overflows": safetensors(
        json.dumps({"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]}}).encode(), data=bytes(4)
    ),
    "nested without end": safetensors(b'{"a":' * 5000 + b"1" + b"}" * 5000),
    "empty": b"",
}


def image_bomb(side: int) -> bytes:
    """A PNG of a few kilobytes that decodes to side * side pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(10**6)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + pixels + chunk(b"IEND", b"")
