"""What the gates and the margins do, on clean images and under one attack; and each expert as a network by itself."""

# B batch, N all images, E experts, C classes

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from phalanx.attacks import Attack, check_answers
from phalanx.data import Batch, ImageSet
from phalanx.errors import InputError
from phalanx.evaluation.alone import ExpertCounts, answer, attacked_alone, expert_counts
from phalanx.evaluation.alpha import probability_margins
from phalanx.evaluation.filling import nobody
from phalanx.evaluation.gates import gates_of_part, joined
from phalanx.evaluation.halving import Halving
from phalanx.evaluation.oracle import oracle_accuracy
from phalanx.rng import SampleRng, derive_seed
from phalanx.routing import (
    DualModel,
    MixtureOfExperts,
    Route,
    RoutedModel,
    flipped,
    gate_entropy,
    load_per_expert,
)

SCHEMA = 1
"""Of `Analysis.to_json`."""

Model = Callable[[Tensor], Any]


@dataclass(frozen=True)
class GateAnalysis:
    """One gate that has a choice, and its experts."""

    name: str
    """"" for a single mixture, "standard" or "robust" for a half of a dual model; with several gates "gate-0",
    "gate-1", ... from left to right ("standard.gate-0" in a half)."""
    experts: int
    top_k: int
    load_clean: tuple[float, ...]
    """(E,) each expert's share of the assignments, or its mean weight where all are selected; sums to 1."""
    load_attacked: tuple[float, ...]
    entropy_clean: float | None
    """Mean over the images of the entropy in nats of softmax(scores), without those whose scores are not finite; None
    if there are no others."""
    entropy_attacked: float | None
    flipped: float
    """Share of the images for which another set of experts is selected under attack."""
    own: tuple[ExpertCounts, ...]
    """(E,) each expert on the images that this gate, when clean, sends to it as its first choice."""
    all: tuple[ExpertCounts, ...]
    """(E,) each expert on every image."""


@dataclass(frozen=True)
class MarginsByClass:
    """(C,) the mean of p_y - max_{k != y} p_k, in [-1, 1], over the images of each class; None for one without any."""

    clean: tuple[float | None, ...]
    attacked: tuple[float | None, ...]


@dataclass(frozen=True)
class Analysis:
    """What `analyse` found."""

    attack: str
    n: int
    num_classes: int
    gates: tuple[GateAnalysis, ...]
    """None of them for a model without a route and for a mixture of one."""
    oracle: ExpertCounts | None
    """A mixture's experts under a gate that knows the label and picks the best of them for each image (see
    `oracle_accuracy`): what no gate that sends an image to one of them can exceed. It needs labels, so it is no model's
    accuracy. None for any other model and for a mixture of one."""
    margins: Mapping[str, MarginsByClass]
    """"model" and, for a dual model, "standard" and "robust": F_D, F_S and F_R at the same points."""
    counts: tuple[int, ...]
    """(C,) images of each class, the invalid ones included."""
    invalid: int
    """Images for which the model, or a half of it, answers with a non-finite number, clean or attacked. They are in no
    margin, so that clean and attacked means are over the same images."""

    def to_json(self) -> dict[str, Any]:
        """The analysis as plain values, lists and dictionaries; every number is finite."""
        return {"schema": SCHEMA, **asdict(self, dict_factory=_plain)}


def _plain(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in items}


class _GateColumns(NamedTuple):
    """What one gate and its experts do with some images, on the CPU."""

    clean: Route
    attacked: Route
    right_BE: Tensor
    """bool: the expert alone answers correctly."""
    robust_BE: Tensor
    """bool: under an attack on it alone, too."""


class _Columns(NamedTuple):
    """One batch, on the CPU."""

    y_B: Tensor
    margins: dict[str, Tensor]
    """(B, 2) float64 clean and attacked; NaN where the answer is not finite."""
    gates: dict[str, _GateColumns]


