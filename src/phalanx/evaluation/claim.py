"""A claim in the form of RobustBench's leaderboards, made of an evaluation, and what speaks against it."""

# N images of the evaluation

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from phalanx.attacks.autoattack import VERSIONS, fitted
from phalanx.data import Batch
from phalanx.errors import InputError
from phalanx.evaluation import autoattack_log
from phalanx.evaluation.adversarial_images import adversarial_images, judged_again
from phalanx.evaluation.eligibility import forward_passes, model_reasons
from phalanx.evaluation.protocols import protocol
from phalanx.evaluation.result import Evaluation
from phalanx.runs import Ledger, write_bytes, write_json, write_text
from phalanx.runs.summary import aside_attacks, held_by_all, radius
from phalanx.threat import ThreatModel, parse_norm

BOARDS = {
    ("cifar10", "Linf"): ("8/255", 10_000),
    ("cifar10", "L2"): ("0.5", 10_000),
    ("cifar100", "Linf"): ("8/255", 10_000),
    ("imagenet", "Linf"): ("4/255", 5_000),
}
"""The radius of each leaderboard, and how many images it is measured on."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What only its authors know of a model; the fields are RobustBench's."""

    model_id: str
    """Name, year and first words, as in "Croce2020Reliable": names the files."""
    name: str
    """The paper's title."""
    authors: str
    link: str
    venue: str
    architecture: str
    dataset: str
    """"cifar10", "cifar100" or "imagenet"."""
    additional_data: bool
    """Whether real images beyond the training set were used; generated ones belong in the footnote."""
    number_forward_passes: int = 1
    """Of whole networks for one image: k of a top-k mixture of such."""
    reported: float | None = None
    """The robust accuracy of the paper, in per cent."""
    footnote: str | None = None

    def __post_init__(self) -> None:
        if self.number_forward_passes < 1:
            raise InputError(f"number_forward_passes must be at least 1, got {self.number_forward_passes}")
        if not self.model_id.isidentifier():
            raise InputError(f"model_id is a name such as 'Croce2020Reliable', got {self.model_id!r}")


def read_evaluation(ledger: Path) -> Evaluation:
    """The evaluation that a ledger holds. Raises InputError if there is none, CorruptError if it is damaged."""
    with Ledger.read(ledger) as book:
        bound, attacks, rows, size = book.binding(), book.attacks(), book.rows(), book.size()
    threat = ThreatModel(parse_norm(bound.norm), bound.eps)
    aside = aside_attacks(attacks, threat.norm, threat.eps)
    found = Evaluation(
        ",".join(attacks), threat, tuple(rows), None, 0.0, ledger, aside, planned=size or 0, attacks=attacks
    )
    return replace(found, finished=found.n >= found.planned and not found.summary.incomplete)


def record(entry: Entry, evaluation: Evaluation) -> dict[str, Any]:
    """The claim: RobustBench's fields, accuracies in per cent of two decimals.

    `autoattack_acc` is None unless the whole standard version was run; `external` is there if other attacks of the
    evaluation found more.
    """
    summary, standard = evaluation.summary, _standard_accuracy(evaluation)
    claim: dict[str, Any] = {
        "link": entry.link,
        "name": entry.name,
        "authors": entry.authors,
        "additional_data": entry.additional_data,
        "number_forward_passes": entry.number_forward_passes,
        "dataset": entry.dataset,
        "venue": entry.venue,
        "architecture": entry.architecture,
        "eps": _written(entry, evaluation.threat),
        "clean_acc": _percent(summary.clean_accuracy),
        "reported": None if entry.reported is None else f"{entry.reported:.2f}",
        "autoattack_acc": None if standard is None else _percent(standard),
    }
    if standard is not None and summary.robust_accuracy < standard:
        claim["external"] = _percent(summary.robust_accuracy)
    if entry.footnote is not None:
        claim["footnote"] = entry.footnote
    return claim


def _written(entry: Entry, threat: ThreatModel) -> str:
    """The radius as the leaderboard writes it, if it is that."""
    eps, _ = BOARDS.get((entry.dataset, threat.norm), (str(threat.eps), 0))
    return eps if radius(eps) == threat.epsilon else str(threat.eps)


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def missing_attacks(evaluation: Evaluation) -> list[str]:
    """The members of the standard version that were not run, or with another budget."""
    threat = evaluation.threat
    return [
        member.name
        for member in protocol("standard", threat).members
        if not _same(
            fitted(member.attack, _classes(evaluation)).spec(), evaluation.attacks.get(member.name, {}), threat
        )
    ]


