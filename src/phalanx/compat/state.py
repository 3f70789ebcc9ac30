"""Verdicts and adversarial images of one evaluation: in memory, or in a ledger with the images beside it."""

# N images of the evaluation, B batch

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from phalanx.errors import CorruptError, InputError
from phalanx.evaluation.books import Book, Memory
from phalanx.runs import Binding, Ledger, Verdict
from phalanx.runs.checkpoint import load_tensors, save_tensors
from phalanx.runs.verdict import CLEAN

_SQLITE = b"SQLite format 3\x00"


def fingerprint(x: Tensor, y: Tensor) -> str:
    """SHA-256 (hex) of images (N, ...) and labels (N,)."""
    digest = hashlib.sha256(f"{x.dtype} {tuple(x.shape)}".encode())
    for image in (*x.detach(), y.detach().long()):
        digest.update(image.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def answers(rows: Sequence[Verdict], y: Tensor) -> Tensor:
    """(N,) the model's answer to each returned image."""
    labels = torch.empty(len(y), dtype=torch.int64)
    for row in sorted(rows, key=lambda row: row.attack != CLEAN):
        if row.attack == CLEAN or row.verdict != "held":
            labels[row.sample] = row.predicted
    return labels.to(y)


class State:
    """What is known so far."""

    def __init__(self, book: Book, images: Path | None, x: Tensor) -> None:
        self.book = book
        self.x_adv = x.detach().clone()
        """(N, ...) the perturbed image where an attack has won, else the clean one."""
        self._images = images

    @classmethod
    @contextmanager
    def opened(cls, path: Path | None, binding: Binding, x: Tensor, attacks: Sequence[str]) -> Iterator[State]:
        """In memory without a `path`; else the ledger there, created or taken up again, and sealed once all is done.

        Raises InputError for a file that is something else, the state of another evaluation, or one with verdicts of
        attacks that are not among these: images that another attack has won would be returned as theirs.
        """
        if path is None:
            yield cls(Memory(), None, x)
            return
        _refuse_foreign(path)
        with Ledger.open(path, binding) as ledger:
            _refuse_others(path, ledger, attacks)
            images = path.with_name(path.name + ".images")
            images.mkdir(exist_ok=True)
            state = cls(ledger, images, x)
            state._restore()
            yield state
            ledger.seal()

    def add(self, rows: Sequence[Verdict], x_adv: Tensor) -> None:
        """Notes the verdicts of one attack on a batch, and keeps those of its images (B, ...) that are no longer
        right."""
        won = [position for position, row in enumerate(rows) if row.verdict != "held"]
        ids = torch.tensor([rows[position].sample for position in won], dtype=torch.int64)
        kept = x_adv[won].to(self.x_adv)
        if won and self._images is not None:
            # before the verdicts: an image without a verdict is made again, a verdict without its image is not
            name = f"{rows[0].attack}-{rows[0].sample}.safetensors".replace(":", "_")
            save_tensors(self._images / name, {"ids": ids, "x_adv": kept}, {"attack": rows[0].attack})
        self.book.add(rows)
        self.x_adv[ids.to(self.x_adv.device)] = kept

    def _restore(self) -> None:
        assert self._images is not None
        lost = {row.sample: row.attack for row in self.book.rows() if row.attack != CLEAN and row.verdict != "held"}
        for path in sorted(self._images.glob("*.safetensors")):
            tensors, about = load_tensors(path)
            for sample, x_adv in zip(tensors["ids"].tolist(), tensors["x_adv"], strict=True):
                if lost.get(sample) == about["attack"]:
                    self.x_adv[sample] = x_adv.to(self.x_adv)
                    del lost[sample]
        if lost:
            sample, attack = next(iter(lost.items()))
            raise CorruptError(
                f"{self._images} lacks the adversarial images of {len(lost)} verdicts, the first of sample {sample} "
                f"under {attack}; restore it, or start again with another state_path"
            )


def _refuse_others(path: Path, ledger: Ledger, attacks: Sequence[str]) -> None:
    others = [name for name in ledger.attacks() if name not in attacks]
    if others:
        raise InputError(
            f"state_path {path} is a state of {', '.join(ledger.attacks())}, and this call runs {', '.join(attacks)}; "
            f"give a new name, or run {', '.join(others)} as well, with the same settings"
        )


def _refuse_foreign(path: Path) -> None:
    if not path.exists():
        return
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(_SQLITE)) == _SQLITE:
                return
    raise InputError(
        f"state_path {path} exists and is no state of Phalanx (the reference's own states cannot be continued, there "
        "or here); give a new name"
    )
