"""Batches that do not fit the memory are halved: verdicts do not depend on the batch, so none is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from phalanx.data import Batch
from phalanx.errors import InputError

T = TypeVar("T")


class Halving:
    """Works on batches in pieces; a size that was too large once is not tried again."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._most: int | None = None

    def size(self, count: int) -> int:
        """Of `count` images, so many are worked on at once."""
        return min(self._most or count, count)

    def pieces(self, batch: Batch, work: Callable[[Batch], T]) -> Iterator[T]:
        """What `work` makes of each piece, in order. Raises InputError if one image alone does not fit."""
        start, count = 0, len(batch.y)
        while start < count:
            size = self.size(count - start)
            done = _attempted(work, Batch(*(column[start : start + size] for column in batch)))
            if done is None:
                # not where the error is at hand: it holds on to the tensors
                self._halve(size)
            else:
                yield done[0]
                start += size

    def _halve(self, size: int) -> None:
        if size == 1:
            raise InputError("one image alone does not fit into the memory; free some, or use device: cpu")
        self._most = size // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._tell(f"{size} images do not fit into the memory; going on with {self._most} at a time")


def _attempted(work: Callable[[Batch], T], piece: Batch) -> tuple[T] | None:
    """The result, None where the memory did not suffice."""
    try:
        return (work(piece),)
    except (torch.OutOfMemoryError, MemoryError):
        return None
    except RuntimeError as error:
        # the CPU's allocator has no error of its own
        if "can't allocate memory" not in str(error) and "not enough memory" not in str(error):
            raise
        return None
