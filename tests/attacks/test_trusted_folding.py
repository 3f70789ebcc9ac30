"""A folded copy that answers otherwise than the model is not searched on, and training folds only what is certain."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from phalanx.attacks import PGD
from phalanx.attacks.target import Target
from phalanx.attacks.tracker import Found
from phalanx.experts import build_expert
from phalanx.experts.build import EXPERTS
from phalanx.nn import LipschitzConv2d, folds_certainly
from phalanx.nn import lipschitz as layers
from phalanx.rng import SampleRng
from phalanx.routing import MixtureOfExperts


class _Indexing(nn.Module):
    """Uses a chain's parts out of order: ReLU between convolution and BatchNorm."""

    def __init__(self, channels: int = 1, classes: int = 3, size: int = 8) -> None:
        super().__init__()
        self.parts = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4 * (size - 2) ** 2, classes)

    def forward(self, x: Tensor) -> Tensor:
        conv, norm, relu = self.parts
        out: Tensor = self.head(norm(relu(conv(x))).flatten(1))
        return out


def indexing_factory(num_classes: int, image_size: int, channels: int) -> nn.Module:
    return _Indexing(channels, num_classes, image_size)


def _seen(model: nn.Module) -> nn.Module:
    """In evaluation mode, with statistics of data."""
    for _ in range(5):
        model.train()(torch.rand(32, 1, 8, 8))
    return model.eval()


def _expert(name: str) -> nn.Module:
    torch.manual_seed(0)
    return _seen(build_expert(name, num_classes=3, image_size=8, channels=1))


def _built() -> nn.Module:
    """With a spec, as every model of `build_expert`."""
    return _expert(f"{__name__}:indexing_factory")


MODELS = {
    "by hand": lambda: _seen(_Indexing()),
    "by a factory": _built,
    "an expert by a factory": lambda: MixtureOfExperts(None, [_built()]).eval(),
}


class Spy(PGD):
    """Says what it was given to search on."""

    seen: list[Target] = []  # noqa: RUF012

    def perturb(self, target: Target, rng: SampleRng) -> Found:
        self.seen.append(target)
        return super().perturb(target, rng)


@pytest.mark.parametrize("call", ["run", "search", "__call__"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_module_that_indexes_into_a_chain_is_searched_as_it_is(kind: str, call: str) -> None:
    torch.manual_seed(0)
    model, x = MODELS[kind](), torch.rand(8, 1, 8, 8)
    Spy.seen.clear()
    getattr(Spy(eps=0.1, steps=2), call)(model, x, model(x).argmax(-1))
    assert [target.search for target in Spy.seen] == [model]


def test_a_plain_chain_is_folded_where_a_verdict_compares_and_not_in_training() -> None:
    torch.manual_seed(0)
    model = _seen(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)))
    x = torch.rand(4, 1, 8, 8)
    y = model(x).argmax(-1)
    Spy.seen.clear()
    Spy(eps=0.1, steps=1).run(model, x, y)
    Spy(eps=0.1, steps=1).search(model, x, y)
    judged, trained = (target.search for target in Spy.seen)
    assert judged is not model and trained is model and not folds_certainly(model)


def test_our_own_networks_are_folded_in_training_without_a_pass_of_the_model() -> None:
    model, x = _expert("small_cnn"), torch.rand(2, 1, 8, 8)
    passes: list[nn.Module] = []
    model.register_forward_hook(lambda module, x, out: passes.append(module))
    Spy.seen.clear()
    Spy(eps=0.1, steps=2).search(model, x, torch.tensor([0, 1]))
    copy = Spy.seen[0].search
    assert passes == [copy, copy] and copy is not model
    assert isinstance(copy, nn.Module) and not any(isinstance(part, nn.BatchNorm2d) for part in copy.modules())


def test_every_builder_of_ours_folds_certainly() -> None:
    for name in EXPERTS:
        torch.manual_seed(0)
        assert folds_certainly(build_expert(name, num_classes=3, image_size=32)), name


def test_constrained_weights_are_made_once_for_an_attack(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    real = layers.almost_orthogonal
    monkeypatch.setattr(layers, "almost_orthogonal", lambda kernel: made.append(1) or real(kernel))
    torch.manual_seed(0)
    model = nn.Sequential(LipschitzConv2d(1, 4, 3, patches=False), nn.Flatten(), nn.Linear(256, 3))
    x, raw = torch.rand(4, 1, 8, 8), model[0].raw.clone()
    y = model(x).argmax(-1)
    found = {}
    for call in ("run", "search"):
        made.clear()
        found[call] = getattr(PGD(eps=0.01, steps=3), call)(model, x, y).x_adv
        assert made == [1]
    assert torch.equal(model[0].raw, raw) and model[0].raw.requires_grad and not model[0].prepared
    made.clear()
    without = PGD(eps=0.01, steps=3).search(lambda x: model(x), x, y).x_adv
    assert len(made) == 3 and torch.equal(without, found["search"])
