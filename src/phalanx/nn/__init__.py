"""Small shared torch tools."""

from phalanx.nn.chains import layers_of
from phalanx.nn.folding import fold_batchnorm, folds_certainly
from phalanx.nn.frozen import exact_fp32, frozen, frozen_except, preserved_rng
from phalanx.nn.layers import ConvBN, Normalize
from phalanx.nn.lipschitz import LipschitzConv2d, LipschitzLinear, MaxMin
from phalanx.nn.routed import Chain, Layers, PlainLayers, Plan, RoutedLayer
from phalanx.nn.spec import Spec, record, spec_of

__all__ = [
    "Chain",
    "ConvBN",
    "Layers",
    "LipschitzConv2d",
    "LipschitzLinear",
    "MaxMin",
    "Normalize",
    "PlainLayers",
    "Plan",
    "RoutedLayer",
    "Spec",
    "exact_fp32",
    "fold_batchnorm",
    "folds_certainly",
    "frozen",
    "frozen_except",
    "layers_of",
    "preserved_rng",
    "record",
    "spec_of",
]
