"""Common corruptions: what cameras and codecs do to images.

Kinds and severities follow CIFAR-10-C (Hendrycks and Dietterich, ICLR 2019), lengths of blurs in 32nds of the side.
They are made here, so that numbers are not those on its files. What differs from its code:

- Random numbers; Poisson noise is drawn as normal; pixels are rounded to 256 levels, there cut off to them.
- Brightness is added to every channel, there to the V of HSV.
- Defocus: a disc whose edge is softened over one pixel, of radius 0.4, 0.6, 0.8, 1.1 and 1.5; there one of whole pixels
  under a Gaussian, of radius 0.3, 0.4, 0.5, 1 and 1.5. Beyond the image its edge goes on, there it is mirrored.
- Motion: an even line of length 2 to 6 in any direction; there one that fades like a Gaussian of deviation 1 to 2.5,
  within 45 degrees of the horizontal.
- Gaussian blur ends at 3 deviations, there at 4.
- Glass, zoom, elastic, saturate, spatter, frost, snow and fog are left out.
"""

# B batch, C channels, H height, W width

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from phalanx.rng import SampleRng

SEVERITIES = (1, 2, 3, 4, 5)

Operation = Callable[[Tensor, Any, SampleRng], Tensor]
"""Images (B, C, H, W) in [0, 1], a severity's parameter and one stream per image, to images that may leave [0, 1]."""


@dataclass(frozen=True)
class Corruption:
    """One kind, at five severities."""

    operation: Operation
    parameters: tuple[Any, Any, Any, Any, Any]


def corrupt(x_BCHW: Tensor, name: str, severity: int, rng: SampleRng) -> Tensor:
    """Images in [0, 1] under one corruption, rounded to 256 levels; what happens to an image depends on its key alone.

    Raises KeyError for a name that is not in `CORRUPTIONS`, ValueError for a severity outside 1..5.
    """
    if severity not in SEVERITIES:
        raise ValueError(f"severity must be in 1..5, got {severity}")
    kind = CORRUPTIONS[name]
    changed = kind.operation(x_BCHW, kind.parameters[severity - 1], rng.fold(name, severity))
    return changed.clamp(0, 1).mul(255).round().div(255)


def _gaussian_noise(x: Tensor, deviation: float, rng: SampleRng) -> Tensor:
    return x + deviation * rng.normal("noise", x.shape[1:], dtype=x.dtype)


def _shot_noise(x: Tensor, photons: float, rng: SampleRng) -> Tensor:
    """A Poisson count of mean x * photons, drawn as the nearest whole number to a normal of that mean and variance."""
    expected = x * photons
    return (expected + expected.sqrt() * rng.normal("noise", x.shape[1:], dtype=x.dtype)).round().clamp_min(0) / photons


def _impulse_noise(x: Tensor, share: float, rng: SampleRng) -> Tensor:
    """Salt and pepper, each on half of a `share` of the values."""
    drawn = rng.uniform("noise", x.shape[1:], dtype=x.dtype)
    return torch.where(drawn < share / 2, 0.0, torch.where(drawn < share, 1.0, x))


def _speckle_noise(x: Tensor, deviation: float, rng: SampleRng) -> Tensor:
    return x + x * deviation * rng.normal("noise", x.shape[1:], dtype=x.dtype)


def _gaussian_blur(x: Tensor, sigma: float, rng: SampleRng) -> Tensor:
    del rng
    sigma *= min(x.shape[2:]) / 32
    reach = max(1, math.ceil(3 * sigma))
    line = torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype).div(sigma).square().div(-2).exp()
    return _filtered(x, (line[:, None] * line)[None].expand(len(x), -1, -1))


def _defocus_blur(x: Tensor, radius: float, rng: SampleRng) -> Tensor:
    """A disc, its edge softened over one pixel."""
    del rng
    radius *= min(x.shape[2:]) / 32
    distance = _grid(math.ceil(radius + 1), x).square().sum(0).sqrt()
    disc = (radius + 0.5 - distance).clamp(0, 1)
    return _filtered(x, disc[None].expand(len(x), -1, -1))


