from __future__ import annotations

import pytest
import torch
from data_samples import noise
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from phalanx.data.augment import augment, check_steps, cutout, flip, shift
from phalanx.data.config import parse_augment
from phalanx.errors import InputError
from phalanx.rng import SampleRng

ALL = parse_augment(["flip", "crop:2", "translate:1", "cutout:3"])


def pictures(n: int) -> Tensor:
    return torch.from_numpy(noise(0, n, 3, 6, 5))


def rng(n: int, seed: int = 1) -> SampleRng:
    return SampleRng(seed, torch.arange(100, 100 + n))


def test_flip_mirrors_about_half_of_the_images() -> None:
    x = pictures(400)
    out = flip(x, 0, rng(400))
    mirrored = (out == x.flip(3)).flatten(1).all(1)
    assert torch.equal(torch.where(mirrored[:, None, None, None], x.flip(3), x), out)
    assert 160 < int(mirrored.sum()) < 240  # 200 expected, standard deviation 10


def test_shift_is_a_crop_out_of_the_zero_padded_image() -> None:
    x = pictures(200)
    out = shift(x, 2, rng(200))
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2))
    windows = torch.stack([padded[:, :, i : i + 6, j : j + 5] for i in range(5) for j in range(5)])
    matches = (windows == out).flatten(2).all(2)
    assert matches.any(0).all()
    assert matches.any(1).all()  # each of the 25 offsets occurs among 200 images


def test_cutout_zeroes_one_clipped_square() -> None:
    out = cutout(torch.ones(300, 2, 6, 5), 3, rng(300))
    holes = out[:, 0] == 0
    assert torch.equal(out[:, 0], out[:, 1])
    # rows 6: a centre at either edge leaves 2 of 3 rows, the others 3; columns likewise
    assert set(holes.any(2).sum(1).tolist()) == {2, 3} and set(holes.any(1).sum(1).tolist()) == {2, 3}
    assert torch.equal(holes.sum((1, 2)), holes.any(2).sum(1) * holes.any(1).sum(1))
    assert holes.any(0).all()


@pytest.mark.parametrize("side", [3, 4])
def test_the_square_lies_around_its_centre(side: int) -> None:
    x, draws = torch.ones(40, 1, 6, 5), rng(40)
    expected = x.clone()
    centres = zip(draws.integers("cutout.row", 6).tolist(), draws.integers("cutout.column", 5).tolist(), strict=True)
    for image, (row, column) in zip(expected, centres, strict=True):
        top, left = row - side // 2, column - side // 2
        image[0, max(top, 0) : top + side, max(left, 0) : left + side] = 0
    assert torch.equal(cutout(x, side, draws), expected)


@given(st.lists(st.integers(0, 19), min_size=1, max_size=20, unique=True))
@settings(max_examples=30, deadline=None)
def test_neighbours_have_no_effect(subset: list[int]) -> None:
    x, draws, index = pictures(20), rng(20), torch.tensor(subset)
    assert torch.equal(augment(x, ALL, draws)[index], augment(x[index], ALL, draws[index]))


def test_two_steps_of_one_kind_draw_apart() -> None:
    steps = parse_augment(["flip", "flip"])
    x = pictures(64)
    assert not torch.equal(augment(x, steps, rng(64)), x)


def test_the_input_is_left_alone() -> None:
    x = pictures(8)
    before = x.clone()
    augment(x, ALL, rng(8))
    assert torch.equal(x, before)


def test_bytes_and_floats_agree() -> None:
    x = pictures(16)
    assert torch.equal(augment(x, ALL, rng(16)).float(), augment(x.float(), ALL, rng(16)))


def test_a_step_as_large_as_the_image_is_refused() -> None:
    check_steps(parse_augment(["crop:4"]), 6, 5)
    with pytest.raises(InputError, match="'crop:5' is too large for 6x5 images; use at most 4"):
        check_steps(parse_augment(["flip", "crop:5"]), 6, 5)
