"""Small shared torch tools."""

from phalanx.nn.folding import fold_batchnorm
from phalanx.nn.frozen import exact_fp32, frozen, preserved_rng
from phalanx.nn.layers import ConvBN, Normalize
from phalanx.nn.spec import Spec, record, spec_of

__all__ = [
    "ConvBN",
    "Normalize",
    "Spec",
    "exact_fp32",
    "fold_batchnorm",
    "frozen",
    "preserved_rng",
    "record",
    "spec_of",
]
