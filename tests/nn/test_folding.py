from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm

from phalanx.experts import EXPERTS, build_expert
from phalanx.nn import ConvBN, fold_batchnorm
from phalanx.routing import CNNRouter, MixtureOfExperts


def trained(model: nn.Module, seed: int = 0) -> nn.Module:
    """In float64, with BatchNorm statistics and affine parameters far from their defaults."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.5, generator=generator)
            module.running_var.uniform_(0.3, 3, generator=generator)
            if module.affine:
                nn.init.normal_(module.weight, 0.2, 0.8, generator=generator)
                nn.init.normal_(module.bias, 0, 0.5, generator=generator)
    return model


def value_and_gradient(model: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    out = model(leaf)
    (gradient,) = torch.autograd.grad((out * torch.arange(1.0, out[0].numel() + 1).reshape(out[0].shape)).sum(), leaf)
    return out.detach(), gradient


def assert_same_function(folded: nn.Module | None, model: nn.Module, x: Tensor) -> nn.Module:
    assert folded is not None
    for ours, theirs in zip(value_and_gradient(folded, x), value_and_gradient(model.eval(), x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    return folded


def pixels(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def count(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


LEFT = {
    # a BatchNorm before its convolution has no convolution of its own to be folded into
    "densenet": (3 + 2 + 1, {"depth": 10, "growth": 4}),
    "lipschitz_cnn": (0, {"width": 4, "hidden": 6}),
    "lipschitz_mlp": (0, {"hidden": [6]}),
    "mlp": (0, {"hidden": [5]}),
    "resnet18": (0, {"width": 4}),
    "small_cnn": (0, {"width": 4}),
    "vgg16": (0, {"width": 4}),
    "wrn": (3 + 1, {"depth": 10, "widen": 1}),
}
"""How many BatchNorms folding leaves in each expert, and options that keep it small."""


@pytest.mark.parametrize("name", EXPERTS)
def test_folded_experts_compute_the_same(name: str) -> None:
    left, options = LEFT[name]
    model = trained(build_expert(name, num_classes=5, image_size=16, **options))
    if not count(model, nn.BatchNorm2d):
        assert fold_batchnorm(model) is None
        return
    folded = assert_same_function(fold_batchnorm(model), model, pixels(3, 3, 16, 16))
    assert count(folded, nn.BatchNorm2d) == left


def test_a_mixture_is_folded_router_and_experts() -> None:
    experts = [build_expert("small_cnn", num_classes=4, image_size=8, width=4) for _ in range(3)]
    model = trained(MixtureOfExperts(CNNRouter((3, 8, 8), 3, hidden=(4, 8)), experts))
    x = pixels(16, 3, 8, 8)
    with torch.no_grad():
        model.eval().router[-1].bias -= model.gate(x).scores.mean(0)
    assert len(model.gate(x).experts.unique()) > 1
    folded = assert_same_function(fold_batchnorm(model), model, x)
    assert count(folded, nn.BatchNorm2d) == 0


@pytest.mark.parametrize("affine", [True, False])
def test_linear_and_bare_batchnorms(affine: bool) -> None:
    model = trained(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, affine=affine), nn.ReLU(), nn.Linear(4, 2)))
    folded = assert_same_function(fold_batchnorm(model), model, pixels(5, 6))
    assert count(folded, nn.BatchNorm1d) == 0


def test_the_arithmetic_of_one_pair() -> None:
    pair = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1, eps=0.0))
    with torch.no_grad():
        pair[0].weight.fill_(3)
        pair[0].bias.fill_(1)
        pair[1].weight.fill_(10)
        pair[1].bias.fill_(7)
        pair[1].running_mean.fill_(5)
        pair[1].running_var.fill_(4)
    folded = fold_batchnorm(pair)
    assert folded is not None
    # 10 * (3 x + 1 - 5) / sqrt(4) + 7 = 15 x - 13
    assert float(folded[0].weight) == pytest.approx(15) and float(folded[0].bias) == pytest.approx(-13)


def test_the_model_is_untouched() -> None:
    model = trained(nn.Sequential(ConvBN(2, 3), nn.ReLU(), ConvBN(3, 3)))
    model.train()
    model[0][0].weight.requires_grad_(False)
    state = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    names = [name for name, _ in model.named_modules()]
    folded = fold_batchnorm(model)
    assert folded is not None and not any(m.training for m in folded.modules())
    assert not any(p.requires_grad for p in folded.parameters())
    assert [module.training for module in model.modules()] == modes
    assert [name for name, _ in model.named_modules()] == names
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * 5
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not {id(p) for p in model.parameters()} & {id(p) for p in folded.parameters()}


class Branches(nn.Module):
    """Two chains around whatever is given to both."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + 2 * self.second(x)


def shared_convolution() -> nn.Module:
    conv = nn.Conv2d(2, 2, 3, padding=1)
    return Branches(nn.Sequential(conv, nn.BatchNorm2d(2)), nn.Sequential(conv, nn.BatchNorm2d(2)))


