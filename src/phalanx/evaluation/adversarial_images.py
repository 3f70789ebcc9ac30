"""The images that broke a model: found again from an evaluation's seeds, and judged again."""

# N images of the evaluation

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from phalanx.data import Batch
from phalanx.errors import HonestyError, InputError
from phalanx.evaluation.again import judged_in
from phalanx.evaluation.protocols import protocol
from phalanx.evaluation.result import Evaluation
from phalanx.rng import SampleRng, derive_seed
from phalanx.runs.summary import external_attacks
from phalanx.runs.verdict import CLEAN

_OTHER_SIZE = 37
"""A batch size that nobody attacks in: a verdict that depends on the batch shows."""


def adversarial_images(
    model: Callable[[Tensor], Any], data: Batch, evaluation: Evaluation, *, batch_size: int = 64
) -> Tensor:
    """(N, ...) for each image one that broke the model, else itself: the winning attacks are run again, on these alone.

    `data` holds all images of the evaluation, where the model is. What only submitted images broke stays clean: those
    are not to be found again from a seed. Raises InputError for an attack that a protocol
    cannot name.
    """
    x_adv = data.x.clone()
    place = {sample: row for row, sample in enumerate(data.ids.tolist())}
    for name, samples in _won(evaluation).items():
        (member,) = protocol(name, evaluation.threat).members
        seed = derive_seed(int(evaluation.attacks[name]["seed"]), name)
        for start in range(0, len(samples), batch_size):
            rows = torch.tensor([place[sample] for sample in samples[start : start + batch_size]])
            rng = SampleRng(seed, data.ids[rows])
            x_adv[rows] = member.attack.run(model, data.x[rows], data.y[rows], rng=rng).x_adv
    return x_adv


def _won(evaluation: Evaluation) -> dict[str, list[int]]:
    """By attack the samples that it broke, each sample once."""
    broken = {row.sample: row.attack for row in evaluation.rows if _is_broken(row.attack, row.verdict, evaluation)}
    found: dict[str, list[int]] = {}
    for sample, attack in broken.items():
        found.setdefault(attack, []).append(sample)
    return found


def _is_broken(attack: str, verdict: str, evaluation: Evaluation) -> bool:
    left_out = (*evaluation.aside, *external_attacks(evaluation.attacks))
    return verdict == "broken" and attack != CLEAN and attack not in left_out


def judged_again(model: Callable[[Tensor], Any], data: Batch, x_adv: Tensor, evaluation: Evaluation) -> Tensor:
    """(N,) the model's answers to `x_adv` (N, ...), on the CPU.

    Raises HonestyError where they are not what the verdicts say, up to rounding, and InputError for an image outside
    the threat.
    """
    threat = evaluation.threat
    outside = 1 if x_adv.shape != data.x.shape else int((~threat.contains(x_adv, data.x)).sum())
    if outside:
        raise InputError(f"{outside} of the adversarial images are outside {threat} or [0, 1]; give those of the run")
    again = judged_in(_OTHER_SIZE, model, x_adv, x_adv.device)
    wrong = set(data.ids.cpu()[(again.predicted != data.y.cpu()) | again.invalid | again.close].tolist())
    broken = {row.sample for row in evaluation.rows if _is_broken(row.attack, row.verdict, evaluation)}
    if lost := broken - wrong:
        raise HonestyError(
            f"the model is right about {len(lost)} adversarial images that the evaluation counts as broken, the first "
            f"of sample {min(lost)}; give the model and the images of the run"
        )
    return again.predicted
