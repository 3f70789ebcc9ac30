"""A claim for a leaderboard: its fields, its files, and what speaks against it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from phalanx.attacks.autoattack import VERSIONS
from phalanx.compat import AutoAttack
from phalanx.data import Batch
from phalanx.errors import HonestyError, InputError
from phalanx.evaluation import Evaluation, Limits, Shard, evaluate, protocol
from phalanx.evaluation.adversarial_images import adversarial_images
from phalanx.evaluation.claim import BOARDS, Entry, missing_attacks, read_evaluation, reasons, record, write_claim
from phalanx.evaluation.eligibility import forward_passes, model_reasons
from phalanx.rng import SampleRng, derive_seed
from phalanx.routing import DualModel, Ensemble
from phalanx.runs import Verdict
from phalanx.threat import ThreatModel
from tiny import digits, mixture

THREAT = ThreatModel("Linf", "8/255")
ENTRY = Entry(
    model_id="Doe2026Mixture",
    name="A mixture",
    authors="J. Doe",
    link="https://example.org",
    venue="unpublished",
    architecture="4 x ResNet-18",
    dataset="cifar10",
    additional_data=False,
    reported=50.0,
    footnote="1M generated images.",
)


@lru_cache
def trained() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    batch = next(iter(digits().train.batches(100)))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch.x), batch.y).backward()
        optimizer.step()
    return model.eval()


def verdict(sample: int, attack: str, outcome: Any) -> Verdict:
    predicted = 0 if outcome == "held" else 1
    return Verdict(
        sample=sample,
        label=0,
        attack=attack,
        surface="whole",
        restart=0,
        verdict=outcome,
        predicted=predicted,
        clean_predicted=predicted if attack == "clean" else 0,
        flipped=None,
        loss=None,
        distance=0.0,
        queries=1,
        first_success=-1,
    )


def standard(held: int, n: int, extra: int = 0, threat: ThreatModel = THREAT) -> Evaluation:
    """Of `n` images one is wrong when clean, FAB breaks all but `held` of the others, and pgd-50 `extra` of those."""
    members = protocol("standard,pgd-50", threat).members
    rows = [verdict(sample, "clean", "held" if sample else "broken") for sample in range(n)]
    for sample in range(1, n):
        # a class that says there are ten
        rows.append(replace(verdict(sample, members[0].name, "held")))
        rows.append(verdict(sample, members[1].name, "held"))
        stands = sample <= held
        rows.append(verdict(sample, members[2].name, "held" if stands else "broken"))
        if stands:
            rows.append(verdict(sample, members[3].name, "held"))
        rows.append(verdict(sample, "pgd-50", "broken" if sample <= extra else "held"))
    rows[0] = replace(rows[0], predicted=9)
    attacks = {
        each.name: {**each.attack.spec(), "seed": 0, **({"after": list(each.after)} if each.after else {})}
        for each in members
    }
    return Evaluation("standard,pgd-50", threat, tuple(rows), None, 0.0, None, attacks=attacks)


# -- the fields ----------------------------------------------------------------------------------------------------


def test_a_claim_has_robustbench_s_fields() -> None:
    assert record(ENTRY, standard(held=4, n=8)) == {
        "link": "https://example.org",
        "name": "A mixture",
        "authors": "J. Doe",
        "additional_data": False,
        "number_forward_passes": 1,
        "dataset": "cifar10",
        "venue": "unpublished",
        "architecture": "4 x ResNet-18",
        "eps": "8/255",
        "clean_acc": "87.50",
        "reported": "50.00",
        "autoattack_acc": "50.00",
        "footnote": "1M generated images.",
    }


def test_what_other_attacks_found_is_the_external_number() -> None:
    claim = record(ENTRY, standard(held=4, n=8, extra=1))
    assert (claim["autoattack_acc"], claim["external"]) == ("50.00", "37.50")


def test_an_attack_with_another_budget_is_not_the_standard_version() -> None:
    evaluation = standard(held=4, n=8)
    assert missing_attacks(evaluation) == []
    attacks = {name: dict(spec) for name, spec in evaluation.attacks.items()}
    attacks["apgd-t-100x9"]["steps"] = 10
    del attacks["square-5000"]
    cut = replace(evaluation, attacks=attacks)
    assert missing_attacks(cut) == ["apgd-t-100x9", "square-5000"]
    assert record(ENTRY, cut)["autoattack_acc"] is None
    (line,) = (line for line in reasons(ENTRY, cut, 1) if "was not run" in line)
    assert "apgd-t-100x9, square-5000" in line


def test_the_radius_may_be_written_otherwise() -> None:
    # a ledger keeps the text of its own radius, and the number that an attack was given
    number = standard(held=2, n=4, threat=ThreatModel("Linf", 8 / 255))
    text = replace(number, threat=ThreatModel("Linf", str(8 / 255)))
    assert missing_attacks(text) == [] and record(ENTRY, text)["eps"] == "8/255"
    assert not [reason for reason in reasons(ENTRY, text, 1) if "radius" in reason]


@pytest.mark.parametrize("board", BOARDS)
def test_nothing_speaks_against_a_whole_evaluation(board: tuple[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, norm = board
    monkeypatch.setitem(BOARDS, board, (BOARDS[board][0], 6))
    whole = standard(held=4, n=6, threat=ThreatModel(norm, BOARDS[board][0]))
    assert reasons(replace(ENTRY, dataset=dataset), whole, 1) == []


@pytest.mark.parametrize(
    ("entry", "threat", "passes", "words"),
    [
        (ENTRY, THREAT, 1, "6 images were judged, the leaderboard has 10,000"),
        (replace(ENTRY, dataset="digits"), THREAT, 1, "no leaderboard for digits in Linf"),
        (ENTRY, ThreatModel("Linf", "4/255"), 1, "the radius is 4/255, that of the leaderboard is 8/255"),
        (ENTRY, THREAT, 3, "an answer takes 3 forward passes of whole networks, the entry says 1"),
    ],
)
def test_what_speaks_against_it(entry: Entry, threat: ThreatModel, passes: int, words: str) -> None:
    assert words in "\n".join(reasons(entry, standard(held=3, n=6, threat=threat), passes))


def test_a_ledger_says_whether_it_is_finished(tmp_path: Path) -> None:
    images, attacks, path = digits().test.first(4), protocol("fgsm", THREAT), tmp_path / "ledger"
    part = evaluate(trained(), images, attacks, THREAT, ledger=path, limits=Limits(shard=Shard(1, 2)))
    assert not part.finished and not read_evaluation(path).finished and " of 4" in str(read_evaluation(path))
    evaluate(trained(), images, attacks, THREAT, ledger=path)
    assert read_evaluation(path).finished


def test_an_unfinished_evaluation_is_not_eligible() -> None:
    evaluation = standard(held=4, n=6)
    cut = replace(evaluation, rows=tuple(row for row in evaluation.rows if row.key[:2] != (2, "square-5000")))
    assert "1 images have attacks left" in reasons(ENTRY, cut, 1)
    assert record(ENTRY, cut)["autoattack_acc"] == record(ENTRY, standard(held=3, n=6))["autoattack_acc"]


@pytest.mark.parametrize(("field", "value"), [("number_forward_passes", 0), ("model_id", "a/b")])
def test_an_entry_is_checked(field: str, value: Any) -> None:
    with pytest.raises(InputError, match=field):
        replace(ENTRY, **{field: value})


# -- the model -----------------------------------------------------------------------------------------------------


class _Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return trained()(x) + torch.randn(len(x), 10)  # type: ignore[no-any-return]


class _Purifying(nn.Module):
    """Moves the image before it answers."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().clone().requires_grad_()
            (gradient,) = torch.autograd.grad(trained()(leaf).logsumexp(-1).sum(), leaf)
        return trained()(x + 0.01 * gradient)  # type: ignore[no-any-return]


