"""What every attack shares: the checks, the frozen model, the projection, the verdict. A subclass only searches."""

# B batch, A samples given to the search, C classes

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, NamedTuple, Self, final

import torch
from torch import Tensor, nn

from phalanx.attacks.objectives import OBJECTIVES
from phalanx.attacks.surfaces import SURFACES, Model
from phalanx.attacks.target import Target, check_answers, check_classes, check_known, errors_of
from phalanx.attacks.tracker import Found
from phalanx.errors import InputError
from phalanx.nn import exact_fp32, fold_batchnorm, folds_certainly, frozen, preserved_rng
from phalanx.nn.lipschitz import prepared_weights
from phalanx.rng import SampleRng
from phalanx.routing import Routed, RouteTree, flipped, routed
from phalanx.threat import Norm, ThreatModel, check_radius, parse_epsilon

VERDICT_QUERIES = 2
"""Of a result's queries, those that judge: of the clean image, and of the perturbed one."""


class AttackResult(NamedTuple):
    """One row per sample of the batch, B in all. Verdicts are the real model's, in its own precision (no autocast)."""

    x_adv: Tensor
    """(B, ...) inside the ball and [0, 1]; the clean image where nothing had to be searched."""
    broken: Tensor
    """(B,) bool: the model answers wrongly at `x_adv`."""
    invalid: Tensor
    """(B,) bool: it answers with a non-finite number, clean or attacked; that never counts as robust."""
    predicted: Tensor
    """(B,) int64 its answer at `x_adv`."""
    clean_predicted: Tensor
    """(B,) int64 its answer at the clean image."""
    flipped: Tensor | None
    """(B,) bool: another set of experts answers at `x_adv`; None for a model without a route."""
    loss: Tensor
    """(B,) the objective at `x_adv` on the attacked surface; NaN where the search did not look."""
    queries: Tensor
    """(B,) int64 images of this sample sent through the model, verdicts included."""
    first_success: Tensor
    """(B,) int64 gradient steps until the first error, 0 if the clean image is wrong or invalid already, -1 for
    none. An error that the search did not watch for counts as found at the end."""
    restart: Tensor
    """(B,) int64 the restart (for route steering: the expert and class aimed at, in order) that `x_adv` comes from."""
    zero_gradient: Tensor
    """(B,) bool: the first gradient was exactly zero in every pixel, so the attack could not move."""


def _check_batch(x: Tensor, y: Tensor) -> int:
    """The largest label, -1 without images. Raises InputError for images or labels that no model can be given."""
    if torch.is_inference_mode_enabled():
        # autograd records nothing there: every gradient would be zero, and every model look robust
        raise InputError("an attack needs gradients, got torch.inference_mode(); call it outside, or under no_grad()")
    if not (isinstance(x, Tensor) and x.is_floating_point() and x.dim() >= 2):
        kind = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise InputError(f"images must be a float tensor (B, ...) in [0, 1], got {kind}; divide uint8 pixels by 255")
    if not (isinstance(y, Tensor) and y.shape == x.shape[:1] and not y.is_floating_point()):
        kind = f"{y.dtype} of shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise InputError(f"labels must be integers of shape ({len(x)},), one for each image, got {kind}")
    if len(x) == 0:
        return -1
    # one transfer from the device for all four
    exact = torch.promote_types(x.dtype, torch.float32)
    bounds = torch.stack([bound.to(x.device, exact) for bound in (*x.detach().aminmax(), *y.aminmax())])
    low, high, smallest, largest = (float(bound) for bound in bounds.tolist())
    # a NaN pixel fails both comparisons
    if not (low >= 0 and high <= 1):
        raise InputError(
            f"pixels must lie in [0, 1], got {low:.6g} to {high:.6g}; "
            "undo any normalisation (it belongs inside the model) and divide uint8 pixels by 255"
        )
    if smallest < 0:
        # the cross-entropy takes -100 for "ignore": no gradient, and every image would look robust
        raise InputError(f"labels must be at least 0, got {int(smallest)}; count classes from 0")
    return int(largest)


