from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import recipe_sample as sample

from phalanx.loading.layers import completed, node_of, to_plain
from phalanx.loading.problems import KeyPath, Place
from phalanx.loading.shapes import Section
from phalanx.loading.validation import schema, validated


def problems_of(values: dict[str, Any], kind: type = sample.Recipe, known: tuple[KeyPath, ...] = ()) -> list[str]:
    tree = completed(Section(kind), node_of(values, Place("here")))
    _, problems = validated(kind, tree, known)
    return [str(problem).removeprefix("here  ") for problem in problems]


def test_a_valid_recipe_is_built_and_given_back() -> None:
    values = {
        "training": {"epochs": 3, "precision": "bf16", "milestones": {"half": 1}},
        "method": {"name": "at", "attack": {"name": "fgsm", "alpha": 1}},
        "attacks": [{"name": "pgd", "steps": 2, "step_size": 0.5}],
        "data": {"root": "x"},
        "model": {"widths": [1, 2, 3]},
    }
    value, problems = validated(sample.Recipe, node_of(values, Place("here")))
    assert problems == []
    assert value is not None
    assert type(value) is sample.Recipe
    assert value.method == sample.AT(attack=sample.FGSM(alpha=1.0))
    assert value.attacks == (sample.PGD(steps=2, step_size=0.5),)
    assert value.model.widths == (1, 2, 3)
    assert value.training.precision is sample.Precision.BF16
    assert type(value.training.milestones["half"]) is float
    assert validated(sample.Recipe, node_of(to_plain(value), Place("again"))) == (value, [])


def test_checks_behind_other_mistakes_come_to_light() -> None:
    # each of the three hides the next: a wrong type, one check, another check, the check of the whole recipe
    found = problems_of(
        {
            "training": {"epochs": 1},
            "model": {"widths": "wide", "experts": -1, "dropout": 3.0},
            "seed": -1,
        }
    )
    assert found == [
        "model.widths: must be a list, got 'wide'; write ['wide']",
        "model.experts: must be at least 1, got -1; raise it",
        "model.dropout: must be in [0, 1), got 3.0; lower it",
        "seed: must be at least 0, got -1; raise it",
    ]


def test_a_missing_key_hides_nothing_else() -> None:
    assert problems_of({"training": {"lr": "fast"}, "model": {"top_k": 9}, "method": {"name": "none"}}) == [
        "training.epochs: is required; add it",
        "training.lr: must be a number, got 'fast'",
        "model.top_k: must be in 1..experts=4, got 9; lower it",
        "method.name: must be 'st' or 'at', got 'none'; choose one of them",
    ]


def test_a_check_that_may_follow_from_another_mistake_is_not_reported() -> None:
    # with experts=8 meant, top_k=6 is right; the default of 4 is no mistake of the user's
    for experts in ({"experts": "eight"}, {"expert": 8}):
        found = problems_of({"training": {"epochs": 1}, "model": {**experts, "top_k": 6, "dropout": 2.0}})
        assert [line.split(": ")[0] for line in found] == [f"model.{next(iter(experts))}", "model.dropout"]


def test_a_misspelt_required_key_is_not_also_missing() -> None:
    assert problems_of({"training": {"epoch": 1}}) == [
        "training.epoch: no such key; did you mean 'epochs'?",
    ]


def test_what_follows_from_a_known_problem_is_not_reported() -> None:
    assert problems_of({"training": {}}, known=(("training", "epochs"),)) == []
    # the key of a list goes when one of its items was refused
    assert problems_of({"training": {}}, known=(("training", "epochs", 0),)) == []


@dataclass(frozen=True, kw_only=True)
class Inner:
    low: int = 0
    high: int = 10
    step: int = 1

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError(f"high must be at least low={self.low}, got {self.high}; raise it")
        if self.low == 5:
            raise ValueError("five is nobody's field")
        if self.low == 7:
            raise ValueError("high must be given with this; add it")
        if self.step < 1:
            raise ValueError(f"step must be at least 1, got {self.step}; raise it")


@dataclass(frozen=True, kw_only=True)
class Outer:
    need: int
    inner: Inner = field(default_factory=Inner)
    table: dict[str, Inner] = field(default_factory=dict)
    many: tuple[Inner, ...] = ()
    limit: int = 3

    def __post_init__(self) -> None:
        if self.need < 0:
            raise ValueError(f"need must be at least 0, got {self.need}; raise it")
        if self.inner.low > self.limit:
            raise ValueError(f"inner.low must be at most limit={self.limit}, got {self.inner.low}; lower it")


def test_a_check_about_a_default_is_reported_at_its_section() -> None:
    # high has its default: what is taken out for the rest to be checked is low, and nothing else of the section
    assert problems_of({"need": 1, "inner": {"low": 11, "step": 0}, "limit": "x"}, Outer) == [
        "inner.high: must be at least low=11, got 10; raise it",
        "limit: must be an integer, got 'x'",
        "inner.step: must be at least 1, got 0; raise it",
    ]


def test_a_check_about_a_default_alone_hides_nothing_around_its_section() -> None:
    assert problems_of({"need": -1, "inner": {"low": 7}}, Outer) == [
        "inner.high: must be given with this; add it",
        "need: must be at least 0, got -1; raise it",
    ]


def test_a_check_that_names_no_field_is_its_sections() -> None:
    assert problems_of({"need": 1, "inner": {"low": 5}, "limit": 9}, Outer) == [
        "inner: five is nobody's field",
    ]


def test_a_check_may_name_a_key_of_a_section_below() -> None:
    assert problems_of({"need": 1, "inner": {"low": 4}}, Outer) == [
        "inner.low: must be at most limit=3, got 4; lower it",
    ]


def test_positions_in_lists_and_tables_stay_right() -> None:
    found = problems_of(
        {"need": 1, "many": [{"low": "x"}, {"low": 5}, 3, {"hihg": 1}], "table": {"a": {}, "b": {"low": 11}}},
        Outer,
    )
    assert [line.split(": ")[0] for line in found] == [
        "table.b.high",
        "many.0.low",
        "many.1",
        "many.2",
        "many.3.hihg",
    ]


def test_nothing_right_is_no_value() -> None:
    value, problems = validated(Outer, node_of({"inner": {"low": 12}}, Place("here")))
    assert value is None
    assert [problem.key for problem in problems] == ["need", "inner.high"]


def test_the_schema_forbids_other_keys_and_explains_fields() -> None:
    found = schema(sample.Recipe)
    assert found["additionalProperties"] is False
    assert found["required"] == ["training"]
    assert all(part["additionalProperties"] is False for part in found["$defs"].values() if "properties" in part)
    assert found["$defs"]["PGD"]["properties"]["steps"] == {
        "default": 10,
        "description": "Gradient steps per example.",
        "title": "Steps",
        "type": "integer",
    }
