"""Training methods, one file each."""

from typing import Annotated

from pydantic import Field

from phalanx.methods.at import AT
from phalanx.methods.base import LabelledBatch, Loss, Method, Update
from phalanx.methods.jtdmoe import JTDMoE
from phalanx.methods.rt_er import RTER
from phalanx.methods.st import ST
from phalanx.methods.trades import TRADES

AnyMethod = Annotated[ST | AT | TRADES | RTER | JTDMoE, Field(discriminator="name")]
"""The methods a recipe can name."""

METHODS: dict[str, type[ST] | type[AT] | type[TRADES] | type[RTER] | type[JTDMoE]] = {
    "at": AT,
    "jtdmoe": JTDMoE,
    "rt_er": RTER,
    "st": ST,
    "trades": TRADES,
}

__all__ = [
    "AT",
    "METHODS",
    "RTER",
    "ST",
    "TRADES",
    "AnyMethod",
    "JTDMoE",
    "LabelledBatch",
    "Loss",
    "Method",
    "Update",
]