@contextmanager
def _borrowed(model: Model, *, certain: bool) -> Iterator[Model]:
    """The model frozen for as long as it is attacked; yields what to search on: it, or its BatchNorm-folded copy, with
    `certain` only of what needs no comparison with the model (see `fold_batchnorm`)."""
    with frozen(model), preserved_rng(), prepared_weights(model):
        folded = fold_batchnorm(model, certain=certain) if isinstance(model, nn.Module) else None
        yield model if folded is None else folded


def _trusted(model: Model, search: Model, x: Tensor, logits: Tensor) -> Model:
    """The folded copy, if it answers as the model does; where its folding is certain, it is not asked."""
    if search is model or (isinstance(model, nn.Module) and folds_certainly(model)):
        return search
    agree = torch.allclose(routed(search, x).logits, logits, rtol=1e-3, atol=1e-3, equal_nan=True)
    return search if agree else model


@dataclass(frozen=True, kw_only=True)
class Attack(ABC):
    """A search for a perturbation. Subclasses are frozen dataclasses with one `perturb`.

    The base checks pixels and labels, freezes and restores the model (mode per module, requires_grad, global random
    state), projects onto the ball, detaches, and judges: a subclass with a bug cannot leave the ball or flatter itself.
    """

    eps: float | str | None = None
    """Radius in pixel units of [0, 1], for example "8/255"; inside a recipe, by default the recipe's threat."""
    norm: Norm | None = None
    """"Linf", "L2" or "L1"; inside a recipe, by default the recipe's threat, else Linf."""
    objective: str = "cross_entropy"
    """What is climbed: "cross_entropy", "margin", "dlr", "kl" away from the clean answer, "steer" on a surface
    "expert-J", "joint-L" on the surface "halves" or "mislead" on "mixing"; towards a class "dlr_targeted" and
    "steer_to"; "kl_route" counts the router's scores too; "cross_entropy_fp16-N" and "cross_entropy_route-W" are for
    reproductions."""
    surface: str = "whole"
    """Which part of the model is differentiated: "whole", "pinned", "straight-through", "experts", "router", "dense",
    "dense-tT" at temperature T, "expert-J"; "held" and "forced" under a route given to the search; of a dual model
    "standard", "robust", "halves", "geometric", "softened-tT" or "mixing"."""
    targeted: bool = False
    """Aim at one class (the caller's, else the runner-up of the clean image) instead of away from the label. Any wrong
    answer still counts as broken, and ends the search where samples are dropped early."""
    reproduction: ClassVar[bool] = False
    """Repeats a published attack, defects included: its verdicts say nothing about robustness and belong in no
    headline."""

    def __post_init__(self) -> None:
        if self.eps is not None:
            parse_epsilon(self.eps)
            check_radius(self.norm or "L2", self.eps)
        OBJECTIVES.check(self.objective)
        OBJECTIVES.check_aim(self.objective, targeted=self.targeted)
        SURFACES.check(self.surface)
        for surface, objective, named in (("halves", "joint-", "joint-L"), ("mixing", "mislead", "mislead")):
            if (self.surface == surface) != self.objective.startswith(objective):
                raise ValueError(
                    f"surface {surface!r} and an objective {named!r} go together, "
                    f"got {self.surface!r} and {self.objective!r}; change one of them"
                )

    def _check_fixed(self, kind: str, **fixed: object) -> None:
        """Raises ValueError for a field that this kind of attack does not leave to the caller."""
        for field, value in fixed.items():
            if getattr(self, field) != value:
                raise ValueError(f"{field} of {kind} is fixed, got {getattr(self, field)!r}; leave it out")

    @property
    def threat(self) -> ThreatModel:
        """The ball; raises ValueError if `eps` was given neither here nor by a recipe."""
        if self.eps is None:
            raise ValueError(f"eps must be given, for example {type(self).__name__}(eps='8/255'), got None")
        return ThreatModel(self.norm or "Linf", self.eps)

    def within(self, threat: ThreatModel) -> Self:
        """This attack with the threat's norm and eps wherever it does not set its own."""
        return replace(
            self,
            eps=threat.eps if self.eps is None else self.eps,
            norm=threat.norm if self.norm is None else self.norm,
        )

    def spec(self) -> dict[str, Any]:
        """Everything that determines the search, as plain values: what a ledger records.

        Of a `reproduction` it says so; the key is absent from others.
        """
        flag = {"reproduction": True} if self.reproduction else {}
        return {"attack": type(self).__name__, **asdict(self), **flag}

    @abstractmethod
    def perturb(self, target: Target, rng: SampleRng) -> Found:
        """The search. Sees only `target`; random numbers come from `rng` alone."""

    @property
    @abstractmethod
    def gradient_steps(self) -> int:
        """Steps over all restarts."""

    @property
    def reads_clean_pass(self) -> bool:
        """Whether the search needs the surface's pass on the clean images, one forward."""
        return SURFACES.needs_clean_pass(self.surface) or OBJECTIVES.needs_clean_pass(self.objective)

    @property
    def reads_clean_logits(self) -> bool:
        """Whether it needs that pass's logits, or no more than its route."""
        return self.targeted or OBJECTIVES.needs_clean_pass(self.objective)

    def _target(
        self,
        model: Model,
        search: Model,
        x: Tensor,
        y: Tensor,
        wanted: Tensor | None,
        *,
        judged: bool,
        largest_label: int = -1,
        route: RouteTree | None = None,
    ) -> Target:
        target = Target(model, search, self.surface, self.objective, x, y, judged=judged, largest_label=largest_label)
        if not (self.reads_clean_pass or (self.targeted and wanted is None)):
            return replace(target, wanted=wanted)
        with torch.no_grad():
            if route is None:
                clean = routed(search, x)
                check_known(largest_label, clean.logits)
            elif self.reads_clean_logits:
                clean = search.routed(x, route)  # type: ignore[attr-defined]
            else:
                clean = Routed(x.new_empty(len(x), 0), route)
        if self.targeted and wanted is None:
            wanted = clean.logits.scatter(-1, y[:, None], float("-inf")).argmax(-1)
        return replace(target, wanted=wanted, clean=clean)

    def _wanted(self, wanted: Tensor | None, y: Tensor) -> Tensor | None:
        if wanted is None:
            return None
        if not self.targeted:
            raise InputError(f"target classes were given, but {type(self).__name__} has targeted=False; set it")
        if wanted.shape != y.shape or wanted.is_floating_point():
            raise InputError(
                f"target must hold one integer class for each of {len(y)} images, "
                f"got {wanted.dtype} of shape {tuple(wanted.shape)}; give a tensor shaped like the labels"
            )
        return wanted.long()

    def _perturbed(self, target: Target, rng: SampleRng) -> Found:
        found = self.perturb(target, rng)
        looked = target.clean is not None and target.clean.logits.numel() > 0
        return found._replace(queries=found.queries + 1) if looked else found

    @final
    def search(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        *,
        rng: SampleRng | None = None,
        target: Tensor | None = None,
        route: RouteTree | None = None,
    ) -> Found:
        """The search without a verdict, in the caller's precision: what training uses.

        Arguments as for `run`; one row per sample, `x_adv` inside the ball. A `route` takes the place of the gate's in
        the pass on the clean images: the surface "experts" then attacks whatever experts it names.
        """
        largest = _check_batch(x, y)
        if route is not None and not self.reads_clean_pass:
            raise InputError(
                f"a route was given, but surface {self.surface!r} with objective {self.objective!r} reads none; "
                "use surface='experts'"
            )
        wanted = self._wanted(target, y)
        rng = _streams(rng, x)
        x, y = x.detach(), y.long()
        # a comparison would cost every training step two passes: what would need one is attacked as it is
        with _borrowed(model, certain=True) as search:
            aim = self._target(model, search, x, y, wanted, judged=False, largest_label=largest, route=route)
            found = self._perturbed(aim, rng)
        return found._replace(x_adv=self.threat.project(found.x_adv, x).detach())

    @final
    def __call__(
        self, model: Model, x: Tensor, y: Tensor, *, rng: SampleRng | None = None, target: Tensor | None = None
    ) -> Tensor:
        """The perturbed images (B, ...): `search(...).x_adv`."""
        return self.search(model, x, y, rng=rng, target=target).x_adv

    @final
    def run(
        self, model: Model, x: Tensor, y: Tensor, *, rng: SampleRng | None = None, target: Tensor | None = None
    ) -> AttackResult:
        """Search, then judge on the real model. Autocast and TF32 are off.

        Args:
            model: any callable, images to logits (B, C).
            x: (B, ...) float images in [0, 1].
            y: (B,) integer labels.
            rng: the samples' random streams; by default keyed by their position in the batch.
            target: (B,) classes to reach, for a targeted attack.

        Images that are wrong or invalid already are not searched. Raises InputError for bad images, labels or logits.
        """
        _check_batch(x, y)
        wanted = self._wanted(target, y)
        rng = _streams(rng, x)
        x, y = x.detach(), y.long()
        with exact_fp32(), _borrowed(model, certain=False) as search, torch.no_grad():
            clean = routed(model, x)
            check_answers(clean.logits, y)
            if wanted is not None:
                check_classes("target", wanted, clean.logits.shape[1])
            search = _trusted(model, search, x, clean.logits)
            wrong, invalid = errors_of(clean.logits, y)
            fallen = wrong | invalid
            found, rows = Found.nothing(x), (~fallen).nonzero().squeeze(1)
            for searched in (search, model):
                if len(rows):
                    aim = None if wanted is None else wanted[rows]
                    part = self._target(model, searched, x[rows], y[rows], aim, judged=True)
                    found = _spread(found, rows, self._perturbed(part, rng[rows]))
                x_adv = self.threat.project(found.x_adv, x)
                attacked = routed(model, x_adv)
                broken, invalid_adv = errors_of(attacked.logits, y)
                # the folded copy rounds differently: where it saw an error that the model does not make, the search
                # stopped too early and is made again on the model itself
                rows = ((found.first_success >= 0) & ~(fallen | broken | invalid_adv)).nonzero().squeeze(1)
                if searched is model or not len(rows):
                    break
        invalid = invalid | invalid_adv
        broken = broken & ~invalid
        unseen = (broken | invalid) & (found.first_success < 0)
        first_success = found.first_success.masked_fill(unseen, self.gradient_steps).masked_fill(fallen, 0)
        return AttackResult(
            x_adv=x_adv,
            broken=broken,
            invalid=invalid,
            predicted=attacked.logits.argmax(-1),
            clean_predicted=clean.logits.argmax(-1),
            flipped=None if clean.route is None or attacked.route is None else flipped(clean.route, attacked.route),
            loss=found.loss,
            queries=found.queries + VERDICT_QUERIES,
            first_success=first_success.masked_fill(~(broken | invalid), -1),
            restart=found.restart,
            zero_gradient=found.zero_gradient,
        )


def _streams(rng: SampleRng | None, x: Tensor) -> SampleRng:
    if rng is None:
        return SampleRng.for_batch(len(x), device=x.device)
    if len(rng) != len(x):
        raise InputError(f"rng must hold one key for each of {len(x)} images, got {len(rng)}; index it like the batch")
    return rng


def _spread(whole: Found, rows: Tensor, part: Found) -> Found:
    fields = (field.index_copy(0, rows, values.to(field.dtype)) for field, values in zip(whole, part, strict=True))
    return Found(*fields)._replace(queries=whole.queries.index_add(0, rows, part.queries))