class _Quantising(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return trained()((8 * x).round() / 8)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("model", "words"),
    [(_Noisy(), "answers are random"), (_Purifying(), "optimisation in the forward"), (_Quantising(), "zero for 100%")],
)
def test_what_a_model_does_that_the_rules_exclude(model: nn.Module, words: str) -> None:
    batch = next(iter(digits().test.batches(16)))
    (reason,) = model_reasons(model, batch.x, batch.y)
    assert words in reason


@pytest.mark.parametrize("model", [trained(), mixture(3, 1), mixture(3, "all"), lambda x: trained()(x)])
def test_ordinary_models_are_eligible(model: Any) -> None:
    batch = next(iter(digits().test.batches(16)))
    assert model_reasons(model, batch.x, batch.y) == []


def test_forward_passes_are_counted() -> None:
    assert forward_passes(trained()) == 1
    assert forward_passes(mixture(3, 1)) == 1 and forward_passes(mixture(3, 2)) == 2
    assert forward_passes(mixture(3, "all")) == 3
    assert forward_passes(DualModel(mixture(2, 1), mixture(3, 2), 0.5)) == 3
    assert forward_passes(Ensemble([mixture(1), mixture(3, 2)])) == 3


# -- the files -----------------------------------------------------------------------------------------------------


def data() -> Batch:
    batch = next(iter(digits().test.batches(24)))
    return Batch(batch.x, batch.y, batch.ids)