def analyse(
    model: Model,
    images: ImageSet,
    attack: Attack,
    *,
    name: str,
    num_classes: int,
    batch_size: int = 64,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int, str], None] | None = None,
) -> Analysis:
    """Load, entropy and flips of every gate, margins by class, and the robust accuracy of each expert alone.

    Load, entropy, flips and margins under attack are taken at the images that one `attack` on the whole model returns,
    those of a dual model's halves too (the margins behind Table 5 of the dual-model paper): an image that is wrong or
    invalid when clean is not searched and stays as it is. A search that stops at the first error says nothing of how
    far the margin could fall after it, so the attacked means are upper bounds.

    Each expert is attacked and judged once more by itself, on the surface "whole" and without a route: what would be
    left if every image could be sent to it; and the experts of a mixture together, under a gate that knows the label.
    The cost is 1 + (number of experts, over all gates) attacks on all images, for a mixture as much again.

    Args:
        model: images (B, ...) in [0, 1] to logits (B, C); attacked in evaluation mode, and left as it was.
        images: what is analysed.
        attack: with eps set; run on the whole model with its own surface.
        name: what the attack is called, for example "pgd-50"; its random numbers belong to the name.
        num_classes: C, the model's.
        batch_size: images attacked at once; no number depends on it, up to rounding.
        seed: of the attacks' random numbers.
        device: where the model is.
        progress: called after every batch with the images done, their total and `name`.

    Raises InputError for no images, for labels or a `num_classes` that are not the model's, and for an attack that
    exists for dual models only.
    """
    if not len(images):
        raise InputError("there are no images to analyse; raise the number of images to evaluate on")
    alone, halving = _by_itself(attack), Halving(nobody)

    def columns(piece: Batch) -> _Columns:
        return _columns(model, piece, attack, alone, num_classes, derive_seed(seed, "analysis", name))

    batches: list[_Columns] = []
    done = 0
    for batch in images.batches(batch_size, device):
        batches += halving.pieces(batch, columns)
        done += len(batch.y)
        if progress is not None:
            progress(done, len(images), name)
    oracle = _oracle(model, images, alone, batch_size, derive_seed(seed, "analysis", name, "oracle"))
    return _analysis(name, num_classes, oracle, batches)


def _oracle(model: Model, images: ImageSet, attack: Attack, batch_size: int, seed: int) -> ExpertCounts | None:
    if not (isinstance(model, MixtureOfExperts) and len(model.experts) > 1):
        return None
    n, clean, robust = oracle_accuracy(model, images, attack, batch_size=batch_size, seed=seed)
    return ExpertCounts(n, round(clean * n), round(robust * n))


def _by_itself(attack: Attack) -> Attack:
    """The same attack for a network alone, to which a part of the mixture means nothing."""
    try:
        return replace(attack, surface="whole")
    except ValueError:
        raise InputError(
            f"the attack must also work on each expert by itself, and {type(attack).__name__} on the surface "
            f"{attack.surface!r} does not; use another, for example pgd-50"
        ) from None


def _columns(model: Model, batch: Batch, attack: Attack, alone: Attack, num_classes: int, seed: int) -> _Columns:
    halves = {"standard": model.standard, "robust": model.robust} if isinstance(model, DualModel) else {}
    views: dict[str, Any] = {"model": model, **halves}
    clean = {view: answer(part, batch.x) for view, part in views.items()}
    for look in clean.values():
        _check_classes(look.logits, batch.y, num_classes)
    x_adv = attack.run(model, batch.x, batch.y, rng=SampleRng(seed, batch.ids)).x_adv
    attacked = {view: answer(part, x_adv) for view, part in views.items()}
    gates = {}
    # a dual model's gates are those of its halves
    for view in halves or views:
        for gate, leaf, before, after in gates_of_part(view if halves else "", clean[view].route, attacked[view].route):
            verdicts = _verdicts_alone(views[view], leaf, before.num_experts, batch, alone, derive_seed(seed, gate))
            gates[gate] = _GateColumns(_on_host(before), _on_host(after), *verdicts)
    margins = {
        view: torch.stack([_finite_margins(look[view].logits, batch.y) for look in (clean, attacked)], 1).cpu()
        for view in views
    }
    return _Columns(batch.y.cpu(), margins, gates)


