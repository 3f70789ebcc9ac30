"""Augmentations of a batch on the device that holds it; what happens to an image depends on its own id alone.

`translate` and `crop` are one operation: cropping an image at random out of its zero-padded self shifts it.
Both names exist because papers use both (crop: He et al. 2016, section 4.2; cutout: DeVries and Taylor 2017).
"""

# B batch, C channels, H height, W width

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from phalanx.data.config import AugmentStep
from phalanx.errors import InputError
from phalanx.rng import SampleRng


def augment(x_BCHW: Tensor, steps: Sequence[AugmentStep], rng: SampleRng) -> Tensor:
    """(B, C, H, W) of any dtype, changed by each step in turn; `rng` has one key per image."""
    for position, (name, amount) in enumerate(steps):
        x_BCHW = _OPERATIONS[name](x_BCHW, amount, rng.fold("augment", position))
    return x_BCHW


def check_steps(steps: Sequence[AugmentStep], height: int, width: int) -> None:
    """Raise InputError if a step could leave nothing of a height x width image."""
    for name, amount in steps:
        if amount >= min(height, width):
            raise InputError(
                f"augment item '{name}:{amount}' is too large for {height}x{width} images; use at most"
                f" {min(height, width) - 1}"
            )


def flip(x_BCHW: Tensor, _: int, rng: SampleRng) -> Tensor:
    """Mirror left and right with probability 1/2."""
    chosen_B = rng.integers("flip", 2).bool()
    return torch.where(chosen_B[:, None, None, None], x_BCHW.flip(3), x_BCHW)


def shift(x_BCHW: Tensor, most: int, rng: SampleRng) -> Tensor:
    """Move by -most..most pixels down and right, uniformly; what comes in from outside is zero."""
    height, width = x_BCHW.shape[2:]
    dy_B1, dx_B1 = (rng.integers("shift", 2 * most + 1, (2,)) - most).unsqueeze(2).unbind(1)
    rows_BH = torch.arange(height, device=x_BCHW.device) - dy_B1
    columns_BW = torch.arange(width, device=x_BCHW.device) - dx_B1
    inside_BHW = _within(rows_BH, height)[:, :, None] & _within(columns_BW, width)[:, None, :]
    flat_BHW = rows_BH.clamp(0, height - 1)[:, :, None] * width + columns_BW.clamp(0, width - 1)[:, None, :]
    index_BCP = flat_BHW.flatten(1)[:, None].expand(-1, x_BCHW.shape[1], -1)
    moved_BCHW = x_BCHW.flatten(2).gather(2, index_BCP).view_as(x_BCHW)
    return moved_BCHW.masked_fill(~inside_BHW[:, None], 0)


def cutout(x_BCHW: Tensor, side: int, rng: SampleRng) -> Tensor:
    """Zero a side x side square whose centre is uniform over the image; it may reach over the edge."""
    height, width = x_BCHW.shape[2:]
    top_B1 = rng.integers("cutout.row", height)[:, None] - side // 2
    left_B1 = rng.integers("cutout.column", width)[:, None] - side // 2
    rows_BH = _within(torch.arange(height, device=x_BCHW.device) - top_B1, side)
    columns_BW = _within(torch.arange(width, device=x_BCHW.device) - left_B1, side)
    return x_BCHW.masked_fill((rows_BH[:, :, None] & columns_BW[:, None, :])[:, None], 0)


def _within(position: Tensor, size: int) -> Tensor:
    return (position >= 0) & (position < size)


_OPERATIONS: dict[str, Callable[[Tensor, int, SampleRng], Tensor]] = {
    "flip": flip,
    "crop": shift,
    "translate": shift,
    "cutout": cutout,
}
