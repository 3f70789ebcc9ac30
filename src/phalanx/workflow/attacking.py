"""Attack a run's test images and keep the adversarial ones, judged again from the files they were written to."""

# N images, C channels, H height, W width

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from phalanx.config import EvaluationConfig, RunConfig
from phalanx.data import Batch, ImageSet, load_data
from phalanx.errors import CorruptError, HonestyError, InputError
from phalanx.evaluation.again import judged_in, other_size
from phalanx.evaluation.halving import Halving
from phalanx.evaluation.protocols import Member, protocol
from phalanx.evaluation.rows import attack_rows
from phalanx.loading import to_plain
from phalanx.models import load
from phalanx.runs import RunFolder, Verdict, write_bytes, write_json, write_text
from phalanx.training import Reporter, Silent
from phalanx.workflow.compute import cpu_threads, pick_device
from phalanx.workflow.identity import made_of, refuse_other_model
from phalanx.workflow.signals import stopped_by_signals
from phalanx.workflow.training import refuse_other_data, require_finished, run_config

IMAGES_NAME = "adversarial.npz"
TABLE_NAME = "verdicts.csv"
RECORD_NAME = "verdicts.json"
PICTURES_NAME = "png"
RECORD_SCHEMA = 1


@dataclass(frozen=True)
class Attacked:
    """What an attack did."""

    folder: Path
    attack: str
    n: int
    clean_correct: int
    held: int
    close: tuple[int, ...]
    """Ids of images whose prediction, read back from the file, differs by rounding alone."""


@dataclass(frozen=True)
class _Found:
    """Every image after the attack, in the order of the set."""

    x_adv: NDArray[np.float32]
    """(N, C, H, W) in [0, 1]."""
    predicted: NDArray[np.int64]
    clean_predicted: NDArray[np.int64]
    rows: tuple[Verdict, ...]


def attack_run(
    run: Path, attack: str, folder: Path, config: EvaluationConfig, pictures: int, reporter: Reporter | None = None
) -> Attacked:
    """Attacks a finished run's test images, those that are wrong already left as they are, and writes into `folder`:

    `adversarial.npz` (x_adv float32, y, ids, predicted, clean_predicted), `verdicts.csv` and `verdicts.json`, the first
    `pictures` images as 8-bit PNGs, and a manifest of sha256 sums. The file is then read back and judged anew in
    batches of another size. Of `config` n, weights and batch_size count; verdicts are those of `evaluate_run`.

    Raises InputError as `evaluate_run`, and unless `attack` names one attack; HonestyError if a verdict is not
    reproduced from the file.
    """
    require_finished(run)
    settings, target, reporter = run_config(run), RunFolder(folder), reporter or Silent()
    # before the folder is bound to it
    member, made = _one(attack, settings), made_of([run], config.weights)
    with target.lock(), cpu_threads(settings.threads):
        target.prepare(_bound(run, attack, config, settings, pictures))
        if target.status() == "finished":
            target.verify()
            return _recorded(target, made)
        with target.records_outcome(), stopped_by_signals("the same command starts again"):
            device, data = pick_device(settings.device), load_data(settings.data)
            refuse_other_data(run, data)
            model = load(run, weights=config.weights).to(device)
            images = data.test.first(config.n)
            found = _search(model, images, member, settings.seed, config.batch_size, device, reporter)
            _write_images(target, images, found)
            _write_pictures(target, images, found, pictures)
            close = _rejudge(target, model, images, member, found.rows, config.batch_size, device)
            done = _summary(target, attack, found, close)
            _write_verdicts(target, found, done, member, made)
        target.finish()
    return done


def _bound(run: Path, attack: str, config: EvaluationConfig, settings: RunConfig, pictures: int) -> dict[str, Any]:
    return {
        "kind": "attack",
        "run": str(run),
        "attack": attack,
        "n": config.n,
        "weights": config.weights,
        "pictures": pictures,
        "threat": to_plain(settings.threat),
        "seed": settings.seed,
    }


def _one(name: str, settings: RunConfig) -> Member:
    members = protocol(name, settings.threat).members
    if len(members) != 1:
        raise InputError(f"--attack must be one attack, got {name!r}, which is {len(members)}; use phalanx evaluate")
    return members[0]


