"""Challenges: images that anybody made, judged on the model of an evaluation, which they can only lower."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from phalanx.attacks.given import Given, GivenImages
from phalanx.data import ImageSet, load_data
from phalanx.errors import HonestyError, InputError
from phalanx.evaluation.again import Again, judged_in, other_size
from phalanx.evaluation.evaluate import model_sha256
from phalanx.evaluation.protocols import Member
from phalanx.evaluation.rows import attack_rows
from phalanx.report.certificates import read_certificates
from phalanx.report.records import read_object
from phalanx.runs import RunFolder, Verdict, summarise, wilson
from phalanx.runs.headline import Challenge, challenges
from phalanx.runs.proofs import Contradiction, contradictions
from phalanx.workflow.compute import cpu_threads, now, pick_device
from phalanx.workflow.evaluated import Evaluated, Foreign, evaluations, find_evaluation
from phalanx.workflow.measuring import EVALUATION_NAME
from phalanx.workflow.merging import Book, merge, settle
from phalanx.workflow.signals import stopped_by_signals
from phalanx.workflow.submission import Submission, read_submission

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Standing:
    """An evaluation with everything that was submitted to it."""

    folder: Path
    n: int
    robust: int
    """Images held in the worst case, submitted images included."""
    challenges: tuple[Challenge, ...]

    def text(self) -> str:
        """Lines for a terminal."""
        head = f"{self.folder}: worst case per image {_rated(self.robust, self.n)}"
        return "\n".join([head, *(f"  {_line(done)}, on {done.spec['when']}" for done in self.challenges)])


@dataclass(frozen=True)
class Outcome:
    """What a submission did."""

    before: int
    """Images held in the worst case without it."""
    standing: Standing
    challenge: Challenge
    merged: bool
    """False if the same file had been merged under this name before."""
    contradicted: tuple[Contradiction, ...] = ()
    """Certificates of the run that its images disprove: there must be none."""

    @property
    def disproved(self) -> str:
        """How many images it broke inside their certified radius, and which certificate says what of the first."""
        count = len({each.sample for each in self.contradicted})
        return f"{count:,} certified image{'s' if count > 1 else ''} ({self.contradicted[0].text})"

    def text(self) -> str:
        """Lines for a terminal."""
        before, after = (_rated(held, self.standing.n) for held in (self.before, self.standing.robust))
        changed = f"worst case per image: {before} to {after}" if before != after else f"worst case per image: {after}"
        again = "" if self.merged else "; merged before, nothing was changed"
        lines = [f"{_line(self.challenge)}{again}", changed, f"evaluation: {self.standing.folder}"]
        return "\n".join([*lines, *([f"broke {self.disproved}"] if self.contradicted else [])])


def _line(done: Challenge) -> str:
    return (
        f"{done.attack}: {done.submitted:,} images, {done.judged:,} of samples that are right when clean; broke "
        f"{done.broken:,}, of which {done.lowered:,} had held against every attack of the protocol"
    )


def _rated(held: int, n: int) -> str:
    low, high = wilson(held, n)
    return f"{held / n if n else 0:.1%} [{low:.1%}, {high:.1%}], n = {n:,}"


def submit(
    file: Path, run: Path, name: str, evaluation: Path | None = None, *, foreign: Foreign | None = None
) -> Outcome:
    """Checks and judges the images of `file` (see `read_submission`), and merges them as "external:NAME".

    Args:
        file: an .npz file, of any origin.
        run: a run's folder, or that of an evaluation.
        name: who submits: letters, digits, ".", "_" and "-".
        evaluation: which of the run's evaluations, its folder or name; by default the only one.
        foreign: what to evaluate again, where the evaluation is of a model made elsewhere.

    Raises InputError for a file, a name or a folder that will not do, and for a model or data that are no longer those
    of the ledger; HonestyError if an image is judged otherwise in another batch size; LockedError while somebody works
    in the folder.
    """
    if not _NAME.fullmatch(name):
        raise InputError(
            f"--name must be 1 to 64 letters, digits, '.', '_' and '-', beginning with a letter or digit, got {name!r}"
        )
    folder = find_evaluation(run, evaluation)
    target = RunFolder(folder)
    with target.lock(), stopped_by_signals("nothing of this challenge is merged, or all of it; give it again"):
        settle(target)
        subject = Evaluated.of(run, folder, foreign)
        with cpu_threads(subject.settings.threads):
            return _submitted(target, subject, file, name)


def _submitted(target: RunFolder, subject: Evaluated, file: Path, name: str) -> Outcome:
    book = Book.of(target.path)
    data = load_data(subject.settings.data)
    images = data.test.first(subject.bound.get("n"))
    if images.fingerprint != book.binding.data_sha256:
        raise InputError(f"the images are no longer those that {target.path} was evaluated on; restore the data")
    taken = read_submission(file, images, book.threat)
    attack = f"external:{name}"
    if (known := book.attacks.get(attack)) is not None:
        if known.get("sha256") == taken.sha256:
            return _outcome(target.path, attack, subject, merged=False)
        raise InputError(
            f"{target.path} already has {attack!r}, of another file; what was merged stays: give another --name"
        )
    device = pick_device(subject.settings.device)
    model = subject.model(data, device)
    if model_sha256(model) != book.binding.model_sha256:
        raise InputError(f"the model is no longer the one that {target.path} was evaluated with; restore its weights")
    member = Member(attack, Given(label=name, given=GivenImages(taken.ids, taken.x_adv)).within(book.threat))
    judged = _judge(model, member, images, book, taken, _batch_size(target.path), device)
    spec = {
        **member.attack.spec(),
        "external": True,
        "sha256": taken.sha256,
        "count": len(taken.ids),
        "when": now(),
    }
    merge(target, attack, spec, judged.rows, _npz(judged))
    return _outcome(target.path, attack, subject, merged=True)


def standings(run: Path) -> list[Standing]:
    """Every evaluation of a run, or the one in the folder, with what was submitted to it.

    Raises InputError where there is none.
    """
    found = evaluations(run)
    if not found:
        raise InputError(f"{run} is not evaluated; run phalanx evaluate first")
    return [_standing(folder) for folder in found]


def _standing(folder: Path) -> Standing:
    book = Book.of(folder)
    found = summarise(book.rows, aside=book.aside, attacks=book.attacks)
    return Standing(folder, found.n, found.robust, challenges(book.rows, book.attacks, aside=book.aside))


def _outcome(folder: Path, attack: str, subject: Evaluated, *, merged: bool) -> Outcome:
    book = Book.of(folder)
    rest = {name: spec for name, spec in book.attacks.items() if name != attack}
    before = summarise([row for row in book.rows if row.attack != attack], aside=book.aside, attacks=rest)
    standing = _standing(folder)
    (own,) = (challenge for challenge in standing.challenges if challenge.attack == attack)
    certified = [found for run in subject.runs.values() for found in read_certificates(run, book.binding)]
    only = [row for row in book.rows if row.attack == attack]
    wrong = contradictions(only, book.attacks, [found.proof for found in certified])
    return Outcome(before.robust, standing, own, merged, wrong)


# -- judging -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Judged:
    rows: tuple[Verdict, ...]
    broken: Tensor
    """(b,) samples."""
    images: Tensor
    """(b, C, H, W) what broke them."""


def _judge(
    model: nn.Module, member: Member, images: ImageSet, book: Book, taken: Submission, size: int, device: torch.device
) -> _Judged:
    """The verdicts on submitted images of samples that are right when clean, the same in two batch sizes."""
    wanted = np.isin(images.ids, taken.ids.numpy()) & np.isin(images.ids, list(book.right))
    chosen = images.select(np.flatnonzero(wanted))
    rows, parts, predicted, invalid = [], [], [], []
    for batch in chosen.batches(size, device) if len(chosen) else ():
        result = member.attack.run(model, batch.x, batch.y, rng=member.streams(0, batch.ids))
        rows += attack_rows(batch, member, result, member.attack.threat.distance(result.x_adv, batch.x))
        parts.append(result.x_adv.cpu())
        predicted.append(result.predicted.cpu())
        invalid.append(result.invalid.cpu())
    if not rows:
        return _Judged((), taken.ids[:0], taken.x_adv[:0])
    x_adv, other = torch.cat(parts), other_size(size)
    again = judged_in(other, model, x_adv, device)
    _refuse_batch_dependent(again, torch.cat(predicted), torch.cat(invalid), chosen.ids, other)
    # where rounding, or another machine, decides the clean image otherwise, the recorded verdict stands
    kept = [row for row in rows if row.clean_predicted == row.label]
    broken = torch.tensor([row.clean_predicted == row.label and row.verdict != "held" for row in rows])
    return _Judged(tuple(kept), torch.from_numpy(chosen.ids)[broken], x_adv[broken])


def _refuse_batch_dependent(again: Again, predicted: Tensor, invalid: Tensor, ids: Any, size: int) -> None:
    differs = again.differs(predicted, invalid) & ~again.close
    if bool(differs.any()):
        raise HonestyError(
            f"{int(differs.sum())} of {len(ids)} images are judged otherwise in batches of {size} (sample "
            f"{int(ids[differs.numpy()][0])} first): the model's answer depends on the batch, or is random; nothing "
            "was merged"
        )


def _npz(judged: _Judged) -> bytes:
    content = io.BytesIO()
    np.savez_compressed(content, x_adv=judged.images.numpy(), ids=judged.broken.numpy())
    return content.getvalue()


def _batch_size(folder: Path) -> int:
    """What the evaluation attacked in."""
    size = read_object(folder / EVALUATION_NAME, missing="evaluate again").values.get("batch_size")
    return size if isinstance(size, int) and size > 0 else 64
