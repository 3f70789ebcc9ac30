"""Counter-based random numbers, one independent stream per sample.

A number is a pure function of (seed, purpose, sample key, restart, step, position): it does not depend on batch
size, order, sharding, on which neighbours are still in the batch, or on how often a run was resumed.
The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), written in
int64 tensor arithmetic so that it runs, bit for bit the same, on any device.
"""

# B batch, P positions within a sample, W the four 32-bit words of one Philox block

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any integers and names: the way a child seed is made from its parent's.

    Equal parts give equal seeds on every machine; the parts are separated, so ("a", "bc") and ("ab", "c") differ.
    """
    # numpy's integers count as Python's
    plain = (part if isinstance(part, str) else operator.index(part) for part in parts)
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in plain)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def _multiply_high_low(a: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    # the 64-bit product wraps into the sign bit; masking after the arithmetic shift recovers the high word exactly
    product = a * multiplier
    return (product >> 32) & _MASK, product & _MASK


def philox(counter: Sequence[Tensor], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four int64 tensors holding 32-bit counters, and two 32-bit keys, to four 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply_high_low(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply_high_low(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


@dataclass(frozen=True, eq=False)
class SampleRng:
    """Random numbers for the samples whose integer keys are `keys`; `rng[index]` follows the batch as it shrinks.

    Two samples with one key get the same numbers: keys are the samples' positions in their data set.
    """

    seed: int
    keys: Tensor
    """(B,) int64, each in 0..2**48 - 1 (`repeated` counts above)."""

    @classmethod
    def for_batch(cls, size: int, seed: int = 0, device: torch.device | str = "cpu") -> SampleRng:
        """Keys 0..size-1: for callers who have a batch and no data set."""
        return cls(seed, torch.arange(size, device=device))

    def __getitem__(self, index: Tensor | slice) -> SampleRng:
        return SampleRng(self.seed, self.keys[index])

    def __len__(self) -> int:
        return len(self.keys)

    def fold(self, *parts: int | str) -> SampleRng:
        """The same samples under a seed derived from this one and `parts` (an epoch, a name)."""
        return SampleRng(derive_seed(self.seed, *parts), self.keys)

    def repeated(self, count: int) -> SampleRng:
        """The samples `count` times over, each time with numbers of its own; the first time with these."""
        return SampleRng(self.seed, torch.cat([self.keys + (copy << 48) for copy in range(count)]))

    def _words(self, purpose: str, count: int, restart: int, step: int) -> Tensor:
        """(B, count) int64 holding uniform 32-bit words."""
        seed = derive_seed(self.seed, purpose, restart, step)
        blocks = math.ceil(count / 4)
        keys_B1 = self.keys[:, None]
        positions_1P = torch.arange(blocks, device=self.keys.device)[None]
        shape = (len(self.keys), blocks)
        counter = (
            positions_1P.expand(shape),
            (keys_B1 & _MASK).expand(shape),
            (keys_B1 >> 32 & _MASK).expand(shape),
            torch.zeros((), dtype=torch.int64, device=self.keys.device).expand(shape),
        )
        words = philox(counter, (seed & _MASK, seed >> 32 & _MASK))
        return torch.stack(words, dim=-1).flatten(1)[:, :count]

    def integers(
        self, purpose: str, high: int, shape: Sequence[int] = (), *, restart: int = 0, step: int = 0
    ) -> Tensor:
        """(B, *shape) int64, uniform on 0..high-1 (bias below high / 2**32)."""
        words = self._words(purpose, math.prod(shape), restart, step)
        return (words * high >> 32).reshape(len(self), *shape)

    def uniform(
        self,
        purpose: str,
        shape: Sequence[int] = (),
        *,
        restart: int = 0,
        step: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """(B, *shape) uniform on [0, 1), 24 random bits each: exact in float32 and above."""
        words = self._words(purpose, math.prod(shape), restart, step)
        return ((words >> 8).to(dtype) * 2.0**-24).reshape(len(self), *shape)

    def normal(
        self,
        purpose: str,
        shape: Sequence[int] = (),
        *,
        restart: int = 0,
        step: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """(B, *shape) standard normal (Box-Muller on two uniforms)."""
        count = math.prod(shape)
        words = self._words(purpose, 2 * count, restart, step).reshape(len(self), 2, count) >> 8
        radius, angle = words.unbind(1)
        # (word + 1) / 2**24 lies in (0, 1]: the logarithm is finite
        radius = ((radius + 1).to(dtype) * 2.0**-24).log().mul(-2).sqrt()
        return (radius * (angle.to(dtype) * (2.0**-23 * math.pi)).cos()).reshape(len(self), *shape)

    def exponential(
        self,
        purpose: str,
        shape: Sequence[int] = (),
        *,
        restart: int = 0,
        step: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """(B, *shape) exponential with mean 1."""
        words = self._words(purpose, math.prod(shape), restart, step) >> 8
        return -((words + 1).to(dtype) * 2.0**-24).log().reshape(len(self), *shape)


@dataclass(frozen=True)
class Rng:
    """A seed that hands out per-sample streams: what a training step gives to a method."""

    seed: int

    def samples(self, ids: Tensor) -> SampleRng:
        """Streams for the samples with these ids (B,)."""
        return SampleRng(self.seed, ids)

    def fold(self, *parts: int | str) -> Rng:
        return Rng(derive_seed(self.seed, *parts))
