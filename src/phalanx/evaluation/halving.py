"""Batches that do not fit the memory are halved: verdicts do not depend on the batch, so none is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

import torch

from phalanx.data import Batch
from phalanx.errors import InputError
from phalanx.nn.memory import attempted

T = TypeVar("T")


class DoesNotFitError(InputError):
    """One image alone needs more memory than there is."""


class Halving:
    """Works on batches in pieces, of `most` images if that is given; a size that was too large once is not tried
    again."""

    def __init__(self, tell: Callable[[str], None], most: int | None = None) -> None:
        self._tell = tell
        self._most = most

    def size(self, count: int) -> int:
        """Of `count` images, so many are worked on at once."""
        return min(self._most or count, count)

    def pieces(self, batch: Batch, work: Callable[[Batch], T]) -> Iterator[T]:
        """What `work` makes of each piece, in order. Raises DoesNotFitError if one image alone is too much."""
        start, count = 0, len(batch.y)
        while start < count:
            size = self.size(count - start)
            piece = Batch(*(column[start : start + size] for column in batch))
            done = attempted(partial(work, piece))
            if done is None:
                # not where the error is at hand: it holds on to the tensors
                self._halve(size)
            else:
                yield done[0]
                start += size

    def _halve(self, size: int) -> None:
        if size == 1:
            raise DoesNotFitError("one image alone does not fit into the memory; free some, or use device: cpu")
        self._most = size // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._tell(f"{size} images do not fit into the memory; going on with {self._most} at a time")
