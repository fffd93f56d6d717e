"""When x = phi(A x + b) has exactly one solution for every b: certificates, and sets of such A."""

from ._base import WellPosedSet
from .certificate import Certificate, certificate
from .rescaling import rescale
from .sets import (
    InfNormBall,
    MatrixMeasure,
    Monotone,
    PerronFrobenius,
    StrictlyUpper,
    get_well_posed,
)

__all__ = [
    "Certificate",
    "InfNormBall",
    "MatrixMeasure",
    "Monotone",
    "PerronFrobenius",
    "StrictlyUpper",
    "WellPosedSet",
    "certificate",
    "get_well_posed",
    "rescale",
]