def _motion_blur(x: Tensor, length: float, rng: SampleRng) -> Tensor:
    """Along a line through the pixel, in a direction drawn for each image."""
    half = length * min(x.shape[2:]) / 64
    grid = _grid(math.ceil(half + 1), x)
    angle_B = rng.uniform("angle", dtype=x.dtype) * math.pi
    sine, cosine = angle_B.sin()[:, None, None], angle_B.cos()[:, None, None]
    along, across = grid[0] * sine + grid[1] * cosine, grid[0] * cosine - grid[1] * sine
    return _filtered(x, (half + 0.5 - along.abs()).clamp(0, 1) * (1 - across.abs()).clamp_min(0))


def _brightness(x: Tensor, more: float, rng: SampleRng) -> Tensor:
    del rng
    return x + more


def _contrast(x: Tensor, left: float, rng: SampleRng) -> Tensor:
    """Every channel drawn towards its own mean."""
    del rng
    mean = x.mean((2, 3), keepdim=True)
    return mean + left * (x - mean)


def _pixelate(x: Tensor, share: float, rng: SampleRng) -> Tensor:
    """Made smaller and large again by boxes. A share near 1 may change an image more than a smaller one: its boxes meet
    the pixels' grid unevenly."""
    del rng

    def coarse(image: Image.Image) -> Image.Image:
        small = [max(1, int(side * share)) for side in image.size]
        return image.resize((small[0], small[1]), Image.Resampling.BOX).resize(image.size, Image.Resampling.BOX)

    return _by_image(x, coarse)


def _jpeg(x: Tensor, quality: int, rng: SampleRng) -> Tensor:
    del rng

    def coded(image: Image.Image) -> Image.Image:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        return Image.open(buffer)

    return _by_image(x, coded)


def _by_image(x_BCHW: Tensor, change: Callable[[Image.Image], Image.Image]) -> Tensor:
    """Each image, of 1 or 3 channels, as 8-bit pixels through `change`."""
    changed = []
    for pixels in x_BCHW.mul(255).round().to(torch.uint8).cpu().numpy():
        image = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
        array = np.asarray(change(image))
        changed.append(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))
    return torch.from_numpy(np.stack(changed)).to(x_BCHW) / 255


def _grid(reach: int, like: Tensor) -> Tensor:
    """(2, 2 reach + 1, 2 reach + 1) offsets down and right."""
    line = torch.arange(-reach, reach + 1, device=like.device, dtype=like.dtype)
    return torch.stack(torch.meshgrid(line, line, indexing="ij"))


def _filtered(x_BCHW: Tensor, kernel_Bkk: Tensor) -> Tensor:
    """Each image by its own kernel, which is brought to sum 1; the edge pixels go on beyond the edge."""
    batch, channels, height, width = x_BCHW.shape
    reach = kernel_Bkk.shape[-1] // 2
    weight = (kernel_Bkk / kernel_Bkk.sum((1, 2), keepdim=True)).repeat_interleave(channels, 0)[:, None]
    padded = F.pad(x_BCHW, (reach,) * 4, mode="replicate").reshape(1, batch * channels, *_grown(height, width, reach))
    return F.conv2d(padded, weight, groups=batch * channels).reshape(x_BCHW.shape)


def _grown(height: int, width: int, reach: int) -> tuple[int, int]:
    return height + 2 * reach, width + 2 * reach


CORRUPTIONS: Mapping[str, Corruption] = {
    "gaussian_noise": Corruption(_gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": Corruption(_shot_noise, (500.0, 250.0, 100.0, 75.0, 50.0)),
    "impulse_noise": Corruption(_impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "speckle_noise": Corruption(_speckle_noise, (0.06, 0.10, 0.12, 0.16, 0.20)),
    "gaussian_blur": Corruption(_gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1.0)),
    "defocus_blur": Corruption(_defocus_blur, (0.4, 0.6, 0.8, 1.1, 1.5)),
    "motion_blur": Corruption(_motion_blur, (2.0, 3.0, 4.0, 5.0, 6.0)),
    "brightness": Corruption(_brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": Corruption(_contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "pixelate": Corruption(_pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg_compression": Corruption(_jpeg, (80, 65, 58, 50, 40)),
}
"""By name."""
