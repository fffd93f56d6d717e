"""The largest of several states, as an activation of a block of states."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ._base import Activation

_POOL: dict[int, Callable[..., Tensor]] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


@dataclass(frozen=True, kw_only=True)
class MaxPool(Activation):
    """phi(z)_w = max of z over window w, on a block of states that is an image.

    |max z - max z'| <= max |z - z'|, so phi is 1-Lipschitz in the infinity norm. It is no gradient
    map. As many states come out as go in: the maxima stand first, zeros follow; `natural` works on
    images and leaves the zeros out.

    Args:
        shape: of the image that goes in, (channels, *size), in 1, 2 or 3 dimensions.
        kernel_size, stride, padding, dilation, ceil_mode: as in torch, one number a dimension.

    Reference:
        El Ghaoui, Gu, Travacca, Askari, Tsai (2021), section 2.4 (block activations).
    """

    shape: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    ceil_mode: bool = False

    entrywise = False
    symmetric = False
    homogeneous = True
    isotone = True
    infinity_lipschitz = 1.0
    _out: ClassVar[tuple[int, ...]]

    def __post_init__(self) -> None:
        dims = len(self.shape) - 1
        if dims not in _POOL or min(self.shape, default=0) < 1:
            raise ValueError(
                f"MaxPool: got shape {self.shape}, expected (channels, *size) with 1 to 3 sizes."
            )
        for name in ("kernel_size", "stride", "padding", "dilation"):
            value = getattr(self, name)
            if len(value) != dims or any(type(i) is not int for i in value):
                raise ValueError(f"MaxPool: got {name}={value!r}, expected {dims} integers.")
        try:
            image = self.natural(torch.empty(1, *self.shape, device="meta"))
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"MaxPool: {error}") from error
        object.__setattr__(self, "_out", tuple(image.shape[1:]))

    def natural_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the image of maxima."""
        return self._out

    @property
    def size(self) -> int:
        """The number of states: that of the larger image."""
        return max(math.prod(self.shape), math.prod(self._out))

    @property
    def slope(self) -> tuple[float, float]:
        """The spectral norm of a Jacobian, either sign: the root of how many windows share a z."""
        share = math.prod(
            math.ceil(((k - 1) * d + 1) / s)
            for k, s, d in zip(self.kernel_size, self.stride, self.dilation, strict=True)
        )
        share = min(share, math.prod(self._out[1:]))
        return (-math.sqrt(share), math.sqrt(share))

    def natural(self, z: Tensor) -> Tensor:  # (m, *shape) -> (m, *out_shape)
        """The maxima as an image."""
        options = (self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)
        return _POOL[len(self.shape) - 1](z, *options)

    def __call__(self, z: Tensor) -> Tensor:
        batch, n = z.shape[:-1], z.shape[-1]
        if n != self.size:
            raise ValueError(f"MaxPool: got {n} states, expected {self.size}.")
        image = z[..., : math.prod(self.shape)].reshape(-1, *self.shape)
        top = self.natural(image).flatten(1)
        return F.pad(top, (0, n - top.shape[1])).reshape(*batch, n)

    def derivative(self, z: Tensor) -> Tensor:
        """There is none that `product` could take: the Jacobian is not symmetric."""
        raise self._missing("derivative")

    def product(self, d: Tensor, w: Tensor) -> Tensor:
        """There is none, as there is no `derivative`."""
        raise self._missing("product")

    def _missing(self, what: str) -> Exception:
        return ValueError(
            f"{what}: max-pooling is not the gradient of a convex potential and its Jacobian is not "
            "symmetric; solve with `ImplicitModel`, or write the map as an `EquilibriumLayer`"
        )

    def to_config(self) -> dict[str, Any]:
        own = super().to_config()
        return {name: list(v) if isinstance(v, tuple) else v for name, v in own.items()}
