"""Transfer: searched on another model, judged on the attacked one."""

from __future__ import annotations

import re

import pytest
import torch
from known_answers import FIVE, THREAT, Bright
from torch import Tensor, nn

import tiny
from phalanx.errors import InputError
from phalanx.evaluation import evaluate, protocol
from phalanx.evaluation.transfer import Surrogate, Transfer, with_surrogates
from phalanx.routing import MixtureOfExperts
from phalanx.threat import ThreatModel

SMALL = ThreatModel("Linf", "1/16")


class Masked(nn.Module):
    """`Bright` without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Bright()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.detach())


def test_what_a_gradient_hides_a_surrogate_shows() -> None:
    alone = evaluate(Masked(), FIVE, protocol("apgd-10,apgd-t-10x1", THREAT), THREAT)
    assert alone.robust_acc == 4 / 5
    tried = with_surrogates(protocol("apgd-10", THREAT), [Surrogate("bright", Bright())], THREAT)
    found = evaluate(Masked(), FIVE, tried, THREAT)
    assert found.robust_acc == 2 / 5
    verdicts = {row.sample: row.verdict for row in found.rows if row.attack == "transfer:bright"}
    assert verdicts == {100: "held", 101: "broken", 103: "broken", 104: "held"}
    # the judge's: two verdicts, and a look at each search's image until one breaks it
    queries = {row.sample: row.queries for row in found.rows if row.attack == "transfer:bright"}
    assert queries == {100: 4, 101: 3, 103: 3, 104: 4}


def test_the_surrogate_is_given_back_as_it_was(trained: MixtureOfExperts) -> None:
    surrogate: MixtureOfExperts = tiny.mixture(2, seed=4)
    surrogate.train()
    surrogate.experts[0].eval()
    modes = {name: module.training for name, module in surrogate.named_modules()}
    before = {name: value.clone() for name, value in surrogate.state_dict().items()}
    tried = with_surrogates(protocol("fgsm", SMALL), [Surrogate("other", surrogate)], SMALL)
    evaluate(trained, tiny.digits().test.first(8), tried, SMALL)
    assert {name: module.training for name, module in surrogate.named_modules()} == modes
    assert all(torch.equal(value, before[name]) for name, value in surrogate.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in surrogate.parameters())


def test_it_joins_the_cascade_that_the_protocol_ends_with() -> None:
    two = [Surrogate("a", Bright()), Surrogate("b", Bright())]
    after = {member.name: member.after for member in with_surrogates(protocol("standard", THREAT), two, THREAT).members}
    assert list(after) == ["apgd-100", "apgd-t-100x9", "fab-t-100x9", "square-5000", "transfer:a", "transfer:b"]
    assert after["transfer:a"] == tuple(after)[:4] and after["transfer:b"] == tuple(after)[:5]
    assert with_surrogates(protocol("fgsm", THREAT), two, THREAT).members[-1].after == ()


def test_its_spec_names_the_surrogate() -> None:
    one, other = tiny.mixture(2, seed=1), tiny.mixture(2, seed=2)
    spec = Transfer(label="x", surrogate=Surrogate("x", one)).within(SMALL).spec()
    assert spec["label"] == "x" and len(spec["surrogate_sha256"]) == 64 and "surrogate" not in spec
    assert spec != Transfer(label="x", surrogate=Surrogate("x", other)).within(SMALL).spec()


def test_verdicts_do_not_depend_on_the_batch(trained: MixtureOfExperts) -> None:
    test = tiny.digits().test.first(20)
    tried = with_surrogates(protocol("fgsm", SMALL), [Surrogate("other", tiny.mixture(2, seed=4))], SMALL)
    found = [evaluate(trained, test, tried, SMALL, batch_size=size) for size in (20, 3)]
    one, other = ([(row.key, row.verdict, row.queries) for row in each.rows] for each in found)
    assert one == other


def test_mistakes(trained: MixtureOfExperts) -> None:
    with pytest.raises(InputError, match=re.escape("two surrogates are called 'a'")):
        with_surrogates(protocol("fgsm", THREAT), [Surrogate("a", Bright()), Surrogate("a", Bright())], THREAT)
    with pytest.raises(InputError, match="label is printable and has no comma"):
        Surrogate("a,b", Bright())
    tried = with_surrogates(protocol("fgsm", SMALL), [Surrogate("two classes", Bright())], SMALL)
    with pytest.raises(InputError, match="surrogate 'two classes' answers with 2 classes, the model with 10"):
        evaluate(trained, tiny.digits().test.first(4), tried, SMALL)
