"""What a forward pass costs: the multiply-adds that it executes, and the parameters that it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

T = TypeVar("T")


@contextmanager
def _unfused_attention() -> Iterator[None]:
    """Torch's fused inference path of attention layers off: its operators have no count, so they would cost nothing."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def macs(function: Callable[[], T]) -> tuple[T, int]:
    """What `function` returns, and the multiply-adds that it executed.

    Those of convolutions, at every position of the output, padding included, and of matrix products, attention's among
    them: half of what torch's flop counter says. Biases, normalisation, activations and pooling are free, as in the
    literature's tables, many of which call a multiply-add a FLOP.
    """
    with _unfused_attention(), FlopCounterMode(display=False) as counter:
        result = function()
    return result, counter.get_total_flops() // 2


class ReadParameters(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, notes which elements of a module's parameters are computed with.

    A view computes nothing: of a weight that holds the slices of several experts only those slices count that an
    operator was given. A copy (indexing by a tensor) reads all that it is made from.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._parameters = list(module.parameters())
        self._read = {_storage(p): torch.zeros(_elements(p), dtype=torch.bool) for p in self._parameters}

    @property
    def count(self) -> int:
        """How many elements were read so far, each counted once."""
        return sum(int(self._part(parameter).sum()) for parameter in self._parameters)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not func.is_view:
            for given in tree_leaves((args, kwargs)):
                if isinstance(given, Tensor) and _storage(given) in self._read:
                    self._part(given).fill_(True)
        return func(*args, **kwargs)

    def _part(self, tensor: Tensor) -> Tensor:
        """The marks of a parameter's elements, or of those of a view of it, in the shape of `tensor`."""
        return self._read[_storage(tensor)].as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _elements(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes() // tensor.element_size()
