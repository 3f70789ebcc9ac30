"""The benchmark scripts run and write what they say. No time is asserted: a clock in a test suite only annoys."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tiny
from phalanx.attacks import Attack
from phalanx.data import ImageSet
from phalanx.evaluation.model_parts import protocol_for
from phalanx.routing import DualModel, MixtureOfExperts
from phalanx.runs import Binding, Ledger, Verdict
from phalanx.threat import ThreatModel

FOLDER = Path(__file__).parent.parent / "benchmarks"
SCRIPTS = (
    *("common", "dispatch", "dwf", "layers", "trained", "pgd", "autoattack", "rt_er", "closed_ranks", "seeds", "soft"),
    *("thorough", "ledgers", "certified", "smoothing", "explanations"),
)
KEYS = {"schema", "benchmark", "what", "settings", "rounds", "measurements", "bars", "environment"}


@pytest.fixture(scope="module")
def scripts() -> Iterator[SimpleNamespace]:
    """The scripts as modules, by name; gone from `sys.modules` afterwards, their names being anybody's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in SCRIPTS})
        for name in SCRIPTS:
            sys.modules.pop(name, None)


@pytest.fixture
def noise(scripts: SimpleNamespace) -> tuple[nn.Module, ImageSet]:
    """An untrained network of width 4, and 8 images labelled with its own answers."""
    model = scripts.dispatch.backbones(1, width=4)[0]
    pixels = np.random.default_rng(0).integers(0, 256, (8, 3, 32, 32), dtype=np.uint8)
    with torch.no_grad():
        labels = model(torch.from_numpy(pixels) / 255).argmax(-1).numpy()
    return model, ImageSet(pixels, labels, np.arange(8, dtype=np.int64), 255)


def check_shape(record: dict[str, Any]) -> None:
    assert set(record) == KEYS
    assert record["schema"] == 1
    assert {"date", "commit", "processor", "gpu", "cpus", "threads", "python", "versions"} == set(record["environment"])
    assert {"phalanx", "torch", "numpy"} <= set(record["environment"]["versions"])
    assert record["bars"]
    for bar in record["bars"]:
        assert bar["met"] == (bar["value"] <= bar["limit"] if bar["at_most"] else bar["value"] >= bar["limit"]), (
            f"{bar['what']} claims what its number does not say"
        )


# -- common --------------------------------------------------------------------------------------------------------


def test_every_variant_runs_once_untimed_and_once_a_round(scripts: SimpleNamespace) -> None:
    calls: list[str] = []
    times = scripts.common.interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert calls[:2] == ["a", "b"]
    assert calls.count("a") == calls.count("b") == 4
    assert [len(times["a"]), len(times["b"])] == [3, 3]


def test_a_ratio_is_paired_within_each_round(scripts: SimpleNamespace) -> None:
    # 2/1, 3/1, 10/2 = 2, 3, 5; the ratio of the medians would be 3/1 too, that of the means 15/4
    spread = scripts.common.ratio({"a": [2, 3, 10], "b": [1, 1, 2]}, "a", "b")
    assert (spread.median, spread.min, spread.max) == (3, 2, 5)
    # 4/1, 1/4, 6/3 = 4, 0.25, 2: the medians' ratio would be 4/3
    assert scripts.common.ratio({"a": [4, 1, 6], "b": [1, 4, 3]}, "a", "b").median == 2


@pytest.mark.parametrize(("value", "at_most", "met"), [(1.2, True, False), (0.9, True, True), (1.0, True, True)])
def test_a_bar_is_met_or_not(scripts: SimpleNamespace, value: float, at_most: bool, met: bool) -> None:
    assert scripts.common.Bar("x", value, 1.0, at_most).met is met
    assert scripts.common.Bar("x", 2 - value, 1.0, not at_most).met is met


