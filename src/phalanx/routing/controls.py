"""Gates that know nothing, over a trained mixture's experts: what is left of its numbers without its router."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import nn

from phalanx.errors import InputError
from phalanx.nn import preserved_rng, spec_of
from phalanx.routing.moe import MixtureOfExperts
from phalanx.routing.routers import LinearRouter, UniformRouter

ControlGate = Literal["uniform", "random"]


def with_gate(mixture: nn.Module, gate: ControlGate, *, seed: int = 0) -> MixtureOfExperts:
    """The mixture's experts, the same modules and no copies, under a gate that was never trained and never will be.

    Args:
        mixture: a `MixtureOfExperts` with at least two experts; it is left as it was.
        gate: "uniform": all experts with equal weight, the mean of their logits; "random": a freshly initialised
            linear router, top-1, on images of the shape and normalisation in the record of the mixture's own router.
        seed: of the random router's weights.

    The new router has the precision, device and mode of the mixture. Raises InputError for another model, for a single
    expert, for another gate and, if "random", for a router that has no record.
    """
    if gate not in get_args(ControlGate):
        raise InputError(f"gate must be one of {', '.join(get_args(ControlGate))}, got {gate!r}")
    if not isinstance(mixture, MixtureOfExperts):
        raise InputError(
            f"another gate needs a MixtureOfExperts, got a {type(mixture).__name__}; give a part of it that is one"
        )
    if mixture.router is None:
        raise InputError("another gate needs at least 2 experts to choose from, got 1; evaluate the network as it is")
    num_experts = len(mixture.experts)
    router = UniformRouter(num_experts) if gate == "uniform" else _random_router(mixture.router, num_experts, seed)
    anchor = next(mixture.parameters(), None)
    if anchor is not None:
        router = router.to(anchor)
    control = MixtureOfExperts(
        router.train(mixture.training), list(mixture.experts), "all" if gate == "uniform" else 1, train_router=False
    )
    # not train(): it would set the shared experts' modes one and all
    control.training = control.experts.training = mixture.training
    return control


def _random_router(router: nn.Module, num_experts: int, seed: int) -> LinearRouter:
    recorded = _recorded_input(router)
    with preserved_rng():
        torch.manual_seed(seed)
        return LinearRouter(recorded["shape"], num_experts, mean=recorded.get("mean"), std=recorded.get("std"))


def _recorded_input(router: nn.Module) -> dict[str, Any]:
    """Shape and normalisation of the images, from the router's record or, of a router of routers, the first part's."""
    for part in router.modules():
        spec = spec_of(part)
        if spec is not None and "shape" in spec.arguments:
            return dict(spec.arguments)
    raise InputError(
        "the mixture's router was built by hand, so the shape of its images is not known; build "
        "MixtureOfExperts(LinearRouter(shape, num_experts), mixture.experts) yourself"
    )