@contextmanager
def small_standard(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The standard version with budgets that a test has time for."""
    small = ("apgd-5", "apgd-t-3x2", "fab-t-3x2", "square-30")
    with monkeypatch.context() as context:
        context.setitem(VERSIONS, "standard", {"Linf": small, "L2": small, "L1": small})
        yield


def test_a_ledger_becomes_a_claim_whose_files_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_standard(monkeypatch):
        ledger = tmp_path / "ledger.sqlite"
        wanted = protocol("standard", THREAT)
        found = evaluate(trained(), digits().test.first(24), wanted, THREAT, ledger=ledger, batch_size=24)
        evaluation = read_evaluation(ledger)
        assert evaluation.rows == found.rows and evaluation.robust_acc == found.robust_acc
        against = write_claim(tmp_path / "claim", ENTRY, evaluation, trained(), data())
    claim = json.loads((tmp_path / "claim" / "Doe2026Mixture.json").read_text(encoding="utf-8"))
    assert claim["autoattack_acc"] == f"{100 * found.robust_acc:.2f}" and 0 < found.robust_acc < found.clean_acc
    with np.load(tmp_path / "claim" / "Doe2026Mixture.npz", allow_pickle=False) as arrays:
        x_adv, y = torch.from_numpy(arrays["x_adv"]), torch.from_numpy(arrays["y"])
        predicted, ids = torch.from_numpy(arrays["predicted"]), torch.from_numpy(arrays["ids"])
    assert bool(THREAT.contains(x_adv, data().x).all()) and torch.equal(ids, data().ids)
    assert torch.equal(trained()(x_adv).argmax(-1), predicted)
    assert float((predicted == y).float().mean()) == pytest.approx(found.robust_acc)
    first = {row.sample for row in found.rows if row.attack == "apgd-5" and row.verdict == "broken"}
    rows = torch.tensor([sample in first for sample in ids.tolist()])
    rng = SampleRng(derive_seed(0, "apgd-5"), ids[rows])
    expected = wanted.members[0].attack.run(trained(), data().x[rows], y[rows], rng=rng).x_adv
    assert first and torch.allclose(x_adv[rows], expected, atol=1e-5)
    lines = (tmp_path / "claim" / "Doe2026Mixture.log").read_text(encoding="utf-8").splitlines()
    assert lines[0] == f"initial accuracy: {found.clean_acc:.2%}"
    assert [line.split(":")[0] for line in lines[1:5]] == [
        f"robust accuracy after {name}" for name in ("APGD-CE", "APGD-T", "FAB-T", "SQUARE")
    ]
    assert lines[4].endswith(f"{found.robust_acc:.2%}") and f"robust accuracy: {found.robust_acc:.2%}" in lines
    assert [f"not eligible because {reason}" for reason in against] == lines[7:]
    assert any("24 images were judged" in line for line in lines[7:])


def test_a_run_of_the_compatible_class_becomes_a_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, _ = data()
    with small_standard(monkeypatch):
        adversary = AutoAttack(trained(), eps="8/255", device="cpu", verbose=False)
        x_adv = adversary.run_standard_evaluation(x, y)
        assert isinstance(x_adv, Tensor) and adversary.evaluation is not None
        batch = Batch(x, y, torch.arange(len(y)))
        write_claim(tmp_path, ENTRY, adversary.evaluation, trained(), batch, x_adv)
        again = adversarial_images(trained(), batch, adversary.evaluation, batch_size=len(y))
    assert torch.allclose(again, x_adv, atol=1e-5)
    claim = json.loads((tmp_path / "Doe2026Mixture.json").read_text(encoding="utf-8"))
    assert claim["autoattack_acc"] == f"{100 * adversary.evaluation.robust_acc:.2f}"


def test_images_that_do_not_show_it_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = data()
    with small_standard(monkeypatch):
        found = evaluate(trained(), digits().test.first(24), protocol("standard", THREAT), THREAT)
        with pytest.raises(HonestyError, match=r"right about .* that the evaluation counts as broken"):
            write_claim(tmp_path, ENTRY, found, trained(), batch, batch.x)
        with pytest.raises(InputError, match="outside Linf 8/255"):
            write_claim(tmp_path, ENTRY, found, trained(), batch, (batch.x + 0.1).clamp(0, 1))
        with pytest.raises(InputError, match="is of 24 images"):
            write_claim(tmp_path, ENTRY, found, trained(), Batch(*(column[:5] for column in batch)))
    assert not list(tmp_path.iterdir())
