"""Training methods, one file each."""

from typing import Annotated

from pydantic import Field

from phalanx.methods.at import AT
from phalanx.methods.base import LabelledBatch, Loss, Method, Update
from phalanx.methods.rt_er import RTER
from phalanx.methods.st import ST
from phalanx.methods.trades import TRADES

AnyMethod = Annotated[ST | AT | TRADES | RTER, Field(discriminator="name")]
"""The methods a recipe can name."""

METHODS: dict[str, type[ST] | type[AT] | type[TRADES] | type[RTER]] = {
    "at": AT,
    "rt_er": RTER,
    "st": ST,
    "trades": TRADES,
}

__all__ = ["AT", "METHODS", "RTER", "ST", "TRADES", "AnyMethod", "LabelledBatch", "Loss", "Method", "Update"]
