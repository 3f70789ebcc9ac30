from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import recipe_sample as sample

from phalanx.loading.layers import (
    BELONGS_TO,
    completed,
    layered,
    merged,
    node_of,
    overrides_node,
    to_plain,
    values_node,
)
from phalanx.loading.problems import DEFAULT, Place, RecipeErrors
from phalanx.loading.shapes import Leaf, Section, shape_of

LOW, HIGH = Place("low.yaml", 1), Place("high.yaml", 2)
ROOT = Section(sample.Recipe)


def merge(below: dict[str, Any], above: dict[str, Any]) -> object:
    return merged(ROOT, node_of(below, LOW), node_of(above, HIGH)).plain()


def test_mappings_merge_and_lists_are_replaced() -> None:
    below = {"model": {"experts": 8, "widths": [1, 2, 3]}, "training": {"milestones": {"a": 1, "b": 2}}}
    above = {"model": {"top_k": 2, "widths": [4]}, "training": {"milestones": {"b": 3}}, "seed": 5}
    assert merge(below, above) == {
        "model": {"experts": 8, "widths": [4], "top_k": 2},
        "training": {"milestones": {"a": 1, "b": 3}},
        "seed": 5,
    }


def test_another_name_replaces_a_chosen_section() -> None:
    below = {"method": {"name": "at", "beta": 3.0, "attack": {"steps": 7}}}
    assert merge(below, {"method": {"name": "st"}}) == {"method": {"name": "st"}}
    kept = {"method": {"name": "at", "beta": 1.0, "attack": {"steps": 7}}}
    assert merge(below, {"method": {"beta": 1.0}}) == kept
    assert merge(below, {"method": {"name": "at", "beta": 1.0}}) == kept


def test_another_name_replaces_a_nested_choice_only() -> None:
    below = {"method": {"name": "at", "beta": 3.0, "attack": {"name": "pgd", "steps": 7}}}
    assert merge(below, {"method": {"attack": {"name": "fgsm"}}}) == {
        "method": {"name": "at", "beta": 3.0, "attack": {"name": "fgsm"}}
    }


def test_a_name_that_chooses_nothing_replaces_nothing() -> None:
    # Data.name is text, not the discriminator of a choice
    below = {"data": {"name": "digits", "batch_size": 3}}
    assert merge(below, {"data": {"name": "cifar10"}}) == {"data": {"name": "cifar10", "batch_size": 3}}


@dataclass(frozen=True)
class Network:
    kind: str = "cnn"
    options: Mapping[str, int] = field(default_factory=dict, metadata={BELONGS_TO: "kind"})


def test_options_go_with_what_they_are_about() -> None:
    shape = Section(Network)
    below = node_of({"kind": "cnn", "options": {"width": 3}}, LOW)

    def over(above: dict[str, Any]) -> object:
        return merged(shape, below, node_of(above, HIGH)).plain()

    assert over({"kind": "mlp"}) == {"kind": "mlp"}
    assert over({"kind": "mlp", "options": {"depth": 2}}) == {"kind": "mlp", "options": {"depth": 2}}
    both = {"kind": "cnn", "options": {"width": 3, "depth": 2}}
    assert over({"kind": "cnn", "options": {"depth": 2}}) == over({"options": {"depth": 2}}) == both


def test_a_section_is_where_a_file_has_it() -> None:
    override = Place("--set", detail="model.top_k=2")
    over_file = merged(ROOT, node_of({"model": {}}, LOW), node_of({"model": {"top_k": 2}}, override))
    model = over_file.child("model")
    assert model is not None
    assert model.place == LOW
    over_default = merged(ROOT, node_of({"model": {}}, DEFAULT), node_of({"model": {}}, override)).child("model")
    assert over_default is not None
    assert over_default.place == override


def test_a_section_given_in_part_keeps_the_rest_of_its_default() -> None:
    # AT's default attack is PGD(steps=50), PGD's own default 10
    given = {"method": {"name": "at", "attack": {"step_size": 0.1}}}
    tree = completed(ROOT, node_of(given, LOW))
    assert tree.plain() == {
        "method": {"name": "at", "beta": 6.0, "attack": {"name": "pgd", "steps": 50, "step_size": 0.1}}
    }
    steps, step_size = tree.at(("method", "attack", "steps")), tree.at(("method", "attack", "step_size"))
    assert steps is not None
    assert step_size is not None
    assert (steps.place, step_size.place) == (DEFAULT, LOW)


