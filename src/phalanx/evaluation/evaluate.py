"""Run a protocol and write every verdict down."""

# B batch, E experts

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from phalanx import __version__
from phalanx.data import ImageSet
from phalanx.evaluation.books import Book, Memory
from phalanx.evaluation.budget import Limits
from phalanx.evaluation.checks import check_allowed
from phalanx.evaluation.filling import Filling, Tell, nobody
from phalanx.evaluation.protocols import Protocol
from phalanx.evaluation.result import Evaluation
from phalanx.evaluation.standing import Standing
from phalanx.nn import spec_of
from phalanx.runs import Binding, Ledger
from phalanx.runs.canonical import canonical_json, sha256_json
from phalanx.runs.summary import aside_attacks
from phalanx.threat import ThreatModel

EVALUATION_VERSION = 3
"""Raised whenever the same model, data and protocol could get other verdicts: old ledgers are then not continued."""

Model = Callable[[Tensor], Any]


def model_sha256(model: Model) -> str:
    """Identifies what is evaluated: how it was built, every submodule's kind and settings, all weights and buffers.

    The settings are what `extra_repr` says, and of a model made elsewhere also every public attribute that is a number,
    a text or a tuple of such. What a forward pass changes, such as a counter, is no setting: name it with a leading
    underscore. A callable that is no module is known by its name alone: its ledger cannot tell two versions of it
    apart.
    """
    if not isinstance(model, nn.Module):
        return sha256_json({"callable": getattr(model, "__qualname__", type(model).__qualname__)})
    spec = spec_of(model)
    # the same weights under another top_k, temperature, alpha or activation are another model
    kinds = {name: f"{type(module).__qualname__}({module.extra_repr()})" for name, module in model.named_modules()}
    digest = hashlib.sha256(canonical_json({"spec": None if spec is None else spec.to_json(), "modules": kinds}))
    state = model.state_dict()
    unsaved = {name: buffer for name, buffer in model.named_buffers() if name not in state}
    for name, tensor in {**state, **unsaved}.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    # a spec says it all; nothing is added where there is nothing, so that older ledgers go on
    if spec is None and (settings := {name: found for name, part in model.named_modules() if (found := _own(part))}):
        digest.update(canonical_json(settings))
    return digest.hexdigest()


def _own(module: nn.Module) -> dict[str, str]:
    """The plain public attributes of a module; ours, and torch's that have an `extra_repr`, say there what they are."""
    kind, (package, *_) = type(module), type(module).__module__.split(".")
    if package == "phalanx" or (package == "torch" and kind.extra_repr is not nn.Module.extra_repr):
        return {}
    public = {name: value for name, value in vars(module).items() if name[0] != "_" and name != "training"}
    return {name: repr(value) for name, value in sorted(public.items()) if _is_plain(value)}


def _is_plain(value: object) -> bool:
    return isinstance(value, bool | int | float | str) or (isinstance(value, tuple) and all(map(_is_plain, value)))


def versions() -> dict[str, str]:
    """Of the software: what a ledger records of its writers."""
    return {
        "phalanx": __version__,
        "torch": str(torch.__version__),
        "numpy": str(np.__version__),
        "python": platform.python_version(),
    }


@contextmanager
def _opened(ledger: Path | None, model: Model, images: ImageSet, threat: ThreatModel) -> Iterator[Ledger | Memory]:
    """The ledger, created or taken up again; memory where none was asked for."""
    if ledger is None:
        yield Memory()
        return
    binding = Binding(
        model_sha256=model_sha256(model),
        data_sha256=images.fingerprint,
        norm=threat.norm,
        eps=str(threat.eps),
        evaluation_version=EVALUATION_VERSION,
        versions=versions(),
    )
    with Ledger.open(ledger, binding) as book:
        yield book


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
    limits: Limits | None = None,
    allow: Collection[str] = (),
    notify: Tell = nobody,
    announce: Tell | None = None,
) -> Evaluation:
    """Clean accuracy and every member of `protocol` on every correctly classified image, those of a cascade on what
    still stands.

    With `ledger` each batch's verdicts are on disk before the next is attacked, and a ledger of the same model, data
    and threat is continued: only what is missing is run. The finished ledger of all images is sealed with its sha256.
    The verdicts do not depend on `batch_size`, up to rounding; a batch that does not fit the memory is halved.

    Args:
        limits: how far this call goes; the result then says whether it has `finished`.
        allow: "probabilities", for a model that looks as if it answered with them and does not.
        notify: hears what must be known about the model, such as random answers.
        announce: hears about how long it will take, which is then found out on the first batch.

    Raises InputError for images, labels or answers that do not fit, a model that answers with probabilities, and a
    ledger of something else.
    """
    started = time.monotonic()
    limits = limits or Limits()
    check_allowed(allow)
    own = images if limits.shard is None else limits.shard.of(images)
    with _opened(ledger, model, images, threat) as book:
        book.declare_size(len(images))
        filling = Filling(model, book, protocol, seed, limits, allow, notify, announce)
        load = filling.over(own, batch_size, device, progress)
        finished = _finished(book, protocol, images)
        rows, attacks = book.rows(), book.attacks()
        if isinstance(book, Ledger) and finished and limits.shard is None:
            book.seal()
    found = Evaluation(
        protocol.name,
        threat,
        tuple(rows),
        load,
        time.monotonic() - started,
        ledger,
        aside_attacks(attacks, threat.norm, threat.eps),
        planned=len(images),
        finished=finished,
        attacks=attacks,
    )
    if finished and found.n and not found.summary.clean_correct:
        notify(
            f"the model is right about none of {found.n:,} images, so there was nothing to attack; check the order of "
            "the classes, and that the model normalises images in [0, 1] itself"
        )
    return found


def _finished(book: Book, protocol: Protocol, images: ImageSet) -> bool:
    """Whether every image has met everything, whoever saw to it."""
    standing = Standing(protocol, book)
    return all(map(standing.finished, images.ids.tolist()))