def test_a_record_is_written_with_a_missed_bar_saying_so(
    scripts: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = scripts.common
    bars = [common.Bar("fast", 1.5, 1.25, at_most=True)]
    record = common.Record(benchmark="x", what="y", settings={}, rounds=1, measurements={}, bars=bars)
    path = common.write_record(record, tmp_path)
    check_shape(json.loads(path.read_text(encoding="utf-8")))
    assert capsys.readouterr().out == "| x | fast | 1.5 | at most 1.25 | **no** |\n"


# -- the scripts at their smallest ---------------------------------------------------------------------------------


def test_dispatch_runs(scripts: SimpleNamespace, tmp_path: Path) -> None:
    record = scripts.dispatch.measure(width=4, counts=(1, 2), batch=8, rounds=1, counted_batches=(4, 8))
    plain = json.loads(scripts.common.write_record(record, tmp_path).read_text(encoding="utf-8"))
    check_shape(plain)
    timed = plain["measurements"]["ratio_to_one_network"]
    assert list(timed) == ["1", "2"]
    assert sum(timed["2"]["group_sizes"]) == 8
    # what does not depend on the clock must hold in the smallest setting too
    steady = [bar for bar in plain["bars"] if "forward+backward" not in bar["what"]]
    assert len(steady) == 3
    assert all(bar["met"] for bar in steady)


class _OneByOne(nn.Module):
    def __init__(self, model: MixtureOfExperts, run: Any) -> None:
        super().__init__()
        self.model, self.run = model, run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.model, x)  # type: ignore[no-any-return]


def test_the_operation_count_sees_a_loop_over_images(scripts: SimpleNamespace) -> None:
    dispatch = scripts.dispatch
    model = dispatch.mixture(dispatch.backbones(2, width=4))
    looped = dispatch.operations(_OneByOne(model, dispatch.one_by_one), dispatch.images(8))
    # a ResNet-18 runs 20 convolutions, 20 BatchNorms and 17 ReLUs, each with its backward: 114 operations an image
    assert looped > 8 * 114 > dispatch.operation_limit(2)


def test_layers_runs(scripts: SimpleNamespace, tmp_path: Path) -> None:
    record = scripts.layers.measure(width=8, counts=(2, 4), batch=8, rounds=1)
    plain = json.loads(scripts.common.write_record(record, tmp_path).read_text(encoding="utf-8"))
    check_shape(plain)
    timed = plain["measurements"]["ratios"]
    assert [sum(timed[count]["group_sizes"]) for count in ("2", "4")] == [8, 8]
    assert {name: set(ratios) for name, ratios in timed["2"].items() if name != "group_sizes"} == {
        "forward": {"plain", "masked"},
        "forward+backward": {"plain", "masked"},
        "training step": {"plain", "masked"},
        "forward+backward, folded": {"plain"},
    }
    (equality,) = (bar for bar in plain["bars"] if "difference" in bar["what"])
    assert equality["met"] and len(plain["bars"]) == 3 * (2 + 2) + 1


def test_pgd_runs_and_every_evaluation_counts_the_same_images(
    scripts: SimpleNamespace, noise: tuple[nn.Module, ImageSet], tmp_path: Path
) -> None:
    pgd, (model, images) = scripts.pgd, noise
    found = pgd.compare(model, images, timed=4, judged=8, rounds=1)
    assert found["clean_accuracy"] == 1
    assert set(found["robust_accuracy"]) == {"ours", *pgd.installed()}
    assert {name for name in found["time_relative_to_ours"] if name.startswith("without")} == set(
        pgd.without_savings(model)
    )
    scaled = {"64": {"peak_mib": 100.0}, "512": {"peak_mib": 110.0, "time_per_image": scripts.common.Spread(1, 1, 1)}}
    record = pgd.record(found, scaled, 4, 8, 1)
    plain = json.loads(scripts.common.write_record(record, tmp_path).read_text(encoding="utf-8"))
    check_shape(plain)
    # 110 / 100 is above the bar of 1.05
    assert [bar["met"] for bar in plain["bars"][-2:]] == [True, False]


def test_without_a_saving_the_verdicts_are_the_same(
    scripts: SimpleNamespace, noise: tuple[nn.Module, ImageSet]
) -> None:
    pgd, (model, images) = scripts.pgd, noise
    batches = list(images.batches(8))
    expected = pgd.tally(pgd.ours(model), batches)
    assert expected.n == 8
    assert {name: pgd.tally(run, batches) for name, run in pgd.without_savings(model).items()} == dict.fromkeys(
        ("without folding", "without channels_last", "without dropping", "without all three"), expected
    )


