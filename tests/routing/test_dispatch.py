from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from routing_samples import SHAPE, Kernels, Waits, gradients, images, small_mixture, small_network
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from phalanx.experts import build_expert
from phalanx.nn import frozen
from phalanx.routing import LinearRouter, MixtureOfExperts, Route, dense, only
from phalanx.routing.dispatch import MIN_BATCHNORM_GROUP, dispatch
from reference.mixture import mixture_logits


def with_route(experts: list[int], num_experts: int, weights: Tensor | None = None) -> Route:
    chosen = torch.tensor(experts)[:, None]
    ones = torch.ones(len(experts), 1, dtype=torch.float64) if weights is None else weights
    return Route(torch.zeros(len(experts), num_experts, dtype=torch.float64), chosen, ones)


@pytest.mark.parametrize(("experts", "top_k"), [(e, k) for e in range(1, 9) for k in range(1, e + 1)])
@pytest.mark.parametrize("size", [1, 13])
def test_equals_the_loop_in_value_and_gradient(experts: int, top_k: int, size: int) -> None:
    # 13 images leave some of 8 experts without work
    model, x = small_mixture(experts, top_k, seed=experts), images(size, seed=top_k)
    router = model.router or nn.Sequential(nn.Flatten(), nn.Linear(16, 1).double())
    logits, found = gradients(model, model, x)
    expected, wanted = gradients(lambda x: mixture_logits(router, [*model.experts], x, top_k), model, x)
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_temperature_reaches_weights_and_gradients(top_k: int) -> None:
    model, x = small_mixture(4, top_k, temperature=0.3), images(9)
    logits, found = gradients(model, model, x)
    assert model.router is not None
    reference = lambda x: mixture_logits(model.router, [*model.experts], x, top_k, temperature=0.3)  # noqa: E731
    expected, wanted = gradients(reference, model, x)
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_by_hand() -> None:
    # expert e answers (e + 1) * x: images 1, 2, 3 to experts 2, 0, 2 with weights 1, .5, 2
    experts = [nn.Linear(1, 1, bias=False).double() for _ in range(3)]
    for factor, expert in enumerate(experts, start=1):
        nn.init.constant_(expert.weight, factor)
    x = torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)
    out = dispatch(experts, x, with_route([2, 0, 2], 3, torch.tensor([[1.0], [0.5], [2.0]]).double()))
    assert out.tolist() == [[3.0], [1.0], [18.0]]


def test_order_of_the_selected_experts_does_not_matter() -> None:
    experts = [small_network().double() for _ in range(3)]
    x, weights = images(5), torch.rand(5, 2, dtype=torch.float64)
    chosen = torch.tensor([[0, 2], [2, 1], [1, 0], [0, 1], [2, 0]])
    one = dispatch(experts, x, Route(torch.zeros(5, 3), chosen, weights))
    other = dispatch(experts, x, Route(torch.zeros(5, 3), chosen.flip(1), weights.flip(1)))
    torch.testing.assert_close(one, other, rtol=1e-14, atol=1e-14)


def test_each_expert_runs_once_on_its_own_images() -> None:
    seen: dict[int, list[list[float]]] = {}

    class Recorder(nn.Module):
        def __init__(self, number: int) -> None:
            super().__init__()
            self.number = number

        def forward(self, x: Tensor) -> Tensor:
            seen.setdefault(self.number, []).append(x[:, 0].tolist())
            return x

    x = torch.arange(5.0, dtype=torch.float64)[:, None]
    dispatch([Recorder(e) for e in range(4)], x, with_route([3, 0, 3, 1, 0], 4))
    assert seen == {0: [[1.0, 4.0]], 1: [[3.0]], 3: [[0.0, 2.0]]}


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (4, 1), (4, 2), (4, 4)])
def test_an_empty_batch(experts: int, top_k: int) -> None:
    model = small_mixture(experts, top_k)
    assert model(images(0)).shape == (0, 3)
    assert model.train()(images(0)).shape == (0, 3)


