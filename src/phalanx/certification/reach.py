"""When an expert can be reached at the earliest, where what it takes is linear in the pixels: all rivals together.

The pairwise rule (`entry_radii`) asks each rival alone. Here conditions v_j . d >= gap_j, j = 1..J, must hold at once.
If ||d||_p <= eps satisfies them, then for any multipliers lambda >= 0

    sum_j lambda_j gap_j <= sum_j lambda_j v_j . d <= eps ||sum_j lambda_j v_j||_q,

so that the quotient of both sides is a radius below which they cannot all hold; the largest quotient is exact (Farkas).
One multiplier alone is the pairwise rule.
"""

# N samples, J conditions, D pixels, E experts

from __future__ import annotations

from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from phalanx.bounds import dual_norm
from phalanx.certification.gates import quotient
from phalanx.threat import Norm

Floats: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]
Reachable = Literal["pairwise", "exact"]
REACHABLE: tuple[Reachable, ...] = get_args(Reachable)

_ROUNDING = 1e-12
"""Relative to the sum's terms, added to its norm: far above what float64 loses in making it."""
_MOST = 1e6
"""Conditions that exclude each other have no largest quotient: multipliers end here, relative to their directions."""


def earliest(gaps: Tensor, directions: Tensor, norm: Norm) -> Tensor:
    """(N,): below this radius in `norm` no d has directions . d >= gaps, (N, J) and (J, D) float64.

    The multipliers are those of a linear programme, for L2 of a least-distance programme (Lawson and Hanson, 1974).
    Whatever they are, their quotient is a bound, made here in float64: nothing rests on the solver, and the pairwise
    rule's is never undercut.
    """
    sizes = dual_norm(directions, norm)
    best_N = quotient(gaps, sizes.expand_as(gaps)).amax(1)
    if gaps.shape[1] == 1:
        return best_N
    rows, columns = gaps.cpu().numpy(), directions.cpu().numpy()
    found = [_multipliers(row, columns, sizes.cpu().numpy(), norm) for row in rows]
    lambda_NJ = torch.from_numpy(np.stack(found)).to(gaps) if found else torch.zeros_like(gaps)
    lambda_NJ = lambda_NJ.nan_to_num(0, 0, 0).clamp_min(0)
    needed_N = dual_norm(lambda_NJ @ directions, norm) + _ROUNDING * (lambda_NJ @ sizes)
    return torch.maximum(best_N, quotient((lambda_NJ * gaps).sum(1), needed_N))


def _multipliers(gaps: Floats, directions: Floats, sizes: Floats, norm: Norm) -> Floats:
    """(J,): where lambda . gaps / ||lambda . directions||_q is largest, up to the solver's tolerance."""
    from scipy.optimize import linprog, nnls  # type: ignore[import-untyped]

    conditions, pixels = directions.shape
    nothing = np.zeros(conditions)
    if not np.isfinite(gaps).all():
        return nothing
    if norm == "L2":
        try:
            return np.asarray(nnls(np.vstack([directions.T, gaps]), np.r_[np.zeros(pixels), 1.0])[0])
        except RuntimeError:
            return nothing
    most = [(0.0, _MOST / max(size, 1e-300)) for size in sizes]
    if norm == "L1":
        sides, limits, bounds = np.vstack([directions.T, -directions.T]), np.ones(2 * pixels), most
    else:
        # t >= |lambda . directions| pixel by pixel, its sum at most 1
        eye = np.eye(pixels)
        sides = np.block([[directions.T, -eye], [-directions.T, -eye], [np.zeros(conditions), np.ones(pixels)]])
        limits, bounds = np.r_[np.zeros(2 * pixels), 1.0], most + [(0.0, None)] * pixels
    costs = np.r_[-gaps, np.zeros(sides.shape[1] - conditions)]
    found = linprog(costs, sides, limits, bounds=bounds, method="highs")
    return nothing if found.x is None else np.asarray(found.x[:conditions])


def exact_entries(scores: Tensor, weights: Tensor, slack: Tensor, norm: Norm) -> Tensor:
    """(N, E): below this radius an expert cannot be the best one, for scores (N, E) that are linear in the pixels with
    `weights` (E, D); `slack` (N,) as in `entry_radii`."""
    experts = range(len(weights))
    others = [[rival for rival in experts if rival != expert] for expert in experts]
    return torch.stack(
        [
            earliest(scores[:, rivals] - scores[:, [i]] - slack[:, None], weights[i] - weights[rivals], norm)
            for i, rivals in enumerate(others)
        ],
        1,
    )
