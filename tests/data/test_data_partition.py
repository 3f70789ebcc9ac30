from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.data.config import DataConfig
from phalanx.data.partition import allocate, class_balanced, partition, shuffled, stratified
from phalanx.errors import InputError

counts_lists = st.lists(st.integers(3, 40), min_size=2, max_size=6)


def labels_of(counts: list[int]) -> np.ndarray:
    return np.repeat(np.arange(len(counts)), counts)


def names_of(counts: list[int]) -> list[str]:
    return [f"class{k}" for k in range(len(counts))]


def test_allocation_by_hand() -> None:
    # quotas 10 * (50, 30, 20) / 100 = 5, 3, 2
    assert allocate(np.array([50, 30, 20]), 10, 0).tolist() == [5, 3, 2]
    # quotas 10 * (55, 35, 10) / 100 = 5.5, 3.5, 1: the first of two equal remainders takes the tenth
    assert allocate(np.array([55, 35, 10]), 10, 0).tolist() == [6, 3, 1]
    # quotas 10 * (97, 3) / 100 = 9.7, 0.3: the rare class is given one
    assert allocate(np.array([97, 3]), 10, 0).tolist() == [9, 1]
    # 2 of 3 images must stay, so the second class gives 1 and the total of 50 is out of its reach
    assert allocate(np.array([20, 3]), 50, 2).tolist() == [18, 1]


@given(counts_lists, st.integers(1, 200), st.integers(0, 2))
def test_an_allocation_respects_its_limits(counts: list[int], total: int, leave: int) -> None:
    array = np.array(counts)
    given_counts = allocate(array, total, leave)
    assert (given_counts >= 1).all() and (given_counts <= array - leave).all()
    assert given_counts.sum() == np.clip(total, len(counts), (array - leave).sum())


def test_the_order_is_pinned() -> None:
    # a change here changes every split and every training run
    assert shuffled(7, "order", 10).tolist() == [7, 5, 6, 9, 8, 2, 0, 1, 3, 4]


@given(counts_lists, st.integers(0, 2**32), st.floats(0.01, 0.5), st.floats(0.01, 0.5))
@settings(max_examples=40, deadline=None)
def test_splits_are_disjoint_cover_everything_and_hold_every_class(
    counts: list[int], seed: int, val_fraction: float, test_fraction: float
) -> None:
    labels = labels_of(counts)
    config = DataConfig(seed=seed, val_fraction=val_fraction, test_fraction=test_fraction)
    parts = partition("t", {"train": labels}, names_of(counts), config)
    rows = np.concatenate([part.rows for part in parts.values()])
    assert np.array_equal(np.sort(rows), np.arange(len(labels)))
    for part in parts.values():
        assert set(labels[part.rows]) == set(range(len(counts)))
        assert (np.diff(part.rows) > 0).all()


def test_held_out_shares_are_those_asked_for() -> None:
    labels = labels_of([80, 40])
    parts = partition("t", {"train": labels}, ["a", "b"], DataConfig())
    # test 25 % of 120 = 30 (20 + 10); val 10 % of the 90 left = 9 (6 + 3)
    assert np.bincount(labels[parts["test"].rows]).tolist() == [20, 10]
    assert np.bincount(labels[parts["val"].rows]).tolist() == [6, 3]


def test_the_seed_moves_the_split_and_equal_seeds_do_not() -> None:
    labels = {"train": labels_of([40, 40])}
    one, again, other = (
        partition("t", labels, ["a", "b"], DataConfig(seed=seed))["test"].rows.tolist() for seed in (1, 1, 2)
    )
    assert one == again != other


def test_a_sources_own_splits_are_kept() -> None:
    labels = {"train": labels_of([10, 10]), "val": labels_of([2, 2]), "test": labels_of([3, 3])}
    parts = partition("t", labels, ["a", "b"], DataConfig())
    assert {name: (part.source, len(part.rows)) for name, part in parts.items()} == {
        "train": ("train", 20),
        "val": ("val", 4),
        "test": ("test", 6),
    }


def test_validation_is_held_out_where_only_a_test_split_exists() -> None:
    parts = partition("t", {"train": labels_of([10, 10]), "test": labels_of([3, 3])}, ["a", "b"], DataConfig())
    assert (parts["val"].source, len(parts["val"].rows), len(parts["train"].rows)) == ("train", 2, 18)


def test_limits_keep_the_first_of_val_and_test_and_balance_train() -> None:
    labels = labels_of([100, 100])
    whole = partition("t", {"train": labels}, ["a", "b"], DataConfig())
    cut = partition("t", {"train": labels}, ["a", "b"], DataConfig(train_limit=20, val_limit=3, test_limit=5))
    assert cut["val"].rows.tolist() == whole["val"].rows[:3].tolist()
    assert cut["test"].rows.tolist() == whole["test"].rows[:5].tolist()
    assert np.bincount(labels[cut["train"].rows]).tolist() == [10, 10]
    assert set(cut["train"].rows) < set(whole["train"].rows)


def test_a_stratified_draw_is_sorted_and_exact() -> None:
    rows = stratified(labels_of([30, 60]), 9, 0, 3, "draw")
    # 9 * (1/3, 2/3) = 3, 6
    assert (rows < 30).sum() == 3 and len(rows) == 9 and (np.diff(rows) > 0).all()


@pytest.mark.parametrize(
    ("counts", "names", "options", "message"),
    [
        ([5, 0, 5], ["a", "b", "c"], {}, "1 of 3 classes have no training image: b; add images"),
        ([9, 2], ["a", "b"], {}, "needs 3 images or more.*but b has 2; add images"),
        ([9], ["a"], {}, "2 classes or more, got a"),
        (
            [9, 9, 9],
            ["a", "b", "c"],
            {"train_limit": 2},
            "train_limit=2 is fewer than.*3 classes; set it to 3",
        ),
    ],
)
def test_too_few_images_are_refused(counts: list[int], names: list[str], options: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        partition("t", {"train": labels_of(counts)}, names, DataConfig(**options))


@given(counts_lists, st.integers(0, 9), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_every_class_stands_equally_often_in_an_epoch(counts: list[int], epoch: int, seed: int) -> None:
    labels = labels_of(counts)
    drawn = np.bincount(labels[class_balanced(labels, seed, epoch)], minlength=len(counts))
    assert drawn.sum() == len(labels) and drawn.max() - drawn.min() <= 1


@given(counts_lists, st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_within_a_class_no_image_gets_ahead_of_another(counts: list[int], seed: int) -> None:
    labels = labels_of(counts)
    shown = np.bincount(np.concatenate([class_balanced(labels, seed, epoch) for epoch in range(5)]))
    for label in range(len(counts)):
        own = shown[labels == label]
        assert own.max() - own.min() <= 1


def test_equal_classes_show_every_image_once_in_an_order_of_their_own() -> None:
    labels = np.arange(12) % 3
    first, second = class_balanced(labels, 0, 0), class_balanced(labels, 0, 1)
    assert sorted(first) == sorted(second) == list(range(12)) and first.tolist() != second.tolist()
    assert first.tolist() == class_balanced(labels, 0, 0).tolist() != class_balanced(labels, 1, 0).tolist()
