"""Verdicts of models whose answers are known, and ledgers that go on."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from known_answers import ATTACKED, CLEAN, FIVE, THREAT, Bright, images, two_experts
from torch import Tensor, nn

import tiny
from phalanx.attacks import FGSM, Found, Target
from phalanx.data import ImageSet
from phalanx.errors import InputError
from phalanx.evaluation import Evaluation, evaluate, protocol
from phalanx.evaluation.evaluate import Model, model_sha256
from phalanx.experts import build_expert
from phalanx.rng import SampleRng
from phalanx.routing import LinearRouter, MixtureOfExperts
from phalanx.runs import Ledger
from phalanx.threat import ThreatModel

PGD = protocol("pgd-8", THREAT)


KINDS: dict[str, Callable[[], Model]] = {
    "network": Bright,
    "mixture": two_experts,
    "callable": lambda: lambda x: Bright()(x),
}


def _verdicts(found: Evaluation, attack: str) -> dict[int, str]:
    return {row.sample: row.verdict for row in found.rows if row.attack == attack}


@pytest.mark.parametrize("name", ["fgsm", "pgd-8", "pgd-8x2", "pgd-8-margin", "fgsm-margin"])
@pytest.mark.parametrize("kind", KINDS)
def test_known_verdicts(name: str, kind: str) -> None:
    found = evaluate(KINDS[kind](), FIVE, protocol(name, THREAT), THREAT)
    assert _verdicts(found, "clean") == dict(zip(range(100, 105), CLEAN, strict=True))
    assert _verdicts(found, name) == ATTACKED
    # of five images four are right and two of these stay so: wrong ones count against both
    assert (found.n, found.clean_acc, found.robust_acc) == (5, 4 / 5, 2 / 5)
    rows = {row.sample: row for row in found.rows if row.attack == name}
    assert {sample: (row.predicted, row.clean_predicted, row.label) for sample, row in rows.items()} == {
        100: (1, 1, 1), 101: (0, 1, 1), 103: (1, 0, 0), 104: (0, 0, 0),
    }  # fmt: skip
    # every gradient points one way: the full two grey levels
    assert all(row.distance == pytest.approx(2 / 16) for row in rows.values() if row.verdict == "held")
    assert all(0 < row.distance <= 2 / 16 + 1e-6 for row in rows.values())
    assert all(row.queries >= 3 and row.surface == "whole" for row in rows.values())
    assert str(found).startswith("SA 80.0% [") and f"under {name}, Linf 2/16, n = 5" in str(found)


def test_load_and_flips_of_a_mixture() -> None:
    found = evaluate(two_experts(), FIVE, PGD, THREAT)
    # bright: the first three images
    assert found.load == pytest.approx((2 / 5, 3 / 5))
    flips = {row.sample: row.flipped for row in found.rows if row.attack == "pgd-8"}
    # crossing the threshold is what changes the expert, too
    assert flips == {100: False, 101: True, 103: True, 104: False}
    assert evaluate(Bright(), FIVE, PGD, THREAT).load is None


def test_eps_zero_is_clean_accuracy_and_eps_one_is_none() -> None:
    for eps, robust in ((0, 4 / 5), (1, 0.0)):
        threat = ThreatModel("Linf", eps)
        assert evaluate(Bright(), FIVE, protocol("pgd-8", threat), threat).robust_acc == robust


def test_robust_accuracy_is_the_worst_case_by_sample() -> None:
    found = evaluate(Bright(), FIVE, protocol("fgsm,pgd-8,pgd-8x2-margin", THREAT), THREAT)
    assert found.robust_acc == 2 / 5
    assert {row.attack for row in found.rows} == {"clean", "fgsm", "pgd-8", "pgd-8x2-margin"}
    assert len(found.rows) == 5 + 3 * 4
    low, high = found.robust_interval
    # Wilson for 2 of 5: (0.4 + z^2/10 -+ z sqrt(0.4 * 0.6/5 + z^2/100)) / (1 + z^2/5)
    assert (low, high) == pytest.approx((0.1176, 0.7693), abs=1e-4)


class _NanWhere(nn.Module):
    """`Bright`, but not a number for images brighter than `limit` sixteenths."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.bright, self.limit = Bright(), limit

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.bright(x)
        return logits.masked_fill((16 * x.flatten(1).sum(1) > self.limit)[:, None], float("nan"))


