"""JTDMoE: joint training of a dual model of two mixtures, by alternating a robust and a standard level."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar, Literal

from phalanx.errors import InputError
from phalanx.methods.base import LabelledBatch, Loss, Update, classification_loss
from phalanx.methods.expert_robustness import Choices, ExpertRobustness, Preset
from phalanx.nn import frozen
from phalanx.rng import Rng
from phalanx.routing import DualModel, RoutedModel

UpperMoves = Literal["both", "standard"]

UPPER_MOVES: Mapping[Preset, UpperMoves] = {"paper": "both", "code": "standard", "sound": "both"}


@dataclass(frozen=True, kw_only=True)
class JTDMoE(ExpertRobustness):
    """The dual model's bi-level training: in each step, RT-ER on the robust half, then CE(D(x), y) on clean images.

    Lower level: the robust half R alone descends RT-ER's loss (`RTER`); the standard half S keeps its bits. Upper
    level, of the weights that the lower one has moved: the cross-entropy of D's log-probabilities (of the mixed logits,
    if that is the model's `mix`) on clean x, plus the balance loss of both gates. Start from two trained halves; the
    upper level's clean cross-entropy also wears down R, so watch the robust accuracy of R alone.

    Paper (eq. 10, Alg. 1) and released code disagree; see `preset`. What the code does by accident, keeping the upper
    level's gradients for the next lower step and moving both halves with one optimizer, is not offered.

    What a step costs per image, counted as for `RTER`: its lower level, then 6 for the upper, or 4 where only S moves
    and R is merely evaluated. At K = 10 and E = 4, code: 20 + 4 * 20 + 3 + 4 * 6 + 4 = 131. The released code takes
    133: it also goes backward through R, which it has frozen.
    """

    name: Literal["jtdmoe"] = "jtdmoe"
    upper_moves: UpperMoves | None = None
    """Who moves in the upper level: "both" halves, or S alone ("standard"), R then being in evaluation mode."""
    PRESETS: ClassVar[Mapping[Preset, Choices]] = {
        "paper": Choices("second", "adversarial", "shared", "mean", "joint"),
        "code": Choices("all", "clean", "own", "sum", "cross_entropy"),
        "sound": Choices("all_others", "adversarial", "own", "mean", "cross_entropy"),
    }

    @property
    def moves(self) -> UpperMoves:
        """What holds of `upper_moves`."""
        return self.upper_moves or UPPER_MOVES[self.preset]

    def check(self, model: RoutedModel, num_classes: int) -> None:
        del num_classes
        dual = self._dual(model)
        if not 0 < dual.alpha < 1:
            half = "standard" if dual.alpha else "robust"
            raise InputError(
                f"{self.name} trains both halves through their mixture: at alpha={dual.alpha:g} the {half} half has no "
                "part in the answer and would get no gradient; set model.alpha strictly between 0 and 1"
            )
        try:
            self.check_mixture(dual.robust)
        except InputError as error:
            raise InputError(f"robust half: {error}") from None

    def updates(self, model: RoutedModel, batches: Mapping[str, LabelledBatch], rng: Rng) -> Iterator[Update]:
        dual, batch = self._dual(model), batches["train"]
        yield self.robust_update(dual.robust, batch, rng, player="robust")
        alone = self.moves == "standard"

        def loss() -> Loss:
            # a half that does not move is only evaluated: no gradient, and BatchNorm's statistics stay
            held: AbstractContextManager[None] = frozen(dual.robust) if alone else nullcontext()
            with held:
                return classification_loss(dual, batch.x, batch.y, self.balance)

        yield Update(loss, player="standard" if alone else "all")

    def _dual(self, model: RoutedModel) -> DualModel:
        # a subclass may answer with gradients that are made for attacks
        if type(model) is not DualModel:
            raise InputError(
                f"{self.name} trains a dual model, got {type(model).__name__}; set model.name to dual, or use rt_er"
            )
        return model
