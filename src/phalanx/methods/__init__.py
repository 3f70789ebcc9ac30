"""Training methods, one file each."""

from typing import Annotated

from pydantic import Field

from phalanx.methods.adaptive_smoothing import AdaptiveSmoothingTraining
from phalanx.methods.advmoe import AdvMoE
from phalanx.methods.at import AT
from phalanx.methods.base import LabelledBatch, Loss, Method, Update
from phalanx.methods.closed_ranks import ClosedRanks
from phalanx.methods.dwf import DWF
from phalanx.methods.free_at import FreeAT
from phalanx.methods.jtdmoe import JTDMoE
from phalanx.methods.rt_er import RTER
from phalanx.methods.soe import SOE
from phalanx.methods.st import ST
from phalanx.methods.trades import TRADES

AnyMethod = Annotated[
    ST | AT | TRADES | RTER | JTDMoE | DWF | SOE | FreeAT | AdaptiveSmoothingTraining | AdvMoE | ClosedRanks,
    Field(discriminator="name"),
]
"""The methods a recipe can name."""

METHODS: dict[
    str,
    type[ST]
    | type[AT]
    | type[TRADES]
    | type[RTER]
    | type[JTDMoE]
    | type[DWF]
    | type[SOE]
    | type[FreeAT]
    | type[AdaptiveSmoothingTraining]
    | type[AdvMoE]
    | type[ClosedRanks],
] = {
    "adaptive_smoothing": AdaptiveSmoothingTraining,
    "advmoe": AdvMoE,
    "at": AT,
    "closed_ranks": ClosedRanks,
    "dwf": DWF,
    "free_at": FreeAT,
    "jtdmoe": JTDMoE,
    "rt_er": RTER,
    "soe": SOE,
    "st": ST,
    "trades": TRADES,
}

__all__ = [
    "AT",
    "DWF",
    "METHODS",
    "RTER",
    "SOE",
    "ST",
    "TRADES",
    "AdaptiveSmoothingTraining",
    "AdvMoE",
    "AnyMethod",
    "ClosedRanks",
    "FreeAT",
    "JTDMoE",
    "LabelledBatch",
    "Loss",
    "Method",
    "Update",
]
