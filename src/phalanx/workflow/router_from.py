"""`model.router_from`: a mixture whose router begins as that of a run; is it a router of the same experts?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from phalanx.config import AssembledConfig, RunConfig
from phalanx.errors import InputError
from phalanx.models import read_description

ROUTER = "router"
"""What the run becomes among those that a model is made of."""


def check_made_router(run: Path, weights: Mapping[str, str]) -> None:
    """Raises InputError unless `run` is a mixture assembled of the experts in `weights`, the sha256 by part."""
    made_from: Mapping[str, str] = read_description(run).get("made_from", {})
    theirs = _experts(made_from)
    if not theirs:
        raise _refused(run, "is no mixture assembled of runs")
    _refuse_others(run, theirs, _experts(weights))


def check_planned_router(config: RunConfig, settings: RunConfig) -> AssembledConfig:
    """The same of two runs of one study that are not made yet; returns the model of `settings`."""
    assert isinstance(config.model, AssembledConfig)
    run, theirs = str(config.model.router_from), settings.model
    if not isinstance(theirs, AssembledConfig):
        raise _refused(run, "is no mixture assembled of runs")
    _refuse_others(run, _experts(theirs.made_of), _experts(config.model.made_of))
    return theirs


def _experts(made_of: Mapping[str, str]) -> dict[str, str]:
    return {part: what for part, what in made_of.items() if part.startswith("expert ")}


def _refuse_others(run: Path | str, theirs: Mapping[str, str], ours: Mapping[str, str]) -> None:
    if len(theirs) != len(ours):
        raise _refused(run, f"weighs {len(theirs)} experts, this model has {len(ours)}")
    changed = [part for part in ours if theirs[part] != ours[part]]
    if changed:
        raise _refused(run, f"weighs other experts or in another order ({changed[0]} differs)")


def _refused(run: Path | str, why: str) -> InputError:
    return InputError(f"model.router_from: {run} {why}; name an assembled run of the same experts, or leave it out")
