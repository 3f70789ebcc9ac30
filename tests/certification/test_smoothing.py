"""Randomised smoothing: the bounds, against what is known exactly of linear classifiers (property 27 of the spec)."""

# N samples, C classes

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import phalanx as px
import tiny
from phalanx.certification import SmoothedCertificate, certify_smoothed, smoothed_radius
from phalanx.certification.binomial import fair_p_value, lower_bound
from phalanx.certification.smoothing import ABSTAINED, counted, predicted
from phalanx.certification.votes import Smoothing, Voter, Votes
from phalanx.data import ImageSet
from phalanx.errors import InputError
from phalanx.experts import TwoHeaded, build_backbone
from phalanx.routing import DualModel, LayerMixture, LinearRouter, MixtureOfExperts, RoutedLayers, SynergyOfExperts
from reference.closed_forms import mixed_radius_closed

NORMAL = NormalDist()
SHAPE = (1, 2, 2)
WEIGHT = torch.tensor([3.0, -1.0, 2.0, 0.5])


def linear(offset: float = 2.2, scale: float = 1.0) -> nn.Module:
    """Two classes; class 1 where WEIGHT x > offset."""
    layer = nn.Linear(4, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.stack([-WEIGHT, WEIGHT]) * scale)
        layer.bias.copy_(torch.tensor([offset, -offset]) * scale)
    return MixtureOfExperts(None, [nn.Sequential(nn.Flatten(), layer)]).eval()


def distances(x: Tensor, offset: float = 2.2) -> Tensor:
    """(N,) signed, float64: how far class 1's side of the boundary is entered."""
    return (x.double().flatten(1) @ WEIGHT.double() - offset) / WEIGHT.double().norm()


def images(n: int, seed: int = 0, **labels: Any) -> ImageSet:
    """Random pixels, each labelled as `linear()` answers."""
    pixels = np.random.default_rng(seed).integers(0, 256, (n, *SHAPE), dtype=np.uint8)
    found = (distances(torch.from_numpy(pixels).float() / 255) > 0).numpy().astype(np.int64)
    return ImageSet(pixels, labels.get("labels", found), np.arange(n, dtype=np.int64) * 7 + 3, 255)


def all_images(found: ImageSet) -> Tensor:
    return found.images(slice(None))


