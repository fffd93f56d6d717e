"""Fixed points whose answer is known: made from the answer, so no solver is trusted.

An affine problem x = phi(A x + v) is built backwards: z is drawn, x = phi(z), v = z - A x.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from implicitdl.activations import Activation, Blocks, LeakyReLU, ReLU, Softmax, Tanh
from implicitdl.maps import AffineMap


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """A map, its equilibrium in float64, and what is true of it."""

    name: str
    f: AffineMap | Callable[[Tensor], Tensor]
    z0: Tensor
    exact: Tensor
    constant: float  # ||x - x*|| is about this times the residual
    contractive: bool = True
    acyclic: bool = False

    @property
    def affine(self) -> bool:
        return isinstance(self.f, AffineMap)

    @property
    def monotone_condition(self) -> float:
        """m / L of I - A, 0 where a monotone splitting does not apply: what those ask for."""
        if not self.affine:
            return 0.0
        A = self.f.A.double()
        G = torch.eye(A.shape[0]) - A
        lo, hi = self.f.phi.slope
        m, L = torch.linalg.eigvalsh((G + G.mT) / 2)[0], torch.linalg.matrix_norm(G, 2)
        return max(float(m / L), 0.0) if lo >= 0 and hi <= 1 else 0.0

    def residual(self, x: Tensor) -> Tensor:
        """rms(f(x) - x) of each sample, from float64 arithmetic on the problem's own numbers."""
        f = self.f
        if isinstance(f, AffineMap):
            fx = f.phi(x.double() @ f.A.double().mT + f.v.double())
        else:
            fx = f(x.double())
        return rms(fx - x.double())


def rms(x: Tensor) -> Tensor:
    """Root mean square of each sample."""
    return x.flatten(1).square().mean(1).sqrt()


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=generator(seed), dtype=torch.float64)


def row_sums(A: Tensor, kappa: float) -> Tensor:
    """A with every absolute row sum equal to kappa."""
    return A * (kappa / A.abs().sum(1, keepdim=True))


def monotone_matrix(n: int, m: float = 0.6, seed: int = 0) -> Tensor:
    """(A + A^T)/2 <= (1 - m) I, far from a contraction."""
    W, Z = randn(n, n, seed=seed) / n**0.5, randn(n, n, seed=seed + 1) / n**0.5
    return (1 - m) * torch.eye(n) - W.mT @ W + (Z - Z.mT) / 2


def affine(
    name: str,
    A: Tensor,
    phi: Activation,
    constant: float,
    *,
    batch: int = 5,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    scale: float = 1.0,
    contractive: bool = True,
    **facts: object,
) -> Problem:
    """x = phi(A x + v) with a drawn solution; the numbers are rounded to `dtype` first."""
    A = A.to(dtype)
    z = scale * randn(batch, A.shape[0], seed=seed + 10)
    x = phi(z)
    v = (z - x @ A.double().mT).to(dtype)
    return Problem(
        name=name,
        f=AffineMap(A, v, phi, **facts),
        z0=torch.zeros_like(v),
        exact=x,
        constant=constant,
        contractive=contractive,
        acyclic=bool(facts.get("acyclic")),
    )


def _nonnegative(kappa: float) -> Callable[[torch.dtype], Problem]:
    def make(dtype: torch.dtype) -> Problem:
        A = row_sums(rand(24, 24, seed=1), kappa)
        return affine(
            f"nonneg-{kappa}", A, ReLU(), 1 / (1 - kappa), dtype=dtype, contraction=kappa + 1e-6
        )

    return make


def _undeclared(dtype: torch.dtype) -> Problem:
    A = row_sums(rand(24, 24, seed=1), 0.9)
    return affine("nonneg-0.9, nothing declared", A, ReLU(), 10, dtype=dtype)


def _random_sign(dtype: torch.dtype) -> Problem:
    A = row_sums(randn(24, 24, seed=2), 0.99)
    return affine("random-sign", A, ReLU(), 100, dtype=dtype, contraction=0.9901)


def _monotone(phi: Activation) -> Callable[[torch.dtype], Problem]:
    def make(dtype: torch.dtype) -> Problem:
        A = monotone_matrix(24, seed=3)
        name = f"monotone {type(phi).__name__}"
        return affine(name, A, phi, 50, dtype=dtype, monotone=0.5999, contractive=False)

    return make


def _triangular(dtype: torch.dtype) -> Problem:
    A = torch.triu(randn(24, 24, seed=4) / 2, diagonal=1)
    return affine("triangular", A, LeakyReLU(), 1e4, dtype=dtype, acyclic=True)


def _tanh(dtype: torch.dtype) -> Problem:
    A = row_sums(randn(24, 24, seed=5), 0.9)
    return affine("tanh", A, Tanh(), 10, dtype=dtype, contraction=0.9001)


def _blocks(dtype: torch.dtype) -> Problem:
    A = row_sums(randn(24, 24, seed=6), 0.8)
    phi = Blocks(parts=((Softmax(), 8), (ReLU(), 10), (Tanh(), 6)))
    return affine("blocks", A, phi, 20, dtype=dtype)


def _closure(dtype: torch.dtype) -> Problem:
    W = row_sums(randn(12, 12, seed=7), 0.8)
    z = 0.5 * randn(5, 3, 4, seed=8)
    shift = torch.atanh(z.clamp(-0.9, 0.9)) - (z.clamp(-0.9, 0.9).flatten(1) @ W.mT).view_as(z)
    W, shift = W.to(dtype), shift.to(dtype)

    def f(z: Tensor) -> Tensor:
        return torch.tanh((z.flatten(1) @ W.to(z).mT).view_as(z) + shift.to(z))

    return Problem(
        name="closure",
        f=f,
        z0=torch.zeros(5, 3, 4, dtype=dtype),
        exact=z.clamp(-0.9, 0.9),
        constant=10,
    )


def _cosine(dtype: torch.dtype) -> Problem:
    """z = a cos z: a scalar a sample, n = 1."""
    z = torch.tensor([[0.1], [0.4], [0.7], [-0.5]])
    a = (z / z.cos()).to(dtype)
    return Problem(
        name="cosine",
        f=lambda z: a.to(z) * z.cos(),
        z0=torch.zeros_like(a),
        exact=z,
        constant=10,
    )


def _expanding(dtype: torch.dtype) -> Problem:
    """z = u - 1.8 z - tanh(z): one solution, and every plain step overshoots."""
    z = randn(5, 6, seed=9)
    u = (2.8 * z + torch.tanh(z)).to(dtype)
    return Problem(
        name="expanding closure",
        f=lambda z: u.to(z) - 1.8 * z - torch.tanh(z),
        z0=torch.zeros_like(u),
        exact=z,
        constant=10,
        contractive=False,
    )


PROBLEMS: dict[str, Callable[[torch.dtype], Problem]] = {
    "nonneg-0.5": _nonnegative(0.5),
    "nonneg-0.9": _nonnegative(0.9),
    "nonneg-0.99": _nonnegative(0.99),
    "undeclared-0.9": _undeclared,
    "random-sign": _random_sign,
    "monotone-relu": _monotone(ReLU()),
    "monotone-tanh": _monotone(Tanh()),
    "triangular": _triangular,
    "tanh": _tanh,
    "blocks": _blocks,
    "closure": _closure,
    "cosine": _cosine,
    "expanding": _expanding,
}


def rows_equal(got: Tensor, expected: Tensor) -> None:
    """Equal up to the rounding of another blocking of the same sums."""
    assert got.shape == expected.shape
    assert torch.allclose(got, expected, rtol=1e-13, atol=1e-14)