def _classes(evaluation: Evaluation) -> int:
    """At least so many: of fewer than AutoAttack aims at, what its attacks are depends on them."""
    return 1 + max((max(row.label, row.predicted) for row in evaluation.rows), default=0)


def _same(wanted: dict[str, Any], found: Any, threat: ThreatModel) -> bool:
    plain = {key: found.get(key) for key in wanted}
    plain["eps"] = wanted["eps"] if radius(found.get("eps") or 0) == threat.epsilon else found.get("eps")
    return plain == wanted


def _standard_accuracy(evaluation: Evaluation) -> float | None:
    if missing_attacks(evaluation):
        return None
    names = VERSIONS["standard"][evaluation.threat.norm]
    held = held_by_all(evaluation.rows, {"standard": [(name, "whole") for name in names]})
    return held["standard"] / max(evaluation.n, 1)


def log(evaluation: Evaluation, x_adv: Tensor, x: Tensor) -> list[str]:
    """AutoAttack's log of the standard version, without times; of another evaluation clean accuracy and end only."""
    lines = [autoattack_log.initial(evaluation.clean_acc)]
    if not missing_attacks(evaluation):
        names = VERSIONS["standard"][evaluation.threat.norm]
        keys = [(name, "whole") for name in names]
        held = held_by_all(evaluation.rows, {number: keys[:number] for number in range(1, len(keys) + 1)})
        for number, name in enumerate(autoattack_log.REFERENCE_NAMES, 1):
            lines.append(autoattack_log.after(name, held[number] / max(evaluation.n, 1)))
    return [*lines, *autoattack_log.final(evaluation.threat, x_adv, x, evaluation.robust_acc)]


def reasons(entry: Entry, evaluation: Evaluation, passes: int) -> list[str]:
    """Why the claim cannot stand on a leaderboard, each to be read after "not eligible because".

    `passes` are the forward passes that the model really makes for an image.
    """
    threat, found = evaluation.threat, []
    board = BOARDS.get((entry.dataset, threat.norm))
    if board is None:
        found.append(f"there is no leaderboard for {entry.dataset} in {threat.norm}")
    else:
        eps, images = board
        if threat.epsilon != radius(eps):
            found.append(f"the radius is {threat.eps}, that of the leaderboard is {eps}")
        if evaluation.n != images:
            found.append(f"{evaluation.n:,} images were judged, the leaderboard has {images:,}")
    if missing := missing_attacks(evaluation):
        found.append(f"the standard version of AutoAttack was not run: {', '.join(missing)} missing")
    if evaluation.summary.incomplete:
        found.append(f"{evaluation.summary.incomplete:,} images have attacks left")
    if entry.number_forward_passes < passes:
        found.append(
            f"an answer takes {passes} forward passes of whole networks, the entry says {entry.number_forward_passes}"
        )
    return found


def write_claim(
    folder: Path,
    entry: Entry,
    evaluation: Evaluation,
    model: Callable[[Tensor], Any],
    data: Batch,
    x_adv: Tensor | None = None,
) -> tuple[str, ...]:
    """Writes a claim into `folder`, and returns why it is not eligible: nothing if it is.

    MODEL_ID.json holds RobustBench's fields, MODEL_ID.log AutoAttack's log and the lines "not eligible because ...",
    MODEL_ID.npz `x_adv`, `y`, `ids` and `predicted`. `data` holds all images of the evaluation, where the model is;
    `x_adv` (N, ...) are found again if not given. They are judged once more before anything is written.

    Raises HonestyError if they do not show what the evaluation says, InputError for images of something else.
    """
    if sorted(data.ids.tolist()) != sorted({row.sample for row in evaluation.rows}):
        raise InputError(f"the evaluation is of {evaluation.n} images, other than the {len(data.y)} that were given")
    x_adv = adversarial_images(model, data, evaluation) if x_adv is None else x_adv.detach().to(data.x)
    predicted = judged_again(model, data, x_adv, evaluation)
    against = (*reasons(entry, evaluation, forward_passes(model)), *model_reasons(model, data.x, data.y))
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    x_adv_array, y, ids, answers = (column.cpu().numpy() for column in (x_adv, data.y, data.ids, predicted))
    np.savez_compressed(buffer, x_adv=x_adv_array, y=y, ids=ids, predicted=answers)
    write_bytes(folder / f"{entry.model_id}.npz", buffer.getvalue())
    verdict = [f"not eligible because {reason}" for reason in against] or ["nothing found that speaks against it"]
    write_text(folder / f"{entry.model_id}.log", "\n".join([*log(evaluation, x_adv, data.x), *verdict]) + "\n")
    write_json(folder / f"{entry.model_id}.json", record(entry, evaluation))
    return against
