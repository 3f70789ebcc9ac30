from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

import tiny
from phalanx.attacks import FGSM, PGD
from phalanx.data import Batch
from phalanx.errors import InputError
from phalanx.experts import TwoHeaded, build_expert
from phalanx.methods import METHODS, SOE, Loss
from phalanx.methods.soe import AttackOn, Weighting
from phalanx.models import MODEL_NAME, load, save_description
from phalanx.rng import Rng
from phalanx.routing import MixtureOfExperts, SynergyOfExperts
from phalanx.threat import ThreatModel

# B batch, M sub-models, C classes

RNG = Rng(5)
EPSILON = 3 / 16
WEIGHTINGS: tuple[Weighting, ...] = get_args(Weighting)
ATTACKED: tuple[AttackOn, ...] = get_args(AttackOn)


def _model(submodels: int = 3, seed: int = 0, expert: str = "mlp", **options: Any) -> SynergyOfExperts:
    torch.manual_seed(seed)
    small: dict[str, Any] = {"hidden": [12]} if expert == "mlp" else {"width": 2}
    parts = [build_expert(expert, num_classes=10, image_size=8, channels=1, **small) for _ in range(submodels)]
    return SynergyOfExperts([TwoHeaded(part) for part in parts], **options)


def _steep(**options: Any) -> SynergyOfExperts:
    """In float64, right on about half of the images, and each sub-model sure of other images."""
    model = _model(**options).double()
    batch = _batch()
    with torch.no_grad():
        for submodel in model.experts:
            submodel.classifier.weight *= 4
            nn.init.normal_(submodel.confidence.weight, 0, 2)
            submodel.confidence.bias -= submodel.both(batch.x)[1].mean()
    return model.train()


def _batch(size: int = 16, dtype: torch.dtype = torch.float64) -> Batch:
    x, y, ids = next(tiny.digits().train.batches(size))
    return Batch(x.to(dtype), y, ids)


