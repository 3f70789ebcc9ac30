"""A mixture's experts one by one, against each other, and without each of them: the model's or a half's."""

# B batch, N all images, E experts

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from phalanx.attacks import PGD
from phalanx.data import Batch, ImageSet
from phalanx.evaluation.alone import Alone, ExpertCounts, answer, attacked_alone, expert_counts, right
from phalanx.evaluation.gates import first_choice, routed_parts
from phalanx.evaluation.knocked_out import Without, cannot_go_without
from phalanx.evaluation.oracle import oracle_verdicts
from phalanx.rng import SampleRng, derive_seed
from phalanx.routing import MixtureOfExperts, Route, RoutedModel, RouteTree, SynergyOfExperts, leaves
from phalanx.runs.rate import Rate


@dataclass(frozen=True, eq=False)
class Part:
    """A model with gates of its own, or such a half of a dual model."""

    name: str
    """"", "standard" or "robust"."""
    model: RoutedModel
    experts: int
    """E, of the gate that has most."""
    gates: int
    top_k: int | None
    """None for several gates."""
    obstacle: str
    """Why no expert can be taken out; "" if one can."""

    @property
    def chooses_one(self) -> bool:
        """Whether one expert answers each image, as it would alone."""
        return self.top_k == 1

    @property
    def has_oracle(self) -> bool:
        """Whether its experts are networks that a gate which knows the label could choose among."""
        return isinstance(self.model, MixtureOfExperts | SynergyOfExperts)

    @property
    def attacks_run(self) -> int:
        """Beyond those on the whole model; the oracle's costs as much as attacking each expert does."""
        return self.experts * (1 + self.has_oracle + (not self.obstacle)) + bool(self.name)


def choosing_parts(model: Callable[..., Any], images: ImageSet, device: torch.device | str) -> list[Part]:
    """The parts that have a choice; `images` holds one at least."""
    x = images.images([0]).to(device)
    found = []
    for name, part in routed_parts(model).items():
        route = answer(part, x).route
        assert route is not None, "a routed model returns its route"
        experts = max(leaf.num_experts for leaf in leaves(route))
        if experts > 1:
            found.append(_part(name, part, route, experts))
    return found


def _part(name: str, model: RoutedModel, route: RouteTree, experts: int) -> Part:
    top_k = route.experts.shape[1] if isinstance(route, Route) else None
    return Part(name, model, experts, len(list(leaves(route))), top_k, cannot_go_without(model, route))


@dataclass(frozen=True)
class PartNumbers:
    """What `numbers` makes of all batches. Accuracies are those of the part by itself, a half's of the half."""

    name: str
    experts: int
    gates: int
    top_k: int | None
    whole: Rate
    """What is known of it: held under the attack here and, for a whole model, in the ledger."""
    all: tuple[ExpertCounts, ...]
    """(E,) each expert alone on every image; of several gates, all that have such an expert forced to it."""
    own: tuple[ExpertCounts, ...] | None
    """(E,) on the images that a single gate, when clean, sends it as its first choice."""
    held_route: Rate | None
    """The clean image's expert attacked alone, image by image: the experts' robustness if no route could be changed. Of
    a gate that chooses one expert."""
    worst_route: Rate
    """Held by the whole and by every expert alone: whatever expert an adversary chose. A lower bound, as far as the
    attack is strong, for one that chooses one expert."""
    best_route: ExpertCounts | None
    """Under a gate that knows the label (see `oracle_verdicts`); None where the experts are no networks."""
    transfer: tuple[tuple[int, ...], ...]
    """(E, E) images that expert j (column) answers correctly when they were made on expert i (row)."""
    transfer_whole: tuple[int, ...]
    """(E,) images that the whole deployed model answers correctly when they were made on expert i."""
    without: tuple[ExpertCounts, ...] | None
    """(E,) the part without expert k, clean and under an attack on what is left; None where that is not defined."""
    undefined: str
    """Why not; "" otherwise."""


class PartColumns(NamedTuple):
    """One batch, on the CPU; booleans."""

    held_B: Tensor
    """By the part under the attack on all of it."""
    first_B: Tensor
    """int64 a single gate's first choice on the clean image, else zeros."""
    right_BE: Tensor
    robust_BE: Tensor
    transfer_BEE: Tensor
    whole_BE: Tensor
    """The deployed model is right where expert i was attacked."""
    without_right_BE: Tensor
    without_robust_BE: Tensor


