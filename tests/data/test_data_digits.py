from __future__ import annotations

import numpy as np
import pytest
from sklearn import datasets

from phalanx.data.digits import LEVELS, load_digits
from phalanx.errors import CorruptError


def test_the_digits_are_those_of_scikit_learn() -> None:
    pixels, labels = load_digits()
    assert pixels.shape == (1797, 1, 8, 8) and pixels.dtype == np.uint8 and pixels.max() == LEVELS
    assert np.array_equal(pixels[:, 0], datasets.load_digits().images)
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


@pytest.mark.parametrize("part", [0, 1])
def test_one_changed_number_is_noticed(monkeypatch: pytest.MonkeyPatch, part: int) -> None:
    changed = [array.copy() for array in datasets.load_digits(return_X_y=True)]
    changed[part].flat[0] += 1
    monkeypatch.setattr(datasets, "load_digits", lambda return_X_y: tuple(changed))
    with pytest.raises(CorruptError, match=r"digits: .* has sha256 .*, expected 65e5b46.*; install scikit-learn again"):
        load_digits()
