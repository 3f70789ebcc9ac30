from __future__ import annotations

import json

from torch import nn

from phalanx.nn import Spec, record, spec_of


def test_a_recorded_spec_comes_back() -> None:
    module = nn.ReLU()
    assert record(module, "relu", name=3, width=[1, 2]) is module  # `name` is an argument like any other
    assert spec_of(module) == Spec("relu", {"name": 3, "width": [1, 2]})
    assert json.loads(json.dumps(spec_of(module).to_json())) == {
        "name": "relu",
        "arguments": {"name": 3, "width": [1, 2]},
    }


def test_a_spec_is_no_part_of_the_weights() -> None:
    module = record(nn.Linear(1, 1), "linear")
    assert set(module.state_dict()) == {"weight", "bias"}


def test_a_module_built_by_hand_has_none() -> None:
    module = nn.ReLU()
    assert spec_of(module) is None
    module.phalanx_spec = "mine"  # another library's attribute of that name is not ours
    assert spec_of(module) is None
