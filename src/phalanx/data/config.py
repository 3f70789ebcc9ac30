"""What data a run uses. Free of torch: configuration is read before anything heavy is loaded."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

Kind = Literal["digits", "folder", "parquet", "mnist", "cifar10", "cifar100", "svhn", "tiny-imagenet", "imagenet"]
NAMED: tuple[Kind, ...] = ("mnist", "cifar10", "cifar100", "svhn", "tiny-imagenet", "imagenet")
"""Public sets whose files are looked for on this machine: `phalanx.data.named`."""
Sampling = Literal["shuffled", "class_balanced"]

AUGMENTS = {
    "flip": None,
    "crop": "pixels of zero padding",
    "translate": "largest shift in pixels",
    "cutout": "side of the square in pixels",
}
"""Each augmentation's name, and what the number after its colon means (None: it takes no number)."""

MAX_SIZE = 4096

AUTO_SIZE = 64
"""The largest side that "auto" leaves an image: what a CPU trains on in minutes."""


class AugmentStep(NamedTuple):
    """One parsed augmentation: `crop:4` is ("crop", 4); an augmentation without a number has amount 0."""

    name: str
    amount: int


def parse_augment(items: Sequence[str]) -> tuple[AugmentStep, ...]:
    """The steps that `items` ("flip", "crop:4", ...) name, in their order.

    Raises ValueError, starting with "augment", for an unknown name or a number that is missing, unwanted or
    out of range.
    """
    if isinstance(items, str):
        raise ValueError(f"augment must be a list of augmentations, got the text {items!r}; write [{items!r}]")
    return tuple(_parse_step(item) for item in items)


def _parse_step(item: str) -> AugmentStep:
    known = ", ".join(name if meaning is None else f"{name}:N ({meaning})" for name, meaning in AUGMENTS.items())
    name, colon, number = str(item).partition(":")
    if name not in AUGMENTS:
        close = difflib.get_close_matches(name, AUGMENTS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"augment has no augmentation {item!r}; {hint}there are: {known}")
    if AUGMENTS[name] is None:
        if colon:
            raise ValueError(f"augment item {item!r} takes no number; write {name!r}")
        return AugmentStep(name, 0)
    if not (number.isascii() and number.isdigit() and 1 <= int(number) <= MAX_SIZE):
        raise ValueError(
            f"augment item {item!r} needs a whole number from 1 to {MAX_SIZE} after the colon"
            f" ({AUGMENTS[name]}), such as '{name}:4'"
        )
    return AugmentStep(name, int(number))


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the images come from, how they are split, and how training images are varied.

    Raises ValueError whose message starts with the name of the field at fault.
    """

    name: str = "digits"
    """"digits" (8 x 8 grey, part of scikit-learn), "folder:PATH" (one folder of PNG or JPEG files per class),
    "parquet:PATH" (a Parquet file, or a folder of them, in the Hugging Face layout), or a public set: mnist, cifar10,
    cifar100, svhn, tiny-imagenet or imagenet, as "NAME:PATH" or, below $PHALANX_DATA, as its name alone."""

    size: int | Literal["auto"] | None = None
    """Side in pixels: each image is scaled so that its shorter side fits, then its centre is cropped to a
    square. Needed for folders and Parquet files whose images differ in size; None keeps their size; "auto" keeps it
    where all are squares of one size up to 64, else takes the smallest of their sides, between 32 and 64."""

    color: Literal["keep", "rgb", "grey", "auto"] = "keep"
    """Channels of folder and Parquet images: as stored (all must agree), three, one, or "auto": three unless all
    images are stored as grey."""

    train_limit: int | None = None
    """Keep this many training images, drawn with `seed` so that classes keep their shares."""

    val_limit: int | None = None
    """Keep the first images of the validation split, this many."""

    test_limit: int | None = None
    """Keep the first images of the test split, this many."""

    val_fraction: float = 0.1
    """Share of the training images held out for validation, where the source has no such split of its own."""

    test_fraction: float = 0.25
    """Share of all images held out for testing, where the source has no test split of its own."""

    seed: int = 0
    """Seed of the stratified splits and of `train_limit`."""

    augment: tuple[str, ...] = ()
    """Augmentations of the training images, in order: "flip", "crop:N", "translate:N", "cutout:N"."""

    mean: tuple[float, ...] | None = None
    """Per channel, what the networks' first layer subtracts; None measures the training images."""

    std: tuple[float, ...] | None = None
    """Per channel, what it divides by; None measures the training images."""

    cache: str | None = None
    """Folder of the decoded images; None is $PHALANX_CACHE, or ~/.cache/phalanx where that is unset."""

    def __post_init__(self) -> None:
        kind = self.kind
        if self.size != "auto":
            _check_count("size", self.size, MAX_SIZE)
        if self.color not in ("keep", "rgb", "grey", "auto"):
            raise ValueError(f"color must be 'keep', 'rgb', 'grey' or 'auto', got {self.color!r}")
        if kind == "digits" and self.size not in (None, "auto"):
            raise ValueError(f"size cannot be set for digits, which are 8 x 8, got {self.size}; leave it out")
        if kind == "digits" and self.color not in ("keep", "auto"):
            raise ValueError(f"color cannot be set for digits, which are grey, got {self.color!r}; leave it out")
        for field in ("train_limit", "val_limit", "test_limit"):
            _check_count(field, getattr(self, field))
        for field in ("val_fraction", "test_fraction"):
            _check_fraction(field, getattr(self, field))
        if not _is_int(self.seed) or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be a whole number from 0 to 2**63 - 1, got {self.seed!r}")
        parse_augment(self.augment)
        _check_channels("mean", self.mean, lambda value: 0 <= value <= 1, "in [0, 1]")
        _check_channels("std", self.std, lambda value: 0 < value <= 1, "in (0, 1]")
        if self.cache == "":
            raise ValueError("cache must be a folder, got an empty text; leave it out for the default")

    @property
    def kind(self) -> Kind:
        """The part of `name` before the colon."""
        kind, colon, path = str(self.name).partition(":")
        usable = path.isprintable() and bool(path)
        match kind:
            case "digits" if not colon:
                return "digits"
            case "folder" if usable:
                return "folder"
            case "parquet" if usable:
                return "parquet"
        for named in NAMED:
            if kind == named and (usable or not colon):
                return named
        raise ValueError(
            f"name must be 'digits', 'folder:PATH', 'parquet:PATH' or one of {', '.join(NAMED)}, got {self.name!r};"
            " your own images go in as a folder with one sub-folder per class, or as Parquet files"
        )

    @property
    def path(self) -> Path:
        """The part of `name` after the colon, with a leading ~ expanded."""
        return Path(self.name.partition(":")[2]).expanduser()


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_count(field: str, value: object, most: int | None = None) -> None:
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < 1 or (most is not None and value > most):
        limits = "at least 1" if most is None else f"in 1..{most}"
        raise ValueError(f"{field} must be a whole number {limits}, got {value!r}; leave it out for the default")


def _check_channels(field: str, values: Sequence[float] | None, fits: Callable[[float], bool], limits: str) -> None:
    if values is not None and (not values or not all(fits(value) for value in values)):
        raise ValueError(f"{field} must hold one number {limits} for each channel, got {list(values)}")


def _check_fraction(field: str, value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= 0.5:
        raise ValueError(f"{field} must be in (0, 0.5], got {value!r}; 0.1 holds out one image in ten")
