from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phalanx.config import load_run
from phalanx.data import ImageSet
from phalanx.errors import InputError
from phalanx.evaluation import protocol
from phalanx.evaluation.corruption_kinds import CORRUPTIONS, SEVERITIES, corrupt
from phalanx.evaluation.corruptions import under_corruptions
from phalanx.report import evaluation_text
from phalanx.rng import SampleRng
from phalanx.threat import ThreatModel
from phalanx.workflow import evaluate_run, train_run

# keys as large as a data set's ids are
IDS = torch.tensor([3, 141, 59_265])


def pictures(channels: int = 3, side: int = 32) -> Tensor:
    """(3, channels, side, side): smooth, with an edge, and flat grey."""
    line = torch.linspace(0, 1, side)
    smooth = (line[:, None] + line) / 2
    edge = (line > 0.4).float().expand(side, side) * 0.6 + 0.2
    return torch.stack([smooth, edge, torch.full_like(smooth, 0.5)])[:, None].repeat(1, channels, 1, 1)


def textures(channels: int) -> Tensor:
    """(24, channels, 32, 32): soft blobs, some 4 pixels across."""
    coarse = torch.rand(24, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, 32, mode="bicubic").clamp(0, 1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_images_stay_images_and_suffer_more_with_severity(name: str, channels: int) -> None:
    x = textures(channels)
    before = x.clone()
    made = [corrupt(x, name, severity, SampleRng.for_batch(len(x))) for severity in SEVERITIES]
    assert torch.equal(x, before)
    for image in made:
        assert image.shape == x.shape and image.dtype == x.dtype and image.min() >= 0 and image.max() <= 1
        assert torch.equal((image * 255).round() / 255, image)
    distances = [float((image - x).square().mean()) for image in made]
    assert distances[0] > 0
    # rounding aside, a severity is no milder than the one before; coarse pixels meet the grid as they happen to
    slack = 0.5 if name == "pixelate" else 0.95
    assert all(later >= slack * earlier for earlier, later in itertools.pairwise(distances))
    assert distances[-1] > 1.1 * distances[0]


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_what_happens_to_an_image_does_not_depend_on_the_others(name: str) -> None:
    x, rng = pictures(), SampleRng(1, IDS)
    together = corrupt(x, name, 3, rng)
    for row in range(3):
        alone = corrupt(x[row : row + 1], name, 3, rng[row : row + 1])
        assert torch.allclose(alone, together[row : row + 1], atol=1 / 254)
    assert torch.equal(corrupt(x, name, 3, rng), together)


@pytest.mark.parametrize("name", ["gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "motion_blur"])
def test_images_draw_numbers_of_their_own(name: str) -> None:
    same = pictures()[1:2].repeat(3, 1, 1, 1)
    first, second, third = corrupt(same, name, 5, SampleRng(1, IDS))
    assert not torch.equal(first, second) and not torch.equal(second, third)
    assert not torch.equal(corrupt(same, name, 5, SampleRng(2, IDS))[0], first)


def test_noise_has_the_deviation_it_says() -> None:
    grey = torch.full((3, 3, 64, 64), 0.5)
    rng = SampleRng(0, IDS)
    assert abs(float(corrupt(grey, "gaussian_noise", 5, rng).std()) - 0.10) < 0.004
    assert abs(float(corrupt(grey, "speckle_noise", 5, rng).std()) - 0.10) < 0.004
    # a Poisson count of mean 25, over 50
    assert abs(float(corrupt(grey, "shot_noise", 5, rng).std()) - 0.1) < 0.004
    assert abs(float((corrupt(grey, "impulse_noise", 5, rng) != 128 / 255).float().mean()) - 0.07) < 0.01


@pytest.mark.parametrize("name", ["gaussian_blur", "defocus_blur", "motion_blur", "pixelate"])
def test_blurs_keep_flat_images_and_the_mean(name: str) -> None:
    made = corrupt(pictures(), name, 5, SampleRng(1, IDS))
    assert torch.allclose(made[2], pictures()[2], atol=1 / 255)
    assert abs(float(made[1].mean() - pictures()[1].mean())) < 0.02


def test_a_severity_or_name_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match=r"1\.\.5, got 6"):
        corrupt(pictures(), "contrast", 6, SampleRng(1, IDS))
    with pytest.raises(KeyError):
        corrupt(pictures(), "frost", 1, SampleRng(1, IDS))


class _Brightness(nn.Module):
    """Right about the bright and the dark; without an answer about images of a high mean."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((1, 2, 3))
        logits = torch.stack([0.5 - mean, mean - 0.5], 1)
        return torch.where(mean[:, None] > 0.85, float("nan"), logits)


def flat(levels: list[int]) -> ImageSet:
    pixels = np.repeat(np.array(levels, np.uint8), 3 * 64).reshape(-1, 3, 8, 8)
    return ImageSet(pixels, (np.array(levels) > 127).astype(np.int64), np.arange(len(levels)), 255)


def test_counts_are_right_and_do_not_depend_on_the_batch() -> None:
    images = flat([0, 40, 110, 180])
    model = _Brightness().train()
    found = under_corruptions(model, images, batch_size=4, seed=3)
    assert model.training and (found.n, found.clean) == (4, 4)
    # + 0.1 brings 110/255 above a half; + 0.3 brings 180/255 to where there is no finite answer
    assert found.correct["brightness"][:2] == (4, 3) and found.correct["brightness"][4] == 2
    assert found.correct["contrast"] == (4,) * 5
    assert under_corruptions(model, images, batch_size=1, seed=3) == found
    record = found.to_json()
    assert json.loads(json.dumps(record)) == record and record["corruptions"][0]["name"] == "gaussian_noise"
    assert record["mean"] == found.mean < 1


def test_answers_are_computed_in_full_precision_and_draw_no_global_numbers() -> None:
    class Drawing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            precisions.add(matmul.fp32_precision)
            return x.flatten(1)[:, :2] + 0 * torch.rand(1)

    precisions: set[str] = set()
    matmul = torch.backends.cuda.matmul
    set_before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    torch.manual_seed(0)
    before = torch.get_rng_state()
    images = ImageSet(np.zeros((2, 1, 8, 8), np.uint8), np.zeros(2, np.int64), np.arange(2), 255)
    try:
        under_corruptions(Drawing(), images)
    finally:
        matmul.fp32_precision = set_before
    assert precisions == {"ieee"} and torch.equal(torch.get_rng_state(), before)


def test_a_protocol_may_name_them_besides_attacks_and_not_alone() -> None:
    threat = ThreatModel()
    assert [member.name for member in protocol("pgd-5, corruptions", threat).members] == ["pgd-5"]
    with pytest.raises(InputError, match="holds no attack; add one, as in quick,corruptions"):
        protocol("corruptions", threat)
    with pytest.raises(InputError, match="twice"):
        protocol("pgd-5,corruptions,corruptions", threat)


def test_an_evaluation_writes_them_and_its_worst_case_is_as_without(tmp_path: Path) -> None:
    settings = ("training.epochs=1", "model.experts=2", "device=cpu", "threads=1", "validation.n=8")
    measured = ("evaluation.n=16", "evaluation.checks=0", "evaluation.analysis=null")
    config = load_run("digits-st", (*settings, *measured, "evaluation.protocol=pgd-2,corruptions")).value
    train_run(config, tmp_path / "run")
    found = evaluate_run(tmp_path / "run", tmp_path / "with", config.evaluation)
    plain = load_run("digits-st", (*settings, *measured, "evaluation.protocol=pgd-2")).value.evaluation
    without = evaluate_run(tmp_path / "run", tmp_path / "without", plain)
    assert found is not None and without is not None and found.rows == without.rows
    record = json.loads((tmp_path / "with/corruptions.json").read_text())
    assert (record["n"], len(record["corruptions"])) == (16, len(CORRUPTIONS))
    assert not (tmp_path / "without/corruptions.json").exists()
    for name, status in (("with", "measured"), ("without", "not measured")):
        evaluation = json.loads((tmp_path / name / "evaluation.json").read_text())
        (line,) = [line for line in evaluation["threats"] if line["threat"] == "corruption"]
        assert line["status"] == status
        told = evaluation_text(tmp_path / name / "ledger.sqlite").splitlines()[-1]
        assert ("corruption" in told.partition("not measured")[0]) == (name == "with")
