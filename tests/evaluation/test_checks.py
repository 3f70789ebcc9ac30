"""What is named before a model's verdicts are believed."""

from __future__ import annotations

import pytest
import torch
from known_answers import FIVE, THREAT, Bright, images, two_experts
from torch import Tensor

from phalanx.errors import InputError
from phalanx.evaluation import evaluate, protocol
from phalanx.evaluation.checks import check_classes
from phalanx.threat import ThreatModel

PGD = protocol("pgd-8", THREAT)


def heard(model: Bright, name: str = "pgd-8") -> list[str]:
    said: list[str] = []
    evaluate(model, FIVE, protocol(name, THREAT), THREAT, notify=said.append)
    return said


class _Probabilities(Bright):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(-1)


class _LogProbabilities(Bright):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).log_softmax(-1)


class _Random(Bright):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.randn(len(x), 2)


def test_a_sound_model_is_not_talked_about() -> None:
    assert heard(Bright().eval()) == heard(_LogProbabilities().eval()) == []
    said: list[str] = []
    evaluate(two_experts().eval(), FIVE, PGD, THREAT, notify=said.append)
    assert said == []


def test_probabilities_are_refused_unless_they_are_allowed() -> None:
    with pytest.raises(InputError, match=r"answers with probabilities \(each row lies in \[0, 1\] and sums to 1\)"):
        evaluate(_Probabilities(), FIVE, PGD, THREAT)
    found = evaluate(_Probabilities(), FIVE, PGD, THREAT, allow=["probabilities"])
    assert found.clean_acc == 4 / 5
    with pytest.raises(InputError, match="allow can name probabilities, got 'probability'"):
        evaluate(Bright(), FIVE, PGD, THREAT, allow=["probability"])


def test_training_mode_is_told_and_changes_nothing() -> None:
    model = two_experts().train()
    model.experts[0].eval()
    said: list[str] = []
    found = evaluate(model, FIVE, PGD, THREAT, notify=said.append)
    assert len(said) == 1 and said[0].startswith("the model came in training mode (6 of its parts); it is evaluated")
    assert found.rows == evaluate(model.eval(), FIVE, PGD, THREAT).rows


def test_random_answers_name_rand() -> None:
    (line,) = heard(_Random().eval())
    assert line.startswith("the model's answers are random") and "--protocol rand" in line
    assert heard(_Random().eval(), "pgd-2-eot:2") == []
    assert "not random" in heard(Bright().eval(), "pgd-2-eot:2")[0]


def test_nothing_to_attack_is_told() -> None:
    wrong, said = images(((12, 12), 0), ((3, 3), 1)), []
    found = evaluate(Bright().eval(), wrong, protocol("standard", THREAT), THREAT, notify=said.append)
    assert found.robust_acc == 0 and said[-1].startswith("the model is right about none of 2 images, so there was")


def test_two_class_counts() -> None:
    check_classes(10, 10)
    with pytest.raises(InputError, match=r"1000 outputs and there are 10 classes; .* --classes 1000"):
        check_classes(1000, 10)


def test_labels_that_the_model_does_not_know() -> None:
    with pytest.raises(InputError, match=r"labels must be in 0\.\.1"):
        evaluate(Bright(), images(((3, 3), 2)), PGD, ThreatModel("Linf", "2/16"))
