from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from phalanx.nn import ConvBN, fold_batchnorm
from phalanx.nn.flops import ReadParameters, macs


def _macs(function: Callable[[], Tensor]) -> int:
    with torch.no_grad():
        return macs(function)[1]


X = torch.rand(2, 4, 8, 8)
CONVOLUTION = 2 * 6 * 8 * 8 * 4 * 9


@pytest.mark.parametrize(
    ("layer", "x", "expected"),
    [
        (nn.Conv2d(4, 6, 3, padding=1), X, CONVOLUTION),
        (nn.Conv2d(4, 6, 3, padding=1, stride=2), X, CONVOLUTION // 4),
        (nn.Conv2d(4, 6, 3, padding=1, groups=2), X, CONVOLUTION // 2),
        (nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), X, 2 * 4 * 8 * 8 * 9),
        (nn.Linear(8, 5), X, 2 * 4 * 8 * 8 * 5),
        (nn.Linear(8, 5, bias=False), X[0, 0], 8 * 8 * 5),
        (nn.BatchNorm2d(4), X, 0),
        (nn.Sequential(nn.ReLU(), nn.AvgPool2d(2)), X, 0),
    ],
    ids=["padded", "strided", "grouped", "depthwise", "linear on a map", "linear", "batch norm", "free layers"],
)
def test_multiply_adds_of_a_layer(layer: nn.Module, x: Tensor, expected: int) -> None:
    assert _macs(lambda: layer.eval()(x)) == expected
    assert _macs(lambda: layer.double()(x.double())) == expected


def test_the_answer_comes_with_them() -> None:
    layer = nn.Linear(8, 5)
    answer, _ = macs(lambda: layer(X))
    torch.testing.assert_close(answer, layer(X), rtol=0, atol=0)


def test_fused_attention_is_counted_as_what_it_computes() -> None:
    tokens, width, hidden = 5, 16, 32
    layer = nn.TransformerEncoderLayer(width, 4, hidden, batch_first=True).eval()
    one = 4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * hidden
    torch.backends.mha.set_fastpath_enabled(True)
    assert _macs(lambda: layer(torch.rand(3, tokens, width))) == 3 * one
    assert torch.backends.mha.get_fastpath_enabled()


def test_folding_and_checkpointing_change_no_count() -> None:
    network = nn.Sequential(ConvBN(4, 6), nn.ReLU(), ConvBN(6, 6, stride=2)).eval()
    folded = fold_batchnorm(network)
    assert folded is not None
    again = _macs(lambda: torch.utils.checkpoint.checkpoint(network, X, use_reentrant=False))  # type: ignore[arg-type]
    assert _macs(lambda: network(X)) == _macs(lambda: folded(X)) == again == CONVOLUTION + 2 * 6 * 4 * 4 * 6 * 9


# -- parameters ----------------------------------------------------------------------------------------------------


class Stacked(nn.Module):
    """The weights of 3 experts in one parameter, and one that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(6, 4))
        self.idle = nn.Parameter(torch.rand(7))

    def forward(self, x: Tensor, expert: int) -> Tensor:
        return F.linear(x, self.weight.unflatten(0, (3, 2))[expert])


def _read(model: nn.Module, *passes: tuple[object, ...]) -> int:
    with torch.no_grad(), ReadParameters(model) as read:
        for arguments in passes:
            model(*arguments)
    return read.count


def test_a_parameter_counts_once_and_only_if_it_is_read() -> None:
    x = torch.rand(2, 4)
    network = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2, bias=False))
    assert _read(network) == 0
    assert _read(network, (x,), (x,)) == 4 * 3 + 3 + 3 * 2
    assert _read(network[0], (x,)) == 4 * 3 + 3


def test_of_stacked_weights_the_slices_that_are_used() -> None:
    x = torch.rand(2, 4)
    assert _read(Stacked(), (x, 1)) == 8
    assert _read(Stacked(), (x, 1), (x, 1)) == 8
    assert _read(Stacked(), (x, 1), (x, 2)) == 16


def test_batchnorm_reads_its_scale_and_shift_but_statistics_are_no_parameters() -> None:
    assert _read(ConvBN(4, 6).eval(), (X,)) == 4 * 6 * 9 + 2 * 6


def test_tied_layers_and_parameters_in_one_storage() -> None:
    tied = nn.Linear(4, 4)
    assert _read(nn.Sequential(tied, tied), (torch.rand(1, 4),)) == 20
    flat = torch.rand(20)
    tied.weight, tied.bias = nn.Parameter(flat[:16].view(4, 4)), nn.Parameter(flat[16:])
    assert tied.weight.untyped_storage().data_ptr() == tied.bias.untyped_storage().data_ptr()
    assert _read(tied, (torch.rand(1, 4),)) == 20
