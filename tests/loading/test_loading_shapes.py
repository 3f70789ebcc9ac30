from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest
import recipe_sample as sample
from pydantic import Field

from phalanx.loading.problems import Place
from phalanx.loading.shapes import Choice, Items, Leaf, Section, Table, all_keys, chosen, locate, shape_of
from phalanx.loading.tree import Node

ATTACKS = Choice("name", {"pgd": sample.PGD, "fgsm": sample.FGSM})


@pytest.mark.parametrize(
    ("annotation", "shape"),
    [
        (int, Leaf()),
        (float | str, Leaf()),
        (Literal["a", "b"], Leaf()),
        (Annotated[int, Field(ge=1)], Leaf()),
        (sample.Model, Section(sample.Model)),
        (sample.Model | None, Section(sample.Model)),
        (sample.Attack, ATTACKS),
        (sample.Attack | None, ATTACKS),
        (tuple[int, ...], Items((int,))),
        (tuple[int, str], Items((int, str))),
        (list[sample.Attack], Items((sample.Attack,))),
        (dict[str, float], Table(float)),
        (dict, Leaf()),
        (Any, Leaf()),
    ],
)
def test_the_shape_of_an_annotation(annotation: Any, shape: object) -> None:
    assert shape_of(annotation) == shape


def test_the_parts_of_shapes() -> None:
    assert Section(sample.AT).child("attack") == ATTACKS
    assert Section(sample.AT).child("nothing") == Leaf()
    pair = Items((int, sample.Model))
    assert [pair.child(0), pair.child(1)] == [Leaf(), Section(sample.Model)]
    assert Table(sample.Model).child("any") == Section(sample.Model)


def test_a_choice_is_made_by_the_first_node_that_names_one() -> None:
    place = Place("here")
    named, unnamed = Node({"name": Node("fgsm", place)}, place), Node({}, place)
    assert chosen(ATTACKS, unnamed, named) == Section(sample.FGSM)
    assert chosen(ATTACKS, unnamed) == Leaf()
    assert chosen(ATTACKS, Node({"name": Node("none such", place)}, place)) == Leaf()


@pytest.mark.parametrize(
    ("location", "path", "section"),
    [
        ((), (), sample.Recipe),
        (("model", "top_k"), ("model", "top_k"), sample.Model),
        # pydantic puts "at", "pgd" and "float" in
        (
            ("method", "at", "attack", "pgd", "step_size", "float"),
            ("method", "attack", "step_size"),
            sample.PGD,
        ),
        (("attacks", 1, "fgsm", "alpha"), ("attacks", 1, "alpha"), sample.FGSM),
        (("attacks", 1), ("attacks", 1), sample.Recipe),
        (("training", "milestones", "half"), ("training", "milestones", "half"), sample.Training),
        (("training", "milestones", "x", "[key]"), ("training", "milestones", "x"), sample.Training),
        (("model", "[key]"), ("model", "[key]"), sample.Model),
    ],
)
def test_a_pydantic_location_is_a_path(location: tuple[Any, ...], path: tuple[Any, ...], section: type) -> None:
    located = locate(sample.Recipe, location)
    assert (located.path, located.section.kind) == (path, section)


@dataclass(frozen=True)
class ByNumber:
    models: dict[int, sample.Model]


def test_a_tables_key_is_not_part_of_its_value() -> None:
    # pydantic's location where a key is not the integer it must be
    located = locate(ByNumber, ("models", "x", "[key]"))
    assert (located.path, located.section.kind) == (("models", "x"), sample.Model)


def test_the_choice_of_a_located_section() -> None:
    assert locate(sample.Recipe, ("attacks", 0, "pgd", "x")).choice == ATTACKS
    assert locate(sample.Recipe, ("model", "x")).choice is None


def test_all_keys_go_through_sections_and_variants() -> None:
    found = list(all_keys(sample.Recipe))
    assert ("method", "smoothing") in found
    assert ("method", "attack", "alpha") in found
    assert ("model", "top_k") in found
    # ST and AT both have a name
    assert found.count(("method", "name")) == 2


def test_a_discriminator_must_tell_the_variants_apart() -> None:
    with pytest.raises(TypeError, match=r"Data.name must be a Literal"):
        shape_of(Annotated[sample.Data | sample.ST, Field(discriminator="name")])
