"""A backbone with a second head that says how far its answer can be trusted."""

# B batch, C classes

from __future__ import annotations

from torch import Tensor, nn

from phalanx.errors import InputError
from phalanx.nn import layers_of, record, spec_of


class TwoHeaded(nn.Module):
    """A classifier and a confidence head, one linear layer each, on the same features.

    The confidence is h(x) = sigmoid(a(x)), a learned rectifier of the largest class probability (Pang et al., CVPR
    2022), as the sub-models of Synergy-of-Experts have it ("simple" in its released code).

    Args:
        backbone: a chain of layers that ends in a linear classifier, such as `build_expert` gives; its layers are
            taken over, not copied.

    Raises InputError for a backbone that ends in anything else: there would be no features to read.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        *layers, classifier = layers_of(backbone)
        if not isinstance(classifier, nn.Linear):
            raise InputError(
                "a two-headed network needs a backbone that is an nn.Sequential ending in nn.Linear, its classifier, "
                f"got {type(backbone).__name__} ending in {type(classifier).__name__}; use one of the named experts"
            )
        self.features = nn.Sequential(*layers)
        self.classifier = classifier
        # on the classifier's device and in its precision
        self.confidence = nn.Linear(classifier.in_features, 1).to(classifier.weight)
        spec = spec_of(backbone)
        if spec is not None:
            record(self, "two_headed", backbone=spec.to_json())

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, C) and confidence logits a (B,) of images (B, channels, H, W) in [0, 1].

        a is left unsquashed: sigmoid(a) rounds to 1 where log(1 - h) is still wanted.
        """
        features = self.features(x)
        return self.classifier(features), self.confidence(features).squeeze(-1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, C) alone."""
        logits: Tensor = self.classifier(self.features(x))
        return logits