def _check_classes(logits: object, y_B: Tensor, num_classes: int) -> None:
    check_answers(logits, y_B)
    assert isinstance(logits, Tensor)
    if logits.shape[1] != num_classes:
        raise InputError(
            f"num_classes must be {logits.shape[1]}, the classes that the model tells apart, got {num_classes}; "
            "use the data that the model is for"
        )


def _finite_margins(logits_BC: Tensor, y_B: Tensor) -> Tensor:
    # a logit of -inf alone would leave the softmax finite
    return probability_margins(logits_BC, y_B).masked_fill(~logits_BC.isfinite().all(-1), float("nan"))


def _on_host(route: Route) -> Route:
    return Route(route.scores.double().cpu(), route.experts.cpu(), route.weights.cpu())


def _verdicts_alone(
    model: RoutedModel, leaf: int, num_experts: int, batch: Batch, attack: Attack, seed: int
) -> tuple[Tensor, Tensor]:
    """(B, E) bool right and (B, E) bool right and held, of each expert by itself under `attack`."""
    found = list(attacked_alone(model, num_experts, batch, attack, seed, leaf=leaf))
    right_BE, robust_BE = (torch.stack(column, 1).cpu() for column in list(zip(*found, strict=True))[:2])
    return right_BE, robust_BE


def _gate_analysis(name: str, batches: Sequence[_GateColumns]) -> GateAnalysis:
    clean, attacked = joined([part.clean for part in batches]), joined([part.attacked for part in batches])
    right_NE = torch.cat([part.right_BE for part in batches])
    robust_NE = torch.cat([part.robust_BE for part in batches])
    first_N1 = clean.experts[:, :1]
    own_NE = first_N1 == torch.arange(clean.num_experts)
    return GateAnalysis(
        name=name,
        experts=clean.num_experts,
        top_k=clean.experts.shape[1],
        load_clean=_load(clean),
        load_attacked=_load(attacked),
        entropy_clean=_entropy(clean),
        entropy_attacked=_entropy(attacked),
        flipped=float(flipped(clean, attacked).double().mean()),
        own=expert_counts(own_NE, right_NE, robust_NE),
        all=expert_counts(torch.ones_like(own_NE), right_NE, robust_NE),
    )


def _load(route: Route) -> tuple[float, ...]:
    (load_E,) = load_per_expert(route)
    return tuple(load_E.tolist())


def _entropy(route: Route) -> float | None:
    return _mean(gate_entropy(route))


def _mean(values: Tensor) -> float | None:
    """Over the finite ones; None if there are none."""
    finite = values[values.isfinite()]
    return float(finite.mean()) if len(finite) else None


def _by_class(values_N: Tensor, y_N: Tensor, counted_N: Tensor, num_classes: int) -> tuple[float | None, ...]:
    return tuple(_mean(values_N[counted_N & (y_N == label)]) for label in range(num_classes))


def _analysis(name: str, num_classes: int, oracle: ExpertCounts | None, batches: Sequence[_Columns]) -> Analysis:
    y_N = torch.cat([columns.y_B for columns in batches])
    margins = {view: torch.cat([columns.margins[view] for columns in batches]) for view in batches[0].margins}
    finite_N = torch.cat([*margins.values()], dim=1).isfinite().all(1)
    return Analysis(
        attack=name,
        n=len(y_N),
        num_classes=num_classes,
        gates=tuple(_gate_analysis(gate, [columns.gates[gate] for columns in batches]) for gate in batches[0].gates),
        oracle=oracle,
        margins={
            view: MarginsByClass(*(_by_class(values_N, y_N, finite_N, num_classes) for values_N in values_N2.unbind(1)))
            for view, values_N2 in margins.items()
        },
        counts=tuple(torch.bincount(y_N, minlength=num_classes).tolist()),
        invalid=int((~finite_N).sum()),
    )
