"""Training methods, one file each."""

from typing import Annotated

from pydantic import Field

from phalanx.methods.at import AT
from phalanx.methods.base import LabelledBatch, Loss, Method, Update
from phalanx.methods.st import ST

AnyMethod = Annotated[ST | AT, Field(discriminator="name")]
"""The methods a recipe can name."""

METHODS: dict[str, type[ST] | type[AT]] = {"at": AT, "st": ST}

__all__ = ["AT", "METHODS", "ST", "AnyMethod", "LabelledBatch", "Loss", "Method", "Update"]
