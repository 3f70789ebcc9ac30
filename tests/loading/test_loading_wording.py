from __future__ import annotations

import math
from typing import Any

import pytest
import recipe_sample as sample

from phalanx.loading.layers import node_of
from phalanx.loading.problems import Place
from phalanx.loading.validation import validated
from phalanx.loading.wording import as_written

MINIMAL: dict[str, Any] = {"training": {"epochs": 1}}


def message(values: dict[str, Any]) -> str:
    """The one problem of a recipe that holds `values`, as "key: message"."""
    _, problems = validated(sample.Recipe, node_of(MINIMAL | values, Place("here")))
    assert len(problems) == 1, problems
    return str(problems[0]).removeprefix("here  ")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        # keys
        ({"model": {"num_expert": 4}}, "model.num_expert: no such key; did you mean 'experts'?"),
        ({"modle": {}}, "modle: no such key; did you mean 'model'?"),
        ({"model": {"epochs": 4}}, "model.epochs: no such key; did you mean 'training.epochs'?"),
        ({"model": {"batchsize": 4}}, "model.batchsize: no such key; did you mean 'data.batch_size'?"),
        ({"threat": {"steps": 4}}, "threat.steps: no such key; did you mean 'method.attack.steps'?"),
        (
            {"model": {"name": 4}},
            "model.name: no such key; did you mean 'method.name', 'method.attack.name' or 'data.name'?",
        ),
        ({"model.top_k": 1}, "model.top_k: no such key; write 'top_k:' indented under 'model:'"),
        (
            {"method": {"name": "st", "beta": 1.0}},
            "method.beta: no such key here, only with 'at'; remove it",
        ),
        (
            {"threat": {"zzzz": 4}},
            "threat.zzzz: no such key; the keys here are: norm, eps",
        ),
        ({"training": {}}, "training.epochs: is required; add it"),
        # variants
        (
            {"method": {"name": "att"}},
            "method.name: must be 'st' or 'at', got 'att'; did you mean 'at'?",
        ),
        ({"method": {"name": 3}}, "method.name: must be 'st' or 'at', got 3; choose one of them"),
        ({"method": {"name": None}}, "method.name: must be 'st' or 'at', got null; choose one of them"),
        ({"attacks": [{"steps": 3}]}, "attacks.0.name: is required, 'pgd' or 'fgsm'; add it"),
        # values
        ({"seed": "lots"}, "seed: must be an integer, got 'lots'"),
        ({"seed": "4"}, "seed: must be an integer, got '4'; remove the quotes"),
        ({"seed": 1.5}, "seed: must be an integer, got 1.5"),
        ({"seed": 4.0}, "seed: must be an integer, got 4.0; write 4"),
        ({"seed": True}, "seed: must be an integer, got true"),
        ({"seed": None}, "seed: must be an integer, got null; give a value or remove the key"),
        ({"model": {"dropout": True}}, "model.dropout: must be a number, got true"),
        ({"model": {"dropout": math.nan}}, "model.dropout: must be a finite number, got .nan"),
        ({"model": {"dropout": -math.inf}}, "model.dropout: must be a finite number, got -.inf"),
        ({"training": {"epochs": 1, "ema": "yes"}}, "training.ema: must be true or false, got 'yes'"),
        ({"training": {"epochs": 1, "ema": 1}}, "training.ema: must be true or false, got 1"),
        ({"data": {"name": 10}}, "data.name: must be text, got 10; put it in quotes"),
        ({"model": {"widths": 4}}, "model.widths: must be a list, got 4; write [4]"),
        ({"model": {"widths": [4, "x"]}}, "model.widths.1: must be an integer, got 'x'"),
        ({"model": 3}, "model: must be a mapping, got 3"),
        ({"model": None}, "model: must be a mapping, got null; give a value or remove the key"),
        ({"method": "at"}, "method: must be a mapping, got 'at'"),
        (
            {"threat": {"norm": "Lfin"}},
            "threat.norm: must be 'Linf' or 'L2', got 'Lfin'; did you mean 'Linf'?",
        ),
        (
            {"training": {"epochs": 1, "precision": "bf8"}},
            "training.precision: must be 'fp32' or 'bf16', got 'bf8'; did you mean 'bf16'?",
        ),
        ({"threat": {"eps": [1]}}, "threat.eps: must be a number or text, got [1]"),
        ({"threat": {"eps": math.inf}}, "threat.eps: must be a finite number or text, got .inf"),
        (
            {"training": {"epochs": 1, "milestones": {"half": "x"}}},
            "training.milestones.half: must be a number, got 'x'",
        ),
        # checks of the configuration's own
        ({"model": {"top_k": 6}}, "model.top_k: must be in 1..experts=4, got 6; lower it"),
        ({"threat": {"eps": "8/0"}}, "threat.eps: must be a number or a fraction, got '8/0'; write 8/255"),
        ({"attacks": [{"name": "pgd", "steps": 0}]}, "attacks.0.steps: must be at least 1, got 0; raise it"),
        ({"seed": -1}, "seed: must be at least 0, got -1; raise it"),
    ],
)
def test_a_mistake_in_words(values: dict[str, Any], expected: str) -> None:
    assert message(values) == expected


@pytest.mark.parametrize(
    ("value", "text"),
    [(True, "true"), (None, "null"), (math.inf, ".inf"), (0.1, "0.1"), ("a\n", "'a\\n'"), ([1], "[1]")],
)
def test_values_are_shown_as_a_recipe_spells_them(value: object, text: str) -> None:
    assert as_written(value) == text
