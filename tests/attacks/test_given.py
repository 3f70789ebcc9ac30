"""Images made elsewhere: looked up by sample, checked, judged as any attack's."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from phalanx.attacks import Given, GivenImages
from phalanx.errors import InputError
from phalanx.rng import SampleRng


class Bright(nn.Module):
    """Class 1 if the two pixels are brighter than 1 together."""

    def forward(self, x: Tensor) -> Tensor:
        margin = x.flatten(1).sum(1) - 1
        return torch.stack([-margin, margin], 1)


X = torch.tensor([[0.55, 0.55], [0.8, 0.8], [0.45, 0.45], [0.2, 0.1]]).reshape(4, 1, 1, 2)
Y = torch.tensor([1, 1, 0, 1])
IDS = torch.tensor([7, 3, 11, 5])


def given(ids: list[int], images: Tensor) -> Given:
    return Given(eps=0.1, label="someone", given=GivenImages(torch.tensor(ids, dtype=torch.int64), images))


def streams() -> SampleRng:
    return SampleRng(0, IDS)


def test_each_sample_gets_its_own_image_and_the_models_verdict() -> None:
    darker = (X - 0.1).clamp(0, 1)
    # in another order than the batch, and none for sample 11
    result = given([5, 7, 3], darker[[3, 0, 1]]).run(Bright(), X, Y, rng=streams())
    assert result.broken.tolist() == [True, False, False, True]
    assert torch.allclose(result.x_adv[:2], darker[:2]) and torch.equal(result.x_adv[2:], X[2:])
    # found by the judge alone: two passes of each image, the verdicts
    assert (result.queries == 2).all()


def test_verdicts_do_not_depend_on_the_batch() -> None:
    attack = given(IDS.tolist(), (X - 0.1).clamp(0, 1))
    whole = attack.run(Bright(), X, Y, rng=streams())
    for rows in ([2], [0, 3], [3, 1]):
        part = attack.run(Bright(), X[rows], Y[rows], rng=streams()[torch.tensor(rows)])
        assert torch.equal(part.broken, whole.broken[rows]) and torch.equal(part.x_adv, whole.x_adv[rows])


def test_an_image_outside_the_ball_is_named_and_not_projected() -> None:
    moved = X.clone()
    moved[1] = 0.65
    message = "someone: the image of sample 3 is 0.15 away from the clean one in Linf, more than 0.1"
    with pytest.raises(InputError, match=re.escape(message)):
        given(IDS.tolist(), moved).run(Bright(), X, Y, rng=streams())


@pytest.mark.parametrize(
    ("ids", "images", "message"),
    [
        ([1, 2, 1], torch.zeros(3, 1, 1, 2), "sample 1 is given twice"),
        ([1, 2], torch.tensor([0.0, float("nan")]).reshape(2, 1, 1, 1), "1 of 2 given images have pixels that are not"),
        ([1, 2], torch.tensor([1.5, 2.0]).reshape(2, 1, 1, 1), "the first of sample 1; clip them, and divide uint8"),
        ([1], torch.zeros(2, 1, 1, 2), "with N integer ids, got torch.float32 of shape (2, 1, 1, 2)"),
        ([1], torch.zeros(1, 1, 1, 2, dtype=torch.uint8), "must be float"),
    ],
)
def test_bad_images(ids: list[int], images: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        GivenImages(torch.tensor(ids, dtype=torch.int64), images)


def test_images_of_other_data() -> None:
    message = "given images must have the shape (1, 1, 2) of the data, got (1, 2, 2)"
    with pytest.raises(InputError, match=re.escape(message)):
        given([7], torch.zeros(1, 1, 2, 2)).run(Bright(), X, Y, rng=streams())


def test_none_at_all_holds_everything() -> None:
    result = given([], torch.zeros(0, 1, 1, 2)).run(Bright(), X, Y, rng=streams())
    assert result.broken.tolist() == [False, False, False, True]


def test_the_spec_knows_the_images() -> None:
    one, same, other = given([7], X[:1]), given([7], X[:1].clone()), given([7], X[1:2])
    assert one.spec() == same.spec() != other.spec()
    assert one.spec()["label"] == "someone" and "given" not in one.spec()
    # whose image it is belongs to it
    assert given([3], X[:1]).spec() != one.spec()