def test_a_reproduced_attack_is_shown_and_counts_for_nothing(trained: MixtureOfExperts) -> None:
    data = tiny.digits().test
    alone = evaluate(trained, data, protocol("fgsm", THREAT), THREAT)
    beside = evaluate(trained, data, protocol("fgsm,apgd-released", THREAT), THREAT)
    assert beside.robust_acc == alone.robust_acc
    shown = {attack.attack: attack.accuracy for attack in beside.summary.attacks}
    # it would have counted
    assert shown["apgd-released"] < shown["fgsm"] == beside.robust_acc


def test_an_attack_outside_the_threat_is_shown_and_counts_for_nothing(trained: MixtureOfExperts) -> None:
    data = tiny.digits().test
    alone = evaluate(trained, data, protocol("fgsm", THREAT), THREAT)
    wider = evaluate(trained, data, protocol("fgsm,fgsm:1", THREAT), THREAT)
    assert wider.aside == ("fgsm:1",)
    assert wider.robust_acc == alone.robust_acc
    shown = {attack.attack: attack.accuracy for attack in wider.summary.attacks}
    # it would have counted
    assert shown["fgsm:1"] < shown["fgsm"] == wider.robust_acc
    # within a ball of its own, which the verdicts' distances stay in; a smaller one counts
    assert max(row.distance for row in wider.rows if row.attack == "fgsm:1") > 0.5
    smaller = evaluate(trained, data, protocol("fgsm:1/16", ThreatModel("Linf", 1)), ThreatModel("Linf", 1))
    assert smaller.aside == () and smaller.robust_acc < smaller.clean_acc
    assert max(row.distance for row in smaller.rows) <= 1 / 16 + 1e-6


def test_a_model_that_answers_nan_is_neither_right_nor_robust() -> None:
    found = evaluate(_NanWhere(-1), FIVE, PGD, THREAT)
    assert set(_verdicts(found, "clean").values()) == {"invalid"}
    assert (found.n, found.clean_acc, found.robust_acc) == (5, 0.0, 0.0)
    # finite on clean images, not on attacked ones: 8 below the threshold, 4 levels up are 12 sixteenths
    found = evaluate(_NanWhere(10), images(((4, 4), 0)), PGD, THREAT)
    assert (found.clean_acc, found.robust_acc) == (1.0, 0.0)
    assert _verdicts(found, "pgd-8") == {100: "invalid"}


SMALL = ThreatModel("Linf", "1/32")
SUITE = protocol("fgsm,pgd-3x2,pgd-3-margin", SMALL)


def _table(path: Path) -> str:
    with Ledger.read(path) as ledger:
        return ledger.table_sha256()


def test_verdicts_do_not_depend_on_the_batch_size(trained: MixtureOfExperts) -> None:
    test = tiny.digits().test.first(20)
    tables = []
    for size in (1, 7, 64):
        found = evaluate(trained, test, SUITE, SMALL, batch_size=size, seed=3)
        tables.append([(row.key, row.verdict, row.predicted, row.flipped, row.first_success) for row in found.rows])
        assert 0.2 < found.robust_acc < found.clean_acc < 1
    assert tables[0] == tables[1] == tables[2]


def test_verdicts_do_not_depend_on_the_order_of_the_images(trained: MixtureOfExperts) -> None:
    test = tiny.digits().test
    one = evaluate(trained, test, SUITE, SMALL)
    two = evaluate(trained, test.select(np.random.default_rng(0).permutation(len(test))), SUITE, SMALL)
    assert [(row.key, row.verdict, row.predicted) for row in one.rows] == [
        (row.key, row.verdict, row.predicted) for row in two.rows
    ]


