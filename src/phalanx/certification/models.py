"""From a model to what a certificate can be searched for, or to the reason why it has none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn

from phalanx.bounds import Dense
from phalanx.bounds.stages import Shape
from phalanx.certification.dual import Combined
from phalanx.certification.moe import Cells, Certifiable, Mixture
from phalanx.certification.networks import Network, rounding
from phalanx.certification.reach import Reachable
from phalanx.errors import InputError
from phalanx.routing import (
    AdaptiveSmoothing,
    DualModel,
    Ensemble,
    LayerMixture,
    MixedNUTS,
    MixtureOfExperts,
    RobustRouter,
    RoutedLayers,
    RoutedModel,
    SynergyOfExperts,
    UniformRouter,
)
from phalanx.routing.robust_router import CENTRE
from phalanx.threat import Norm

_LAYERED = (
    "its layers are routed one by one, and every layer's choice depends on the one before: no bound of a model-level "
    "mixture holds for it"
)
_REASONS: dict[type, str] = {
    LayerMixture: _LAYERED,
    RoutedLayers: _LAYERED,
    SynergyOfExperts: "its experts' own confidence chooses among them, and no bound of that is known",
    AdaptiveSmoothing: "its halves' weight depends on their features, and no bound of that is known",
    MixedNUTS: "its robust half's logits are transformed, and no bound of that is known",
}


class Read(NamedTuple):
    """A model as it is certified."""

    model: Certifiable
    notes: tuple[str, ...]
    """What is treated as unknown, and why."""


@dataclass(frozen=True, eq=False)
class Reader:
    """How a model is read."""

    shape: Shape
    """Of its images."""
    norm: Norm
    reachable: Reachable = "pairwise"
    """The rule for when a top-1 gate can reach an expert."""
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    """(C, C) by a network's path, where they are known already."""

    def network(self, module: nn.Module, where: str) -> Network:
        """Raises InputError naming a layer that no bound is known for."""
        return Network.read(module, self.shape, self.norm, where, self.constants.get(where))


def read_model(model: nn.Module, reader: Reader) -> Read:
    """A mixture, a dual model, an ensemble or a single network on images (*shape), in evaluation mode.

    The standard half of a dual model that averages probabilities may be anything: one that no bound is known for counts
    as if it were always wrong, and must answer with numbers in the whole ball. Raises InputError for any other model
    that no bound is known for, naming the layer and its path or the reason, for what is no network at all, and for the
    exact rule where no gate is one that it is known for.
    """
    if not isinstance(model, nn.Module):
        raise InputError(
            f"only networks whose layers can be read are certified, got a {type(model).__name__}; certify_smoothed "
            "takes any callable"
        )
    if model.training:
        raise InputError("the model is in training mode, where an answer depends on the rest of the batch; eval() it")
    if model._forward_hooks or model._forward_pre_hooks:
        raise InputError("the model has a forward hook, which may change what it computes; remove it")
    read = _read(model, reader)
    if reader.reachable == "exact" and not any(mixture.reachable == "exact" for mixture in read.model.mixtures):
        raise InputError(
            "the exact reachable rule is for top-1 gates behind a linear or a tree router, and this model has none; "
            "use pairwise"
        )
    return read


def _read(model: nn.Module, reader: Reader) -> Read:
    if type(model) is DualModel:
        return _dual(model, reader)
    if type(model) is Ensemble:
        members = [_mixture(part, reader, f"members.{i}") for i, part in enumerate(model.members)]
        names = tuple(f"member {i}" for i in range(len(members)))
        weights = (1 / len(members),) * len(members)
        allowed = max(rounding(network.module) for member in members for network in member.experts)
        return Read(Combined(tuple(members), weights, model.mix, names, allowed), ())
    return Read(_mixture(model, reader, ""), ())


def _dual(model: DualModel, reader: Reader) -> Read:
    assert isinstance(model.standard, nn.Module) and isinstance(model.robust, nn.Module)
    if model.alpha in (0, 1):
        # the other half does not count
        half, name = (model.robust, "robust") if model.alpha else (model.standard, "standard")
        return Read(_mixture(half, reader, name), ())
    notes: tuple[str, ...] = ()
    standard: Mixture | None
    try:
        standard = _mixture(model.standard, reader, "standard")
    except InputError as error:
        if model.mix == "logits":
            raise
        standard, notes = None, (f"the standard half counts as if it were always wrong: {error}",)
    robust = _mixture(model.robust, reader, "robust")
    names = ("the standard half", "the robust half")
    weights, allowed = (1 - model.alpha, model.alpha), max(rounding(model.standard), rounding(model.robust))
    return Read(Combined((standard, robust), weights, model.mix, names, allowed), notes)


def _mixture(model: object, reader: Reader, where: str) -> Mixture:
    assert isinstance(model, nn.Module)
    if type(model) is not MixtureOfExperts:
        _refuse_routed(model, where)
        return Mixture((reader.network(model, where),), None, 1, 1.0)
    # one hook on the mixture itself could change everything that follows
    if model.training or model._forward_hooks or model._forward_pre_hooks:
        raise InputError(
            f"{where or 'the mixture'} is in training mode or has a forward hook; eval() it, remove the hook"
        )
    prefix = f"{where}." if where else ""
    experts = tuple(reader.network(expert, f"{prefix}experts.{index}") for index, expert in enumerate(model.experts))
    router = _router(model, reader, f"{prefix}router")
    # the rule asks when one expert scores most, in terms that are linear in the pixels
    linear = isinstance(router, Cells) or (router is not None and router.linear is not None)
    reachable = reader.reachable if linear and model.top_k == 1 else "pairwise"
    return Mixture(experts, router, model.top_k, model.temperature, reachable)


def _refuse_routed(model: nn.Module, where: str) -> None:
    for kind, reason in _REASONS.items():
        if isinstance(model, kind):
            raise InputError(f"{where or 'the model'} is a {type(model).__name__}: {reason}; use randomised smoothing")
    if isinstance(model, RoutedModel):
        raise InputError(
            f"{where or 'the model'} is a {type(model).__name__}, whose way of routing no bound is known for; a "
            "MixtureOfExperts, DualModel, Ensemble or a single network can be certified"
        )


def _router(model: MixtureOfExperts, reader: Reader, where: str) -> Network | Cells | None:
    router = model.router
    if router is None or type(router) is UniformRouter:
        return None
    if type(router) is not RobustRouter:
        return reader.network(router, where)
    if router.layout == "flat":
        weight, bias = router.linear.weight.detach().double(), router.linear.bias.detach().double()
        stage = Dense(weight, bias - CENTRE * weight.sum(1), reader.shape)
        return Network(router, (stage,), reader.shape, reader.norm, where)
    if model.top_k > 1:
        raise InputError(f"{where} is a tree, whose scores no bound is known for but which is best: use top_k 1")
    return Cells(router.regions, reader.norm)
