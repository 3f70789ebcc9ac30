"""Attacks: frozen dataclasses that search for a perturbation; the base judges it on the real model."""

from typing import Annotated

from pydantic import Field

from phalanx.attacks import dual_surfaces as dual_surfaces
from phalanx.attacks.apgd import APGD, APGDTargeted
from phalanx.attacks.base import Attack, AttackResult
from phalanx.attacks.black_box import labels_only, scores_only
from phalanx.attacks.carlini_wagner import CarliniWagner
from phalanx.attacks.fab import FAB
from phalanx.attacks.fgsm import FGSM, FGSMRS
from phalanx.attacks.given import Given, GivenImages
from phalanx.attacks.hopskipjump import HopSkipJump
from phalanx.attacks.joint import JointMargin
from phalanx.attacks.objectives import OBJECTIVES
from phalanx.attacks.pgd import PGD
from phalanx.attacks.rays import RayS
from phalanx.attacks.released import ReleasedAdvMoE, ReleasedAPGD, ReleasedPGD
from phalanx.attacks.routing_attacks import ExpertTransfer, RouteSteering
from phalanx.attacks.square import Square
from phalanx.attacks.surfaces import SURFACES
from phalanx.attacks.target import Climb, Target, check_answers
from phalanx.attacks.tracker import Found, Tracker

AnyAttack = Annotated[
    FGSM
    | FGSMRS
    | PGD
    | APGD
    | APGDTargeted
    | FAB
    | Square
    | RayS
    | HopSkipJump
    | CarliniWagner
    | RouteSteering
    | ExpertTransfer
    | JointMargin
    | ReleasedPGD
    | ReleasedAPGD
    | ReleasedAdvMoE,
    Field(discriminator="name"),
]
"""The attacks a recipe can name."""

__all__ = [
    "APGD",
    "FAB",
    "FGSM",
    "FGSMRS",
    "OBJECTIVES",
    "PGD",
    "SURFACES",
    "APGDTargeted",
    "AnyAttack",
    "Attack",
    "AttackResult",
    "CarliniWagner",
    "Climb",
    "ExpertTransfer",
    "Found",
    "Given",
    "GivenImages",
    "HopSkipJump",
    "JointMargin",
    "RayS",
    "ReleasedAPGD",
    "ReleasedAdvMoE",
    "ReleasedPGD",
    "RouteSteering",
    "Square",
    "Target",
    "Tracker",
    "check_answers",
    "labels_only",
    "scores_only",
]