def test_another_seed_is_another_search(trained: MixtureOfExperts) -> None:
    losses = [
        [row.loss for row in evaluate(trained, tiny.digits().test, SUITE, SMALL, seed=seed).rows] for seed in (0, 0, 1)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_adding_an_attack_changes_no_other_ones_numbers(trained: MixtureOfExperts) -> None:
    alone = evaluate(trained, tiny.digits().test, protocol("pgd-3x2", SMALL), SMALL)
    both = evaluate(trained, tiny.digits().test, protocol("pgd-2,pgd-3x2", SMALL), SMALL)
    assert list(alone.rows) == [row for row in both.rows if row.attack != "pgd-2"]


class _Crash(Exception):
    pass


@pytest.mark.parametrize("after", [0, 1, 3])
def test_an_interrupted_ledger_goes_on_with_what_is_missing(
    trained: MixtureOfExperts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    test = tiny.digits().test

    def crash(done: int, total: int, note: str) -> None:
        if done > 10 * after:
            raise _Crash

    whole = evaluate(trained, test, SUITE, SMALL, ledger=tmp_path / "whole", batch_size=10)
    with pytest.raises(_Crash):
        evaluate(trained, test, SUITE, SMALL, ledger=tmp_path / "part", batch_size=10, progress=crash)
    with Ledger.read(tmp_path / "part") as ledger:
        kept = ledger.rows()
    # the batch that was being reported is on disk already
    assert {row.sample for row in kept if row.attack == "clean"} == set(test.ids[: 10 * (after + 1)].tolist())
    attacked: list[int] = []
    search = FGSM.perturb

    def spy(self: FGSM, target: Target, rng: SampleRng) -> Found:
        attacked.extend(rng.keys.tolist())
        return search(self, target, rng)

    monkeypatch.setattr(FGSM, "perturb", spy)
    found = evaluate(trained, test, SUITE, SMALL, ledger=tmp_path / "part", batch_size=10)
    assert _table(tmp_path / "part") == _table(tmp_path / "whole")
    assert found.rows == whole.rows
    # only what had no verdict, and each image once
    fgsm = {row.sample for row in whole.rows if row.attack == "fgsm"}
    assert sorted(attacked) == sorted(fgsm - {row.sample for row in kept})


def test_a_finished_ledger_is_sealed_and_running_again_attacks_nothing(tmp_path: Path) -> None:
    model = Bright()
    first = evaluate(model, FIVE, PGD, THREAT, ledger=tmp_path / "ledger.sqlite")
    assert first.ledger == tmp_path / "ledger.sqlite" and (tmp_path / "ledger.sqlite.sha256").is_file()
    with Ledger.read(tmp_path / "ledger.sqlite") as ledger:
        assert ledger.rows() == list(first.rows)
        assert ledger.attacks()["pgd-8"]["steps"] == 8 and ledger.attacks()["pgd-8"]["seed"] == 0
    before = model.passes
    again = evaluate(model, FIVE, PGD, THREAT, ledger=tmp_path / "ledger.sqlite")
    # the clean pass alone
    assert model.passes == before + 1
    assert (again.rows, again.load) == (first.rows, first.load)


def test_more_attacks_and_more_images_are_added_to_a_ledger(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    evaluate(Bright(), FIVE, protocol("fgsm", THREAT), THREAT, ledger=path)
    found = evaluate(Bright(), FIVE, protocol("fgsm,pgd-8", THREAT), THREAT, ledger=path)
    assert found.rows == evaluate(Bright(), FIVE, protocol("fgsm,pgd-8", THREAT), THREAT).rows


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("model", "model_sha256"),
        ("data", "data_sha256"),
        ("eps", "eps: ledger '2/16', now '1/16'"),
        ("norm", "norm: ledger 'Linf', now 'L2'"),
        ("version", r"evaluation_version: ledger \d+, now 99"),
    ],
)
def test_a_ledger_of_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str, message: str
) -> None:
    path = tmp_path / "ledger.sqlite"
    evaluate(Bright(), FIVE, PGD, THREAT, ledger=path)
    model, data, threat = Bright(15.0 if changed == "model" else 16.0), FIVE, THREAT
    if changed == "data":
        data = images(((12, 12), 1))
    if changed in ("eps", "norm"):
        threat = ThreatModel("L2" if changed == "norm" else "Linf", "1/16" if changed == "eps" else "2/16")
    if changed == "version":
        monkeypatch.setattr(importlib.import_module("phalanx.evaluation.evaluate"), "EVALUATION_VERSION", 99)
    with pytest.raises(InputError, match=message):
        evaluate(model, data, protocol("pgd-8", threat), threat, ledger=path)


