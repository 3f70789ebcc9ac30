"""AutoAttack under its reference's names: the log, the settings, the verdicts, the state."""

from __future__ import annotations

import copy
import inspect
import re
import subprocess
import sys
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import phalanx as px
from phalanx.attacks.autoattack import VERSIONS
from phalanx.compat import AutoAttack
from phalanx.compat.settings import Settings, protocol_name
from phalanx.compat.state import State
from phalanx.data import ImageSet
from phalanx.errors import CorruptError, InputError
from phalanx.evaluation import protocol
from phalanx.runs import Ledger
from phalanx.threat import ThreatModel
from tiny import digits

EPS = 0.12


@lru_cache
def trained() -> nn.Module:
    """A network after a second of training."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
    batch = next(iter(digits().train.batches(100)))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        noisy = (batch.x + 0.2 * (torch.rand_like(batch.x) - 0.5)).clamp(0, 1)
        nn.functional.cross_entropy(model(noisy), batch.y).backward()
        optimizer.step()
    return model.eval()


def images(n: int = 24) -> tuple[Tensor, Tensor]:
    batch = next(iter(digits().test.batches(n)))
    return batch.x, batch.y


def adversary(model: nn.Module | None = None, **options: Any) -> AutoAttack:
    """With budgets that a test has time for."""
    settings = {"eps": EPS, "device": "cpu", "attacks_to_run": ["apgd-ce", "fab-t", "square"], "version": "custom"}
    made = AutoAttack(model or trained(), **{**settings, **options})
    made.apgd.n_iter, made.apgd.n_restarts = 5, 1
    made.apgd_targeted.n_iter = made.fab.n_iter = 3
    made.apgd_targeted.n_target_classes = made.fab.n_target_classes = 2
    made.square.n_queries = 20
    return made


# -- the interface -------------------------------------------------------------------------------------------------


def test_the_signatures_are_the_reference_s() -> None:
    def parameters(function: Any) -> dict[str, Any]:
        return {name: each.default for name, each in inspect.signature(function).parameters.items() if name != "self"}

    empty = inspect.Parameter.empty
    assert parameters(AutoAttack.__init__) == {
        "model": empty,
        "norm": "Linf",
        "eps": 0.3,
        "seed": None,
        "verbose": True,
        "attacks_to_run": (),
        "version": "standard",
        "is_tf_model": False,
        "device": "cuda",
        "log_path": None,
    }
    images_and_labels = {"x_orig": empty, "y_orig": empty, "bs": 250}
    assert parameters(AutoAttack.clean_accuracy) == images_and_labels
    individual = {**images_and_labels, "return_labels": False}
    assert parameters(AutoAttack.run_standard_evaluation_individual) == individual
    assert parameters(AutoAttack.run_standard_evaluation) == {**individual, "state_path": None}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_a_version_is_the_protocol_of_that_name(version: str, norm: Any) -> None:
    made = AutoAttack(trained(), norm=norm, eps=0.1, version=version, device="cpu", verbose=False)
    threat = ThreatModel(norm, 0.1)
    ours = made._settings.members(made.attacks_to_run, threat)
    assert ours == protocol(version, threat).members
    expected = {
        "standard": ["apgd-ce", "apgd-t", "fab-t", "square"],
        "plus": ["apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"],
        "rand": ["apgd-ce", "apgd-dlr"],
    }
    assert made.attacks_to_run == expected[version]


def test_the_settings_have_the_reference_s_names_and_values() -> None:
    made = AutoAttack(trained(), eps=0.1, version="plus", device="cpu", verbose=False)
    assert (made.apgd.n_restarts, made.fab.n_restarts, made.square.n_queries) == (5, 5, 5000)
    made.set_version("rand")
    assert (made.apgd.n_restarts, made.apgd.eot_iter, made.epsilon) == (1, 20, 0.1)
    made.set_version("standard")
    assert (made.apgd.n_restarts, made.apgd.eot_iter, made.fab.n_restarts) == (1, 1, 1)
    assert (made.fab.n_target_classes, made.apgd_targeted.n_target_classes) == (9, 9)
    custom = AutoAttack(trained(), version="custom", device="cpu")
    assert (custom.apgd.n_restarts, custom.fab.n_restarts, custom.attacks_to_run) == (5, 5, [])


def test_every_name_is_the_protocol_s_own() -> None:
    threat, settings = ThreatModel("Linf", EPS), Settings()
    settings.square.n_restarts, settings.apgd.eot_iter, settings.apgd_targeted.eot_iter = 2, 3, 4
    for name in ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square"):
        attack = settings.attack(name).within(threat)
        assert protocol(protocol_name(attack), threat).members[0].attack == attack


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"is_tf_model": True}, "only torch"),
        ({"version": "best"}, "version must be one of standard, plus, rand, custom"),
        ({"version": "standard", "attacks_to_run": ["square"]}, "use version='custom'"),
        ({"norm": "L7"}, "norm must be one of Linf, L2, L1, got 'L7'"),
        ({"device": "gpu"}, "device='gpu' is none that torch knows; give 'cuda' or 'cpu'"),
        ({"eps": -1, "version": "standard", "attacks_to_run": []}, "at least 0"),
    ],
)
def test_what_does_not_fit_is_said_at_once(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        adversary(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_reference_s_default_device_is_named_where_there_is_none() -> None:
    with pytest.raises(InputError, match="give device='cpu'"):
        AutoAttack(trained())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"attacks_to_run": []}, "attacks_to_run must name attacks"),
        ({"attacks_to_run": ["square", "square"]}, "each once"),
        ({"attacks_to_run": ["pgd"]}, "can name apgd-ce"),
        ({"bs": 0}, "bs must be"),
        ({"x": 2 * images(4)[0]}, r"in \[0, 1\]"),
        ({"y": images(3)[1]}, r"as many images \(N, ...\) as labels, .* and 3 labels"),
        ({"y": images(4)[1].float()}, r"integer labels \(N,\), got torch.float32 of shape \(4,\)"),
        ({"y": images(4)[1][:, None]}, r"integer labels \(N,\), got torch.int64 of shape \(4, 1\)"),
        ({"x": images(4)[0].numpy()}, "x_orig must be a torch tensor, got ndarray; convert it"),
        ({"y": images(4)[1].tolist()}, "y_orig must be a torch tensor, got list"),
        ({"x": torch.zeros(4)}, r"as many images \(N, ...\) as labels, at least one, got shape \(4,\)"),
        ({"n_iter": 0}, "apgd-ce: steps must be at least 1"),
    ],
)
def test_what_cannot_be_run_is_said_before_it_starts(change: dict[str, Any], words: str) -> None:
    made = adversary(attacks_to_run=change.get("attacks_to_run", ["apgd-ce"]), verbose=False)
    made.apgd.n_iter = change.get("n_iter", 2)
    x, y = images(4)
    if "attacks" not in words and change.keys() & {"x", "y"}:
        with pytest.raises(InputError, match=words):
            made.clean_accuracy(change.get("x", x), change.get("y", y))
    with pytest.raises(InputError, match=words):
        made.run_standard_evaluation(change.get("x", x), change.get("y", y), bs=change.get("bs", 4))


def test_a_setting_that_nothing_reads_is_refused() -> None:
    with pytest.raises(InputError, match=r"APGDSettings has no 'rho', only n_iter, n_restarts, eot_iter"):
        adversary().apgd.rho = 0.5  # type: ignore[attr-defined]


# -- what is run ---------------------------------------------------------------------------------------------------


def test_the_log_can_be_parsed_and_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x, y = images()
    made = adversary(log_path=tmp_path / "log.txt")
    x_adv = made.run_standard_evaluation(x, y, bs=10)
    assert isinstance(x_adv, Tensor)
    text = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert capsys.readouterr().out == text
    share = r"(\d+\.\d\d)%"
    (clean,) = re.findall(rf"^initial accuracy: {share}$", text, re.MULTILINE)
    after = re.findall(rf"^robust accuracy after ([A-Z-]+): {share} \(total time \d+\.\d s\)$", text, re.MULTILINE)
    (end,) = re.findall(rf"^robust accuracy: {share}$", text, re.MULTILINE)
    assert [name for name, _ in after] == ["APGD-CE", "FAB-T", "SQUARE"]
    falling = [float(clean), *(float(accuracy) for _, accuracy in after)]
    assert falling == sorted(falling, reverse=True) and falling[-1] == float(end)
    model = trained()
    assert float(clean) == round(100 * float((model(x).argmax(-1) == y).float().mean()), 2)
    assert float(end) == round(100 * float((model(x_adv).argmax(-1) == y).float().mean()), 2) < float(clean)
    assert re.search(
        r"^max Linf perturbation: 0\.12000, nan in tensor: 0, max: 1\.00000, min: 0\.00000$", text, re.MULTILINE
    )
    assert re.search(r"^using custom version including apgd-ce, fab-t, square\.$", text, re.MULTILINE)


def test_labels_are_the_answers_and_what_stands_is_unchanged() -> None:
    x, y = images()
    x_adv, labels = adversary(verbose=False).run_standard_evaluation(x, y, return_labels=True)
    answers = trained()(x_adv).argmax(-1)
    assert torch.equal(labels, answers) and labels.dtype == y.dtype
    # what was wrong from the start is not attacked, what stood is given back as it came
    clean = trained()(x).argmax(-1)
    same = (x_adv == x).flatten(1).all(1)
    assert torch.equal(same, (answers == y) | (clean != y))
    assert 0 < int(same.sum()) < len(y)


def test_silent_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    adversary(verbose=False).run_standard_evaluation(*images(6))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Sequential(trained(), nn.Softmax(-1)), "Warning: the model answers with probabilities"),
        (copy.deepcopy(trained()).train(), "Warning: the model came in training mode"),
    ],
)
def test_warnings_are_logged_even_in_silence(model: nn.Module, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    adversary(model, verbose=False, attacks_to_run=["apgd-ce"]).run_standard_evaluation(*images(6))
    assert words in capsys.readouterr().out


class _Masked(nn.Module):
    """Gradients that vanish, around a network that breaks easily."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = trained()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.detach()) + 0 * x.sum()  # type: ignore[no-any-return]