def _search(
    model: nn.Module,
    images: ImageSet,
    member: Member,
    seed: int,
    batch_size: int,
    device: torch.device,
    reporter: Reporter,
) -> _Found:
    def attacked(piece: Batch) -> tuple[tuple[Tensor, Tensor, Tensor], list[Verdict]]:
        # with the random numbers of an evaluation: the verdicts are the same
        result = member.attack.run(model, piece.x, piece.y, rng=member.streams(seed, piece.ids))
        distance = member.attack.threat.distance(result.x_adv, piece.x)
        columns = result.x_adv.cpu(), result.predicted.cpu(), result.clean_predicted.cpu()
        return columns, attack_rows(piece, member, result, distance)

    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    rows: list[Verdict] = []
    halving = Halving(reporter.notify)
    for batch in images.batches(batch_size, device):
        for columns, verdicts in halving.pieces(batch, attacked):
            parts.append(columns)
            rows += verdicts
        reporter.progress(len(rows), len(images), member.name)
    x_adv, predicted, clean = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
    return _Found(x_adv.astype(np.float32), predicted, clean, tuple(rows))


def _write_images(target: RunFolder, images: ImageSet, found: _Found) -> None:
    content = io.BytesIO()
    np.savez_compressed(
        content,
        x_adv=found.x_adv,
        y=images.labels,
        ids=images.ids,
        predicted=found.predicted,
        clean_predicted=found.clean_predicted,
    )
    write_bytes(target.resolve(IMAGES_NAME), content.getvalue())


def _write_pictures(target: RunFolder, images: ImageSet, found: _Found, count: int) -> None:
    if not count or images.shape[0] not in (1, 3):
        return
    folder = target.resolve(PICTURES_NAME)
    folder.mkdir(exist_ok=True)
    for place in range(min(count, len(images))):
        levels = np.rint(found.x_adv[place] * 255).astype(np.uint8)
        content = io.BytesIO()
        Image.fromarray(levels[0] if len(levels) == 1 else levels.transpose(1, 2, 0)).save(content, "PNG")
        name = f"{images.ids[place]:06}-is-{images.labels[place]}-seen-{found.predicted[place]}.png"
        write_bytes(folder / name, content.getvalue())


def _rejudge(
    target: RunFolder,
    model: nn.Module,
    images: ImageSet,
    member: Member,
    rows: Sequence[Verdict],
    batch_size: int,
    device: torch.device,
) -> tuple[int, ...]:
    """The ids of images that rounding alone decides otherwise. Raises HonestyError for any other difference."""
    path = target.resolve(IMAGES_NAME)
    x_adv, predicted, ids = _read(path)
    size, images_adv = other_size(batch_size), torch.from_numpy(x_adv)
    for part, batch in zip(torch.split(images_adv, size), images.batches(size), strict=True):
        if not bool(member.attack.threat.contains(part, batch.x).all()):
            raise HonestyError(f"{path}: an image is outside {member.attack.threat}; tell us how this came about")
    again = judged_in(size, model, images_adv, device)
    differs = again.differs(torch.from_numpy(predicted), torch.tensor([row.verdict == "invalid" for row in rows]))
    wrong = ids[(differs & ~again.close).numpy()]
    if len(wrong):
        raise HonestyError(
            f"{len(wrong)} of {len(ids)} images are judged otherwise when read from {path} in batches of {size} "
            f"(id {int(wrong[0])} first): the model's answer to an image depends on the batch it is in, or is random; "
            "such verdicts mean nothing"
        )
    return tuple(int(sample) for sample in ids[(differs & again.close).numpy()])


def _read(path: Path) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
    try:
        with np.load(path, allow_pickle=False) as content:
            return content["x_adv"], content["predicted"], content["ids"]
    except (ValueError, KeyError, OSError) as error:
        raise CorruptError(f"{path} cannot be read back: {error}; attack again") from None


def _summary(target: RunFolder, attack: str, found: _Found, close: Sequence[int]) -> Attacked:
    correct = sum(row.clean_predicted == row.label for row in found.rows)
    held = sum(row.verdict == "held" for row in found.rows)
    return Attacked(target.path, attack, len(found.rows), correct, held, tuple(close))


def _write_verdicts(target: RunFolder, found: _Found, done: Attacked, member: Member, made: list[str]) -> None:
    table = io.StringIO()
    lines = [asdict(row) for row in found.rows]
    writer = csv.DictWriter(table, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_text(target.resolve(TABLE_NAME), table.getvalue())
    record: dict[str, Any] = {
        "schema": RECORD_SCHEMA,
        "attack": {**member.attack.spec(), "name": done.attack},
        "made_of": made,
        "n": done.n,
        "clean_correct": done.clean_correct,
        "held": done.held,
        "close": list(done.close),
        "verdicts": lines,
    }
    write_json(target.resolve(RECORD_NAME), record)


def _recorded(target: RunFolder, made: list[str]) -> Attacked:
    record = json.loads(target.resolve(RECORD_NAME).read_bytes())
    # older folders do not say
    refuse_other_model(target.path, record.get("made_of", made) == made)
    counts = {key: record[key] for key in ("n", "clean_correct", "held")}
    return Attacked(target.path, record["attack"]["name"], **counts, close=tuple(record["close"]))