def test_a_name_cannot_mean_two_attacks_in_one_ledger(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    evaluate(Bright(), FIVE, PGD, THREAT, ledger=path)
    with pytest.raises(InputError, match=r"already has attack 'pgd-8' as .*\"seed\":0"):
        evaluate(Bright(), FIVE, PGD, THREAT, ledger=path, seed=1)
    (member,) = PGD.members
    other = replace(PGD, members=(replace(member, attack=replace(member.attack, steps=9)),))
    with pytest.raises(InputError, match="already has attack 'pgd-8'"):
        evaluate(Bright(), FIVE, other, THREAT, ledger=path)


def _digest(top_k: int | str = 1, temperature: float = 1.0, expert: type[nn.Module] = nn.ReLU) -> str:
    torch.manual_seed(0)
    experts = [nn.Sequential(nn.Flatten(), nn.Linear(64, 5), expert(), nn.Linear(5, 10)) for _ in range(2)]
    if expert is nn.ReLU:
        experts = [build_expert("mlp", num_classes=10, image_size=8, channels=1, hidden=[5]) for _ in range(2)]
    return model_sha256(MixtureOfExperts(LinearRouter((1, 8, 8), 2), experts, top_k, temperature=temperature))


def test_what_identifies_a_model() -> None:
    assert _digest() == _digest()
    # the same weights, another function
    digests = [_digest(), _digest(2), _digest(temperature=2.0), _digest(expert=nn.Tanh), _digest(expert=nn.Sigmoid)]
    assert len(set(digests)) == 5
    model = Bright()
    before = model_sha256(model)
    assert model_sha256(model.train()) == model_sha256(model.eval()) == before
    with torch.no_grad():
        model.threshold += 1e-5
    assert model_sha256(model) != before


class Scaled(nn.Module):
    """What it answers hangs on attributes, and on a buffer that is not saved."""

    def __init__(self, scale: float = 1.0, shift: float = 1.0, sides: tuple[int, ...] = (1, 2)) -> None:
        super().__init__()
        self.scale, self.sides, self._calls = scale, sides, 0
        self.register_buffer("shift", torch.tensor(shift), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._calls += 1
        margin = self.scale * (x.flatten(1).sum(1) - self.shift) / self.sides[0]
        return torch.stack([-margin, margin], 1)


def test_plain_attributes_and_unsaved_buffers_identify_a_model(tmp_path: Path) -> None:
    made = [Scaled(), Scaled(-1.0), Scaled(shift=0.5), Scaled(sides=(2, 2))]
    assert len({model_sha256(nn.Sequential(model)) for model in made}) == 4
    model = Scaled()
    before = model_sha256(model)
    evaluate(model, FIVE, PGD, THREAT, ledger=tmp_path / "ledger.sqlite")
    assert model_sha256(model) == model_sha256(model.train()) == before
    with pytest.raises(InputError, match="model_sha256"):
        evaluate(Scaled(-1.0), FIVE, PGD, THREAT, ledger=tmp_path / "ledger.sqlite")


def test_our_own_models_keep_their_fingerprints() -> None:
    """Ledgers of earlier versions go on: nothing is added to what they are bound to."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2), nn.ReLU())
    with torch.no_grad():
        model[1].weight.copy_(torch.eye(2))
        model[1].bias.zero_()
    assert model_sha256(model) == "b5f2c6ae55295cdaa4d2466f1289a59cfd4128506b69d55e6e8cfaeb172ac481"


def test_an_attack_outside_the_threat_stays_aside_when_another_call_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    both = evaluate(Bright(), FIVE, protocol("pgd-8,fgsm:12/16", THREAT), THREAT, ledger=path)
    again = evaluate(Bright(), FIVE, PGD, THREAT, ledger=path)
    assert again.aside == both.aside == ("fgsm:12/16",) and again.robust_acc == both.robust_acc == 0.4


def test_the_model_is_given_back_as_it_was() -> None:
    model = two_experts().train()
    model.experts[0].eval()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    evaluate(model, FIVE, PGD, THREAT)
    assert torch.equal(torch.get_rng_state(), before)
    assert [model.training, model.experts[0].training, model.experts[1].training] == [True, False, True]
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_progress_counts_images() -> None:
    seen: list[tuple[int, int, str]] = []
    evaluate(Bright(), FIVE, PGD, THREAT, batch_size=2, progress=lambda *call: seen.append(call))
    assert seen == [(2, 5, "pgd-8"), (4, 5, "pgd-8"), (5, 5, "pgd-8")]


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (lambda x: x.flatten(), FIVE, "logits"),
        (Bright(), images(((3, 3), 2)), r"labels must be in 0\.\.1"),
    ],
)
def test_mistakes(model: Model, data: ImageSet, message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(model, data, PGD, THREAT)
