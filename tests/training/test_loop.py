"""What one run of the loop does and writes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from method_samples import Loop, TurnByTurn
from torch import Tensor, nn

import tiny
from phalanx.data import Loader
from phalanx.errors import CorruptError, InputError
from phalanx.methods import ST
from phalanx.methods.base import LabelledBatch, Loss, Update, classification_loss
from phalanx.rng import Rng, derive_seed
from phalanx.routing import RoutedModel
from phalanx.runs import RunFolder
from phalanx.runs.checkpoint import load_latest, load_tensors
from phalanx.runs.metrics import read_metrics
from phalanx.training import SGD, Adam, Constant, Cosine

PLAIN = SGD(lr=1.0, momentum=0.0, weight_decay=0.0)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def _batches(steps: int, stream: str = "train") -> list[LabelledBatch]:
    loader = Loader(tiny.digits().train, batch_size=tiny.BATCH, seed=derive_seed(0, "data"), stream=stream)
    return [loader.batch(step) for step in range(steps)]


def test_it_is_gradient_descent(tmp_path: Path) -> None:
    model, reference = tiny.mixture(), tiny.mixture()
    for parameter in model.parameters():
        # what somebody else's backward left behind
        parameter.grad = torch.ones_like(parameter)
    tiny.run_training(tmp_path, model, epochs=1, optimizer=PLAIN, schedule=Cosine(final=0.5))
    # 100 images in batches of 32 are 3 steps; the factors are 0.5 + 0.5 * (1, 1/2, 0)
    for batch, lr in zip(_batches(3), (1.0, 0.75, 0.5), strict=True):
        loss = classification_loss(reference, batch.x, batch.y, ST().balance).value
        parameters = list(reference.parameters())
        with torch.no_grad():
            gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= lr * gradient
    for name, parameter in _weights(reference).items():
        assert torch.allclose(_weights(model)[name], parameter, atol=1e-6), name


def test_players_move_in_turn_and_each_sees_the_other_moved(tmp_path: Path) -> None:
    model, reference = tiny.mixture(), tiny.mixture()
    method = TurnByTurn()
    tiny.run_training(tmp_path, model, method, epochs=1, optimizer=PLAIN, schedule=Constant())
    again = TurnByTurn()
    for step in range(3):
        batches = {stream: _batches(step + 1, stream)[step] for stream in again.streams}
        for update in again.updates(reference, batches, Rng(derive_seed(0, "step", step))):
            # only this update's loss: what the other player's left behind must not be added
            mine = list(reference.players()[update.player])
            gradients = torch.autograd.grad(update.loss().value, mine, materialize_grads=True)
            with torch.no_grad():
                for parameter, gradient in zip(mine, gradients, strict=True):
                    parameter -= gradient
    for name, parameter in _weights(reference).items():
        assert torch.allclose(_weights(model)[name], parameter, atol=1e-6), name
    assert method.count == [3]
    epoch, *_ = tiny.metrics(tmp_path)
    assert {"router.loss", "experts.loss", "router.load", "experts.accuracy"} <= set(epoch)


class _Picky(ST):
    """Refuses every model."""

    def check(self, model: RoutedModel, num_classes: int) -> None:
        raise InputError("picky trains no model")


def test_a_model_that_the_method_refuses_is_left_alone_and_nothing_is_written(tmp_path: Path) -> None:
    model = tiny.mixture()
    before = _weights(model)
    with pytest.raises(InputError, match="picky trains no model"):
        tiny.run_training(tmp_path, model, _Picky())
    assert not [name for name in ("metrics.jsonl", "checkpoints", "last.safetensors") if (tmp_path / name).exists()]
    assert all(torch.equal(parameter, before[name]) for name, parameter in _weights(model).items())


class _OneMoves(ST):
    """Only `experts` ever move."""

    def updates(self, model: RoutedModel, batches: Mapping[str, LabelledBatch], rng: Rng) -> Iterator[Update]:
        for update in super().updates(model, batches, rng):
            yield update._replace(player="experts")


def test_a_player_that_does_not_move_is_bit_identical(tmp_path: Path) -> None:
    model = tiny.mixture()
    before = _weights(model)
    tiny.run_training(tmp_path, model, _OneMoves(), optimizer=Adam(weight_decay=0.5))
    for name, parameter in _weights(model).items():
        assert torch.equal(parameter, before[name]) is name.startswith("router"), name


@pytest.mark.parametrize(("limit", "length"), [(0.125, 0.125), (1e6, None)])
def test_the_gradient_is_cut_to_clip_norm_over_all_players(tmp_path: Path, limit: float, length: float | None) -> None:
    moved = []
    for name, clip in (("clipped", limit), ("free", None)):
        model = tiny.mixture()
        before = torch.cat([p.flatten() for p in _weights(model).values()])
        reporter = tiny.StopAt(1)
        with pytest.raises(tiny.Stop):
            tiny.run_training(tmp_path / name, model, optimizer=PLAIN, clip_norm=clip, reporter=reporter)
        moved.append(torch.cat([p.flatten() for p in _weights(model).values()]) - before)
    clipped, free = moved
    expected = free if length is None else free * length / free.norm()
    assert torch.allclose(clipped, expected, atol=1e-6)
    assert free.norm() > 0.2


def test_bf16_is_for_training_passes_and_weights_stay_fp32(tmp_path: Path) -> None:
    seen: list[tuple[torch.dtype, bool]] = []

    def look(model: RoutedModel, step: int, loss: Tensor) -> Tensor:
        seen.append((model.routed(torch.rand(2, 1, 8, 8)).logits.dtype, torch.is_autocast_enabled("cpu")))
        return loss

    def validate(model: nn.Module) -> dict[str, float]:
        seen.append((model(torch.rand(2, 1, 8, 8)).dtype, torch.is_autocast_enabled("cpu")))
        return {"accuracy": 0.5, "robust_accuracy": 0.5}

    model = tiny.mixture()
    tiny.run_training(tmp_path, model, Loop(look), epochs=1, precision="bf16", validate=validate)
    assert seen == [(torch.bfloat16, True)] * 3 + [(torch.float32, False)]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    kept = load_latest(tmp_path / "checkpoints")
    assert kept is not None
    assert {tensor.dtype for name, tensor in kept.tensors["optimizer"].items()} == {torch.float32}
    other = tiny.mixture()
    tiny.run_training(tmp_path / "fp32", other, Loop(lambda model, step, loss: loss), epochs=1)
    assert not torch.equal(model.experts[0][2].weight, other.experts[0][2].weight)


class _Twice(ST):
    """The same update two times in a step."""

    def updates(self, model: RoutedModel, batches: Mapping[str, LabelledBatch], rng: Rng) -> Iterator[Update]:
        (update,) = super().updates(model, batches, rng)
        for _ in range(2):
            yield Update(lambda: self.keep(update.loss()))

    def keep(self, loss: Loss) -> Loss:
        LOSSES.append(loss.value.item())
        return loss


LOSSES: list[float] = []


def test_in_bf16_an_update_sees_what_the_one_before_it_moved(tmp_path: Path) -> None:
    LOSSES.clear()
    tiny.run_training(tmp_path, method=_Twice(), epochs=1, optimizer=PLAIN, precision="bf16")
    # a step of length 1 is no rounding error
    assert all(abs(first - second) > 0.01 for first, second in zip(LOSSES[:4:2], LOSSES[1:4:2], strict=True))


def test_the_average_is_what_is_validated_deployed_and_saved(tmp_path: Path) -> None:
    trained: list[dict[str, Tensor]] = []
    validated: list[dict[str, Tensor]] = []
    model = tiny.mixture()
    initial = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    class Watch(tiny.StopAt):
        def progress(self, done: int, total: int, note: str) -> None:
            trained.append({name: tensor.clone() for name, tensor in model.state_dict().items()})

    def validate(deployed: nn.Module) -> dict[str, float]:
        validated.append({name: tensor.clone() for name, tensor in deployed.state_dict().items()})
        return {"accuracy": 0.5, "robust_accuracy": 0.5}

    deployed = tiny.run_training(tmp_path, model, ema_decay=0.3, reporter=Watch(-1), validate=validate)
    expected = dict(initial)
    for step, weights in enumerate(trained):
        decay = min(0.3, (1 + step) / (10 + step))
        expected = {name: decay * expected[name] + (1 - decay) * tensor for name, tensor in weights.items()}
    last, _ = load_tensors(tmp_path / "last.safetensors")
    for name, tensor in expected.items():
        assert torch.allclose(last[name], tensor, atol=1e-6), name
        assert torch.equal(deployed.state_dict()[name], last[name])
        assert torch.equal(validated[-1][name], last[name])
    assert deployed is not model and not deployed.training


def test_before_its_epoch_the_average_is_the_model(tmp_path: Path) -> None:
    kept: list[tuple[bool, Tensor]] = []
    model = tiny.mixture()

    def validate(deployed: nn.Module) -> dict[str, float]:
        weight = deployed.get_parameter("experts.0.2.weight")
        kept.append((torch.equal(weight, model.experts[0][2].weight), weight.clone()))
        return {"accuracy": 0.5, "robust_accuracy": 0.5}

    tiny.run_training(tmp_path, model, epochs=3, ema_decay=0.9, ema_start_epoch=2, validate=validate)
    assert [same for same, _ in kept] == [True, True, False]


@pytest.mark.parametrize(
    ("select", "scores", "best"),
    [
        # (accuracy, robust accuracy) of epochs 1 to 4
        ("robust_accuracy", [(0.1, 0.3), (0.2, 0.5), (0.9, 0.4), (0.9, 0.1)], 2),
        ("accuracy", [(0.1, 0.3), (0.2, 0.5), (0.9, 0.4), (0.9, 0.1)], 3),
        ("robust_accuracy", [(0.1, 0.5), (0.3, 0.5), (0.2, 0.5), (0.3, 0.4)], 2),
        ("robust_accuracy", [(0.3, 0.5), (0.3, 0.5), (0.3, 0.5), (0.3, 0.4)], 3),
    ],
    ids=["robust", "accuracy", "tie: the other number", "tie: the later epoch"],
)
def test_the_best_weights(tmp_path: Path, select: str, scores: list[tuple[float, float]], best: int) -> None:
    snapshots: list[dict[str, Tensor]] = []

    def validate(model: nn.Module) -> dict[str, float]:
        snapshots.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        accuracy, robust = scores[len(snapshots) - 1]
        return {"accuracy": accuracy, "robust_accuracy": robust}

    model = tiny.mixture()
    tiny.run_training(tmp_path, model, epochs=4, select=select, validate=validate)
    tensors, _ = load_tensors(tmp_path / "best.safetensors")
    assert all(torch.equal(tensors[name], tensor) for name, tensor in snapshots[best - 1].items())
    last, _ = load_tensors(tmp_path / "last.safetensors")
    assert all(torch.equal(last[name], tensor) for name, tensor in model.state_dict().items())
    records = [record for record in tiny.metrics(tmp_path) if record["kind"] == "validation"]
    assert [record["epoch"] for record in records] == [1, 2, 3, 4]
    assert [record["accuracy"] for record in records] == [accuracy for accuracy, _ in scores]


def test_when_it_validates_and_what_it_logs(tmp_path: Path) -> None:
    def validate(model: nn.Module) -> dict[str, float]:
        return {"accuracy": 0.5, "robust_accuracy": 0.25, "n": 30}

    tiny.run_training(tmp_path, epochs=5, validate_every=2, validate=validate)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [(record["kind"], record["epoch"]) for record in records] == [
        ("train", 1), ("train", 2), ("validation", 2), ("train", 3), ("train", 4), ("validation", 4), ("train", 5),
        ("validation", 5),
    ]  # fmt: skip
    trained = [record for record in records if record["kind"] == "train"]
    assert [record["step"] for record in trained] == [3, 6, 9, 12, 15]
    assert all(len(record["load"]) == 2 and sum(record["load"]) == pytest.approx(1) for record in trained)
    assert all(0 <= record["accuracy"] <= 1 and record["seconds"] >= 0 for record in trained)
    # a cosine over 15 steps ends at 0
    assert [trained[0]["lr"] > trained[1]["lr"], trained[-1]["lr"]] == [True, 0.0]
    assert records[2] == {"kind": "validation", "epoch": 2, "step": 6, **validate(nn.Identity())}


def test_the_logged_loss_is_the_mean_over_the_epoch(tmp_path: Path) -> None:
    losses: list[float] = []

    def keep(model: RoutedModel, step: int, loss: Tensor) -> Tensor:
        losses.append(loss.item())
        return loss

    tiny.run_training(tmp_path, method=Loop(keep), epochs=2)
    assert [record["loss"] for record in tiny.metrics(tmp_path)] == pytest.approx(
        [sum(losses[:3]) / 3, sum(losses[3:]) / 3]
    )


def test_the_callers_torch_is_as_it_was(tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    model = tiny.mixture()
    torch.manual_seed(3)
    tiny.run_training(tmp_path, model, epochs=1)
    assert torch.equal(torch.rand(3), expected)
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_same_run_twice_is_the_same(tmp_path: Path) -> None:
    for name in ("one", "two"):
        tiny.run_training(tmp_path / name, method=tiny.at(), augment=("translate:1",))
    assert tiny.result(tmp_path / "one") == tiny.result(tmp_path / "two")
    tiny.run_training(tmp_path / "plain", method=tiny.at())
    assert tiny.result(tmp_path / "plain") != tiny.result(tmp_path / "one")


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a Linear is no routed model; .*MixtureOfExperts\(None, \[network\]\)"):
        tiny.run_training(tmp_path / "a", nn.Linear(64, 10))
    with pytest.raises(InputError, match=r"batch_size must be in 1\.\.100"):
        tiny.run_training(tmp_path / "b", batch_size=101)
    with pytest.raises(InputError, match="augment"):
        tiny.run_training(tmp_path / "c", augment=("rotate",))


def test_a_checkpoint_of_another_model_or_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(tiny.Stop):
        tiny.run_training(tmp_path, reporter=tiny.StopAt(4), checkpoint_seconds=0.0)
    with pytest.raises(InputError, match=r"checkpoint in .* is of another model: .*experts\.0\.2\.weight"):
        tiny.run_training(tmp_path, tiny.mixture(expert="small_cnn"))
    log = RunFolder(tmp_path).resolve("metrics.jsonl")
    log.write_bytes(log.read_bytes().replace(b'"epoch":1', b'"epoch":2'))
    with pytest.raises(CorruptError, match="does not match its checkpoint"):
        tiny.run_training(tmp_path)


def test_no_epochs_deploy_the_weights_that_came(tmp_path: Path) -> None:
    def validate(model: nn.Module) -> Mapping[str, float]:
        return {"accuracy": 0.5, "robust_accuracy": 0.25}

    model = tiny.mixture()
    before = tiny.sha256_of(model.state_dict())
    # a second time, as after a kill at the very end
    for _ in range(2):
        tiny.run_training(tmp_path, model, validate=validate, epochs=0)
        (record,) = read_metrics(tmp_path / "metrics.jsonl")
        assert (record["kind"], record["epoch"], record["accuracy"]) == ("validation", 0, 0.5)
        for name in ("best", "last"):
            assert tiny.sha256_of(load_tensors(tmp_path / f"{name}.safetensors")[0]) == before


def test_cross_entropy_goes_down(tmp_path: Path) -> None:
    model = tiny.mixture()
    (batch,) = tiny.digits().train.batches(100)
    before = F.cross_entropy(model(batch.x), batch.y).item()
    tiny.run_training(tmp_path, model, epochs=10, optimizer=Adam(lr=0.01))
    assert F.cross_entropy(model(batch.x), batch.y).item() < 0.5 * before
