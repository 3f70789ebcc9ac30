from __future__ import annotations

import json
import re

import pytest
import torch
from expert_samples import SMALL
from torch import nn

from phalanx.errors import InputError
from phalanx.experts import EXPERTS, TwoHeaded, build_expert
from phalanx.models import build
from phalanx.nn import LipschitzLinear, fold_batchnorm, spec_of

SIZE = 16
# the others end in a layer of their own
LINEAR = [name for name in EXPERTS if not name.startswith("lipschitz")]


def _backbone(name: str) -> nn.Module:
    torch.manual_seed(0)
    return build_expert(name, num_classes=7, image_size=SIZE, channels=1, **SMALL[name])


@pytest.mark.parametrize("name", LINEAR)
def test_both_heads_read_the_same_features(name: str) -> None:
    backbone = _backbone(name).eval()
    x = torch.rand(3, 1, SIZE, SIZE)
    expected = backbone(x)
    model = TwoHeaded(backbone).eval()
    logits, confidence = model.both(x)
    assert logits.shape == (3, 7) and confidence.shape == (3,)
    assert torch.equal(logits, expected) and torch.equal(model(x), expected)
    # by hand, from the classifier's own input
    seen: list[torch.Tensor] = []
    model.classifier.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    model(x)
    by_hand = seen[0] @ model.confidence.weight[0] + model.confidence.bias
    torch.testing.assert_close(confidence, by_hand)


@pytest.mark.parametrize("name", LINEAR)
def test_every_parameter_has_a_gradient(name: str) -> None:
    model = TwoHeaded(_backbone(name))
    logits, confidence = model.both(torch.rand(9, 1, SIZE, SIZE))
    (logits.square().sum() + confidence.sum()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_logits_alone_do_not_ask_the_confidence_head() -> None:
    model = TwoHeaded(_backbone("mlp"))
    model.confidence = nn.Identity()  # would answer with the features
    model(torch.rand(2, 1, SIZE, SIZE)).sum().backward()


@pytest.mark.parametrize("name", LINEAR)
def test_the_spec_rebuilds_both_heads(name: str) -> None:
    model = TwoHeaded(_backbone(name)).eval()
    spec = spec_of(model)
    assert spec is not None and spec.name == "two_headed"
    again = build(json.loads(json.dumps(spec.to_json()))).eval()
    assert isinstance(again, TwoHeaded) and spec_of(again) == spec
    again.load_state_dict(model.state_dict())
    x = torch.rand(3, 1, SIZE, SIZE)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(model.both(x), again.both(x), strict=True))


def test_a_chain_within_a_chain_is_opened() -> None:
    # what `build_expert` makes of one's own factory
    inner = nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 3))
    model = TwoHeaded(nn.Sequential(nn.Identity(), inner))
    x = torch.rand(2, 1, 4, 4)
    assert model.classifier is inner[3] and torch.equal(model(x), inner(x))
    assert spec_of(model) is None


def test_the_confidence_head_is_where_and_what_the_classifier_is() -> None:
    model = TwoHeaded(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).double().to("meta"))
    assert model.confidence.weight.dtype == torch.float64 and model.confidence.weight.is_meta


def test_batchnorm_can_be_folded() -> None:
    model = TwoHeaded(_backbone("small_cnn")).eval()
    folded = fold_batchnorm(model)
    assert isinstance(folded, TwoHeaded) and not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    x = torch.rand(3, 1, SIZE, SIZE)
    for ours, theirs in zip(folded.both(x), model.both(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


class _Subclass(nn.Sequential):
    pass


@pytest.mark.parametrize(
    ("backbone", "kinds"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU()), "Sequential ending in ReLU"),
        (nn.Sequential(), "Sequential ending in Sequential"),
        (nn.Conv2d(1, 1, 1), "Conv2d ending in Conv2d"),
        (nn.Sequential(LipschitzLinear(4, 4)), "Sequential ending in LipschitzLinear"),
        # it may compute anything
        (_Subclass(nn.Flatten(), nn.Linear(4, 4)), "_Subclass ending in _Subclass"),
    ],
)
def test_a_backbone_without_features_to_read(backbone: nn.Module, kinds: str) -> None:
    message = f"an nn.Sequential ending in nn.Linear, its classifier, got {kinds}; use one of the named experts"
    with pytest.raises(InputError, match=re.escape(message)):
        TwoHeaded(backbone)