def test_square_that_finds_what_gradients_did_not_is_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    made = adversary(_Masked(), attacks_to_run=["apgd-ce", "square"], eps=0.3)
    made.square.n_queries = 100
    made.run_standard_evaluation(*images())
    assert "Warning: Square Attack has decreased the robust accuracy by" in capsys.readouterr().out
    honest = adversary(eps=0.3)
    honest.run_standard_evaluation(*images())
    assert "Square Attack has decreased" not in capsys.readouterr().out


def test_the_verdicts_are_those_of_evaluate() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 1, 8, 8), dtype=np.uint8)
    data = ImageSet(pixels, np.zeros(12, np.int64), np.arange(12, dtype=np.int64), 255)
    x = data.images(slice(None))
    labels = trained()(x).argmax(-1)
    data = ImageSet(pixels, labels.numpy(), data.ids, 255)
    made = adversary(verbose=False, eps=0.05, seed=3)
    made.run_standard_evaluation(x, labels, bs=5)
    assert made.evaluation is not None
    names = ",".join(made.evaluation.attacks)
    # a protocol of single parts is no cascade: theirs attack everything
    alone = px.evaluate(trained(), data, protocol=names, eps=0.05, seed=3)
    rows = {row.key: row for row in alone.rows}
    for row in made.evaluation.rows:
        # the loss is rounded by batch
        other = rows[row.key]
        assert (row.verdict, row.predicted, row.first_success, row.queries) == (
            other.verdict,
            other.predicted,
            other.first_success,
            other.queries,
        )
    assert made.evaluation.robust_acc == alone.robust_acc


