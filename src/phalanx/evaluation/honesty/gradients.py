"""Do gradients tell the truth? M5 to M9."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from phalanx.attacks import OBJECTIVES, Target
from phalanx.data import Batch
from phalanx.evaluation.honesty.finding import Finding, failed, info, passed, skipped, warned
from phalanx.evaluation.honesty.probe import Model, Probe
from phalanx.rng import SampleRng, derive_seed
from phalanx.routing import Routed, leaves, routed

_ZERO_SHARE = 0.1
"""More images than this without a gradient invalidate the verdicts."""
_FEW = 16
_DIRECTIONS = 32
_STEP = 1e-3
_AGREE = 0.5
_NOISE = 1e-4
_CONSTANT = 0.1
"""Fewer images than this whose answer does not move at all are rounding."""


def zero_gradients(probe: Probe) -> Finding:
    """M5: images without a usable gradient of cross-entropy, DLR or the router's scores, clean and in the ball."""
    if not len(probe.right.y):
        return skipped("no image is classified rightly")
    x, y = probe.right.x, probe.right.y
    rng = SampleRng(derive_seed(probe.seed, "honesty", "M5"), probe.right.ids)
    points = (x, probe.threat.random_start(x, rng))
    shares = {
        name: max(float(_blind(probe, Batch(point, y, probe.right.ids), name).double().mean()) for point in points)
        for name in ("cross_entropy", "dlr")
    }
    router = _blind_router(probe)
    if router is not None:
        shares["router"] = router
    worst = max(shares.values())
    if worst > _ZERO_SHARE:
        names = ", ".join(name for name, share in shares.items() if share > _ZERO_SHARE)
        return failed(
            f"gradients of {names} are zero or not finite on up to {worst:.0%} of the images: gradient attacks cannot "
            "move there; remove what masks them, or attack a smooth stand-in",
            **shares,
        )
    if worst:
        return warned(f"up to {worst:.1%} of the images have a gradient that is zero or not finite", **shares)
    return passed("every image has a gradient", **shares)


def _blind(probe: Probe, at: Batch, objective: str) -> Tensor:
    """(R,) the image is still right, and the gradient of the objective is zero in every pixel, or somewhere not finite.

    Where the model errs already DLR may be constant, the label being third, and no attack needs it.
    """

    def blind(piece: Batch) -> Tensor:
        climb = Target(model, model, "whole", objective, piece.x, piece.y).climb(piece.x)
        assert climb.gradient is not None
        return (climb.logits.argmax(-1) == piece.y) & _is_blind(climb.gradient)

    with probe.borrowed() as model:
        return torch.cat(probe.in_pieces(at, blind))


def _is_blind(gradient: Tensor) -> Tensor:
    """(B,) of (B, ...): zero in every pixel, or somewhere not finite."""
    flat = gradient.flatten(1)
    return (flat == 0).all(1) | ~flat.isfinite().all(1)


def _blind_router(probe: Probe) -> float | None:
    """The largest share over the gates of images whose scores have no gradient; None without scores that vary."""
    varying = [place for place, gate in enumerate(probe.gates) if bool((gate.scores.std(0) > 0).any())]
    if not varying or probe.random:
        return None

    def blind(piece: Tensor) -> Tensor:
        """(B, G)"""
        x = piece.clone().requires_grad_()
        route = routed(model, x).route
        assert route is not None
        gates = [leaf for leaf in leaves(route) if leaf.num_experts > 1]
        return torch.stack([_is_blind(_gradient(_lead(gates[place].scores), x)) for place in varying], 1)

    with probe.borrowed() as model, torch.enable_grad():
        return float(probe.by_piece(probe.right.x, blind).double().mean(0).max())


def _lead(scores: Tensor) -> Tensor:
    """(B,) the best score above the second best, of (B, E) or (B, T, E)."""
    best = scores.topk(2, -1).values
    return (best[..., 0] - best[..., 1]).flatten(1).sum(1) if scores.dim() > 2 else best[:, 0] - best[:, 1]


def _gradient(values: Tensor, x: Tensor) -> Tensor:
    """Of the sum of the values, zero where they do not depend on `x`."""
    if not values.requires_grad:
        return torch.zeros_like(x)
    (found,) = torch.autograd.grad(values.sum(), x, allow_unused=True, retain_graph=True)
    return torch.zeros_like(x) if found is None else found


def router_gradient(probe: Probe) -> Finding:
    """M6: whether the answers, or the chosen gate, have a gradient through the router's scores."""
    if not probe.gates:
        return skipped("the model has no router")
    few = Batch(*(column[:_FEW] for column in probe.batch))
    with probe.borrowed() as model, torch.enable_grad():
        sizes = probe.in_pieces(few, partial(_reached, model))
    chosen, logits = (sum(column) for column in zip(*sizes, strict=True))
    evidence = {"of_the_gate": chosen, "of_the_answers": logits, "gates": len(probe.gates)}
    if chosen > 0 or logits > 0:
        return passed("the router is reached by gradients", **evidence)
    aware = [member.name for member in probe.members if is_routing_aware(member.attack)]
    if aware:
        return info(
            f"the route has no gradient (a hard choice), and {len(aware)} attacks aim at it otherwise", **evidence
        )
    return warned(
        "the route has no gradient (a hard choice): attacks on the whole model cannot see it; add routing-50",
        **evidence,
    )