def look(
    model: Callable[[Tensor], Any], part: Part, batch: Batch, attack: PGD, seed: int, held_B: Tensor | None
) -> PartColumns:
    """Attacks the experts one by one and the part without each; `held_B` where the part was attacked already."""
    if held_B is None:
        held_B = _held(part.model, batch, attack, derive_seed(seed, "half")).cpu()
    # beyond the first error: what barely breaks one network says nothing of another
    going_on = replace(attack, early_drop=False)
    alone = list(attacked_alone(part.model, part.experts, batch, going_on, derive_seed(seed, "alone")))
    networks = [Alone(part.model, expert) for expert in range(part.experts)]
    transfer = [
        torch.stack([right(answer(network, made.x_adv).logits, batch.y) for network in networks], 1) for made in alone
    ]
    whole = [right(answer(model, made.x_adv).logits, batch.y) for made in alone]
    return PartColumns(
        held_B,
        _first(part.model, batch.x),
        torch.stack([made.right for made in alone], 1).cpu(),
        torch.stack([made.robust for made in alone], 1).cpu(),
        torch.stack(transfer, 1).cpu(),
        torch.stack(whole, 1).cpu(),
        *_without(part, batch, attack, derive_seed(seed, "without")),
    )


def _held(network: Callable[[Tensor], Any], batch: Batch, attack: PGD, seed: int) -> Tensor:
    result = attack.run(network, batch.x, batch.y, rng=SampleRng(seed, batch.ids))
    return ~(result.broken | result.invalid)


def _first(model: RoutedModel, x: Tensor) -> Tensor:
    route = answer(model, x).route
    return first_choice(route).cpu() if isinstance(route, Route) else torch.zeros(len(x), dtype=torch.int64)


def _without(part: Part, batch: Batch, attack: PGD, seed: int) -> tuple[Tensor, Tensor]:
    """(B, E) right and (B, E) robust without each expert; (B, 0) where that is not defined."""
    if part.obstacle:
        nothing = torch.zeros(len(batch.y), 0, dtype=torch.bool)
        return nothing, nothing
    rest = [Without(part.model, expert) for expert in range(part.experts)]
    clean = [right(answer(network, batch.x).logits, batch.y) for network in rest]
    held = [_held(network, batch, attack, derive_seed(seed, expert)) for expert, network in enumerate(rest)]
    return torch.stack(clean, 1).cpu(), torch.stack(held, 1).cpu()


def numbers(
    part: Part,
    batches: Sequence[PartColumns],
    known_N: Tensor | None,
    images: ImageSet,
    attack: PGD,
    batch_size: int,
    seed: int,
) -> tuple[PartNumbers, Tensor]:
    """The numbers of all batches, and (N,) bool: images for which something found here breaks the whole deployed model.

    `known_N` (N,) is what a ledger counts as robust, None of a half.
    """
    columns = PartColumns(*(torch.cat(column) for column in zip(*batches, strict=True)))
    n = len(images)
    held_N = columns.held_B if known_N is None else columns.held_B & known_N
    everywhere_NE = torch.ones_like(columns.right_BE)
    own_NE = columns.first_B[:, None] == torch.arange(part.experts)
    best_NN, breaks_N = _best(part, images, attack, batch_size, seed), ~columns.whole_BE.all(1)
    if best_NN is not None and known_N is not None and part.chooses_one:
        # where all experts err, so does the one that answers
        breaks_N |= ~best_NN[1]
    found = PartNumbers(
        name=part.name,
        experts=part.experts,
        gates=part.gates,
        top_k=part.top_k,
        whole=Rate.of(held_N),
        all=expert_counts(everywhere_NE, columns.right_BE, columns.robust_BE),
        own=None if part.top_k is None else expert_counts(own_NE, columns.right_BE, columns.robust_BE),
        held_route=Rate.of((own_NE & columns.robust_BE).any(1)) if part.chooses_one else None,
        worst_route=Rate.of(held_N & columns.robust_BE.all(1)),
        best_route=None if best_NN is None else ExpertCounts(n, *(int(column.sum()) for column in best_NN)),
        transfer=tuple(map(tuple, columns.transfer_BEE.sum(0).tolist())),
        transfer_whole=tuple(columns.whole_BE.sum(0).tolist()),
        without=None
        if part.obstacle
        else expert_counts(everywhere_NE, columns.without_right_BE, columns.without_robust_BE),
        undefined=part.obstacle,
    )
    return found, breaks_N


def _best(part: Part, images: ImageSet, attack: PGD, batch_size: int, seed: int) -> tuple[Tensor, Tensor] | None:
    if not (part.has_oracle and isinstance(part.model, torch.nn.Module)):
        return None
    return oracle_verdicts(part.model, images, attack, batch_size=batch_size, seed=derive_seed(seed, "best"))