def test_verdicts_do_not_depend_on_the_batch() -> None:
    x, y = images()
    one, many = (adversary(verbose=False).run_standard_evaluation(x, y, bs=bs) for bs in (1, 24))
    assert isinstance(one, Tensor) and isinstance(many, Tensor)
    assert torch.equal(trained()(one).argmax(-1), trained()(many).argmax(-1))
    assert torch.allclose(one, many, atol=1e-5)


def test_each_attack_alone(capsys: pytest.CaptureFixture[str]) -> None:
    x, y = images()
    made = adversary()
    found = made.run_standard_evaluation_individual(x, y, return_labels=True)
    assert list(found) == made.attacks_to_run == ["apgd-ce", "fab-t", "square"] and made.verbose
    log = capsys.readouterr().out
    for name, (x_adv, labels) in found.items():
        assert torch.equal(trained()(x_adv).argmax(-1), labels)
        accuracy = 100 * float((labels == y).float().mean())
        assert re.search(rf"robust accuracy by {name.upper()}\s+{accuracy:.2f}%\s+\(time attack: ", log)
    assert isinstance(made.run_standard_evaluation_individual(x, y)["square"], Tensor)


def test_clean_accuracy(capsys: pytest.CaptureFixture[str]) -> None:
    x, y = images()
    expected = float((trained()(x).argmax(-1) == y).double().mean())
    assert adversary().clean_accuracy(x, y, bs=7) == expected
    assert f"clean accuracy: {expected:.2%}" in capsys.readouterr().out


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_answer_is_not_right(value: float) -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([torch.full((len(x), 1), value), x.new_zeros(len(x), 9)], 1)

    x, y = images()
    assert adversary(Broken(), verbose=False).clean_accuracy(x, torch.zeros_like(y)) == 0
    with pytest.raises(InputError, match=r"labels must be in 0..9, the model's classes, got 10..10"):
        adversary(verbose=False).clean_accuracy(x, torch.full_like(y, 10))


