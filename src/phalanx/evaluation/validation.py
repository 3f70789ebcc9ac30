"""The numbers on the validation split that pick a run's best weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from phalanx.attacks import Attack
from phalanx.data import ImageSet
from phalanx.errors import InputError
from phalanx.rng import SampleRng


def validation(
    images: ImageSet, attack: Attack, *, batch_size: int = 128, seed: int = 0
) -> Callable[[nn.Module], dict[str, float]]:
    """A function of the model: {"n", "accuracy", "robust_accuracy"} on `images` under `attack`.

    Every call uses the same random numbers, so differences between epochs are the model's. An image that gets a
    non-finite answer, clean or attacked, counts in neither accuracy.
    """
    if not len(images):
        raise InputError("the validation split is empty; raise data.val_fraction")

    def validate(model: nn.Module) -> dict[str, float]:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        correct = robust = 0
        for batch in images.batches(batch_size, device):
            result = attack.run(model, batch.x, batch.y, rng=SampleRng(seed, batch.ids))
            correct += int(((result.clean_predicted == batch.y) & ~result.invalid).sum())
            robust += int((~(result.broken | result.invalid)).sum())
        n = len(images)
        return {"n": n, "accuracy": correct / n, "robust_accuracy": robust / n}

    return validate
