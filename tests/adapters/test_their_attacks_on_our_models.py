"""Our models are plain modules to other libraries; their attacks are members of our protocols."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from foreign_samples import EPS, MODELS, images, model, snapshot, untouched
from torch import Tensor, nn

from phalanx.compat import ForeignAttack, with_external
from phalanx.evaluation import evaluate, protocol
from phalanx.threat import ThreatModel
from tiny import digits

Search = Callable[[Any, Tensor, Tensor], Tensor]


def torchattacks_pgd(attacked: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    library = pytest.importorskip("torchattacks")
    found: Tensor = library.PGD(attacked, eps=EPS, alpha=EPS / 4, steps=10)(x, y)
    return found


def foolbox_pgd(attacked: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    library = pytest.importorskip("foolbox")
    wrapped = library.PyTorchModel(attacked, bounds=(0, 1), device="cpu")
    attack = library.attacks.LinfPGD(abs_stepsize=EPS / 4, steps=10)
    found: Tensor = attack(wrapped, x, y, epsilons=EPS)[1]
    return found


def art_pgd(attacked: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    evasion = pytest.importorskip("art.attacks.evasion")
    estimators = pytest.importorskip("art.estimators.classification")
    classifier = estimators.PyTorchClassifier(
        attacked,
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(x.shape[1:]),
        nb_classes=10,
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )
    attack = evasion.ProjectedGradientDescent(
        classifier, norm=np.inf, eps=EPS, eps_step=EPS / 4, max_iter=10, verbose=False
    )
    return torch.from_numpy(attack.generate(x.numpy(), y.numpy()))


def pyautoattack_apgd(attacked: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    library = pytest.importorskip("pyautoattack")
    attack = library.AutoAttack(attacked, eps=EPS, version="custom", attacks=["apgd-ce"], seed=0, device="cpu")
    attack.apgd.n_iter, attack.apgd.n_restarts = 10, 1
    found: Tensor = attack.run_standard_evaluation(x, y)[0]
    return found


SEARCHES: dict[str, Search] = {
    "torchattacks": torchattacks_pgd,
    "foolbox": foolbox_pgd,
    "art": art_pgd,
    "pyautoattack": pyautoattack_apgd,
}


@pytest.mark.parametrize("library", SEARCHES)
@pytest.mark.parametrize("name", MODELS)
def test_their_attack_finds_errors_of_our_model(library: str, name: str) -> None:
    x, y = images(name)
    attacked = model(name)
    before = snapshot(attacked)
    x_adv = SEARCHES[library](attacked, x.clone(), y.clone())
    assert bool(ThreatModel("Linf", EPS).contains(x_adv, x).all())
    # the models are untrained: nearly every image is close to a boundary
    assert int((attacked(x_adv).argmax(-1) != y).sum()) >= len(y) // 2
    assert untouched(before, attacked)


@pytest.mark.parametrize("library", SEARCHES)
@pytest.mark.parametrize("name", ["network", "top-1"])
def test_their_attack_is_a_member_of_our_protocol(library: str, name: str) -> None:
    x, y = images(name)
    attacked, threat = model(name), ThreatModel("Linf", EPS)
    before = snapshot(attacked)
    result = ForeignAttack(name=library, function=SEARCHES[library]).within(threat).run(attacked, x, y)
    assert bool(threat.contains(result.x_adv, x).all()) and int(result.broken.sum()) >= len(y) // 2
    assert untouched(before, attacked)
    wanted = with_external(protocol("fgsm", threat), {library: SEARCHES[library]}, threat)
    found = evaluate(attacked, digits().test.first(10), wanted, threat, batch_size=10)
    assert f"external:{library}" in {row.attack for row in found.rows} or not found.summary.clean_correct
