"""Attacks: frozen dataclasses that search for a perturbation; the base judges it on the real model."""

from typing import Annotated

from pydantic import Field

from phalanx.attacks.base import Attack, AttackResult
from phalanx.attacks.fgsm import FGSM
from phalanx.attacks.joint import JointMargin
from phalanx.attacks.objectives import OBJECTIVES
from phalanx.attacks.pgd import PGD
from phalanx.attacks.released import ReleasedAPGD, ReleasedPGD
from phalanx.attacks.routing_attacks import RouteSteering
from phalanx.attacks.surfaces import SURFACES
from phalanx.attacks.target import Climb, Target, check_answers
from phalanx.attacks.tracker import Found, Tracker

AnyAttack = Annotated[
    FGSM | PGD | RouteSteering | JointMargin | ReleasedPGD | ReleasedAPGD, Field(discriminator="name")
]
"""The attacks a recipe can name."""

__all__ = [
    "FGSM",
    "OBJECTIVES",
    "PGD",
    "SURFACES",
    "AnyAttack",
    "Attack",
    "AttackResult",
    "Climb",
    "Found",
    "JointMargin",
    "ReleasedAPGD",
    "ReleasedPGD",
    "RouteSteering",
    "Target",
    "Tracker",
    "check_answers",
]
