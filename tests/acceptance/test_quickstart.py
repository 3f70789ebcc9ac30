"""The quickstart as a user runs it, and what its numbers must be if attacks and reports are right."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from quiet import check_worst_is_below_every_component, made, rows_of

import phalanx as px
from phalanx.report import Page
from phalanx.rng import SampleRng
from phalanx.workflow import plan

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

ALPHAS = ("0.5", "0.6", "0.7", "0.8", "0.9", "1.0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quickstart")


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return made(plan("quickstart"), folder)


@pytest.fixture(scope="module")
def rows(page: Page) -> dict[str, dict[str, Any]]:
    return rows_of(page)


def test_standard_training_falls_and_adversarial_training_does_not(rows: dict[str, dict[str, Any]]) -> None:
    st, at = rows["ST"]["columns"]["worst"], rows["AT"]["columns"]["worst"]
    assert st["accuracy"] <= 0.05 and at["accuracy"] >= 0.25
    assert st["interval"][1] < at["interval"][0]
    assert rows["AT, single network"]["columns"]["worst"]["accuracy"] >= 0.25


def test_no_component_is_below_the_worst_case(rows: dict[str, dict[str, Any]]) -> None:
    check_worst_is_below_every_component(rows)


def test_all_of_the_weight_on_the_robust_half_is_the_robust_half(rows: dict[str, dict[str, Any]]) -> None:
    alone = {attack["label"]: attack["held"] for attack in rows["RT-ER"]["attacks"]}
    joined = {attack["label"]: attack["held"] for attack in rows["dual, alpha 1.0"]["attacks"]}
    # steering reads the standard half's route too, which decides nothing here
    shared = [name for name in alone if not name.startswith("steer")]
    assert len(shared) >= 6 and {name: joined[name] for name in shared} == {name: alone[name] for name in shared}
    assert rows["dual, alpha 1.0"]["clean"]["held"] == rows["RT-ER"]["clean"]["held"]


def test_half_of_the_weight_protects_hardly_more_than_none(rows: dict[str, dict[str, Any]]) -> None:
    half, standard = (rows[name]["columns"]["worst"]["accuracy"] for name in ("dual, alpha 0.5", "ST"))
    assert half <= standard + 0.1


def test_more_weight_on_the_robust_half_is_not_less_robust(rows: dict[str, dict[str, Any]]) -> None:
    worst = [rows[f"dual, alpha {alpha}"]["columns"]["worst"] for alpha in ALPHAS]
    for less, more in itertools.pairwise(worst):
        assert more["interval"][1] > less["accuracy"]
    assert worst[-1]["accuracy"] > worst[0]["interval"][1]


def test_a_stronger_attack_leaves_no_more(folder: Path, page: Page) -> None:
    del page
    model, images = px.load(folder / "at"), px.load_data("digits").test

    def robust(eps: str | float, **budget: int) -> float:
        """With the same random starts whatever the budget: an attack of more steps goes on where the other ends."""
        attack, held = px.attacks.PGD(eps=eps, **budget), 0
        for batch in images.batches(256):
            found = attack.run(model, batch.x, batch.y, rng=SampleRng(0, batch.ids))
            held += int((~(found.broken | found.invalid)).sum())
        return held / len(images)

    steps = [robust("3/16", steps=count) for count in (1, 5, 20, 50)]
    assert steps == sorted(steps, reverse=True)
    assert robust("3/16", steps=20, restarts=5) <= robust("3/16", steps=20)
    radii = [robust(eps, steps=20) for eps in (0, "1/16", "3/16", "5/16", 0.5)]
    assert radii == sorted(radii, reverse=True) and radii[-1] <= 0.01