def batchnorm_mixture(experts: int) -> MixtureOfExperts:
    networks = [nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 3)) for _ in range(experts)]
    return MixtureOfExperts(LinearRouter(SHAPE, experts), networks).double()


@pytest.mark.parametrize("size", [1, MIN_BATCHNORM_GROUP - 1])
def test_small_groups_use_running_statistics_and_leave_them(size: int) -> None:
    model = batchnorm_mixture(2).train()
    norm = model.experts[1][1]
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    x = images(size + 10)
    out = model.routed(x, with_route([1] * size + [0] * 10, 2)).logits
    torch.testing.assert_close(out[:size], model.experts[1].eval()(x[:size]))
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    # the other group is large enough: it has moved its statistics, once
    assert int(model.experts[0][1].num_batches_tracked) == 1
    assert norm.training is False and model.experts[0][1].training


def test_groups_of_eight_are_normalised_by_themselves() -> None:
    model = batchnorm_mixture(2).train()
    x = images(MIN_BATCHNORM_GROUP + 1)
    out = model.routed(x, with_route([1] * MIN_BATCHNORM_GROUP + [0], 2)).logits
    norm, linear = model.experts[1][1], model.experts[1][2]
    flat = x[:MIN_BATCHNORM_GROUP].flatten(1)
    expected = linear((flat - flat.mean(0)) / (flat.var(0, unbiased=False) + norm.eps).sqrt())
    torch.testing.assert_close(out[:MIN_BATCHNORM_GROUP], expected)
    assert int(norm.num_batches_tracked) == 1 and model.experts[0][1].num_batches_tracked == 0
    # the borrowed mode is given back, also to a norm that was frozen by its owner
    assert all(module.training for module in model.modules())
    norm.eval()
    model.routed(x[:3], with_route([1] * 3, 2))
    assert norm.training is False


def test_a_failing_expert_gives_its_mode_back() -> None:
    model = batchnorm_mixture(2).train()
    with pytest.raises(RuntimeError):
        model.routed(images(3, shape=(1, 3, 3)), with_route([0, 1, 1], 2))
    assert all(module.training for module in model.modules())


# -- experts that run again in the backward pass -------------------------------------------------------------------


def noisy_network() -> nn.Module:
    """BatchNorm, which remembers, one of its kinds by counting its passes; and dropout, which draws."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(16, 32),
        nn.BatchNorm1d(32, momentum=None),
        nn.Dropout(0.4),
        nn.Tanh(),
        nn.BatchNorm1d(32),
        nn.Linear(32, 3),
    )


def noisy_mixture(experts: int, top_k: int, checkpoint: bool) -> MixtureOfExperts:
    torch.manual_seed(3)
    router = LinearRouter(SHAPE, experts) if experts > 1 else None
    networks = [noisy_network() for _ in range(experts)]
    return MixtureOfExperts(router, networks, top_k, checkpoint=checkpoint).double().train()


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (4, 4), (4, 1), (4, 2)])
@pytest.mark.parametrize("size", [5, 40])
def test_running_again_changes_neither_gradients_nor_statistics_nor_draws(experts: int, top_k: int, size: int) -> None:
    # groups of 5 use running statistics, most of those of 40 their own
    x, results = images(size), []
    for checkpoint in (False, True):
        model = noisy_mixture(experts, top_k, checkpoint)
        norms = {id(module): module for module in model.modules() if isinstance(module, nn.BatchNorm1d)}
        buffers = dict(model.named_buffers())
        torch.manual_seed(7)
        logits, found = gradients(model, model, x)
        after = torch.rand(())
        assert all(buffer is dict(model.named_buffers())[name] for name, buffer in buffers.items())
        counted = [int(norm.num_batches_tracked) for norm in norms.values()]
        results.append(([logits, *found, *buffers.values(), after], counted))
    (plain, counted), (again, counted_again) = results
    for ours, theirs in zip(again, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert counted_again == counted and set(counted) <= {0, 1}
    assert (1 in counted) is (size == 40)


class LiveBytes(TorchDispatchMode):
    """The largest sum of bytes of the tensors that were made inside and alive at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for storage in {t.untyped_storage() for t in tree_leaves(out) if isinstance(t, Tensor)} - set(self.known):
            self.known.add(storage)
            self.live += storage.nbytes()
            weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out

    def _freed(self, size: int) -> None:
        self.live -= size