def _reached(model: Model, few: Batch) -> tuple[float, float]:
    """How large the chosen gates' gradients are in the images, and the answers' in the router's scores."""
    x = few.x.clone().requires_grad_()
    answers, route = routed(model, x)
    assert route is not None
    gates = [leaf for leaf in leaves(route) if leaf.num_experts > 1]
    chosen = sum((_size(_gradient(gate.weights[..., 0], x)) for gate in gates), 0.0)
    scores = [gate.scores for gate in gates if gate.scores.requires_grad]
    target = answers.gather(-1, few.y[:, None]).sum()
    through = torch.autograd.grad(target, scores, allow_unused=True) if scores and target.requires_grad else ()
    return chosen, sum((_size(found) for found in through if found is not None), 0.0)


def is_routing_aware(attack: Any) -> bool:
    """Whether an attack looks at the route: by what it climbs, or by the surface it climbs on."""
    surface = str(attack.surface)
    own = surface.startswith(("dense", "router", "straight", "expert-"))
    return own or type(attack).__name__ in ("RouteSteering", "ExpertTransfer") or attack.objective == "steer"


def _size(gradient: Tensor) -> float:
    return float(gradient.nan_to_num(0, 0, 0).abs().sum())


def finite_differences(probe: Probe) -> Finding:
    """M7: gradients agree with central differences along random directions."""
    few = Batch(*(column[:_FEW] for column in probe.right))
    if not len(few.y):
        return skipped("no image is classified rightly")
    if probe.random:
        return skipped("the answers are random, so differences of two passes are noise")
    sides = probe.in_pieces(few, partial(_slopes, probe))
    slopes, differences = (torch.cat(side) for side in zip(*sides, strict=True))
    if not bool(slopes.any()) and not bool(differences.any()):
        return warned("the answers do not change, by gradient or by difference", cosine=0.0, images=len(few.y))
    cosine = torch.nn.functional.cosine_similarity(slopes.double(), differences.double(), dim=1).nan_to_num(0, 0, 0)
    agreed, evidence = float(cosine.median()), {"cosine": float(cosine.median()), "images": len(few.y)}
    if agreed < _AGREE:
        return warned(
            "gradients do not agree with finite differences: they are shattered, quantised away or replaced; attack "
            "a smooth stand-in, or without gradients",
            **evidence,
        )
    return passed("gradients agree with finite differences", **evidence)


def _slopes(probe: Probe, few: Batch) -> tuple[Tensor, Tensor]:
    """(A, D) of A images the margin's slope in D directions, by its gradient and by its differences."""
    rng = SampleRng(derive_seed(probe.seed, "honesty", "M7"), few.ids)
    signs = rng.uniform("directions", (_DIRECTIONS, *few.x.shape[1:])).to(few.x.dtype).sub(0.5).sign()
    with probe.borrowed() as model:
        climb = Target(model, model, "whole", "margin", few.x, few.y).climb(few.x)
    assert climb.gradient is not None
    slopes = (climb.gradient[:, None] * signs).flatten(2).sum(2)
    ends = [_margins(probe, few, few.x[:, None] + sign * _STEP * signs) for sign in (1, -1)]
    return slopes, (ends[0] - ends[1]) / (2 * _STEP)


def _margins(probe: Probe, few: Batch, x: Tensor) -> Tensor:
    """(A, D) of images (A, D, ...)."""
    y = few.y[:, None].expand(x.shape[:2]).flatten()
    answers = Routed(probe.answers(x.flatten(0, 1)), None)
    return OBJECTIVES["margin"](answers, None, y).reshape(x.shape[:2])


def quantisation(probe: Probe) -> Finding:
    """M8: whether the answers are constant under noise that no quantiser should see, and clip pixels inside."""
    x = probe.batch.x
    if probe.random:
        return skipped("the answers are random")
    rng = SampleRng(derive_seed(probe.seed, "honesty", "M8"), probe.batch.ids)
    noise = _NOISE * rng.uniform("noise", x.shape[1:]).to(x.dtype).sub(0.5).sign()
    # inside the range, so that a model that clips does not seem to be constant at black and white
    same = (probe.answers((x + noise).clamp(0, 1)) == probe.logits).all(-1)
    outside = x + noise.sign()
    clipped = bool((probe.answers(outside) == probe.answers(outside.clamp(0, 1))).all())
    share = float(same.double().mean())
    evidence = {"constant": share, "clips_inside": float(clipped)}
    if share > _CONSTANT:
        return warned(
            f"the answers to {share:.0%} of the images do not change at all under noise of {_NOISE:g}: the input is "
            "quantised, or the answers saturate, and gradients are zero or invented; attack a smooth stand-in (BPDA)",
            **evidence,
        )
    return passed("the answers follow the smallest change of a pixel", **evidence)


class _GradientWatch(TorchFunctionMode):
    """Counts how often a forward pass asks for gradients."""

    _ASKING: tuple[Callable[..., Any], ...] = (torch.autograd.grad, torch.autograd.backward, Tensor.backward)

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.asked += function in self._ASKING
        return function(*args, **(kwargs or {}))


def optimisation(probe: Probe) -> Finding:
    """M9: no gradient is computed while the model answers. One pass is watched, through torch's own dispatch."""
    with probe.borrowed() as model, torch.enable_grad(), _GradientWatch() as watch:
        probe.by_piece(probe.batch.x[:_FEW], model)
    if watch.asked:
        return warned(
            "the model computes gradients while it answers (an optimisation in the forward pass): attacks through it "
            "are weak; attack what it optimises towards",
            asked=watch.asked,
        )
    return passed("no gradient is computed while the model answers", asked=0)
