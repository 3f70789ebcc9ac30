"""Training methods, one file each."""

from typing import Annotated, get_args

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

METHODS: dict[str, type[Method]] = {
    method.name: method for method in sorted(get_args(get_args(AnyMethod)[0]), key=lambda method: method.name)
}
"""By the name that a recipe gives."""

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
