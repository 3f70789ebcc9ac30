"""AdvMoE's router: what it is trained on, what is logged of it, and which models have one to train."""

# B batch, E experts, S gates

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from phalanx.errors import InputError
from phalanx.methods.base import Loss, mean_kl, with_divergence
from phalanx.routing import (
    LayerMixture,
    MixtureOfExperts,
    Route,
    RoutedModel,
    RouteTree,
    flipped,
    leaves,
    load_balance,
    load_per_expert,
    map_route,
)


@dataclass(frozen=True)
class RouterLoss:
    """label_weight CE(s(x), y mod E) + beta KL(s(x) || s(x')) + balance times the load-balance loss, s the scores.

    Each term is a mean over the batch and over the route's leaves.
    """

    label_weight: float
    beta: float
    balance: float

    def __call__(self, clean: RouteTree, adv: RouteTree, y: Tensor) -> Loss:
        """Of the routes of images and of the same images attacked, with labels (B,)."""
        labels = _mean(clean, lambda leaf: F.cross_entropy(leaf.scores, y % leaf.num_experts))
        pairs = zip(leaves(clean), leaves(adv), strict=True)
        kl = torch.stack([mean_kl(before.scores, after.scores) for before, after in pairs]).mean()
        value = self.label_weight * labels + self.balance * load_balance(clean)
        return with_divergence(Loss(value, self.logs(clean, adv, y)), self.beta, kl)

    @torch.no_grad()
    def logs(self, clean: RouteTree, adv: RouteTree, y: Tensor) -> dict[str, Tensor]:
        """ "route_accuracy" and "adversarial_route_accuracy" (), the share of best scores at y mod E; "route_flips" (),
        of images that another set of experts answers once they are attacked; "score_gap" (), the largest difference of
        two scores of an image, which tells of overconfidence; "load" (E,), the experts' shares, of several gates
        "gate-J.load" each."""

        def right(leaf: Route) -> Tensor:
            return (leaf.scores.argmax(-1) == y % leaf.num_experts).float().mean()

        gaps = [leaf.scores.amax(-1) - leaf.scores.amin(-1) for leaf in leaves(clean)]
        return {
            "route_accuracy": _mean(clean, right),
            "adversarial_route_accuracy": _mean(adv, right),
            "route_flips": flipped(clean, adv).float().mean(),
            "score_gap": torch.stack(gaps).amax(),
            **_loads(clean),
        }


def _mean(tree: RouteTree, function: Callable[[Route], Tensor]) -> Tensor:
    return torch.stack([function(leaf) for leaf in leaves(tree)]).mean()


def _loads(tree: RouteTree) -> dict[str, Tensor]:
    loads = load_per_expert(tree)
    return {"load": loads[0]} if len(loads) == 1 else {f"gate-{gate}.load": load for gate, load in enumerate(loads)}


def with_scores(tree: RouteTree, source: RouteTree) -> RouteTree:
    """The decisions of `tree` with the scores of `source`, a tree of the same shape."""
    scores = (leaf.scores for leaf in leaves(source))
    return map_route(lambda leaf: Route(next(scores), leaf.experts, leaf.weights), tree)


def check_players(method: str, model: RoutedModel) -> None:
    """Raises InputError unless `model` has exactly the players "experts" and "router"."""
    players = set(model.players())
    if players == {"experts", "router"}:
        return
    if isinstance(model, MixtureOfExperts | LayerMixture):
        if model.router is None:
            why, remedy = "a mixture of one expert, which has no router", "give it more experts, or use trades"
        elif "router" not in players:
            why, remedy = "a mixture whose router is frozen", "set model.router.train to true"
        else:
            why, remedy = "a mixture whose experts are frozen", "set model.train_experts to true"
    else:
        why, remedy = f"a {type(model).__name__}", "use another method"
    raise InputError(f"{method} needs a router and experts to move in turn, got {why}; {remedy}")


def check_class_per_expert(method: str, model: RoutedModel, num_classes: int) -> None:
    """Raises InputError for a mixture of more experts than classes: y mod E names only the first of them."""
    if isinstance(model, LayerMixture):
        experts = model.num_experts
    elif isinstance(model, MixtureOfExperts):
        experts = len(model.experts)
    else:
        # only an image would tell
        return
    if experts > num_classes:
        raise InputError(
            f"{method} sends class y to expert y mod {experts}, so {experts - num_classes} of {experts} experts would "
            f"have no class of {num_classes}; use at most {num_classes} experts, or method.router_objective end_to_end"
        )
