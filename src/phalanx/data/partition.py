"""Which image goes to which split: a pure function of the labels and the configuration."""

# N images, K classes

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from phalanx.data.config import DataConfig
from phalanx.errors import InputError, about
from phalanx.rng import SampleRng, derive_seed

Indices = NDArray[np.int64]

SPLITS = ("train", "val", "test")


class Part(NamedTuple):
    """Rows of one of the source's own splits."""

    source: str
    rows: Indices


def shuffled(seed: int, purpose: str, n: int) -> Indices:
    """(n,) a permutation of 0..n-1, the same on every machine and with every version of numpy and torch."""
    keys = SampleRng(seed, torch.arange(n)).integers(purpose, 1 << 31)
    order: Indices = keys.argsort(stable=True).numpy()
    return order


def class_balanced(labels: Indices, seed: int, epoch: int) -> Indices:
    """(N,) shuffled rows of `labels` (N,) among which every class stands equally often, up to one.

    A class goes through its images in one shuffled order after another, across epochs: none is shown again before all
    others of the class were. Where all classes are equally large, an epoch shows every image once.
    """
    classes = np.unique(labels)
    rows = []
    for position, label in enumerate(classes.tolist()):
        own = np.flatnonzero(labels == label)
        # of the N images of an epoch each class has N / K; these floors add up to N (Hermite's identity)
        first, last = ((turn * len(labels) + position) // len(classes) for turn in (epoch, epoch + 1))
        passes = range(first // len(own), -(-last // len(own)))
        orders = [own[shuffled(derive_seed(seed, label, number), "class", len(own))] for number in passes]
        start = passes.start * len(own)
        rows.append(np.concatenate([*orders, own[:0]])[first - start : last - start])
    chosen = np.concatenate(rows)
    return chosen[shuffled(derive_seed(seed, "epoch", epoch), "order", len(chosen))]


def allocate(counts: Indices, total: int, leave: int) -> Indices:
    """(K,) how many of each class make up `total`, in the classes' proportions (largest remainders).

    Every class gives at least 1 and keeps at least `leave`. Where `total` is out of reach, the nearest total
    that can be reached.
    """
    most = counts - leave
    quota = counts * (total / counts.sum())
    given: Indices = np.clip(np.floor(quota).astype(np.int64), 1, most)
    missing = int(np.clip(total, len(counts), most.sum()) - given.sum())
    step = 1 if missing > 0 else -1
    for _ in range(abs(missing)):
        movable = given < most if step > 0 else given > 1
        given[np.where(movable, step * (quota - given), -np.inf).argmax()] += step
    return given


def stratified(labels: Indices, total: int, leave: int, seed: int, purpose: str) -> Indices:
    """Sorted rows of about `total` images, each class in proportion (see `allocate`), drawn with `seed`."""
    classes, counts = np.unique(labels, return_counts=True)
    order = shuffled(seed, purpose, len(labels))
    chosen = [
        order[labels[order] == k][:count] for k, count in zip(classes, allocate(counts, total, leave), strict=True)
    ]
    return np.sort(np.concatenate(chosen))


def partition(
    title: str, labels: Mapping[str, Indices], class_names: Sequence[str], config: DataConfig
) -> dict[str, Part]:
    """Rows of train, val and test, given the labels of the source's own splits (at least "train").

    Held-out splits are stratified; limits come last. Raises InputError where a class has too few images.
    """
    rows = {name: np.arange(len(values), dtype=np.int64) for name, values in labels.items()}
    train = labels["train"]
    held_out = [name for name in ("test", "val") if name not in labels]
    with about("name"):
        _check_classes(title, train, class_names, 1 + len(held_out))

    parts = {name: Part(name, rows[name]) for name in labels}
    for position, name in enumerate(held_out):
        left = parts["train"].rows
        fraction = config.test_fraction if name == "test" else config.val_fraction
        leave = len(held_out) - position
        drawn = stratified(train[left], round(fraction * len(left)), leave, config.seed, f"data.{name}")
        parts[name] = Part("train", left[drawn])
        parts["train"] = Part("train", np.delete(left, drawn))

    parts["train"] = Part("train", _limit_train(title, parts["train"].rows, train, class_names, config))
    for name, limit in (("val", config.val_limit), ("test", config.test_limit)):
        parts[name] = Part(parts[name].source, parts[name].rows[:limit])
    return {name: parts[name] for name in SPLITS}


def _limit_train(title: str, rows: Indices, labels: Indices, class_names: Sequence[str], config: DataConfig) -> Indices:
    limit = config.train_limit
    if limit is None or limit >= len(rows):
        return rows
    if limit < len(class_names):
        raise InputError(
            f"{title}: train_limit={limit} is fewer than one image for each of the {len(class_names)}"
            f" classes; set it to {len(class_names)} or more",
            key="train_limit",
        )
    return rows[stratified(labels[rows], limit, 0, config.seed, "data.train_limit")]


def _check_classes(title: str, train: Indices, class_names: Sequence[str], needed: int) -> None:
    if len(class_names) < 2:
        raise InputError(f"{title}: a classifier needs 2 classes or more, got {_some(class_names)}; add another class")
    counts = np.bincount(train, minlength=len(class_names))
    missing = [class_names[k] for k in np.flatnonzero(counts == 0).tolist()]
    if missing:
        raise InputError(
            f"{title}: {len(missing)} of {len(class_names)} classes have no training image: {_some(missing)};"
            " add images or remove the class"
        )
    short = [f"{class_names[k]} has {counts[k]}" for k in np.flatnonzero(counts < needed).tolist()]
    if short:
        raise InputError(
            f"{title}: each class needs {needed} images or more, one for each split drawn from them, but"
            f" {_some(short)}; add images or remove the class"
        )


def _some(items: Sequence[str], most: int = 5) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
