"""The checklist, in order, and what it says of an evaluation."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from phalanx.data import ImageSet
from phalanx.errors import InputError, Interrupted
from phalanx.evaluation.halving import DoesNotFitError
from phalanx.evaluation.honesty import behaviour, gradients, ledger, radii, router, search, strangers
from phalanx.evaluation.honesty.active import active_test
from phalanx.evaluation.honesty.finding import Check, CheckResult, Finding, Status, skipped
from phalanx.evaluation.honesty.probe import Model, Probe
from phalanx.evaluation.protocols import Protocol
from phalanx.evaluation.result import Evaluation
from phalanx.nn.memory import attempted
from phalanx.runs.proofs import Proof

HONESTY_SCHEMA = 1

CHECKS: tuple[Check, ...] = (
    Check("M1", "evaluation mode", behaviour.evaluation_mode),
    Check("M2", "determinism", behaviour.determinism),
    Check("M3", "batch independence", behaviour.batch_independence),
    Check("M4", "logits, not probabilities", behaviour.logits),
    Check("M5", "zero gradients", gradients.zero_gradients),
    Check("M6", "gradient of the route", gradients.router_gradient),
    Check("M7", "finite differences", gradients.finite_differences),
    Check("M8", "quantised input", gradients.quantisation),
    Check("M9", "optimisation in the forward pass", gradients.optimisation),
    Check("M10", "number of classes", behaviour.class_count),
    Check("M11", "health of the router", router.health),
    Check("M12", "eps in pixel space", behaviour.pixel_space),
    Check("E1", "ball and range", ledger.bounds),
    Check("E2", "errors made and judged again", ledger.verified),
    Check("E3", "iterative beats single step", search.single_step),
    Check("E4", "monotone in eps", radii.monotone),
    Check("E5", "large eps reaches everything", radii.large_radius),
    Check("E6", "eps = 0 is clean accuracy", radii.zero_radius),
    Check("E7", "convergence", search.convergence),
    Check("E8", "best iterate returned", search.best_iterate),
    Check("E9", "starts and restarts", search.restarts),
    Check("E10", "black box is not better", strangers.black_box),
    Check("E11", "random noise is not better", search.random_noise),
    Check("E12", "transfer is not better", strangers.transfer),
    Check("E13", "diversity of losses", search.losses),
    Check("E14", "hard-label attack", strangers.hard_label),
    Check("E15", "active test", active_test),
    Check("E16", "planted route", router.planted_route),
    Check("E17", "consistency of components", ledger.components),
    Check("E18", "forced route", router.forced_route),
    Check("E19", "certified at most empirical", ledger.certificates),
    Check("E20", "worst case per image", ledger.worst_case),
    Check("E21", "convergence of averages", strangers.averaging),
)

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Honesty:
    """What the checks said of one evaluation."""

    samples: int
    """Images that were looked at; 0 where the checks were left out."""
    checks: tuple[CheckResult, ...]

    def with_status(self, status: Status) -> tuple[CheckResult, ...]:
        return tuple(check for check in self.checks if check.status == status)

    @property
    def failed(self) -> bool:
        """Whether the headline says nothing."""
        return bool(self.with_status("fail"))

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "schema": HONESTY_SCHEMA,
            "samples": self.samples,
            "seconds": round(sum(check.seconds for check in self.checks), 1),
            "checks": [check.to_json() for check in self.checks],
        }


LEFT_OUT = Honesty(0, ())


def samples_for(protocol: str) -> int:
    """How many images are looked at: 256 where AutoAttack or more was run, else 64."""
    thorough = {"standard", "thorough", "plus", "rand"}
    return 256 if thorough & {part.strip() for part in protocol.split(",")} else 64


def run_checks(
    model: Model,
    images: ImageSet,
    evaluation: Evaluation,
    protocol: Protocol,
    *,
    samples: int | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    batch_size: int = 64,
    attribution: Mapping[str, Any] | None = None,
    proofs: Sequence[Proof] = (),
    progress: Progress | None = None,
    checks: Sequence[Check] | None = None,
) -> Honesty:
    """Goes through the checklist once an evaluation has ended.

    Args:
        model: what was evaluated, on `device`.
        images: all images of the evaluation; `samples` of them are looked at, spread over the set.
        protocol: the attacks that were run, `seed` that of their random numbers.
        samples: by default `samples_for` the protocol; 0 leaves the checks out.
        batch_size: images that go through the model at once; halved where they do not fit the memory.
        attribution: what the evaluation's attribution says.
        proofs: certificates of the model.
        progress: called after every check with the checks done, their number and the last one's id.
        checks: by default all of `CHECKS`.

    A check that a model cannot stand (a foreign one may refuse what no attack asks of it) is skipped, with the reason.
    Raises InputError for one that needs more memory than there is: it could be the one that fails.
    """
    size = min(samples_for(protocol.name) if samples is None else samples, len(images))
    if not size:
        return LEFT_OUT
    spread = torch.linspace(0, len(images) - 1, size).round().long()
    (batch,) = images.select(spread).batches(size, device)
    probe = Probe(
        model=model,
        batch=batch,
        evaluation=evaluation,
        protocol=protocol,
        seed=seed,
        batch_size=batch_size,
        attribution=attribution,
        proofs=proofs,
    )
    return Honesty(size, look(probe, CHECKS if checks is None else checks, progress))


def look(probe: Probe, checks: Sequence[Check], progress: Progress | None = None) -> tuple[CheckResult, ...]:
    """The results of some checks, in order."""
    found = []
    for number, check in enumerate(checks):
        found.append(done(check, probe))
        if progress is not None:
            progress(number + 1, len(checks), f"honesty {check.id}")
    return tuple(found)


def done(check: Check, probe: Probe) -> CheckResult:
    """One check, timed."""
    started = time.monotonic()
    finding = _looked(check, probe)
    seconds = time.monotonic() - started
    return CheckResult(check.id, check.title, finding.status, finding.sentence, finding.evidence, seconds)


def _looked(check: Check, probe: Probe) -> Finding:
    try:
        found = attempted(partial(check.look, probe))
    except (Interrupted, DoesNotFitError):
        raise
    except Exception as error:
        # whatever a foreign model does, the evaluation stands, and the check is shown as not done
        text = " ".join(str(error).split())[:200]
        return skipped(f"it could not be run on this model: {type(error).__name__}: {text}")
    if found is None:
        raise InputError(
            f"honesty check {check.id} does not fit into the memory; free some, use device: cpu, or leave the checks "
            "out with --no-checks"
        )
    return found[0]