def _halves_right(model: SynergyOfExperts, batch: Batch) -> Batch:
    """Labels that sub-model 0 gets right on the first images of the batch, and the others as they come."""
    labels = model.experts[0](batch.x).argmax(-1)
    return batch._replace(y=torch.where(torch.arange(len(labels)) < len(labels) // 2, labels, batch.y))


def _loss(model: SynergyOfExperts, batch: Batch, **settings: Any) -> Loss:
    method = SOE(attack=FGSM(eps=EPSILON), **settings)
    (update,) = method.updates(model, {"train": batch}, RNG)
    return update.loss()


def _gradients(model: nn.Module, value: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, found, strict=True)}


# -- one image and one sub-model at a time, in probabilities ---------------------------------------------------------


def _heads(submodel: nn.Module, image: Tensor) -> tuple[Tensor, Tensor]:
    features = submodel.features(image)
    return submodel.classifier(features)[0], submodel.confidence(features)[0, 0]


def _probability(z: Tensor, temperature: float = 1.0) -> Tensor:
    exps = (z / temperature).exp()
    return exps / exps.sum()


def _rectified(submodel: nn.Module, image: Tensor, temperature: float) -> Tensor:
    z, a = _heads(submodel, image)
    return _probability(z, temperature).max() / (1 + (-a).exp())


def _surest(model: SynergyOfExperts, image: Tensor, temperature: float) -> int:
    scores = [float(_rectified(submodel, image, temperature).detach()) for submodel in model.experts]
    return scores.index(max(scores))


def _shifted(network: Callable[[Tensor], Tensor], image: Tensor, label: int) -> Tensor:
    """FGSM."""
    leaf = image.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(-_probability(network(leaf))[label].log(), leaf)
    return (image + EPSILON * gradient.sign()).clamp(0, 1)


def _image_loss(
    model: SynergyOfExperts, image: Tensor, label: int, weighting: str, confidence_weight: float, temperature: float
) -> Tensor:
    count = len(model.experts)
    ce, rectified, bce = [], [], []
    for submodel in model.experts:
        z, a = _heads(submodel, image)
        ce.append(-_probability(z)[label].log())
        p = _probability(z, temperature)
        target = float(p[label].detach())
        right = z.tolist().index(max(z.tolist())) == label
        r = (p.max().detach() if right else p.max()) / (1 + (-a).exp())
        rectified.append(float(r.detach()))
        bce.append(-(target * r.log() + (1 - target) * (1 - r).log()))
    if weighting == "true_best":
        raw = [math.exp(-float(each.detach())) for each in ce]
    elif weighting == "predicted_best":
        raw = [math.exp(r) for r in rectified]
    elif weighting == "sum":
        raw = [1.0] * count
    else:
        raw = [float(r == max(rectified)) for r in rectified]
    scale = 1.0 if weighting == "sum" else sum(raw)
    weighted = sum((w / scale * each for w, each in zip(raw, ce, strict=True)), torch.zeros(()))
    return weighted + confidence_weight * torch.stack(bce).mean()


def _reference(
    model: SynergyOfExperts, batch: Batch, weighting: str, attack_on: str, confidence_weight: float, temperature: float
) -> Tensor:
    clean, attacked = [], []
    for image, label in zip(batch.x.split(1), batch.y.tolist(), strict=True):
        surest = model.experts[_surest(model, image, temperature)]
        aimed = [surest] if attack_on == "together" else list(model.experts)
        points = [_shifted(lambda at, network=network: _heads(network, at)[0], image, label) for network in aimed]
        settings = (label, weighting, confidence_weight, temperature)
        clean.append(_image_loss(model, image, *settings))
        attacked += [_image_loss(model, point, *settings) for point in points]
    return torch.stack(clean).mean() + torch.stack(attacked).mean()


@pytest.mark.parametrize("attack_on", ATTACKED)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_loss_and_its_gradient_one_image_at_a_time(weighting: Weighting, attack_on: AttackOn) -> None:
    for temperature, confidence_weight in ((1.0, 1.0), (2.0, 0.3)):
        model = _steep(temperature=temperature)
        batch = _halves_right(model, _batch(8))
        ours = _loss(model, batch, weighting=weighting, attack_on=attack_on, confidence_weight=confidence_weight)
        theirs = _reference(model, batch, weighting, attack_on, confidence_weight, temperature)
        torch.testing.assert_close(ours.value, theirs)
        expected = _gradients(model, theirs)
        for name, gradient in _gradients(model, ours.value).items():
            torch.testing.assert_close(gradient, expected[name], msg=f"{name} at temperature {temperature}")
            assert gradient.abs().sum() > 0, name


# -- where the gradient goes -----------------------------------------------------------------------------------------


def _of_confidence(model: SynergyOfExperts, batch: Batch) -> dict[str, Tensor]:
    """The gradient of the confidence loss alone: what it adds."""
    with_it, without = (_gradients(model, _loss(model, batch, confidence_weight=weight).value) for weight in (1.0, 0.0))
    return {name: with_it[name] - without[name] for name in with_it}


def _one_class(model: SynergyOfExperts, answer: int) -> SynergyOfExperts:
    """Every sub-model answers with class `answer`, attacked or not."""
    with torch.no_grad():
        for submodel in model.experts:
            submodel.classifier.bias[answer] += 40
            # not so sure that nothing is left to lower
            submodel.classifier.weight /= 4
            submodel.classifier.bias[answer + 1] += 35
    return model


def test_where_a_sub_model_is_right_only_its_confidence_learns_from_the_confidence_loss() -> None:
    model = _one_class(_steep(), 3)
    batch = _batch()
    right = _of_confidence(model, batch._replace(y=torch.full_like(batch.y, 3)))
    wrong = _of_confidence(model, batch._replace(y=torch.full_like(batch.y, 7)))
    for name in right:
        if ".classifier." in name:
            assert right[name].abs().max() < 1e-15, name
            assert wrong[name].abs().max() > 1e-6, name
        if ".confidence." in name:
            assert right[name].abs().max() > 1e-6, name
    for submodel in range(3):
        name = f"experts.{submodel}.confidence.bias"
        # descent raises the confidence where it is right, lowers it where it is wrong
        assert right[name] < 0 < wrong[name]
        # and lowers the probability of the wrong answer
        assert wrong[f"experts.{submodel}.classifier.bias"][3] > 0


def test_true_best_is_the_gradient_of_the_smooth_best_loss() -> None:
    model, batch = _steep(), _batch()
    ours = _gradients(model, _loss(model, batch, confidence_weight=0.0).value)

    def smooth(x: Tensor) -> Tensor:
        logits, _ = model.submodels(x)
        ce = torch.stack([nn.functional.cross_entropy(z, batch.y, reduction="none") for z in logits.unbind(1)], 1)
        return -torch.logsumexp(-ce, 1).mean()

    x_adv = FGSM(eps=EPSILON)(model, batch.x, batch.y)
    expected = _gradients(model, smooth(batch.x) + smooth(x_adv))
    for name in ours:
        torch.testing.assert_close(ours[name], expected[name], msg=name)


def test_selected_teaches_nobody_else() -> None:
    model, batch = _steep(), _batch(1)
    x_adv = FGSM(eps=EPSILON)(model, batch.x, batch.y)
    spoke = {int(model.gate(x).experts) for x in (batch.x, x_adv)}
    gradients = _gradients(model, _loss(model, batch, weighting="selected", confidence_weight=0.0).value)
    moved = {int(name.split(".")[1]) for name, gradient in gradients.items() if gradient.abs().sum() > 0}
    assert moved == spoke and len(spoke) < 3


class _Says(nn.Module):
    """The same answer for every image."""

    def __init__(self, logits: list[float], confidence: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits, dtype=dtype))
        self.confidence = nn.Parameter(torch.tensor(confidence, dtype=dtype))

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self(x), self.confidence.expand(len(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.expand(len(x), -1) + 0 * x.flatten(1).sum(1, keepdim=True)


def _extreme(gap: float, confidence: float, dtype: torch.dtype, label: int) -> tuple[float, list[Tensor]]:
    """Loss and gradients of two equal sub-models that answer with logits (gap, 0)."""
    model = SynergyOfExperts([_Says([gap, 0.0], confidence, dtype) for _ in range(2)])
    batch = Batch(torch.full((1, 1, 1, 1), 0.5, dtype=dtype), torch.tensor([label]), torch.arange(1))
    value = _loss(model, batch).value
    return float(value.detach()), list(_gradients(model, value).values())


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("confidence", [-300.0, -20.0, 0.0, 20.0, 80.0, 300.0])
@pytest.mark.parametrize("gap", [0.5, 18.0, 60.0, 1e4])
def test_the_confidence_loss_of_the_very_sure_is_exact(gap: float, confidence: float, label: int) -> None:
    value, gradients = _extreme(gap, confidence, torch.float32, label)
    exact, slopes = _extreme(gap, confidence, torch.float64, label)
    assert value == pytest.approx(exact, rel=1e-5, abs=1e-6)
    for gradient, slope in zip(gradients, slopes, strict=True):
        # two losses, of which each cross-entropy and each confidence loss weighs 1/2: at most 2 + 2 halves
        assert gradient.isfinite().all() and gradient.abs().max() <= 2 + 1e-5
        torch.testing.assert_close(gradient.double(), slope, rtol=1e-4, atol=1e-6)


def test_the_confidence_loss_by_hand() -> None:
    # softmax([ln 3, 0]) = (3, 1) / 4, sigmoid(0) = 1/2: R = 3/8, T = 1/4 for label 1; all twice, clean and attacked
    value, _ = _extreme(math.log(3), 0.0, torch.float64, 1)
    bce = -(1 / 4 * math.log(3 / 8) + 3 / 4 * math.log(5 / 8))
    assert value == pytest.approx(2 * (math.log(4) + bce))


# -- what it does to a model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("expert", ["mlp", "small_cnn"])
@pytest.mark.parametrize("attack_on", ATTACKED)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_every_parameter_moves(weighting: Weighting, attack_on: AttackOn, expert: str) -> None:
    model = _model(expert=expert).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attack = PGD(steps=3, random_start=False)
    method = SOE(weighting=weighting, attack_on=attack_on, attack=attack).within(tiny.THREAT)
    method.check(model, 10)
    (update,) = method.updates(model, {"train": _batch(32, torch.float32)}, RNG)
    assert update.player == "all"
    after_search = dict(model.named_buffers())
    assert all(torch.equal(buffer, before[name]) for name, buffer in after_search.items()) and model.training
    update.loss().value.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter -= 0.1 * parameter.grad
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name
    # the clean and the attacked batch, once each
    counted = [int(buffer) for name, buffer in model.named_buffers() if "num_batches" in name]
    assert set(counted) == (set() if expert == "mlp" else {2})


def test_the_attack_is_on_what_was_asked_for() -> None:
    model, batch = _steep(), _batch()

    def attacked(**settings: Any) -> Tensor:
        seen: list[Tensor] = []
        handle = model.experts[0].features.register_forward_hook(
            lambda module, inputs, _: seen.append(inputs[0].detach()) if module.training else None
        )
        _loss(model, batch, **settings)
        handle.remove()
        clean, x_adv = seen
        assert torch.equal(clean, batch.x)
        return x_adv

    together = attacked()
    assert torch.equal(together, FGSM(eps=EPSILON)(model, batch.x, batch.y))
    one_by_one = attacked(attack_on="one_by_one").split(16)
    assert len(one_by_one) == 3
    for submodel, x_adv in zip(model.experts, one_by_one, strict=True):
        assert torch.equal(x_adv, FGSM(eps=EPSILON)(submodel, batch.x, batch.y))
    assert not torch.equal(one_by_one[0], one_by_one[1])


@pytest.mark.parametrize(("attack_on", "passes"), [("together", 3 * 10 + 2 * 3), ("one_by_one", 3 * 10 + 3 + 9)])
def test_what_a_step_costs(attack_on: AttackOn, passes: int) -> None:
    # forwards per image at K = 10 and M = 3; those of the attack have a backward as dear, those of the loss twice that
    model, batch, seen = _model().train(), _batch(16, torch.float32), []
    for submodel in model.experts:
        submodel.features.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    (update,) = SOE(attack_on=attack_on).within(tiny.THREAT).updates(model, {"train": batch}, RNG)
    update.loss()
    assert sum(seen) == 16 * passes


def test_random_starts_differ_between_sub_models() -> None:
    submodel = _model(2).experts[0]
    twins = SynergyOfExperts(
        [submodel, TwoHeaded(build_expert("mlp", num_classes=10, image_size=8, channels=1, hidden=[12]))]
    )
    twins.experts[1].load_state_dict(submodel.state_dict())
    batch = _batch(4, torch.float32)
    method = SOE(attack=PGD(eps=EPSILON, steps=1, step_size=1e-6), attack_on="one_by_one")
    first, second = (found.x_adv for found in method._attacked(twins, batch, RNG))
    assert not torch.equal(first, second)


def test_logs() -> None:
    model, batch = _steep(), _batch()
    x_adv = FGSM(eps=EPSILON)(model, batch.x, batch.y)
    routes = [model.gate(x).experts.flatten() for x in (batch.x, x_adv)]
    load = torch.stack([(torch.stack(routes) == number).double().mean() for number in range(3)])
    accuracy = torch.stack([(model(x).argmax(-1) == batch.y).double().mean() for x in (batch.x, x_adv)]).mean()
    entropies = {}
    for weighting in WEIGHTINGS:
        logs = _loss(model, batch, weighting=weighting).logs
        assert logs.keys() == {"accuracy", "adversarial_accuracy", "weight_entropy", "load"}
        assert not any(log.requires_grad for log in logs.values())
        torch.testing.assert_close(logs["load"], load)
        torch.testing.assert_close(logs["accuracy"].double(), accuracy)
        entropies[weighting] = float(logs["weight_entropy"])
    assert entropies["sum"] == pytest.approx(math.log(3)) and entropies["selected"] == 0
    # the released weighting hardly prefers anybody: at least that of (.155, .269, .576)
    assert 0 < entropies["true_best"] < 0.95 < entropies["predicted_best"] < math.log(3)


def test_a_run_from_start_to_model(tmp_path: Path) -> None:
    model = tiny.run_training(tmp_path, _model(), SOE(attack=PGD(steps=2, random_start=False)).within(tiny.THREAT))
    record = tiny.metrics(tmp_path)[-1]
    assert 0 < record["weight_entropy"] < math.log(3) and len(record["load"]) == 3
    save_description(tmp_path / MODEL_NAME, model, tiny.digits())
    loaded = load(tmp_path, weights="last")
    (batch,) = tiny.digits().val.batches(30)
    assert isinstance(loaded, SynergyOfExperts) and torch.equal(loaded(batch.x), model.eval()(batch.x))


# -- its settings ----------------------------------------------------------------------------------------------------


def test_defaults() -> None:
    method = METHODS["soe"]()
    assert method == SOE(weighting="true_best", attack_on="together", confidence_weight=1.0)
    assert method.attack == PGD(steps=10, random_start=False) and method.streams == ("train",)
    filled = method.within(ThreatModel("L2", "1/2")).attack
    assert (filled.norm, str(filled.eps), filled.steps) == ("L2", "1/2", 10)


def test_it_trains_nothing_else() -> None:
    model = MixtureOfExperts(None, [nn.Linear(1, 2)])
    method = SOE().within(tiny.THREAT)
    for attempt in (lambda: method.check(model, 10), lambda: next(method.updates(model, {"train": _batch()}, RNG))):
        with pytest.raises(InputError, match="soe trains a SynergyOfExperts, got MixtureOfExperts; set "):
            attempt()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SOE(confidence_weight=-1), "confidence_weight must be at least 0, got -1"),
        (
            lambda: SOE(attack_on="one_by_one", attack=PGD(surface="dense")),
            "attack.surface must be 'whole' where attack_on is 'one_by_one', got 'dense'; a single sub-model has no",
        ),
    ],
)
def test_a_bad_value_is_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