# -- the bounds of a probability -------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.5, 0.05, 0.001])
@pytest.mark.parametrize("trials", [1, 10, 1000, 100_000])
def test_clopper_pearson_is_scipys(trials: int, alpha: float) -> None:
    beta = pytest.importorskip("scipy.stats").beta
    for successes in {1, max(1, trials // 3), max(1, trials // 2), max(1, trials - 3), trials}:
        expected = float(beta.ppf(alpha, successes, trials - successes + 1))
        found = lower_bound(successes, trials, alpha)
        assert found <= expected * (1 + 1e-12) and found == pytest.approx(expected, rel=1e-6)
    assert lower_bound(0, trials, alpha) == 0


def test_clopper_pearson_covers() -> None:
    trials, alpha = 40, 0.05
    bounds = [lower_bound(k, trials, alpha) for k in range(trials + 1)]
    assert bounds == sorted(bounds)
    worst = 0.0
    for p in np.linspace(0.01, 0.99, 197):
        # how likely is a bound above the truth?
        wrong = sum(math.comb(trials, k) * p**k * (1 - p) ** (trials - k) for k in range(trials + 1) if bounds[k] > p)
        worst = max(worst, wrong)
    assert 0.6 * alpha < worst <= alpha


def test_the_test_of_a_fair_coin_is_scipys() -> None:
    binomtest = pytest.importorskip("scipy.stats").binomtest
    for first, second in [(0, 0), (5, 5), (0, 3), (60, 40), (1000, 900), (51, 49)]:
        expected = 1.0 if not first + second else binomtest(first, first + second, 0.5).pvalue
        assert fair_p_value(first, second) == fair_p_value(second, first) == pytest.approx(expected, rel=1e-9)


# -- the radius ------------------------------------------------------------------------------------------------------


def test_radii_of_known_probabilities() -> None:
    for p in (0.6, 0.9, 0.999):
        assert smoothed_radius(p, 1 - p, 0.25) == pytest.approx(0.25 * NORMAL.inv_cdf(p), rel=1e-9)
        # two half-spaces attain it: nothing larger is true
        for lead in (0.1, 0.25, 0.6):
            exact = max(0.0, 0.5 * (NORMAL.inv_cdf(p) - NORMAL.inv_cdf((1 + lead) / 2)))
            assert smoothed_radius(p, 1 - p, 0.5, lead) == pytest.approx(exact, rel=1e-9)
            assert smoothed_radius(p, 1 - p, 0.5, lead) <= exact
    assert smoothed_radius(0.5, 0.5, 1) == smoothed_radius(0.4, 0.6, 1) == smoothed_radius(0.6, 0.4, 1, 0.2) == 0


def test_the_closed_form_of_the_mix_is_never_above() -> None:
    for low in np.linspace(0.51, 0.999, 30):
        for share in (0.1, 0.5, 1.0):
            high = (1 - low) * share
            for lead in (0.05, 0.3, 0.9):
                ours, closed = (rule(low, high, 0.5, lead) for rule in (smoothed_radius, mixed_radius_closed))
                assert 0 <= closed <= ours
            assert mixed_radius_closed(low, high, 0.5, 0.0) == pytest.approx(smoothed_radius(low, high, 0.5), rel=1e-9)


# -- a linear classifier, whose smoothed radius is its distance ------------------------------------------------------


@pytest.fixture(scope="module")
def certified() -> tuple[ImageSet, SmoothedCertificate]:
    found = images(60)
    return found, certify_smoothed(
        linear(), found, sigma=0.5, samples=20_000, selection_samples=1000, batch_size=5000, seed=1
    )


def test_radii_lie_below_the_distance_and_near_it(certified: tuple[ImageSet, SmoothedCertificate]) -> None:
    found, certificate = certified
    distance = distances(all_images(found)).abs()
    assert bool((certificate.radius <= distance).all())
    # at 20,000 samples a radius loses some thousandths of sigma, and beyond 3 sigma the count is all there is
    middle = (distance > 0.1) & (distance < 0.7)
    assert int(middle.sum()) > 20 and bool((certificate.radius[middle] > distance[middle] - 0.05).all())
    assert certificate.counts["certified"] > 50 and certificate.counts["misclassified"] == 0
    assert certificate.accuracy_at(0) >= certificate.accuracy_at(0.2) >= certificate.accuracy_at(0.5) > 0
    assert certificate.accuracy <= 1 and certificate.interval[0] <= certificate.accuracy <= certificate.interval[1]


def test_inside_the_radius_the_answer_stays(certified: tuple[ImageSet, SmoothedCertificate]) -> None:
    found, certificate = certified
    voter = Voter.of(linear(), Smoothing(sigma=0.5, samples=4000, seed=9))
    x, sign = all_images(found), 2 * torch.from_numpy(found.labels) - 1
    towards = (WEIGHT / WEIGHT.norm()).reshape(SHAPE)
    for i in (certificate.radius > 0.05).nonzero()[:20, 0].tolist():
        for share in (0.5, 0.999):
            moved = x[i] - share * certificate.radius[i].float() * sign[i] * towards
            answer = predicted(voter.votes(moved, 1000 + i, 4000), voter)
            assert answer == found.labels[i] or (answer == ABSTAINED and share > 0.9)


def test_the_claims_fail_no_more_often_than_alpha() -> None:
    # one image at a known distance, met by the noise of 400 ids
    pixels = np.full((400, *SHAPE), 150, np.uint8)
    ones = ImageSet(pixels, np.ones(400, np.int64), np.arange(400, dtype=np.int64), 255)
    (distance,) = distances(all_images(ones)[:1]).tolist()
    assert 0.1 < distance < 0.5
    found = certify_smoothed(linear(), ones, sigma=0.5, samples=200, confidence=0.9, batch_size=300, seed=5)
    wrong = float((found.radius > distance).double().mean())
    # alpha is 0.1, and 4 standard deviations of 400 draws 0.06: neither vacuous nor more
    assert 0.02 < wrong < 0.16


def test_abstention() -> None:
    # on the boundary half the votes go either way
    (bias,) = (all_images(images(1, 3)).flatten(1) @ WEIGHT).tolist()
    found = certify_smoothed(linear(bias), images(1, 3), sigma=0.5, samples=500)
    assert found.reasons == ("abstained",) and found.radius.tolist() == [0.0]
    assert found.predicted.tolist() == [ABSTAINED] and found.abstentions == 1 and found.accuracy == 0
    assert found.accuracy_at(0) == 0 and 0.4 < float(found.lower) <= 0.5


def test_a_wrong_answer_has_no_radius() -> None:
    right = images(20)
    wrong = ImageSet(right.pixels, 1 - right.labels, right.ids, 255)
    found = certify_smoothed(linear(), wrong, sigma=0.25, samples=300)
    assert found.counts["certified"] == 0 and found.counts["misclassified"] > 10 and float(found.radius.max()) == 0


# -- determinism -----------------------------------------------------------------------------------------------------


def _same(one: SmoothedCertificate, other: SmoothedCertificate) -> None:
    assert torch.equal(one.radius, other.radius) and torch.equal(one.predicted, other.predicted)
    assert one.reasons == other.reasons and torch.equal(one.lower, other.lower)


def test_neither_batches_nor_neighbours_nor_order_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    data, model = tiny.digits().test.first(12), tiny.mixture(3).eval()
    whole = certify_smoothed(model, data, samples=150, selection_samples=20)
    _same(whole, certify_smoothed(model, data, samples=150, selection_samples=20, batch_size=7))
    rows = [9, 2, 5]
    some = certify_smoothed(model, data.select(rows), samples=150, selection_samples=20)
    assert some.radius.tolist() == whole.radius[rows].tolist() and some.lower.tolist() == whole.lower[rows].tolist()
    monkeypatch.setattr("phalanx.certification.votes._DRAWN", 200)
    _same(whole, certify_smoothed(model, data, samples=150, selection_samples=20))
    other = certify_smoothed(model, data, samples=150, selection_samples=20, seed=1)
    assert other.lower.tolist() != whole.lower.tolist()


def test_selection_and_estimation_share_no_copy() -> None:
    seen: list[Tensor] = []

    def model(x: Tensor) -> Tensor:
        seen.append(x)
        return torch.stack([x.sum((1, 2, 3)), -x.sum((1, 2, 3))], 1)

    voter = Voter.of(model, Smoothing(samples=60, selection_samples=40, sigma=0.5))
    votes = voter.votes(torch.zeros(SHAPE), 5, 33)
    copies = torch.cat(seen)
    assert sum(votes.counts) == 60 and len({tuple(copy.flatten().tolist()) for copy in copies}) == len(copies) == 100
    # the estimate is of the last 60 alone
    assert votes.counts[0] == int((copies[40:].sum((1, 2, 3)) >= 0).sum())
    # not clamped, of the deviation asked for
    assert float(copies.min()) < -0.5 and float(copies.std()) == pytest.approx(0.5, rel=0.1)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny.mixture(2).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    certify_smoothed(model, tiny.digits().test.first(2), samples=50)
    assert torch.equal(torch.get_rng_state(), state) and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# -- any model -------------------------------------------------------------------------------------------------------


def _layered() -> LayerMixture:
    layers = RoutedLayers(2, 0.5, "shared", "shared", False)
    network = build_backbone("small_cnn", layers, num_classes=10, image_size=8, channels=1, width=8)
    return LayerMixture(network, LinearRouter((1, 8, 8), 2), 2)


ANY: dict[str, Callable[[], Any]] = {
    "top-2": lambda: tiny.mixture(3, 2),
    "residual": lambda: _resnet(),
    "layers": _layered,
    "synergy": lambda: SynergyOfExperts([TwoHeaded(tiny.mixture(1, seed=seed).experts[0]) for seed in range(2)]),
    "dual": lambda: DualModel(tiny.mixture(2), tiny.mixture(2, seed=1), 0.8),
    "float64": lambda: tiny.mixture(2).double(),
    "callable": lambda: tiny.mixture(2).eval().forward,
}


def _resnet() -> MixtureOfExperts:
    expert = px.build_expert("resnet18", num_classes=10, image_size=8, channels=1, width=4)
    return MixtureOfExperts(None, [expert])


@pytest.mark.parametrize("name", ANY)
def test_every_kind_of_model_meets_noise_beyond_the_pixels_range(name: str) -> None:
    torch.manual_seed(0)
    model = ANY[name]()
    model = model.eval() if isinstance(model, nn.Module) else model
    found = certify_smoothed(model, tiny.digits().test.first(2), sigma=2.0, samples=40, batch_size=16)
    assert len(found.reasons) == 2 and found.counts["non-finite"] == 0


def test_answers_that_are_not_finite_vote_for_nothing() -> None:
    inner = linear(-9.0)  # always class 1

    def model(x: Tensor) -> Tensor:
        sums = x.sum((1, 2, 3))
        return inner(x).masked_fill((sums > 0)[:, None], math.nan)

    pixels = np.zeros((2, *SHAPE), np.uint8)
    pixels[1] = 255
    found = certify_smoothed(model, ImageSet(pixels, np.ones(2, np.int64), np.arange(2), 255), sigma=0.25, samples=400)
    # the first image's copies are half of them lost, the second's nearly all
    assert found.reasons == ("abstained", "non-finite") or found.reasons == ("non-finite", "non-finite")
    assert found.predicted.tolist() == [ABSTAINED, ABSTAINED] and float(found.radius.max()) == 0


# -- the smoothed dual model -----------------------------------------------------------------------------------------


class _Contrary(nn.Module):
    """Surely class 1 at some images, surely class 0 at the others."""

    def forward(self, x: Tensor) -> Tensor:
        side = (x.flatten(1) @ WEIGHT > 2.2).float() * 2 - 1
        return torch.stack([side, -side], 1) * 50


def dual(alpha: float) -> DualModel:
    return DualModel(MixtureOfExperts(None, [_Contrary()]), linear(), alpha).eval()


@pytest.mark.parametrize("alpha", [0.6, 0.8])
def test_the_smoothed_dual_model_holds_whatever_its_standard_half_says(alpha: float) -> None:
    found = images(40)
    certificate = certify_smoothed(dual(alpha), found, sigma=0.25, samples=5000, smoothed="robust", batch_size=5000)
    distance = distances(all_images(found)).abs()
    lead = (1 - alpha) / alpha
    # at the boundary moved towards the image by this, the smoothed half's lead is exactly what the other overrules
    exact = distance - 0.25 * NORMAL.inv_cdf((1 + lead) / 2)
    held = torch.tensor([why == "certified" for why in certificate.reasons])
    assert bool((certificate.radius <= exact.clamp_min(0)).all()) and int(held.sum()) > 5
    assert bool((certificate.radius[held] > 0).all()) and "always wrong" in certificate.notes[0]
    middle = held & (distance < 0.6)
    assert bool((certificate.radius[middle] > exact[middle] - 0.08).all())
    # the standard half is wrong everywhere, and outvoted wherever something is certified by a margin
    sure = certificate.radius > 0.05
    assert bool(sure.any()) and torch.equal(certificate.predicted[sure], certificate.labels[sure])


def test_a_larger_weight_of_the_robust_half_certifies_more_and_all_of_it_is_plain_smoothing() -> None:
    found, settings = images(15), {"sigma": 0.5, "samples": 2000, "batch_size": 2000}
    radii = [certify_smoothed(dual(a), found, smoothed="robust", **settings).radius for a in (0.55, 0.7, 0.9, 1.0)]
    assert all(bool((low <= high).all()) for low, high in pairwise(radii))
    assert bool((radii[0] < radii[2]).any())
    _same(
        certify_smoothed(dual(1.0), found, smoothed="robust", **settings), certify_smoothed(linear(), found, **settings)
    )


def test_the_dual_model_answers_only_where_the_votes_tell() -> None:
    voter = Voter.of(dual(0.75), Smoothing(samples=1000, smoothed="robust"))
    # 0.25 of the standard half against three quarters of the votes' lead
    assert predicted(Votes(1, (0, 1000, 0), (1.0, 0.0)), voter) == 1
    assert predicted(Votes(1, (500, 500, 0), (1.0, 0.0)), voter) == 0
    # as 2/3 of the votes balance a sure standard half, some more do not tell
    assert predicted(Votes(1, (320, 680, 0), (1.0, 0.0)), voter) == ABSTAINED
    assert predicted(Votes(1, (0, 1000, 0), ()), voter) == ABSTAINED


class _Lost(nn.Module):
    """Its answers are no numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return x.new_full((len(x), 2), math.nan)


def test_a_standard_half_that_is_not_finite_is_certified_nowhere() -> None:
    found = images(10)
    lost = DualModel(MixtureOfExperts(None, [_Lost()]), linear(), 0.8).eval()
    certificate = certify_smoothed(lost, found, sigma=0.25, samples=1000, smoothed="robust")
    assert set(certificate.reasons) == {"non-finite"} and float(certificate.radius.max()) == 0
    assert certificate.accuracy == certificate.accuracy_at(0) == 0


@pytest.mark.parametrize("smoothed", ["whole", "robust"])
def test_what_is_certified_is_what_is_answered(smoothed: str) -> None:
    # one-sided bounds prove a winner that the two-sided test, or Hoeffding's inequality, cannot tell yet
    voter = Voter.of(dual(0.8), Smoothing(samples=10_000, smoothed=smoothed))  # type: ignore[arg-type]
    apart, only = ((0.0, 1.0) if smoothed == "robust" else ()), images(1, labels=np.array([0]))
    seen = set()
    for count in range(5000, 7000, 2):
        certificate = counted([Votes(0, (count, 10_000 - count, 0), apart)], only, voter)
        assert certificate.reasons[0] != "certified" or certificate.predicted.tolist() == [0]
        assert certificate.accuracy_at(0) <= certificate.accuracy
        seen.add(certificate.reasons[0])
    assert seen == {"abstained", "certified"}


def test_predict_asks_whether_the_two_best_could_be_even() -> None:
    voter = Voter.of(linear(), Smoothing(samples=100))
    assert predicted(Votes(0, (70, 30, 0)), voter) == 0
    assert predicted(Votes(0, (30, 70, 0)), voter) == 1
    assert predicted(Votes(0, (60, 40, 0)), voter) == ABSTAINED
    assert predicted(Votes(2, (30, 0, 70)), voter) == ABSTAINED


# -- refusals --------------------------------------------------------------------------------------------------------


def _lost_together(x: Tensor) -> Tensor:
    return linear()(x) if len(x) == 1 else torch.full((len(x), 2), math.nan)


def _unlike() -> DualModel:
    three = MixtureOfExperts(None, [nn.Sequential(nn.Flatten(), nn.Linear(4, 3))])
    return DualModel(three, linear(), 0.8).eval()


class _Beside(nn.Module):
    """Its answers depend on the rest of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return (x - x.mean(0))[:, :2] * 3


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (linear, {"norm": "Linf"}, "L2 balls, not Linf: use norm L2.*sqrt"),
        (linear, {"norm": "L7"}, "norm must be one of"),
        (linear, {"sigma": 0.0}, "sigma must be positive"),
        (linear, {"sigma": math.nan}, "sigma must be positive"),
        (linear, {"confidence": 1.0}, "confidence must be in"),
        (linear, {"samples": 0}, "samples must be at least 1"),
        (linear, {"selection_samples": 0}, "selection_samples must be at least 1"),
        (linear, {"samples": 1e4}, "samples must be a whole number, got 10000.0"),
        (linear, {"samples": 9}, "even a unanimous vote"),
        (linear, {"batch_size": 0}, "batch_size must be at least 1"),
        (linear, {"smoothed": "router"}, "smoothed must be one of"),
        (linear, {"smoothed": "robust"}, "which a dual model of probabilities has"),
        (lambda: dual(0.5), {"smoothed": "robust"}, "may overrule any vote"),
        (lambda: dual(0.501), {"smoothed": "robust", "samples": 2000}, "even a unanimous vote"),
        (lambda: linear().train(), {}, "the model is in training mode"),
        (_Beside().eval, {}, "when it is alone"),
        (lambda: lambda x: torch.rand(len(x), 2), {}, "when it is alone"),
        (lambda: _lost_together, {}, "when it is alone"),
        (_unlike, {"smoothed": "robust"}, "answer for 3 and 2 classes"),
        (lambda: lambda x: x.sum((1, 2, 3)), {}, r"with logits \(4, C\)"),
        (lambda: lambda x: [0] * len(x), {}, r"with logits \(4, C\), got list"),
    ],
)
def test_refusals(model: Callable[[], Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        px.certify_smoothed(model(), images(4), **settings)


def test_a_half_in_training_mode_is_named() -> None:
    model = dual(0.8)
    model.robust.train()
    with pytest.raises(InputError, match="robust is in training mode"):
        certify_smoothed(model, images(1))


def test_no_images() -> None:
    with pytest.raises(InputError, match="no images to certify"):
        certify_smoothed(linear(), images(1).select([]))


def test_labels_that_are_no_class() -> None:
    with pytest.raises(InputError, match=r"label must be in 0\.\.1"):
        certify_smoothed(linear(), images(2, labels=np.array([0, 2])), samples=50)


def test_certify_sends_to_smoothing() -> None:
    with pytest.raises(InputError, match="certify_smoothed"):
        px.certify(linear(), images(1), method="smoothing")
