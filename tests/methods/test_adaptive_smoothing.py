"""Training the mixing network of adaptive smoothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from phalanx.attacks import PGD
from phalanx.data import Batch
from phalanx.errors import InputError
from phalanx.methods import METHODS, AdaptiveSmoothingTraining, Loss, Update
from phalanx.methods.adaptive_smoothing import Misleading
from phalanx.rng import Rng, SampleRng
from phalanx.routing import AdaptiveSmoothing, DualModel
from phalanx.training import Adam

# B batch

RNG = Rng(4)
EPSILON = 3 / 16


def _model(**options: Any) -> AdaptiveSmoothing:
    return AdaptiveSmoothing(tiny.mixture(2), tiny.mixture(3, seed=1), hidden=6, **options)


def _method(**settings: Any) -> AdaptiveSmoothingTraining:
    chosen: dict[str, Any] = {"attack": PGD(steps=2), "draw_steps": None, **settings}
    return AdaptiveSmoothingTraining(**chosen).within(tiny.THREAT)


def _batch(size: int = 16) -> Batch:
    return next(tiny.digits().train.batches(size))


def _update(model: AdaptiveSmoothing, batch: Batch, rng: Rng = RNG, **settings: Any) -> Update:
    (update,) = _method(**settings).updates(model, {"train": batch}, rng)
    return update


# -- the loss ------------------------------------------------------------------------------------------------------


def _reference(model: AdaptiveSmoothing, clean: Batch, attacked: Tensor, weights: tuple[float, float, float]) -> Tensor:
    """Image by image, in probabilities."""
    bce_weight, ce_weight, product_weight = weights
    totals = []
    for images, label in ((clean.x, 0), (attacked, 1)):
        each = []
        for image, y in zip(images.split(1), clean.y.tolist(), strict=False):
            passed = model.smoothed(image)
            told = passed.gamma.sigmoid()[0]
            bce = -(told if label else 1 - told).log()
            ce = -passed.logits.softmax(-1)[0, y].log()
            each.append(bce_weight * bce + ce_weight * ce + product_weight * bce * ce)
        totals.append(torch.stack(each).mean())
    return (totals[0] + totals[1]) / 2


@pytest.mark.parametrize("weights", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (1.5, 0.5, 0.1)])
def test_the_loss_and_its_gradient_image_by_image(weights: tuple[float, float, float]) -> None:
    model, batch = _model().double().train(), _batch()
    batch = batch._replace(x=batch.x.double())
    settings = dict(zip(("bce", "ce", "product"), weights, strict=True))
    update = _update(model, batch, clean_per_attacked=4, **settings)
    found = Misleading.of(_method().attack, (0.4, 1.1), 0.4).search(
        model, batch.x[:4], batch.y[:4], rng=RNG.fold("attack").samples(batch.ids[:4])
    )
    ours, theirs = update.loss().value, _reference(model, batch, found.x_adv, weights)
    torch.testing.assert_close(ours, theirs)
    own = model.players()["mixing"]
    torch.testing.assert_close(torch.autograd.grad(ours, own), torch.autograd.grad(theirs, own))


@pytest.mark.parametrize(("per_attacked", "attacked"), [(1, 16), (4, 4), (16, 1), (40, 1)])
def test_how_many_are_attacked(per_attacked: int, attacked: int) -> None:
    model, seen = _model(), []
    inner = model.smoothed

    def spy(x: Tensor, route: Any = None) -> Any:
        seen.append(len(x))
        return inner(x, route)

    model.smoothed = spy  # type: ignore[method-assign]
    update = _update(model, _batch(), clean_per_attacked=per_attacked)
    seen.clear()
    logs = update.loss().logs
    assert seen == [16 + attacked]
    assert {"accuracy", "clean_accuracy", "attacked_accuracy", "clean_told", "attacked_told"} <= set(logs)


# -- the attack ----------------------------------------------------------------------------------------------------


def test_every_image_has_a_radius_of_its_own() -> None:
    model, batch = _model(), _batch(64)
    attack = Misleading.of(_method(attack=PGD(steps=12)).attack, (0.4, 1.1), 0.4)
    x_adv = attack.search(model, batch.x, batch.y, rng=SampleRng(0, batch.ids)).x_adv
    reach = (x_adv - batch.x).abs().flatten(1).amax(1) / EPSILON
    assert 0.4 - 1e-4 <= float(reach.min()) < 0.5 and 1.0 < float(reach.max()) <= 1.1 + 1e-4
    assert float(x_adv.min()) >= 0 and float(x_adv.max()) <= 1 and len(reach.unique()) > 60
    # by sample, not by place in the batch
    some = torch.tensor([40, 3, 17])
    again = attack.search(model, batch.x[some], batch.y[some], rng=SampleRng(0, batch.ids[some])).x_adv
    torch.testing.assert_close(again, x_adv[some])


def test_a_fixed_radius_without_misleading_is_plain_pgd() -> None:
    model, batch = _model(), _batch()
    pgd = _method(attack=PGD(steps=3)).attack
    attack = Misleading.of(pgd, (1.0, 1.0), 0.0)
    rng = SampleRng(0, batch.ids)
    assert torch.equal(attack(model, batch.x, batch.y, rng=rng), pgd(model, batch.x, batch.y, rng=rng))


@pytest.mark.parametrize("early_drop", [None, True])
def test_it_misleads_the_mixing_network(early_drop: bool | None) -> None:
    model, batch = _model(), _batch(64)
    pgd = _method(attack=PGD(steps=10, early_drop=early_drop)).attack

    def gamma(mislead: float) -> Tensor:
        x_adv = Misleading.of(pgd, (1.0, 1.0), mislead)(model, batch.x, batch.y, rng=SampleRng(0, batch.ids))
        return model.eval().smoothed(x_adv).gamma.mean()

    if early_drop is None:
        assert gamma(100.0) < gamma(0.0) - 0.05
    else:
        assert gamma(100.0).isfinite()


def test_beyond_a_radius_of_one_there_is_nothing() -> None:
    pgd = PGD(eps="0.95", norm="Linf")
    assert Misleading.of(pgd, (0.4, 1.1), 0.4).eps == "1"
    assert Misleading.of(PGD(eps=0.95, norm="L2"), (0.4, 1.1), 0.4).threat.epsilon == pytest.approx(1.045)


# -- what it does to a model ---------------------------------------------------------------------------------------


def test_a_run_moves_the_mixing_network_and_nothing_else(tmp_path: Path) -> None:
    # soft gates: every expert answers, so every reader learns
    halves = tiny.mixture(2, "all", expert="small_cnn"), tiny.mixture(2, "all", seed=1, expert="small_cnn")
    model = AdaptiveSmoothing(*halves, hidden=6)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tiny.run_training(tmp_path, model, _method(), epochs=3, optimizer=Adam(lr=1e-2))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == name.startswith(("standard.", "robust.")), name
    first, *_, last = [record for record in tiny.metrics(tmp_path) if record["kind"] == "train"]
    assert last["loss"] < first["loss"]


def test_the_step_count_is_drawn_for_each_batch() -> None:
    model, batch = _model(), _batch(4)
    drawn = {int(_update(model, batch, RNG.fold(step), draw_steps=(1, 2, 3)).logs["drawn_steps"]) for step in range(20)}
    assert drawn == {1, 2, 3}


# -- what it refuses -----------------------------------------------------------------------------------------------


def test_any_other_model_is_refused_by_name() -> None:
    assert METHODS["adaptive_smoothing"] is AdaptiveSmoothingTraining
    _method().check(_model(), 10)
    dual = DualModel(tiny.mixture(2), tiny.mixture(2, seed=1), 0.7)
    for model in (dual, tiny.mixture(2)):
        with pytest.raises(InputError, match=f"trains an AdaptiveSmoothing, got {type(model).__name__}; set model"):
            _method().check(model, 10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bce": -1.0}, "bce must be at least 0"),
        ({"mislead": -0.1}, "mislead must be at least 0"),
        ({"bce": 0, "ce": 0, "product": 0}, "nothing to learn from; set one"),
        ({"radius": (0.0, 1.0)}, "radius must be a range of positive numbers that goes up"),
        ({"radius": (1.1, 0.4)}, "radius must be a range of positive numbers that goes up"),
        ({"clean_per_attacked": 0}, "clean_per_attacked must be at least 1, got 0"),
        ({"attack": PGD(surface="standard")}, "attack must be on the surface 'whole' and untargeted"),
        ({"attack": PGD(targeted=True)}, "attack must be on the surface 'whole' and untargeted"),
        ({"draw_steps": ()}, "draw_steps must hold at least one value"),
        ({"draw_steps": (0,)}, "draw_steps: steps must be at least 1"),
    ],
)
def test_settings_that_make_no_method(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, InputError), match=message):
        AdaptiveSmoothingTraining(**settings)


def test_the_loss_is_a_loss() -> None:
    loss = _update(_model(), _batch()).loss()
    assert isinstance(loss, Loss) and loss.value.isfinite()
