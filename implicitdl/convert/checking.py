"""Whether a model computes what its network does, looked at from several sides."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..model import ImplicitModel
from ..solution import ConversionError

# Relative to the largest output, in float64: what rounding makes of a network of hundreds of layers.
_ALLOWED = 1e-8


class _Both(nn.Module):
    """The network and the model on the same input, for `functional_call` to exchange their tensors."""

    def __init__(self, network: nn.Module, model: ImplicitModel):
        super().__init__()
        self.network, self.model = network, model

    def forward(self, u: Tensor) -> tuple[Any, Tensor]:
        """What both say of u."""
        return self.network(u.clone()), self.model(u)


def check(network: nn.Module, model: ImplicitModel, example: Tensor) -> None:
    """The model must reproduce the network, at the example and away from it.

    In float64 where the network runs in it, and on copies of all tensors: at the example; with
    other weights and buffers, so that a bias of zero or a gate that is shut hides nothing; and for
    another number of samples, ten times as large, which a batch size or a branch that became a
    constant does not survive.

    Raises:
        ConversionError: it does not.
    """
    both = _Both(network, model)
    own = {**dict(both.named_parameters()), **dict(both.named_buffers())}
    buffers = {name for name, _ in both.named_buffers()}
    seed = torch.Generator().manual_seed(0)

    def noise(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=seed, dtype=torch.float64).to(t.device, t.dtype)

    def call(tensors: dict[str, Tensor], v: Tensor) -> tuple[Any, Tensor]:
        fresh = {n: t.clone() if n in buffers else t for n, t in tensors.items()}
        return torch.func.functional_call(both, fresh, (v,))

    exact = True
    with torch.no_grad():
        wide = {n: t.double() if t.is_floating_point() else t.clone() for n, t in own.items()}
        try:
            call(wide, example.double())
        except Exception:  # noqa: BLE001 - it is written for its own dtype
            wide, exact = {n: t.clone() for n, t in own.items()}, False
        u = example.detach().to(torch.float64 if exact else example.dtype)
        other = 2 if example.shape[0] != 2 else 3
        _compare(*call(wide, u), "at the example", exact)
        what = f"for {other} samples, {example.shape[0]} in the example,"
        far = 10 * noise(u[:1].expand(other, *u.shape[1:]))
        try:
            pair = call(wide, far)
        except Exception as error:
            if _alone(network, wide, far):
                raise _differs(f"fails {what} where the network does not ({error})") from error
        else:  # a network that takes no other batch cannot be compared there
            _compare(*pair, what, exact)
        for name, t in wide.items():
            if t.is_floating_point():  # variances stay positive
                wide[name] = t * (1 + 0.3 * torch.tanh(noise(t))) + 0.05 * noise(t).abs()
        _compare(*call(wide, u), "with other weights", exact)


def _alone(network: nn.Module, tensors: dict[str, Tensor], v: Tensor) -> bool:
    """Whether the network itself takes the input."""
    own = {n.removeprefix("network."): t.clone() for n, t in tensors.items()}
    try:
        torch.func.functional_call(network, own, (v,))
    except Exception:  # noqa: BLE001 - whatever the network raises
        return False
    return True


def _compare(expected: Any, got: Tensor, what: str, exact: bool) -> None:
    expected = next(_tensors(expected))
    if got.dtype != expected.dtype or got.shape != expected.shape:
        raise _differs(
            f"gives {got.dtype} {tuple(got.shape)} {what} where the network gives "
            f"{expected.dtype} {tuple(expected.shape)}"
        )
    finite = torch.isfinite(expected)
    allowed = _ALLOWED if exact else 64 * torch.finfo(expected.dtype).eps
    size = 1.0 + float(torch.where(finite, expected, 0.0).abs().amax()) if got.numel() else 1.0
    gap = torch.where(finite, (got - expected).abs(), 0.0).nan_to_num(nan=torch.inf)
    if bool((torch.isfinite(got) != finite).any()) or (
        got.numel() and float(gap.amax()) > allowed * size
    ):
        raise _differs(f"differs from the network by {float(gap.amax()):.3g} {what}")


def _tensors(result: Any) -> Iterator[Tensor]:
    """The tensors of an output, the first of which the model computes."""
    if isinstance(result, Tensor):
        yield result
    for part in result.values() if isinstance(result, dict) else result:
        yield from _tensors(part)


def _differs(how: str) -> ConversionError:
    return ConversionError(
        f"the network cannot be converted: the model {how.rstrip(',')}. Either the network is random "
        "or keeps a state, or what it does depends on the batch size or on values of its input, or "
        "a converter is wrong.", "",
    )  # fmt: skip
