"""Robust and chance-constrained linear programs, over uncertainty sets that can be learned."""

from .base import UncertaintySet
from .chance import (
    ChanceConstrainedLayer,
    ChanceConstrainedLP,
    Frequency,
    Moments,
    clopper_pearson,
)
from .combined import Image, Intersection, Sum
from .families import (
    AnyLaw,
    Bounded,
    Family,
    Gaussian,
    Radial,
    RadiallyDecreasing,
    StudentT,
    Symmetric,
    SymmetricUnimodal,
    UniformEllipsoid,
)
from .maximin import maximin, maximin_oracle
from .polyhedral import Budget, Hull, Polytope
from .programs import RobustLP
from .rows import Data
from .sets import Ball, Box, Ellipsoid

__all__ = [
    "AnyLaw",
    "Ball",
    "Bounded",
    "Box",
    "Budget",
    "ChanceConstrainedLP",
    "ChanceConstrainedLayer",
    "Data",
    "Ellipsoid",
    "Family",
    "Frequency",
    "Gaussian",
    "Hull",
    "Image",
    "Intersection",
    "Moments",
    "Polytope",
    "Radial",
    "RadiallyDecreasing",
    "RobustLP",
    "StudentT",
    "Sum",
    "Symmetric",
    "SymmetricUnimodal",
    "UncertaintySet",
    "UniformEllipsoid",
    "clopper_pearson",
    "maximin",
    "maximin_oracle",
]
