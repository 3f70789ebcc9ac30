"""The printed theorems on whole models: their radii are broken, sound ones of the same model are not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from phalanx.bounds import class_lipschitz, forward, output_lipschitz, read_network
from phalanx.certification import certify
from phalanx.certification.as_printed import printed_claims
from phalanx.data import ImageSet
from phalanx.errors import InputError
from phalanx.report import build_page, render_html, to_json
from phalanx.routing import DualModel, MixtureOfExperts
from phalanx.threat import NORMS
from phalanx.workflow import find_rows
from phalanx.workflow.as_printed import attacked
from tiny import digits, mixture

Run = Callable[..., tuple[int, str, str]]


def _switching() -> MixtureOfExperts:
    """Constant experts of one class each behind a linear router: only the switch matters, and 5.4 does not see it."""
    model = mixture(2, 1).eval()
    for index, expert in enumerate(model.experts):
        for module in expert.modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)
        expert[-1].bias.data[index] = 1.0
    return model


def _own_labels(model: nn.Module) -> ImageSet:
    images = digits().test
    labels = model(images.images(slice(0, len(images)))).argmax(1).numpy()
    return ImageSet(images.pixels, labels, images.ids, images.levels)


def test_what_switches_is_claimed_for_ever_and_broken() -> None:
    model = _switching()
    images = _own_labels(model)
    (batch,) = images.batches(len(images))
    claims = printed_claims(model, batch.x, batch.y, "L2")
    assert [claim.theorem for claim in claims] == ["5.4", "5.4"]
    for claim in claims:
        assert bool(claim.radius.isinf().all())
        found = attacked(model, images, claim.radius, "L2")
        assert found.claimed == len(images) and found.broken > 0.9 * len(images)
        assert found.mean_radius == pytest.approx(8)
    sound = attacked(model, images, certify(model, images, method="lipschitz").radius, "L2")
    assert sound.claimed == len(images) and sound.broken == 0


def test_an_answer_that_is_lost_inside_a_radius_is_broken() -> None:
    class Lost(nn.Module):
        """Right on clean images, and not finite as soon as one moves."""

        def __init__(self, images: ImageSet) -> None:
            super().__init__()
            self.slope = nn.Parameter(torch.ones(()))
            self._sums = images.images(slice(0, len(images))).flatten(1).sum(1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            total = x.flatten(1).sum(1)
            moved = (total[:, None] - self._sums).abs().amin(1) > 1e-4
            logits = self.slope * torch.stack([total, total - 1], 1)
            return logits.masked_fill(moved[:, None], float("nan"))

    images = digits().test
    zeros = ImageSet(images.pixels, images.labels * 0, images.ids, images.levels)
    found = attacked(Lost(images), zeros, torch.full((len(images),), 0.5), "L2")
    assert found.broken > 0.9 * found.claimed == 0.9 * len(images)


def test_wrong_answers_have_no_radius_and_halves_count_both_classes() -> None:
    robust = mixture(2, 1, seed=1).eval()
    (batch,) = digits().test.batches(40)
    claims = printed_claims(robust, batch.x, batch.y, "Linf")
    right = robust(batch.x).argmax(1) == batch.y
    for claim in claims:
        assert bool((claim.radius[~right] == 0).all()) and bool((claim.radius[right] > 0).all())
    # a bound of the constant is at least the gradient
    assert bool((claims[0].radius <= claims[1].radius).all())
    for alpha in (0.9, 1.0):
        dual = DualModel(mixture(2, seed=2), robust, alpha).eval()
        bounds, _ = printed_claims(dual, batch.x, batch.y, "Linf")
        assert bounds.theorem == "5.5" and bool((bounds.radius <= claims[0].radius + 1).all())


def test_other_models_are_refused() -> None:
    (batch,) = digits().test.first(3).batches(3)
    for model in (mixture(2, "all").eval(), mixture(2).eval().experts[0]):
        with pytest.raises(InputError, match="top-1 mixtures"):
            printed_claims(model, batch.x, batch.y, "L2")
    with pytest.raises(InputError, match="alpha"):
        printed_claims(DualModel(mixture(2), mixture(2), 0.3).eval(), batch.x, batch.y, "L2")
    with pytest.raises(InputError, match="averages logits"):
        printed_claims(DualModel(mixture(2), mixture(2), 0.8, mix="logits").eval(), batch.x, batch.y, "L2")


@pytest.mark.parametrize("norm", NORMS)
def test_a_single_output_s_constant(norm: Any) -> None:
    network = mixture(1).eval().experts[0].double()
    stages = read_network(network, (1, 8, 8))
    single, pairs = class_lipschitz(stages, (1, 8, 8), norm), output_lipschitz(stages, (1, 8, 8), norm)
    assert bool((pairs <= single[:, None] + single[None] + 1e-9).all())
    order = {"Linf": torch.inf, "L2": 2.0, "L1": 1.0}[norm]
    x = torch.rand(200, 2, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moved = (forward(stages, x[:, 0]) - forward(stages, x[:, 1])).abs()
    distance = (x[:, 0] - x[:, 1]).flatten(1).norm(p=order, dim=1, keepdim=True)
    assert bool((moved <= single * distance + 1e-12).all())


def test_the_command_says_unsound_everywhere(phalanx: Run, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = ["training.epochs=1", "data.train_limit=200", "validation.n=20", "model.experts=2"]
    assert phalanx("train", "digits-at", "--out", run, *(w for s in settings for w in ("--set", s)))[0] == 0
    code, out, err = phalanx("certify", run, "--as-printed", "--n", 16)
    assert code == 0, err
    assert "UNSOUND" in out and "theorem 5.4 as printed" in out and "printed-unsound" in out
    record = json.loads((run / "certificates" / "L2-printed-unsound-best-16" / "printed.json").read_text())
    assert record["sound"] is False and [line["sound"] for line in record["lines"]] == [False, False, True]
    assert record["lines"][2]["broken"] == 0 <= record["lines"][1]["broken"] <= record["lines"][1]["claimed"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("phalanx.workflow.as_printed.printed_claims", lambda *_: pytest.fail("claimed again"))
        assert phalanx("certify", run, "--as-printed", "--n", 16)[1] == out
    assert phalanx("evaluate", run, "--protocol", "pgd-2", "--n", 16, "--no-checks")[0] == 0
    page = build_page("t", "", find_rows([run]), "phalanx report")
    html = render_html(page)
    assert "theorem 5.4 as printed (unsound)" in html and page.rows[0].certificates == ()
    assert len(to_json(page)["rows"][0]["printed_unsound"]) == 3
    code, _, err = phalanx("certify", run, "--as-printed", "--method", "crown")
    assert code == 2 and "leave out --method" in err
