from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from phalanx.nn import exact_fp32, frozen, frozen_except, preserved_rng

BACKENDS: Any = torch.backends


def partly_frozen() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Sequential(nn.Dropout(), nn.BatchNorm2d(2)))
    model.train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model[2][1].bias.requires_grad_(False)
    return model


def flags(model: nn.Module) -> list[bool]:
    return [m.training for m in model.modules()] + [p.requires_grad for p in model.parameters()]


def test_a_partly_frozen_model_comes_back_partly_frozen() -> None:
    model = partly_frozen()
    before = flags(model)
    with frozen(model):
        assert not any(flags(model))
    assert flags(model) == before == [True, True, False, True, True, True, False, True, True, True, True, False]


def test_an_exception_restores_as_well() -> None:
    model = partly_frozen()
    before = flags(model)
    with pytest.raises(KeyError), frozen(model):
        raise KeyError("in the middle of an attack")
    assert flags(model) == before


def test_contexts_nest() -> None:
    model = partly_frozen()
    before = flags(model)
    with frozen(model):
        with frozen(model):
            pass
        assert not any(flags(model))
    assert flags(model) == before


def test_gradients_and_batchnorm_statistics_are_left_alone() -> None:
    model = partly_frozen()
    x = torch.rand(4, 1, 6, 6, requires_grad=True)
    model(x).square().sum().backward()
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    statistics = {name: value.clone() for name, value in model.state_dict().items()}
    with frozen(model):
        torch.autograd.grad(model(x).sum(), x)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(parameter.grad, gradient)
    assert all(torch.equal(value, statistics[name]) for name, value in model.state_dict().items())


def two_players() -> nn.Module:
    """A network of two parts with dropout between them; the second has a frozen part of its own."""
    second = nn.Sequential(nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2), nn.Dropout()), nn.BatchNorm2d(2))
    second[1].eval().requires_grad_(False)
    first = nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 2, 3), nn.Dropout())
    return nn.ModuleDict({"first": first, "between": nn.Dropout(), "second": second})


@pytest.mark.parametrize(("player", "other"), [("first", "second"), ("second", "first")])
def test_one_player_stays_as_it_is_and_all_else_is_frozen(player: str, other: str) -> None:
    model = two_players()
    before, own = flags(model), flags(model[player])
    with frozen_except(model, model[player].parameters()):
        assert flags(model[player]) == own and any(own)
        assert not any(flags(model[other])) and not model.training and not model["between"].training
    assert flags(model) == before


def test_a_module_with_one_foreign_parameter_is_frozen_but_not_all_in_it() -> None:
    model = partly_frozen()
    # the convolution's bias and the inner BatchNorm, but not the convolution's weight
    moving = [model[0].bias, *model[2].parameters()]
    with frozen_except(model, moving):
        assert [m.training for m in model.modules()] == [False, False, False, True, True, True]
        assert [p.requires_grad for p in model.parameters()] == [False, True, False, False, True, False]


def test_nobody_moving_is_frozen_and_everybody_is_not() -> None:
    model = two_players()
    before = flags(model)
    with frozen_except(model, ()):
        assert not any(flags(model))
    with frozen_except(model, model.parameters()):
        assert flags(model) == before


def test_the_others_statistics_and_gradients_are_left_alone() -> None:
    model = two_players()
    x = torch.rand(4, 1, 6, 6)
    statistics = {name: value.clone() for name, value in model.state_dict().items()}
    with frozen_except(model, model["second"].parameters()):
        out = model["second"](model["between"](model["first"](x)))
    out.square().sum().backward()
    assert all(p.grad is None for p in model["first"].parameters())
    assert all(p.grad is not None for p in model["second"][0][0].parameters())
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, statistics[name])}
    assert moved == {f"second.0.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}


def test_a_plain_callable_is_left_alone() -> None:
    def model(x: Tensor) -> Tensor:
        return x

    with frozen(model):
        pass


@pytest.mark.parametrize("error", [None, RuntimeError])
def test_global_random_state_is_given_back(error: type[Exception] | None) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    try:
        with preserved_rng():
            torch.manual_seed(99)
            torch.rand(7)
            if error is not None:
                raise error
    except RuntimeError:
        pass
    assert torch.equal(torch.rand(4), expected)


def precisions() -> list[str]:
    parts = [BACKENDS.cuda.matmul, BACKENDS.cudnn.conv, BACKENDS.cudnn.rnn]
    parts += [BACKENDS.mkldnn.matmul, BACKENDS.mkldnn.conv, BACKENDS.mkldnn.rnn]
    return [part.fp32_precision for part in parts]


@pytest.fixture
def restored_precisions() -> Any:
    yield
    BACKENDS.cuda.matmul.allow_tf32 = False
    BACKENDS.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("highest")
    BACKENDS.fp32_precision = "none"


def older_flags() -> None:
    BACKENDS.cuda.matmul.allow_tf32 = True


def newer_setting() -> None:
    BACKENDS.cuda.matmul.fp32_precision = "tf32"


def everywhere() -> None:
    BACKENDS.fp32_precision = "tf32"


def bf16_on_the_cpu() -> None:
    torch.set_float32_matmul_precision("medium")


@pytest.mark.parametrize("setting", [None, older_flags, newer_setting, everywhere, bf16_on_the_cpu])
@pytest.mark.usefixtures("restored_precisions")
def test_fp32_is_exact_whatever_the_caller_set(setting: Callable[[], None] | None) -> None:
    if setting is not None:
        setting()
    before = precisions()
    with pytest.raises(KeyError), exact_fp32():
        assert set(precisions()) == {"ieee"}
        raise KeyError
    assert precisions() == before


def test_autocast_is_off_inside() -> None:
    a = torch.ones(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
        with exact_fp32():
            assert (a @ a).dtype == torch.float32
        assert (a @ a).dtype == torch.bfloat16