def shared_batchnorm() -> nn.Module:
    norm = nn.BatchNorm2d(2)
    return Branches(nn.Sequential(nn.Conv2d(2, 2, 1), norm), nn.Sequential(nn.ReLU(), norm))


def convolution_twice_in_one_chain() -> nn.Module:
    conv = nn.Conv2d(2, 2, 1)
    return nn.Sequential(conv, nn.BatchNorm2d(2), conv)


def batchnorm_twice_in_one_chain() -> nn.Module:
    norm = nn.BatchNorm2d(2)
    return nn.Sequential(nn.Conv2d(2, 2, 1), norm, nn.ReLU(), norm)


def activation_twice_in_one_chain() -> nn.Module:
    # the chain's own list of children names the activation once, as if the second BatchNorm followed its convolution
    act = nn.ReLU()
    return nn.Sequential(nn.Conv2d(2, 2, 1), act, nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1), act, nn.BatchNorm2d(2))


def batchnorm_before_convolution() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1))


def without_running_statistics() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2, track_running_stats=False))


def hooked(place: int, kind: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))
        getattr(model[place], f"register_{kind}")(lambda module, *tensors: None)
        return model

    return build


class BatchNormAct(nn.BatchNorm2d):
    """As in timm: a BatchNorm that is followed by its activation."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class StandardizedConv(nn.Conv2d):
    """Its output does not grow with its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight / self.weight.norm(), self.bias)


class OwnForward(nn.Sequential):
    """A chain that does more than follow its links."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self[0](x)


def parametrized() -> nn.Module:
    return nn.Sequential(parametrizations.spectral_norm(nn.Conv2d(2, 2, 1)), nn.BatchNorm2d(2))


def spectral() -> nn.Module:
    return nn.Sequential(spectral_norm(nn.Conv2d(2, 2, 1)), nn.BatchNorm2d(2))


@pytest.mark.parametrize(
    "build",
    [
        shared_convolution,
        shared_batchnorm,
        convolution_twice_in_one_chain,
        batchnorm_twice_in_one_chain,
        activation_twice_in_one_chain,
        batchnorm_before_convolution,
        without_running_statistics,
        hooked(0, "forward_hook"),
        hooked(0, "forward_pre_hook"),
        hooked(1, "forward_hook"),
        hooked(1, "forward_pre_hook"),
        lambda: nn.Sequential(nn.Conv2d(2, 2, 1), BatchNormAct(2)),
        lambda: nn.Sequential(StandardizedConv(2, 2, 1), nn.BatchNorm2d(2)),
        lambda: OwnForward(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)),
        parametrized,
        spectral,
        lambda: nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU()),
    ],
)
def test_what_cannot_be_folded_safely_is_not(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    assert fold_batchnorm(trained(build())) is None


def test_unsafe_places_stay_beside_safe_ones() -> None:
    torch.manual_seed(0)
    unsafe = [shared_convolution(), convolution_twice_in_one_chain(), activation_twice_in_one_chain()]
    model = trained(nn.Sequential(ConvBN(2, 2), *unsafe, nn.Sequential(nn.Conv2d(2, 2, 1), BatchNormAct(2))))
    folded = assert_same_function(fold_batchnorm(model), model, pixels(3, 2, 5, 5))
    assert isinstance(folded[0][1], nn.Identity) and count(folded, nn.BatchNorm2d) == count(model, nn.BatchNorm2d) - 1


def test_a_chain_in_two_places_is_still_one_chain() -> None:
    chain = ConvBN(2, 2)
    model = trained(nn.Sequential(chain, nn.ReLU(), chain))
    assert_same_function(fold_batchnorm(model), model, pixels(3, 2, 5, 5))


def test_a_norm_over_another_axis_is_left() -> None:
    # on (B, tokens, features) a BatchNorm1d normalises the tokens, not the linear layer's outputs
    model = trained(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(4)))
    assert fold_batchnorm(model) is None and model.eval()(pixels(2, 4, 6)).shape == (2, 4, 5)


def test_a_model_that_cannot_be_copied_is_not_folded() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))
    model.cache = model[0](torch.ones(1, 2, 3, 3))  # not a leaf of the graph: deepcopy refuses
    assert fold_batchnorm(model) is None


def test_a_relu_overwrites_only_what_nobody_else_sees() -> None:
    shared = nn.ReLU()
    model = nn.Sequential(
        ConvBN(1, 2), nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), shared, nn.BatchNorm2d(2), shared
    )
    folded = fold_batchnorm(model.eval())
    assert folded is not None
    relus = [module for module in folded.modules() if isinstance(module, nn.ReLU)]
    assert [relu.inplace for relu in relus] == [True, False] and not model[3].inplace
    x = torch.rand(2, 1, 4, 4)
    torch.testing.assert_close(folded(x), model(x))