def test_robust_means_still_correct(scripts: SimpleNamespace, noise: tuple[nn.Module, ImageSet]) -> None:
    pgd, (model, images) = scripts.pgd, noise
    batches = list(images.batches(8))
    # in a ball of radius 0 every image stays as it is, and the labels are the model's own answers
    harmless = replace(pgd.OURS, eps=0.0)
    assert pgd.tally(pgd.ours(model, harmless), batches) == (8, 8)


def test_a_probe_reports_its_own_process(
    scripts: SimpleNamespace, noise: tuple[nn.Module, ImageSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    pgd, (model, images) = scripts.pgd, noise
    monkeypatch.setattr(pgd, "BATCH", 8)
    twice = pgd.repeated(images, 17)
    assert twice.ids.tolist() == list(range(17))
    assert (twice.pixels[8:16] == images.pixels).all()
    found = pgd.probe(model, images, 16)
    assert found["seconds_per_image"] > 0
    # a process that has imported torch is far above 50 MiB and, in bytes or kibibytes read wrongly, not below 1 TiB
    assert 50 < found["peak_mib"] < 2**20


# -- autoattack ----------------------------------------------------------------------------------------------------


def test_autoattack_runs(
    scripts: SimpleNamespace, noise: tuple[nn.Module, ImageSet], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script, (model, images) = scripts.autoattack, noise
    pytest.importorskip("pyautoattack")
    threat, name = ThreatModel("Linf", "1/255"), "apgd-2,apgd-t-2x1,fab-t-2x1,square-3"
    found = {"noise, Linf": script.compare(model, images, threat, name, n=8, rounds=1)}
    _, data = script.right_images(model, images, 8)
    saved = script.savings(model, data, threat, rounds=1, steps=2)
    plain = json.loads(
        scripts.common.write_record(script.record(found, saved, name, 8, 1), tmp_path).read_text(encoding="utf-8")
    )
    check_shape(plain)
    assert [bar["at_most"] for bar in plain["bars"]] == [True] * 4
    one = plain["measurements"]["comparisons"]["noise, Linf"]
    assert (one["n"], one["clean"]) == (8, 8) and set(one["time"]) == {"apgd-ce", "apgd-t", "fab-t", "square", "total"}
    assert len(plain["measurements"]["savings"]) == 5


def test_a_cascade_attacks_what_stands_and_counts_both_ways(
    scripts: SimpleNamespace, noise: tuple[nn.Module, ImageSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    script, (model, images) = scripts.autoattack, noise
    _, data = script.right_images(model, images, 8)
    seen: list[list[int]] = []

    def breaking(*ids: int) -> Any:
        def component(batch: Any) -> Tensor:
            seen.append(batch.ids.tolist())
            return torch.tensor([i in ids for i in batch.ids.tolist()])

        return component

    found = script.in_turn({"one": script.cascade([breaking(0, 5), breaking(5, 6)], data, batch_size=4)})["one"]
    assert seen == [[0, 1, 2, 3], [4, 5, 6, 7], [1, 2, 3, 4], [6, 7]]
    assert (~found.standing).sum(1).tolist() == [2, 3]
    nothing = breaking()
    monkeypatch.setattr(script, "ours", lambda *_: [breaking(1), nothing, nothing, nothing])
    monkeypatch.setattr(script, "theirs", lambda *_: [breaking(2, 3), nothing, nothing, nothing])
    one = script.compare(model, images, ThreatModel("Linf", "1/255"), "fgsm", n=8, rounds=2)
    assert (one.lost, one.gained, one.weaker) == (2, 1, 1 / 8)
    assert (one.broken_ours[-1], one.broken_theirs[-1]) == (1, 2)


def test_without_a_saving_of_autoattack_the_search_is_the_same(
    scripts: SimpleNamespace, noise: tuple[nn.Module, ImageSet]
) -> None:
    pytest.importorskip("pyautoattack")
    script, (model, images) = scripts.autoattack, noise
    _, data = script.right_images(model, images, 4)
    weighted = script._weighted(model)
    gradients = [scripts.dispatch.input_gradient(run, data.x) for run in (model, weighted)]
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-6)
    x, slope, value = torch.rand(3, 20), torch.randn(3, 20), torch.randn(3)
    for norm in ("Linf", "L2", "L1"):
        expected = script.fab.onto_hyperplane(x, slope, value, norm)
        with script._sorted_projection():
            assert torch.allclose(script.fab.onto_hyperplane(x, slope, value, norm), expected, atol=1e-5)


def test_a_network_below_the_bar_is_not_measured(scripts: SimpleNamespace, noise: tuple[nn.Module, ImageSet]) -> None:
    model, images = noise
    wrong = ImageSet(images.pixels, (images.labels + 1) % 10, images.ids, 255)
    with pytest.raises(SystemExit, match="right about 0 of 8 images, below 75%"):
        scripts.autoattack.right_images(model, wrong, 8)


# -- rt_er ---------------------------------------------------------------------------------------------------------


def test_rt_er_runs(scripts: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scripts.rt_er, "STEPS", 1)
    record = scripts.rt_er.measure(width=4, batch=8, rounds=1, steering_steps=2)
    plain = json.loads(scripts.common.write_record(record, tmp_path).read_text(encoding="utf-8"))
    check_shape(plain)
    assert plain["settings"]["steering_steps"] == 2
    assert [bar["at_most"] for bar in plain["bars"]] == [False, True, True]
    # 131 / 49
    assert plain["measurements"]["jtdmoe_relative_to_rt_er"]["counted"] == 2.673


def test_the_step_image_by_image_is_the_same_step(scripts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    rt_er, losses = scripts.rt_er, []
    # in a ball of radius 0 no start is random, and in evaluation mode both normalise alike
    monkeypatch.setattr(rt_er, "THREAT", ThreatModel("Linf", 0.0))
    method = rt_er.RTER(preset="code", attack=rt_er.PGD(steps=1), beta=rt_er.BETA, balance=0.0).within(rt_er.THREAT)
    weights = []
    for step in (rt_er.image_by_image, lambda it: rt_er.ours(method, it)):
        it = rt_er.case(rt_er.mixture(4, 0).eval(), 8, "cpu")
        losses.append(step(it))
        weights.append(torch.cat([parameter.detach().flatten() for parameter in it.model.parameters()]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    moved = (weights[0] - weights[1]).abs()
    # Adam's first step is the sign of the gradient: where that is rounding noise, it goes either way
    assert float((moved > 1e-6).float().mean()) < 0.05


def test_neither_steering_nor_pgd_may_stop_early(scripts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    results: list[Any] = []
    run = Attack.run
    monkeypatch.setattr(Attack, "run", lambda *arguments: results.append(run(*arguments)))
    for attack in scripts.rt_er.attacks(width=4, batch=8, device="cpu", steps=3).values():
        attack()
    pgd, steering = results
    assert (pgd.first_success == -1).all() and (steering.first_success == -1).all()
    # at least the steps and the look at the end; PGD has two verdicts besides, steering four walks
    assert (pgd.queries == 3 + 1 + 2).all()
    assert (steering.queries >= 4 * (3 + 1) + 2).all()


# -- thorough ------------------------------------------------------------------------------------------------------


def test_thorough_runs(scripts: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, data = scripts.thorough, tiny.digits().test
    small = {"standard": "fgsm,pgd-2", "thorough": "fgsm,pgd-2,steer-2", "quick": "fgsm"}
    monkeypatch.setattr(script, "protocol_for", lambda name, threat, model, x: protocol_for(small[name], threat, model))
    found = script.compare(tiny.mixture(2, seed=1).eval(), data.first(20), tiny.THREAT, rounds=2)
    assert found.n == 20 and found.standing["thorough"] <= found.standing["standard"] <= found.standing["quick"]
    assert set(found.time) == {"thorough", "quick"} and set(found.broken) == {"fgsm", "pgd-2", "steer-2"}
    path = scripts.common.write_record(script.record(found, "run", tiny.THREAT, 2), tmp_path)
    check_shape(json.loads(path.read_text()))


# -- smoothing -----------------------------------------------------------------------------------------------------


def test_smoothing_runs(scripts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script, data = scripts.smoothing, tiny.digits().test.first(4)
    monkeypatch.setattr(script, "trained", lambda folder, recipe, seed, sets=(): tiny.mixture(2, seed=seed).eval())
    monkeypatch.setattr(script, "STEPS", 2)
    found = script.measure(tmp_path, data, [0, 1], [30, 40])
    assert len(found) == 2 * (len(script.SIGMAS) + 1 + len(script.ALPHAS)) + len(script.SIGMAS)
    assert all(len(runs) == 2 for runs in found.values())
    lines = script.summary(found, 4)
    assert len(lines) == len(found) - len(script.SIGMAS) and "± " in lines[0] and "s an image" in lines[0]
    record = script.record(found, 4, [0, 1], [30, 40]).stamped().to_json()
    check_shape(record)
    assert record["benchmark"] == "smoothing" and len(record["bars"]) == 4


def test_an_attack_that_leaves_the_radius_is_seen(scripts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tiny.digits().test.first(15)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with torch.no_grad():
        network[1].weight.normal_(0, 0.5)
        answers = network(data.images(slice(None))).argmax(1).numpy()
    own = ImageSet(data.pixels, answers, data.ids, data.levels)
    model = MixtureOfExperts(None, [network]).eval()
    found = scripts.smoothing.certify(model, own, 0.25, 300, "whole")[0]
    inside = scripts.smoothing.broken(model, own, found)
    assert inside["attacked"] >= 3 and inside["answered otherwise"] == 0
    monkeypatch.setattr(scripts.smoothing, "INSIDE", 4.0)
    assert scripts.smoothing.broken(model, own, found)["answered otherwise"] > 0


# -- seeds ---------------------------------------------------------------------------------------------------------


def _table(seed: int, held: int, **changed: Any) -> dict[str, Any]:
    row = {
        "label": "AT",
        "n": 50,
        "seed": seed,
        "measurement": {"norm": "Linf", "eps": "3/16", "protocol": "pgd-50"},
        "data": {"trained on": "digits", "evaluated images (sha256)": "ab"},
        "columns": {"SA": {"held": 45, "n": 50}, "RA": {"held": held, "n": 50}, "RA-E": None},
        "released_columns": {"pgd-released": {"RA": {"held": 40, "n": 50}}},
        "attacks": [],
        "outside_attacks": [],
        "reported": {},
    }
    return {
        "title": "Quickstart",
        "description": "",
        "command": "phalanx run quickstart --set seed=1",
        "reported_source": "",
        **{key: [] for key in ("columns", "attacks", "outside_attacks", "sweeps", "notices", "caveats")},
        "rows": [{**row, **changed}],
    }


def test_seeds_become_one_record_and_one_table(scripts: SimpleNamespace, tmp_path: Path) -> None:
    record, table = scripts.seeds.collect("mine", [_table(0, 20), _table(1, 22), _table(2, 24)])
    assert record.measurements == {
        "held": {"AT": {"SA": [45, 45, 45], "RA": [20, 22, 24]}},
        "released": {"AT": {"pgd-released": [40, 40, 40]}},
    }
    assert record.settings["command"] == "phalanx run quickstart --set seed=K" and record.settings["seeds"] == [0, 1, 2]
    # 20, 22 and 24 of 50 are 40, 44 and 48 %: a deviation of 4
    text = scripts.seeds.markdown(table, ["RA", "pgd-released", "RA-E"])
    assert text.splitlines()[-1] == "| AT | 44.0 ± 4.0 | 80.0 ± 0.0 | – |"
    plain = json.loads(scripts.common.write_record(record, tmp_path).read_text())
    assert plain["rounds"] == 3 and set(plain) == KEYS


def test_soft_runs(scripts: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scripts.soft, "STEPS", 1)
    record = scripts.soft.measure(width=4, batch=8, rounds=1)
    plain = json.loads(scripts.common.write_record(record, tmp_path).read_text(encoding="utf-8"))
    check_shape(plain)
    assert set(plain["measurements"]["ratio_to_plain_sum"]) == {"forward", "forward+backward", "pgd-1"}
    # the second bar, equality, does not depend on the clock
    assert [bar["at_most"] for bar in plain["bars"]] == [True, True] and plain["bars"][1]["met"]


def test_both_soft_attacks_take_every_step(scripts: SimpleNamespace) -> None:
    model, x = scripts.soft.mixture(4), scripts.dispatch.images(4)
    asked: list[int] = []
    # a folded copy has it too
    model.router.register_forward_pre_hook(lambda _, given: asked.append(len(given[0])))
    *_, attacks = scripts.soft.pairs(model, x).values()
    for attack in attacks:
        asked.clear()
        assert torch.equal(attack(), x)
        assert asked == [len(x)] * scripts.soft.STEPS


# -- dwf -----------------------------------------------------------------------------------------------------------


def test_dwf_runs(scripts: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scripts.dwf, "phase_seconds", lambda study, workers: len(study.runs) / workers)
    record = scripts.dwf.measure(width=2, batch=4, rounds=1, device="cpu", epochs=1, phases=1)
    plain = json.loads(scripts.common.write_record(record, tmp_path).read_text(encoding="utf-8"))
    check_shape(plain)
    assert plain["measurements"]["phase 1 seconds"] == [[4.0, 2.0]]
    assert [bar["at_most"] for bar in plain["bars"]] == [True, False] and plain["bars"][1]["met"]


# -- closed_ranks ---------------------------------------------------------------------------------------------------


def test_closed_ranks_runs(scripts: SimpleNamespace, tmp_path: Path) -> None:
    record = scripts.closed_ranks.measure(width=2, batch=16, rounds=1, device="cpu", fitted=64, reached=20)
    written = json.loads(scripts.common.write_record(record, tmp_path).read_text())
    check_shape(written)
    assert 1 <= written["measurements"]["mean reach"] < 2 and len(written["bars"]) == 4


# -- certified -----------------------------------------------------------------------------------------------------


def test_certified_runs_and_breaks_nothing(
    scripts: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certified = scripts.certified
    for name, value in (("STEPS", 6), ("STARTS", 1), ("SURFACES", ("whole",))):
        monkeypatch.setattr(certified, name, value)
    # each gate and each norm once, and sizes of a test
    chosen = {name: certified.SETTINGS[name] for name in ("L2, top-1", "Linf, soft")}
    sets = ("model.options.hidden=[16]", "training.epochs=8", "model.experts=2", "validation.n=10")
    record = certified.measure(tmp_path / "runs", [0], 24, chosen, (0.0,), sets)
    written = json.loads(scripts.common.write_record(record, tmp_path).read_text())
    check_shape(written)
    for row in written["measurements"]["settings"].values():
        assert row["attacked"] > 10 and row["broken"] == 0
        assert row["clean"]["mean"] >= max(at["mean"] for at in row["certified"].values()) > 0
    assert set(written["measurements"]["weight"]) == {"0.0"}
    certified.picture(written["measurements"]["weight"], tmp_path / "weight.svg")
    assert (tmp_path / "weight.svg").read_text().count("<path") > 10
    # the attacks do break what is not certified
    model = certified.trained(tmp_path / "runs", chosen["L2, top-1"].recipe, 0, (*chosen["L2, top-1"].sets, *sets))
    images = certified.load_data("digits").test.first(24)
    found = certified.certify(model, images, norm="L2")
    assert certified.broken_within(model, images, found, 4.0) > 5


# -- what is committed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dispatch", "dwf", "layers", "pgd", "rt_er", "soft"])
def test_a_committed_record_has_the_shape_and_names_no_place(name: str) -> None:
    text = (FOLDER / "results" / f"{name}.json").read_text(encoding="utf-8")
    check_shape(json.loads(text))
    assert not [part for part in ("/home", "/root", "/tmp", "/work") if part in text]


def test_the_readme_shows_the_committed_numbers(scripts: SimpleNamespace) -> None:
    assert scripts.common.results_table() in scripts.common.README.read_text(encoding="utf-8")


# -- ledgers -------------------------------------------------------------------------------------------------------


def _reading(scripts: SimpleNamespace, worst: int, **broken: int) -> Any:
    held = dict(zip(scripts.ledgers.COLUMNS, (19, 15, 12, worst), strict=True))
    return scripts.ledgers.Reading(n=20, held=held, broken=broken)


def test_ledgers_of_seeds_are_compared_pair_by_pair(scripts: SimpleNamespace) -> None:
    ledgers = scripts.ledgers
    found = {
        "one": [_reading(scripts, worst, pgd=3) for worst in (10, 12, 11)],
        "two": [_reading(scripts, worst, steer=2, pgd=1) for worst in (8, 11, 8)],
    }
    record = ledgers.record("mine", found, "two")
    (difference,) = record.measurements["paired differences of the worst case, in points"].values()
    assert difference["seeds"] == [10, 5, 15] and difference["positive"] == 3 and difference["mean"] == 10
    # t(0.975, 2) = 4.303, times 5 / sqrt(3)
    assert difference["interval"] == [pytest.approx(-2.42, abs=0.01), pytest.approx(22.42, abs=0.01)]
    lines = ledgers.table(found).splitlines()
    assert lines[2] == "| one | 95.0 ± 0.0 | 75.0 ± 0.0 | 60.0 ± 0.0 | 55.0 ± 5.0 | pgd 9 |"
    assert lines[3].endswith("| steer 6, pgd 3 |")


def test_a_ledger_is_read_by_column(scripts: SimpleNamespace, tmp_path: Path) -> None:
    members = ("apgd-100", "apgd-t-100x9", "fab-t-100x9", "square-5000")
    # which attack breaks which image; image 3 is wrong when clean
    broken = {"apgd-100": {0}, "square-5000": {1}, "steer-50": {2}, "pgd-50": {0}}
    folder = tmp_path / "seed-0" / "one.evaluation"
    binding = Binding(
        model_sha256="0" * 64, data_sha256="1" * 64, norm="Linf", eps="3/16", evaluation_version=2, versions={}
    )
    with Ledger.open(folder / "ledger.sqlite", binding) as ledger:
        ledger.declare_size(6)
        blank = {"label": 0, "surface": "whole", "restart": 0, "clean_predicted": 0, "flipped": None, "loss": None}
        blank |= {"distance": 0.0, "queries": 1, "first_success": -1}

        def row(sample: int, attack: str, fell: bool) -> Verdict:
            return Verdict(
                sample=sample, attack=attack, verdict="broken" if fell else "held", predicted=int(fell), **blank
            )

        ledger.add([row(sample, "clean", sample == 3) for sample in range(6)])
        standing = {0, 1, 2, 4, 5}
        for place, attack in enumerate((*members, "steer-50", "pgd-50")):
            after = () if attack == "pgd-50" else (*members, "steer-50")[:place]
            ledger.declare_attack(attack, {"attack": "PGD", "norm": "Linf", "eps": "3/16", "after": list(after)})
            met = {0, 1, 2, 4, 5} if attack == "pgd-50" else standing
            ledger.add([row(sample, attack, sample in broken.get(attack, ())) for sample in sorted(met)])
            standing = standing - broken.get(attack, set())
    (folder / "evaluation.json").write_text(json.dumps({"reach": {"n": 6, "reachable": 8}}))
    ((reading,),) = scripts.ledgers.collect(tmp_path, ["one"]).values()
    assert reading.n == 6 and list(reading.held.values()) == [5, 4, 3, 2]
    assert reading.broken == {**dict.fromkeys(members, 0), "apgd-100": 1, "square-5000": 1, "steer-50": 1}
    assert reading.reach == {"n": 6, "reachable": 8} and reading.blame == {}
    with pytest.raises(SystemExit, match=r"nothing evaluated in .*: seed-0/two"):
        scripts.ledgers.collect(tmp_path, ["one", "two"])


def test_the_explanations_are_means_over_seeds(
    scripts: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    explained = scripts.explanations
    models: dict[str, Any] = {name: tiny.mixture(2, 1, seed=place) for place, name in enumerate(("st", "at", "rt-er"))}
    models["jtdmoe-0.7"] = DualModel(tiny.mixture(2, 1, seed=3), tiny.mixture(2, 1, seed=4), 0.7)
    monkeypatch.setattr(explained, "load", lambda run: models[run.name])
    monkeypatch.setattr(explained, "EPS", {"Linf": "3/16"})
    monkeypatch.setattr("phalanx.workflow.as_printed._STEPS", 3)
    record = explained.measure([tmp_path / "seed-0", tmp_path / "seed-1"], tiny.digits().test, lambda _: None)
    found = record.measurements["constants"]["Linf"]
    assert list(found) == ["ST", "AT", "RT-ER", "JTDMoE, robust half"] and record.rounds == 2
    for numbers in found.values():
        # the same models as other seeds
        assert all(each["deviation"] == 0 for each in numbers.values())
        assert numbers["expert slope, gradients"]["mean"] <= numbers["expert constant, upper bound"]["mean"]
        assert 0 <= numbers["routes that hold at eps"]["mean"] <= 1
    assert "| router constant, exact |" in explained.markdown(found)
    printed = record.measurements["printed theorems"]["Linf"]
    assert printed["ST"]["reachable experts, both classes"]["broken"]["mean"] == 0
    assert explained.spread([1.0, 3.0]) == {"mean": 2.0, "deviation": 1.414}
