from __future__ import annotations

import json

import torch

from phalanx.training.meters import Meters


def _observed() -> Meters:
    meters = Meters()
    meters.add({"loss": torch.tensor(1.0), "load": torch.tensor([0.25, 0.75])})
    meters.add({"loss": torch.tensor(2.0), "load": torch.tensor([0.75, 0.25])})
    meters.add({"loss": torch.tensor(5.0, dtype=torch.bfloat16)}, player="router")
    return meters


def test_means_by_name_and_by_player() -> None:
    assert _observed().means() == {"loss": 1.5, "load": [0.5, 0.5], "router.loss": 5.0}


def test_a_saved_meter_goes_on_with_the_same_bits() -> None:
    third = torch.tensor(1 / 3)
    meters = _observed()
    meters.add({"loss": third})
    again = Meters.from_state(json.loads(json.dumps(meters.state_dict())))
    for one in (meters, again):
        one.add({"loss": third, "load": torch.tensor([0.1, 0.9])})
    assert again.means() == meters.means()
    assert again.state_dict() == meters.state_dict()
