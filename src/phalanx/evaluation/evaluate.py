"""Run a protocol and write every verdict down."""

# B batch, E experts

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from typing import Protocol as Interface

import numpy as np
import torch
from torch import Tensor, nn

from phalanx import __version__
from phalanx.attacks import Attack, AttackResult, check_answers
from phalanx.data import Batch, ImageSet
from phalanx.evaluation.protocols import Member, Protocol
from phalanx.nn import exact_fp32, frozen, preserved_rng, spec_of
from phalanx.rng import SampleRng, derive_seed
from phalanx.routing import load_per_expert, routed
from phalanx.runs import Binding, Ledger, Summary, Verdict, summarise
from phalanx.runs.canonical import canonical_json, sha256_json
from phalanx.runs.verdict import CLEAN
from phalanx.threat import ThreatModel

EVALUATION_VERSION = 1
"""Raised whenever the same model, data and protocol could get other verdicts: old ledgers are then not continued."""

Model = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found."""

    protocol: str
    threat: ThreatModel
    rows: tuple[Verdict, ...]
    load: tuple[float, ...] | None
    """Share of the clean images that each expert answers; None without a route."""
    seconds: float
    ledger: Path | None
    """The file that holds the rows; None if none was asked for."""
    aside: tuple[str, ...] = ()
    """Attacks that reproduce a published one, defects included, or are outside the threat: shown, in no headline."""

    @property
    def summary(self) -> Summary:
        return summarise(self.rows, aside=self.aside)

    @property
    def n(self) -> int:
        return self.summary.n

    @property
    def clean_acc(self) -> float:
        return self.summary.clean_accuracy

    @property
    def robust_acc(self) -> float:
        """Per sample the worst case over everything tried: held / n."""
        return self.summary.robust_accuracy

    @property
    def robust_interval(self) -> tuple[float, float]:
        """95 % Wilson interval of `robust_acc`."""
        return self.summary.robust_interval

    def __str__(self) -> str:
        summary = self.summary
        low, high = summary.robust_interval
        clean_low, clean_high = summary.clean_interval
        return (
            f"SA {summary.clean_accuracy:.1%} [{clean_low:.1%}, {clean_high:.1%}], "
            f"RA {summary.robust_accuracy:.1%} [{low:.1%}, {high:.1%}] "
            f"under {self.protocol}, {self.threat}, n = {summary.n}"
        )


class _Book(Interface):
    """Where verdicts go: a ledger, or memory."""

    def declare_attack(self, name: str, spec: Any) -> None: ...
    def done(self, attack: str, surface: str) -> set[int]: ...
    def add(self, rows: Iterable[Verdict]) -> None: ...
    def rows(self) -> list[Verdict]: ...


class _Memory:
    """A ledger that nobody keeps."""

    def __init__(self) -> None:
        self._rows: list[Verdict] = []

    def declare_attack(self, name: str, spec: Any) -> None:
        """Nothing to record."""

    def done(self, attack: str, surface: str) -> set[int]:
        return {row.sample for row in self._rows if (row.attack, row.surface) == (attack, surface)}

    def add(self, rows: Iterable[Verdict]) -> None:
        self._rows.extend(rows)

    def rows(self) -> list[Verdict]:
        return sorted(self._rows, key=lambda row: row.key)


def model_sha256(model: Model) -> str:
    """Identifies what is evaluated: how it was built, every submodule's kind and settings, all weights and buffers.

    A callable that is no module is known by its name alone: its ledger cannot tell two versions of it apart.
    """
    if not isinstance(model, nn.Module):
        return sha256_json({"callable": getattr(model, "__qualname__", type(model).__qualname__)})
    spec = spec_of(model)
    # the same weights under another top_k, temperature, alpha or activation are another model
    kinds = {name: f"{type(module).__qualname__}({module.extra_repr()})" for name, module in model.named_modules()}
    digest = hashlib.sha256(canonical_json({"spec": None if spec is None else spec.to_json(), "modules": kinds}))
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    return {
        "phalanx": __version__,
        "torch": str(torch.__version__),
        "numpy": str(np.__version__),
        "python": platform.python_version(),
    }


def _clean_rows(batch: Batch, logits: Tensor) -> list[Verdict]:
    predicted = logits.argmax(-1)
    finite = logits.isfinite().all(-1)
    columns = zip(batch.ids.tolist(), batch.y.tolist(), predicted.tolist(), finite.tolist(), strict=True)
    return [
        Verdict(
            sample=sample,
            label=label,
            attack=CLEAN,
            surface="whole",
            restart=0,
            verdict=("held" if answer == label else "broken") if sound else "invalid",
            predicted=answer,
            clean_predicted=answer,
            flipped=None,
            loss=None,
            distance=0.0,
            queries=1,
            first_success=-1,
        )
        for sample, label, answer, sound in columns
    ]


def _attack_rows(batch: Batch, member: Member, result: AttackResult, distance: Tensor) -> list[Verdict]:
    # one transfer a column: number by number, the host would wait for the device each time
    result = result._replace(**{name: column.cpu() for name, column in result._asdict().items() if column is not None})
    labels, distances = batch.y.tolist(), distance.tolist()
    rows = []
    for i, sample in enumerate(batch.ids.tolist()):
        loss = float(result.loss[i])
        rows.append(
            Verdict(
                sample=sample,
                label=labels[i],
                attack=member.name,
                surface=member.attack.surface,
                restart=int(result.restart[i]),
                verdict="invalid" if result.invalid[i] else "broken" if result.broken[i] else "held",
                predicted=int(result.predicted[i]),
                clean_predicted=int(result.clean_predicted[i]),
                flipped=None if result.flipped is None else bool(result.flipped[i]),
                loss=loss if np.isfinite(loss) else None,
                distance=distances[i],
                queries=int(result.queries[i]),
                first_success=int(result.first_success[i]),
            )
        )
    return rows


def _subset(batch: Batch, keep: Tensor) -> Batch:
    return Batch(batch.x[keep], batch.y[keep], batch.ids[keep])


def _run_member(model: Model, batch: Batch, member: Member, seed: int) -> list[Verdict]:
    attack: Attack = member.attack
    # the stream belongs to the attack's name: adding a member to a protocol changes no other member's numbers
    rng = SampleRng(derive_seed(seed, member.name), batch.ids)
    result = attack.run(model, batch.x, batch.y, rng=rng)
    assert bool(attack.threat.contains(result.x_adv, batch.x).all()), f"{member.name} left its ball"
    return _attack_rows(batch, member, result, attack.threat.distance(result.x_adv, batch.x))


@torch.no_grad()
def _clean_pass(model: Model, batch: Batch) -> tuple[list[Verdict], Tensor, Tensor | None]:
    """Rows, (B,) bool correct and finite, and the images per expert (E,)."""
    with frozen(model), exact_fp32(), preserved_rng():
        logits, route = routed(model, batch.x)
    check_answers(logits, batch.y)
    correct = (logits.argmax(-1) == batch.y) & logits.isfinite().all(-1)
    load = None if route is None else max(load_per_expert(route), key=len).double() * len(batch.y)
    return _clean_rows(batch, logits), correct, load


def evaluate(
    model: Model,
    images: ImageSet,
    protocol: Protocol,
    threat: ThreatModel,
    *,
    ledger: Path | None = None,
    batch_size: int = 64,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int, str], None] | None = None,
) -> Evaluation:
    """Clean accuracy and every member of `protocol` on every correctly classified image.

    With `ledger` each batch's verdicts are on disk before the next is attacked, and a ledger of the same model, data
    and threat is continued: only what is missing is run. The finished ledger is sealed with its sha256.
    The verdicts do not depend on `batch_size`, up to rounding.
    """
    started = time.monotonic()
    if ledger is None:
        rows, load = _fill(_Memory(), model, images, protocol, batch_size, seed, device, progress)
    else:
        binding = Binding(
            model_sha256=model_sha256(model),
            data_sha256=images.fingerprint,
            norm=threat.norm,
            eps=str(threat.eps),
            evaluation_version=EVALUATION_VERSION,
            versions=_versions(),
        )
        with Ledger.open(ledger, binding) as book:
            rows, load = _fill(book, model, images, protocol, batch_size, seed, device, progress)
            book.seal()
    seconds = time.monotonic() - started
    return Evaluation(protocol.name, threat, tuple(rows), load, seconds, ledger, protocol.aside(threat))


def _fill(
    book: _Book,
    model: Model,
    images: ImageSet,
    protocol: Protocol,
    batch_size: int,
    seed: int,
    device: torch.device | str,
    progress: Callable[[int, int, str], None] | None,
) -> tuple[list[Verdict], tuple[float, ...] | None]:
    for member in protocol.members:
        book.declare_attack(member.name, {**member.attack.spec(), "seed": seed})
    finished = {member.name: book.done(member.name, member.attack.surface) for member in protocol.members}
    clean_done = book.done(CLEAN, "whole")
    total_load: Tensor | None = None
    seen = 0
    for batch in images.batches(batch_size, device):
        clean_rows, correct, load = _clean_pass(model, batch)
        book.add(row for row in clean_rows if row.sample not in clean_done)
        if load is not None:
            total_load = load if total_load is None else total_load + load
        for member in protocol.members:
            fresh = torch.tensor([i not in finished[member.name] for i in batch.ids.tolist()], device=correct.device)
            if bool((correct & fresh).any()):
                rows = _run_member(model, _subset(batch, correct & fresh), member, seed)
                book.add(rows)
        seen += len(batch.y)
        if progress is not None:
            progress(seen, len(images), protocol.name)
    shares = None if total_load is None else tuple((total_load / total_load.sum()).tolist())
    return book.rows(), shares