def test_another_variant_than_the_default_takes_nothing_from_it() -> None:
    tree = completed(ROOT, node_of({"method": {"name": "st"}, "attacks": [{"name": "fgsm"}]}, LOW))
    assert tree.plain() == {"method": {"name": "st"}, "attacks": [{"name": "fgsm"}]}


def test_the_default_variant_counts_as_named() -> None:
    # the lower layer means "pgd", the default; steps must not reach "fgsm"
    below, above = (
        {"method": {"name": "at", "attack": {"steps": 3}}},
        {"method": {"attack": {"name": "fgsm"}}},
    )
    tree = layered(sample.Recipe, [node_of(below, LOW), node_of(above, HIGH)])
    attack = tree.at(("method", "attack"))
    assert attack is not None
    assert attack.plain() == {"name": "fgsm"}


def test_overrides_spell_one_tree_whatever_their_order() -> None:
    tree, problems = overrides_node(["method.attack.steps=3", "method.name=at", "seed=1", "seed=2", "data.root="])
    assert problems == []
    assert tree is not None
    assert tree.plain() == {
        "method": {"attack": {"steps": 3}, "name": "at"},
        "seed": 2,
        "data": {"root": None},
    }
    steps = tree.at(("method", "attack", "steps"))
    assert steps is not None
    assert (str(steps.place), steps.place.origin) == ("--set method.attack.steps=3", "--set")


@pytest.mark.parametrize("override", ["seed", "", "=3", "a..b=3", ".=3", "\udcff=3", "a." * 99 + "b=3"])
def test_what_is_no_key_and_value_is_explained(override: str) -> None:
    tree, problems = overrides_node([override])
    assert tree is None
    assert [problem.message for problem in problems] == ["is not KEY=VALUE; write --set section.key=value"]


def test_an_override_with_a_value_that_is_no_yaml_names_its_key() -> None:
    _, problems = overrides_node(["a.b=[1", "c=!x {}"])
    assert [str(problem).split(": ")[0] for problem in problems] == ["--set a.b=[1  a.b", "--set c=!x {}  c"]
    assert "value '[1' is not valid YAML" in str(problems[0])


def test_no_overrides_are_no_tree() -> None:
    assert overrides_node([]) == (None, [])


@dataclass(frozen=True)
class Parts:
    numbers: frozenset[int]
    where: PurePosixPath
    precision: sample.Precision
    attacks: tuple[sample.PGD, ...]
    table: dict[str, float]
    derived: int = field(init=False, default=3)


def test_plain_values_of_every_kind() -> None:
    parts = Parts(frozenset({3, 1}), PurePosixPath("a/b"), sample.Precision.BF16, (sample.PGD(steps=2),), {"x": 0.5})
    assert to_plain(parts) == {
        "numbers": [1, 3],
        "where": "a/b",
        "precision": "bf16",
        "attacks": [{"name": "pgd", "steps": 2, "step_size": "2/255"}],
        "table": {"x": 0.5},
    }


def test_what_a_recipe_cannot_hold_is_named() -> None:
    with pytest.raises(TypeError, match=r"a\.0 is b'x', a bytes"):
        to_plain({"a": [b"x"]})
    with pytest.raises(TypeError, match=r"key 3 in a is a int; keys are strings"):
        to_plain({"a": {3: 4}})


def endless() -> dict[str, Any]:
    loop: dict[str, Any] = {}
    loop["again"] = loop
    return loop


@pytest.mark.parametrize("values", [{"a": object()}, {3: 4}, {"a": "\ud800"}, {"\ud800": 1}, endless()])
def test_values_that_no_recipe_can_hold_are_the_callers_mistake(values: Any) -> None:
    with pytest.raises(RecipeErrors, match="1 problem in the recipe:\n  values  "):
        values_node(values)


def test_merging_without_a_type_merges_mappings() -> None:
    tree = merged(Leaf(), node_of({"a": {"name": 1, "b": 2}}, LOW), node_of({"a": {"name": 3}}, HIGH))
    assert tree.plain() == {"a": {"name": 3, "b": 2}}


def test_paths_become_strings() -> None:
    assert to_plain([Path("x")]) == ["x"]


def test_a_variant_may_be_named_by_the_upper_layer_alone() -> None:
    below, above = {"attack": {"name": "pgd", "steps": 3}}, {"name": "at", "attack": {"name": "fgsm"}}
    tree = merged(shape_of(sample.Method), node_of(below, LOW), node_of(above, HIGH))
    assert tree.plain() == above