def resnets(experts: int, top_k: int | str, **options: Any) -> MixtureOfExperts:
    torch.manual_seed(0)
    networks = [build_expert("resnet18", num_classes=4, image_size=8, width=2) for _ in range(experts)]
    return MixtureOfExperts(LinearRouter((3, 8, 8), experts), networks, top_k, **options)


def peak(model: MixtureOfExperts, x: Tensor) -> int:
    with LiveBytes() as bytes_:
        model(x).sum().backward()
    return bytes_.peak


def test_running_again_keeps_the_activations_of_one_expert() -> None:
    x = torch.rand(64, 3, 8, 8)
    plain, recomputed = (peak(resnets(9, "all", checkpoint=checkpoint).train(), x) for checkpoint in (False, True))
    # the activations of one, and the gradients of all nine
    assert recomputed < plain / 3


def test_what_needs_no_memory_does_not_run_again() -> None:
    calls: list[str] = []

    class Recorder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def forward(self, x: Tensor) -> Tensor:
            calls.append("run")
            return self.layer(x).tanh()

    x, route = torch.rand(9, 1, requires_grad=True), with_route([0] * 9, 1)
    expert = Recorder()

    def runs(*, training: bool, gradient: bool) -> int:
        calls.clear()
        expert.train(training)
        with torch.set_grad_enabled(gradient):
            out = dispatch([expert], x, route, checkpoint=True)
        if gradient:
            out.sum().backward()
        return len(calls)

    assert runs(training=True, gradient=True) == 2
    assert runs(training=True, gradient=False) == 1
    # an attack: evaluation mode, gradients of the images
    assert runs(training=False, gradient=True) == 1


def test_dense_and_only_routes_run_through_the_same_door() -> None:
    model, x = small_mixture(3), images(6)
    outputs = torch.stack([expert(x) for expert in model.experts], 1)
    soft = model.gate(x).scores.softmax(-1)
    torch.testing.assert_close(model.routed(x, dense(model.gate(x))).logits, (soft[..., None] * outputs).sum(1))
    for j in range(3):
        torch.testing.assert_close(model.routed(x, only(model.gate(x), j)).logits, outputs[:, j])


@pytest.mark.parametrize("experts", [2, 4])
def test_kernels_do_not_grow_with_the_batch(experts: int) -> None:
    networks = [build_expert("resnet18", num_classes=4, image_size=8, width=2) for _ in range(experts)]
    model = MixtureOfExperts(LinearRouter((3, 8, 8), experts), networks).eval()
    totals = {}
    for size in (4, 64, 256):
        x = torch.rand(size, 3, 8, 8, requires_grad=True)
        # a route that uses every expert, with the gate's own cost: the loop over images would be 160 kernels for each
        with frozen(model), Kernels() as kernels:
            route = model.gate(x)
            forced = Route(route.scores, torch.arange(size)[:, None] % experts, route.weights)
            torch.autograd.grad(model.routed(x, forced).logits.sum(), x)
        totals[size] = kernels.counts.total()
    assert len(set(totals.values())) == 1, totals
    assert totals[4] <= 165 * experts + 50


@pytest.mark.parametrize(("experts", "top_k", "waits"), [(4, 1, 1), (4, 2, 1), (4, 4, 0), (1, 1, 0)])
def test_the_host_waits_once_in_a_forward_pass(experts: int, top_k: int, waits: int) -> None:
    model = small_mixture(experts, top_k)
    x = images(12)
    with Waits() as seen:
        model(x)
    assert seen.calls == ["tolist"] * waits


def test_the_counter_of_waits_counts() -> None:
    x = images(2)
    with Waits() as seen:
        x.sum().item()
        x.flatten()[x.flatten() > 0.5]
        if x.sum() > 0:
            x.long().flatten().bincount()
    assert seen.calls == ["item", "__getitem__", "__bool__", "bincount"]
