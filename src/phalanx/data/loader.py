"""Training batches by step number: an exact resume needs nothing else."""

# N images of the split, B batch, C channels, H height, W width

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

import torch
from torch import Tensor

from phalanx.data.augment import augment as augment_batch
from phalanx.data.augment import check_steps
from phalanx.data.config import Sampling, parse_augment
from phalanx.data.memory import fits
from phalanx.data.partition import class_balanced, shuffled
from phalanx.data.splits import Batch, ImageSet, owned, to_unit
from phalanx.errors import InputError
from phalanx.rng import SampleRng, derive_seed

RowsAt = Callable[[int], Tensor]
"""From a step to the positions of its images, (B,) int64 on the host."""


class _Resident:
    """All pixels on the device."""

    def __init__(self, images: ImageSet, device: torch.device, rows: RowsAt) -> None:
        self.pixels = owned(images.pixels).to(device)
        self.rows = rows

    def take(self, step: int) -> Tensor:
        """(B, C, H, W) uint8 on the device."""
        return self.pixels.index_select(0, self.rows(step).to(self.pixels.device))


class _Streamed:
    """Pixels read from the split's (memory-mapped) array, one step ahead of their use."""

    def __init__(self, images: ImageSet, device: torch.device, rows: RowsAt) -> None:
        self.images = images
        self.device = device
        self.rows = rows
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="phalanx-data")
        self.ahead: tuple[int, Future[Tensor]] | None = None

    def take(self, step: int) -> Tensor:
        """(B, C, H, W) uint8 on the device."""
        expected, future = self.ahead or (None, None)
        pixels = future.result() if future and expected == step else self._read(step)
        self.ahead = step + 1, self.thread.submit(self._read, step + 1)
        return pixels.to(self.device, non_blocking=True)

    def _read(self, step: int) -> Tensor:
        pixels = torch.from_numpy(self.images.pixels[self.rows(step).numpy()])
        return pixels.pin_memory() if self.device.type == "cuda" else pixels


class Loader:
    """Shuffled, augmented batches; `batch(step)` is a pure function of `step` and of these arguments.

    `step` counts from 0 over the whole training. Each epoch (`steps_per_epoch` steps) visits the images in a
    new order, which depends on (seed, stream, epoch); the augmentation of an image, on (seed, stream, epoch,
    id). With `drop_last` an epoch leaves out what does not fill a batch, other images each time.
    With `sampling` "class_balanced" as many images make an epoch, but all classes equally often (`class_balanced`).
    `resident` holds the whole set as uint8 on the device; None does so where that takes less than a quarter
    of the free memory. Otherwise batches are read from the (memory-mapped) pixels, the next one by a thread
    while this one is used. Both ways give the same bytes.

    Raises InputError for a batch size outside 1..N, an unknown augmentation, or one too large for the images.
    """

    def __init__(
        self,
        images: ImageSet,
        *,
        batch_size: int,
        seed: int,
        stream: str = "train",
        augment: Sequence[str] = (),
        sampling: Sampling = "shuffled",
        device: torch.device | str = "cpu",
        drop_last: bool = True,
        resident: bool | None = None,
    ) -> None:
        if not 1 <= batch_size <= len(images):
            raise InputError(
                f"batch_size must be in 1..{len(images)}, the number of images, got {batch_size};"
                " lower it or raise train_limit"
            )
        try:
            self._steps = parse_augment(augment)
        except ValueError as error:
            raise InputError(str(error)) from None
        check_steps(self._steps, *images.shape[1:])
        self.device = torch.device(device)
        self.batch_size = batch_size
        self.steps_per_epoch = len(images) // batch_size if drop_last else -(-len(images) // batch_size)
        self._images = images
        self._seed = seed
        self._stream = stream
        self._sampling = sampling
        self._order = lru_cache(maxsize=2)(self._epoch_order)
        self._labels = owned(images.labels).to(self.device)
        self._ids = owned(images.ids).to(self.device)
        self.resident = fits(images.pixels.nbytes, self.device) if resident is None else resident
        store = _Resident if self.resident else _Streamed
        self._pixels: _Resident | _Streamed = store(images, self.device, self._rows)

    def batch(self, step: int) -> Batch:
        """The batch of a 0-based step: (B, C, H, W) float32 in [0, 1], labels, ids, all on the device."""
        if step < 0:
            raise InputError(f"step must be at least 0, got {step}")
        rows = self._rows(step)
        pixels = self._pixels.take(step)
        on_device = rows.to(self.device)
        ids = self._ids[on_device]
        epoch = step // self.steps_per_epoch
        rng = SampleRng(derive_seed(self._seed, self._stream, epoch), ids)
        x = to_unit(augment_batch(pixels, self._steps, rng), self._images.levels)
        return Batch(x, self._labels[on_device], ids)

    def _rows(self, step: int) -> Tensor:
        """(B,) positions within the split, on the host."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return self._order(epoch)[position * self.batch_size : (position + 1) * self.batch_size]

    def _epoch_order(self, epoch: int) -> Tensor:
        if self._sampling == "class_balanced":
            seed = derive_seed(self._seed, self._stream)
            return torch.from_numpy(class_balanced(self._images.labels, seed, epoch))
        seed = derive_seed(self._seed, self._stream, epoch)
        return torch.from_numpy(shuffled(seed, "order", len(self._images)))
