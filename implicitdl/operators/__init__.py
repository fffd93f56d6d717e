"""Linear operators that keep their structure: what the blocks of A, B, C and D are.

A convolution is applied as a convolution, a permutation as one; the matrix of an operator is made
by `dense()` alone, which refuses where it would be large. Five things are asked of each:

    apply(x, bias)     M x + bias                   # (m, *in_shape) -> (m, *out_shape)
    transpose(g)       M^T g                        # (m, *out_shape) -> (m, *in_shape)
    abs()              |M|, for Perron-Frobenius conditions and bounds
    norm()             ||M||_inf = max_i sum_j |M_ij|, or the 1-norm, from above
    dense()            the matrix
"""

from ._base import DENSE_LIMIT, REGISTRY, Live, Operator, Weight, read, rebuilt, weights
from .composed import Product, Sum, product, total
from .convolution import Convolution
from .dense import Dense, Identity, LowRank, Scale, Zero
from .fixed import Gather, Pooling
from .grid import Grid, Space
from .sparse import Sparse

__all__ = [
    "DENSE_LIMIT",
    "REGISTRY",
    "Convolution",
    "Dense",
    "Gather",
    "Grid",
    "Identity",
    "Live",
    "LowRank",
    "Operator",
    "Pooling",
    "Product",
    "Scale",
    "Space",
    "Sparse",
    "Sum",
    "Weight",
    "Zero",
    "product",
    "read",
    "rebuilt",
    "total",
    "weights",
]
