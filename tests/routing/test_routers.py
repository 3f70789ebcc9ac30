from __future__ import annotations

import pytest
import torch
from torch import nn

from phalanx.nn import Normalize, spec_of
from phalanx.routing import ROUTERS, LinearRouter, MLPRouter, build_router


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 5, 7)])
def test_scores_for_pixels(name: str, shape: tuple[int, int, int]) -> None:
    router = build_router(name, shape, 5)
    x = torch.rand(4, *shape, requires_grad=True)
    scores = router(x)
    assert scores.shape == (4, 5) and isinstance(router[0], Normalize)
    scores.sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ROUTERS)
def test_the_spec_rebuilds_the_router(name: str) -> None:
    router = build_router(name, (1, 4, 4), 3, mean=[0.1], std=[0.2])
    spec = spec_of(router)
    assert spec is not None and spec.name == f"router.{name}"
    arguments = dict(spec.arguments)
    again = build_router(name, arguments.pop("shape"), arguments.pop("num_experts"), **arguments)
    again.load_state_dict(router.state_dict())
    x = torch.rand(2, 1, 4, 4)
    assert torch.equal(again.eval()(x), router.eval()(x))


def test_linear_by_hand() -> None:
    router = LinearRouter((1, 1, 2), 1, mean=[0.5], std=[0.25])
    nn.init.constant_(router[2].weight, 2.0)
    nn.init.constant_(router[2].bias, 1.0)
    # 2 * ((1 - .5) / .25 + (.25 - .5) / .25) + 1 = 2 * (2 - 1) + 1
    assert router(torch.tensor([[[[1.0, 0.25]]]])).tolist() == [[3.0]]


def test_default_widths_are_those_of_divided_we_fall() -> None:
    widths = [layer.out_features for layer in MLPRouter((3, 32, 32), 9) if isinstance(layer, nn.Linear)]
    assert widths == [1024, 512, 128, 9]


def test_unknown_router() -> None:
    with pytest.raises(ValueError, match="must be one of linear, mlp, cnn, resnet20, lipschitz, got 'transformer'"):
        build_router("transformer", (1, 4, 4), 2)