@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes_fall_back_by_name(classes: int, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, classes))
    x, _ = images()
    made = adversary(model, attacks_to_run=["apgd-dlr", "apgd-t", "fab-t"])
    made.run_standard_evaluation(x, model(x).argmax(-1))
    assert "the margin is climbed instead" in capsys.readouterr().out
    assert made.evaluation is not None
    assert made.evaluation.attacks["apgd-t-3x2"]["targets"] == min(2, classes - 1)


def test_nothing_is_left_to_attack(capsys: pytest.CaptureFixture[str]) -> None:
    x, _ = images(6)
    made = adversary()
    x_adv = made.run_standard_evaluation(x, (trained()(x).argmax(-1) + 1) % 10)
    assert isinstance(x_adv, Tensor) and torch.equal(x_adv, x)
    log = capsys.readouterr().out
    assert "initial accuracy: 0.00%" in log and "robust accuracy: 0.00%" in log and "after" not in log


# -- the state -----------------------------------------------------------------------------------------------------


class _Stop(Exception):
    pass


def _stopped_after(batches: int, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is cut short once so many batches are written down."""
    add, left = State.add, [batches]

    def stopping(self: State, *arguments: Any) -> None:
        add(self, *arguments)
        left[0] -= 1
        if not left[0]:
            raise _Stop

    with monkeypatch.context() as context, pytest.raises(_Stop):
        context.setattr(State, "add", stopping)
        adversary(verbose=False).run_standard_evaluation(*images(), bs=8, state_path=path)


@pytest.mark.parametrize("batches", [1, 4])
def test_a_state_goes_on_and_ends_as_if_never_stopped(
    batches: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    x, y = images()
    whole = adversary(verbose=False)
    expected, labels = whole.run_standard_evaluation(x, y, bs=8, return_labels=True)
    path = tmp_path / "state.json"
    _stopped_after(batches, path, monkeypatch)
    resumed = adversary()
    found, again = resumed.run_standard_evaluation(x, y, bs=8, return_labels=True, state_path=path)
    assert torch.equal(found, expected) and torch.equal(again, labels)
    assert whole.evaluation is not None and resumed.evaluation is not None
    assert resumed.evaluation.rows == whole.evaluation.rows
    assert "robust accuracy at the time of restoring the state: " in capsys.readouterr().out
    # finished: the images are all there, nothing is attacked again
    with monkeypatch.context() as context:
        context.setattr("phalanx.attacks.Attack.run", lambda *_, **__: pytest.fail("attacked again"))
        assert torch.equal(adversary().run_standard_evaluation(x, y, bs=5, state_path=path), expected)  # type: ignore[arg-type]
    with Ledger.read(path) as ledger:
        assert len(ledger.rows()) == len(whole.evaluation.rows)


def test_a_state_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state"
    x, y = images(6)
    adversary(verbose=False).run_standard_evaluation(x, y, state_path=path)
    with pytest.raises(InputError, match="eps"):
        adversary(verbose=False, eps=0.2).run_standard_evaluation(x, y, state_path=path)
    with pytest.raises(InputError, match="data_sha256"):
        adversary(verbose=False).run_standard_evaluation(x, y.roll(1), state_path=path)
    with pytest.raises(InputError, match="seed"):
        adversary(verbose=False, seed=1).run_standard_evaluation(x, y, state_path=path)
    theirs = tmp_path / "theirs.json"
    theirs.write_text('{"_attacks_to_run": "{\'apgd-t\'}"}', encoding="utf-8")
    with pytest.raises(InputError, match="no state of Phalanx"):
        adversary(verbose=False).run_standard_evaluation(x, y, state_path=theirs)


def test_a_state_of_other_attacks_is_refused_and_one_of_fewer_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "state"
    x, y = images(12)
    first = adversary(attacks_to_run=["apgd-ce"], verbose=False)
    first.run_standard_evaluation(x, y, state_path=path)
    words = r"state is a state of apgd-5, and this call runs square-\d+; give a new name, or run apgd-5 as well"
    with pytest.raises(InputError, match=words):
        adversary(attacks_to_run=["square"], verbose=False).run_standard_evaluation(x, y, state_path=path)
    longer = adversary(attacks_to_run=["apgd-ce"], verbose=False)
    longer.apgd.n_iter = 6
    with pytest.raises(InputError, match="is a state of apgd-5, and this call runs apgd-6"):
        longer.run_standard_evaluation(x, y, state_path=path)
    both = ["apgd-ce", "square"]
    expected = adversary(attacks_to_run=both, verbose=False).run_standard_evaluation(x, y)
    found = adversary(attacks_to_run=both, verbose=False).run_standard_evaluation(x, y, state_path=path)
    assert torch.equal(found, expected)  # type: ignore[arg-type]


def test_a_lost_image_is_not_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "state"
    x, y = images()
    adversary(verbose=False).run_standard_evaluation(x, y, state_path=path)
    lost = next((tmp_path / "state.images").glob("*.safetensors"))
    lost.unlink()
    with pytest.raises(CorruptError, match="lacks the adversarial images"):
        adversary(verbose=False).run_standard_evaluation(x, y, state_path=path)


_CHILD = """
import sys
sys.path[:0] = [sys.argv[1]]
from pathlib import Path
from test_compat import adversary, images
made = adversary(verbose=False)
made.run_standard_evaluation(*images(), bs=2, state_path=Path(sys.argv[2]))
"""


@pytest.mark.slow
def test_kill_9_loses_no_verdict(tmp_path: Path) -> None:
    path, command = tmp_path / "state", [sys.executable, "-c", _CHILD, str(Path(__file__).parent)]
    child = subprocess.Popen([*command, str(path)])
    while child.poll() is None and len(list(tmp_path.glob("state.images/*.safetensors"))) < 2:
        time.sleep(0.01)
    child.kill()
    assert child.wait() == -9
    with Ledger.read(path) as ledger:
        before = {row.key: row for row in ledger.rows()}
    subprocess.run([*command, str(path)], check=True)
    whole = tmp_path / "whole"
    subprocess.run([*command, str(whole)], check=True)
    with Ledger.read(path) as resumed, Ledger.read(whole) as once:
        assert resumed.table_sha256() == once.table_sha256()
        after = {row.key: row for row in resumed.rows()}
    assert before and len(before) < len(after) and all(after[key] == row for key, row in before.items())
