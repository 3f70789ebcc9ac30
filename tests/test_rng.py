from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.rng import Rng, SampleRng, derive_seed, philox
from reference.philox import philox4x32_10

word = st.integers(0, 2**32 - 1)
KINDS = ("uniform", "normal", "exponential")


def one_block(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    return tuple(int(out) for out in philox([torch.tensor([c]) for c in counter], key))


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the known-answer vectors of the authors' Random123 library
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]) -> None:
    assert one_block(counter, key) == expected
    assert philox4x32_10(counter, key) == expected


@given(st.tuples(word, word, word, word), st.tuples(word, word))
@settings(max_examples=100, deadline=None)
def test_equals_the_integer_reference(counter: tuple[int, int, int, int], key: tuple[int, int]) -> None:
    assert one_block(counter, key) == philox4x32_10(counter, key)


def test_words_are_the_blocks_of_seed_and_key() -> None:
    # position block p of the sample with key k: counter (p, low k, high k, 0), key the two halves of the derived seed
    key = (7 << 32) + 5
    seed = derive_seed(11, "noise", 2, 3)
    halves = (seed % 2**32, seed >> 32)
    expected = [*philox4x32_10((0, 5, 7, 0), halves), *philox4x32_10((1, 5, 7, 0), halves)][:6]
    rng = SampleRng(11, torch.tensor([key]))
    drawn = rng.uniform("noise", (6,), restart=2, step=3, dtype=torch.float64)[0]
    assert drawn.tolist() == [(w >> 8) / 2**24 for w in expected]
    # integers use the whole word: floor(word * high / 2**32)
    assert rng.integers("noise", 10, (6,), restart=2, step=3)[0].tolist() == [w * 10 >> 32 for w in expected]


@given(st.sets(st.integers(0, 11), min_size=1), st.sampled_from([*KINDS, "integers"]), st.integers(0, 2**40))
@settings(max_examples=60, deadline=None)
def test_neighbours_do_not_matter(kept: set[int], kind: str, seed: int) -> None:
    index = torch.tensor(sorted(kept, key=lambda i: -i * 7 % 12))
    whole = SampleRng(seed, torch.arange(12) * 10**10)
    arguments = (9,) if kind == "integers" else ()
    draw = {name: getattr(rng, kind)("x", *arguments, (2, 3)) for name, rng in [("all", whole), ("few", whole[index])]}
    assert torch.equal(draw["few"], draw["all"][index])


@pytest.mark.parametrize("kind", KINDS)
def test_every_coordinate_of_the_stream_matters(kind: str) -> None:
    def draw(seed: int = 1, purpose: str = "a", restart: int = 0, step: int = 0) -> torch.Tensor:
        return getattr(SampleRng.for_batch(50, seed), kind)(purpose, (40,), restart=restart, step=step)

    streams = [draw(), draw(seed=2), draw(purpose="b"), draw(restart=1), draw(step=1)]
    assert torch.equal(draw(), streams[0])
    flat = torch.stack([stream.double().flatten() for stream in streams])
    # 2000 independent draws: a correlation has standard deviation .022
    off_diagonal = flat.corrcoef() - torch.eye(5)
    assert off_diagonal.abs().max() < 0.09
    samples = streams[0].double().corrcoef() - torch.eye(50)
    assert samples.abs().max() < 0.75  # 40 positions, deviation .16, 1225 pairs


@pytest.mark.parametrize(
    ("kind", "mean", "second", "fourth"),
    [  # raw moments: uniform 1/(n+1); normal 0, 1, 3; exponential n!
        ("uniform", 1 / 2, 1 / 3, 1 / 5),
        ("normal", 0.0, 1.0, 3.0),
        ("exponential", 1.0, 2.0, 24.0),
    ],
)
def test_moments(kind: str, mean: float, second: float, fourth: float) -> None:
    drawn = getattr(SampleRng.for_batch(400, 9), kind)("moments", (1000,)).double()
    assert drawn.isfinite().all()
    assert float(drawn.mean()) == pytest.approx(mean, abs=0.01)
    assert float(drawn.square().mean()) == pytest.approx(second, rel=0.02)
    assert float(drawn.pow(4).mean()) == pytest.approx(fourth, rel=0.1)


def test_ranges() -> None:
    rng = SampleRng.for_batch(200, 4)
    uniform = rng.uniform("u", (500,))
    assert uniform.dtype == torch.float32 and float(uniform.min()) >= 0 and float(uniform.max()) < 1
    counts = rng.integers("i", 7, (500,)).flatten().bincount()
    assert len(counts) == 7
    # 100,000 draws into 7 cells: 14,286 each, deviation 111
    assert (counts - 100_000 / 7).abs().max() < 500
    assert not rng.integers("i", 1, (5,)).any()


def test_shapes_lengths_and_precision() -> None:
    rng = SampleRng.for_batch(3)
    assert len(rng) == 3 and rng.uniform("u").shape == (3,) and rng.normal("n", (2, 5)).shape == (3, 2, 5)
    assert rng.uniform("u", (0, 4)).shape == (3, 0, 4) and len(rng[:0].normal("n", (2,))) == 0
    # 24 bits are exact in either precision
    assert torch.equal(rng.uniform("u", (9,)).double(), rng.uniform("u", (9,), dtype=torch.float64))
    assert rng.normal("n", dtype=torch.float64).dtype == torch.float64


@given(st.lists(st.one_of(st.integers(), st.text(max_size=5)), min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_derived_seeds_fit_63_bits_and_depend_on_every_part(parts: list[int | str]) -> None:
    seed = derive_seed(*parts)
    assert 0 <= seed < 2**63 and derive_seed(*parts) == seed
    assert derive_seed(*parts, 0) != seed


def test_derived_seeds_separate_their_parts() -> None:
    seeds = [derive_seed("a", "bc"), derive_seed("ab", "c"), derive_seed("abc"), derive_seed("a", "b", "c")]
    seeds += [derive_seed(1, 23), derive_seed(12, 3), derive_seed(1), derive_seed("1"), derive_seed(-1)]
    assert len(set(seeds)) == len(seeds)
    # fixed for ever: runs of other versions must resume with the same numbers. sha256("str:a\x1fint:1"), little-endian
    assert derive_seed("a", 1) == 4808850819454271645


def test_fold_gives_another_stream_for_the_same_samples() -> None:
    rng = SampleRng(5, torch.tensor([3, 1]))
    child = rng.fold("epoch", 2)
    assert child.seed == derive_seed(5, "epoch", 2) and torch.equal(child.keys, rng.keys)
    assert not torch.equal(child.uniform("u", (8,)), rng.uniform("u", (8,)))
    parent = Rng(5)
    assert parent.samples(rng.keys).uniform("u", (8,)).equal(rng.uniform("u", (8,)))
    assert parent.fold("epoch", 2).seed == child.seed


def test_samples_with_one_key_share_their_numbers() -> None:
    drawn = SampleRng(0, torch.tensor([4, 4, 5])).normal("n", (6,))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_normal_is_box_muller_on_two_uniforms() -> None:
    seed = derive_seed(0, "n", 0, 0)
    radius, angle = (w >> 8 for w in philox4x32_10((0, 0, 0, 0), (seed % 2**32, seed >> 32))[:2])
    expected = math.sqrt(-2 * math.log((radius + 1) / 2**24)) * math.cos(2 * math.pi * angle / 2**24)
    drawn = SampleRng.for_batch(1).normal("n", (1,), dtype=torch.float64)
    assert float(drawn) == pytest.approx(expected, rel=1e-12)
