"""Synergy-of-Experts: every sub-model answers and says how sure it is; the surest one speaks for all."""

# B batch, M sub-models, C classes

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phalanx.nn import record, spec_of
from phalanx.routing.dispatch import dispatch
from phalanx.routing.gates import check_temperature, gate
from phalanx.routing.route import Route, Routed, RouteTree


@runtime_checkable
class _TwoHeads(Protocol):
    def both(self, x: Tensor) -> tuple[Tensor, Tensor]: ...


class SynergyOfExperts(nn.Module):
    """The answer is that of the sub-model with the largest rectified confidence (Cui et al., NeurIPS 2022).

    R_i(x) = max_c softmax(z_i / temperature)_c * sigmoid(a_i), z_i the logits of sub-model i and a_i its confidence
    logit; argmax_i R_i answers, with weight 1, and ties go to the lower index. There is no router: a route's scores are
    log R_i. The choice is hard, so the gradient of the answer belongs to the sub-model that gives it and says nothing
    about the choice; the scores are differentiable in the images, which is what route steering climbs.

    Args:
        submodels: M >= 2 networks with two heads (`phalanx.experts.TwoHeaded`) for the same classes.
        temperature: divides the logits inside R, and nowhere else; the released code multiplies by its inverse.

    Raises ValueError where these do not fit together, TypeError for a sub-model without a confidence head.
    """

    def __init__(self, submodels: Sequence[nn.Module], *, temperature: float = 1.0) -> None:
        super().__init__()
        if len(submodels) < 2:
            raise ValueError(f"submodels must hold at least 2 networks to choose from, got {len(submodels)}; add some")
        if len({id(submodel) for submodel in submodels}) < len(submodels):
            raise ValueError(
                f"submodels must be {len(submodels)} different networks, got one of them twice; build each anew"
            )
        for submodel in submodels:
            if not isinstance(submodel, _TwoHeads):
                raise TypeError(
                    f"submodels must have a confidence head, got a {type(submodel).__name__} without one; "
                    "wrap it: TwoHeaded(network)"
                )
        check_temperature(temperature)
        self.experts = nn.ModuleList(submodels)
        self._temperature = float(temperature)
        specs = [spec_of(submodel) for submodel in submodels]
        if all(spec is not None for spec in specs):
            parts = [spec.to_json() for spec in specs if spec is not None]
            record(self, "soe", submodels=parts, temperature=self._temperature)

    def extra_repr(self) -> str:
        """What the parts do not show; also tells two models of the same weights apart in a ledger."""
        return f"temperature={self._temperature}"

    def submodels(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, M, C) and confidence logits (B, M) of images (B, C, H, W) in [0, 1], float32 at least.

        Raises ValueError unless all sub-models answer for the same classes.
        """
        answers = [cast(_TwoHeads, submodel).both(x) for submodel in self.experts]
        shapes = {tuple(logits.shape) for logits, _ in answers}
        if len(shapes) > 1:
            raise ValueError(
                "submodels must answer with logits for the same classes, got shapes "
                + " and ".join(map(str, sorted(shapes)))
            )
        logits_BMC = torch.stack([logits for logits, _ in answers], 1)
        confidence_BM = torch.stack([confidence for _, confidence in answers], 1)
        # near 1, where the sub-models are compared, half precision has steps of 1/256 and less
        precision = torch.promote_types(logits_BMC.dtype, torch.float32)
        return logits_BMC.to(precision), confidence_BM.to(precision)

    def log_probs(self, logits: Tensor) -> Tensor:
        """(B, M, C) log softmax(logits / temperature): the probabilities that R is made of."""
        return (logits / self._temperature).log_softmax(-1)

    def decide(self, logits: Tensor, confidence: Tensor) -> Route:
        """The route that the answers of `submodels` lead to: scores log R (B, M), one sub-model each, weight 1."""
        scores_BM = self.log_probs(logits).amax(-1) + F.logsigmoid(confidence)
        chosen_B1 = gate(scores_BM, top_k=1).experts
        return Route(scores_BM, chosen_B1, torch.ones_like(scores_BM[:, :1]))

    def gate(self, x: Tensor) -> Route:
        """The route of images (B, C, H, W). It costs as much as the answer: every sub-model runs."""
        return self.decide(*self.submodels(x))

    def routed(self, x: Tensor, route: RouteTree | None = None) -> Routed:
        """Logits (B, C) of the surest sub-model, each having run once; and the route.

        Under a given `route` only the sub-models that it names run, each on its images, weighted as it says. Raises
        TypeError unless `route` is one `Route`.
        """
        if route is None:
            logits_BMC, confidence_BM = self.submodels(x)
            route = self.decide(logits_BMC, confidence_BM)
            return Routed(answer(logits_BMC, route), route)
        if not isinstance(route, Route):
            raise TypeError(f"a Synergy-of-Experts takes one Route, got {type(route).__name__}")
        return Routed(dispatch(tuple(self.experts), x, route), route)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, C) of images (B, C, H, W) in [0, 1]."""
        return self.routed(x).logits

    def players(self) -> Mapping[str, Sequence[nn.Parameter]]:
        """Who can move: "experts", the sub-models with both heads."""
        return {"experts": list(self.experts.parameters())}


def answer(logits_BMC: Tensor, route: Route) -> Tensor:
    """(B, C): of logits (B, M, C) those of the one sub-model that `route` names for each image."""
    return logits_BMC.take_along_dim(route.experts[..., None], dim=1).squeeze(1)
