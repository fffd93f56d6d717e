"""The worst of finitely many: groups of samples, or distributions over them."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ._checks import distribution, finite, labels_of, losses_of, number
from .risks import Risk


def group_means(losses: Tensor, groups: Tensor, number_of_groups: int) -> tuple[Tensor, Tensor]:
    """The mean loss of each group, and how many samples of it there are.

    Args:
        losses: # (..., n)
        groups: 0, ..., G - 1, of each sample.  # (n,) or (..., n)
        number_of_groups: G.

    Returns:
        means, 0 for an absent group  # (..., G); counts  # (..., G), int64
    """
    if type(number_of_groups) is not int or number_of_groups < 1:
        raise ValueError(f"number_of_groups: got {number_of_groups!r}, expected an integer >= 1.")
    l = losses_of(losses)
    shape = tuple(groups.shape) if isinstance(groups, Tensor) else ()
    if shape not in (tuple(l.shape), tuple(l.shape[-1:])):
        shape = tuple(l.shape)
    index = labels_of("groups", groups, shape, number_of_groups).expand(l.shape)
    zero = l.new_zeros(*l.shape[:-1], number_of_groups)
    counts = zero.scatter_add(-1, index, torch.ones_like(l))
    sums = zero.scatter_add(-1, index, l)
    return (sums / counts.clamp_min(1)).to(losses.dtype), counts.long()


def reweighted(losses: Tensor, groups: Tensor, sizes: Tensor) -> Tensor:
    """Reweighted empirical risk: every group counts the same, sum_i n / (G n_g(i)) l_i / batch.

    The baseline to hold group DRO against. Over all data it is the plain mean of the groups' means;
    over a random batch, an unbiased estimate of it.

    Args:
        losses: # (..., n)
        groups: of each sample.  # (n,) or (..., n)
        sizes: samples of each group in all data.  # (G,)

    Returns:
        # (...)

    Raises:
        ValueError: a group with no samples, or a group number out of range.
    """
    sizes = _sizes(sizes)
    means, counts = group_means(losses, groups, sizes.shape[0])
    scale = sizes.sum() / (sizes * sizes.shape[0])  # n / (G n_g)
    share = counts.double() / losses.shape[-1]
    return (means.double() * share * scale.to(means.device)).sum(-1).to(losses.dtype)


def maximin(
    losses: Tensor, family: "Tensor | None" = None, *, certified: bool = False,
    weights: "Tensor | None" = None,
) -> "Tensor | Risk":  # fmt: skip
    """Wald's criterion over a finite family: max over k of sum_i P_ki l_i.

    To minimise it in the parameters of a decision is to prepare for the worst member.

    Args:
        losses: one a sample, or, without a family, the expected loss under each member.  # (..., n)
        family: distributions over the samples, one a row.  # (K, n)
        certified: return a `Risk`, whose `weights` are over the members, and whose `upper` is the
            largest expected loss and `lower` the one under a mixture of the members.
        weights: of that mixture; the worst member where None.  # (..., K)

    Returns:
        # (...), differentiable; of several worst members the gradient is the mean

    Raises:
        ValueError: NaN, rows of the family or weights that are negative or do not sum to one.

    Reference:
        Wald (1945), "Statistical decision functions which minimize the maximum risk".
    """
    l = losses_of(losses)
    if family is not None:
        if not isinstance(family, Tensor) or family.dim() != 2:
            raise ValueError("family: expected a tensor (K, n), one distribution a row.")
        l = l @ distribution("family", family, l).mT
    top = l.detach().amax(-1, keepdim=True)
    peak = (l.detach() == top).to(l)
    q = peak / peak.sum(-1, keepdim=True)
    value = (q * l).sum(-1).to(losses.dtype)
    if not certified:
        return value
    mix = q if weights is None else distribution("weights", weights, l)
    return Risk(
        value=value, weights=q.to(losses.dtype), dual=top[..., 0].to(losses.dtype),
        lower=(mix * l).sum(-1).to(losses.dtype), upper=l.amax(-1).to(losses.dtype),
    )  # fmt: skip


class GroupDRO(nn.Module):
    """min over theta of max over q of sum_g q_g (l_g + C / sqrt(n_g)), q by exponentiated gradient.

    In training mode each call first updates q_g <- q_g e^(eta (l_g + C / sqrt(n_g))) / Z for the
    groups present in the batch (the relative weights of absent ones stay), then returns the sum
    over those present. In evaluation mode q stays. q is a buffer, and so part of `state_dict`.

    Args:
        sizes: samples of each group in the training data.  # (G,)
        eta: step size of q, >= 0.
        adjustment: C >= 0, which weighs small groups up, since their loss generalises worse.

    Raises:
        ValueError: a group with no samples, a negative eta or adjustment.

    Example:
        >>> import torch
        >>> from implicitdl import dro
        >>> risk = dro.GroupDRO(torch.tensor([90, 10]), eta=0.1)
        >>> losses, groups = torch.tensor([0.1, 0.2, 2.0]), torch.tensor([0, 0, 1])
        >>> risk(losses, groups) > losses.mean(), risk.weights
        (tensor(True), tensor([0.4539, 0.5461]))

    Reference:
        Sagawa, Koh, Hashimoto, Liang (2020), "Distributionally robust neural networks for group
        shifts", algorithm 1 and section 3.3.
    """

    log_weights: Tensor
    sizes: Tensor

    def __init__(self, sizes: Tensor, *, eta: float = 0.01, adjustment: float = 0.0):
        super().__init__()
        sizes = _sizes(sizes)
        self.eta = number("eta", eta, 0)
        self.adjustment = number("adjustment", adjustment, 0)
        self.register_buffer("sizes", sizes)
        # Logarithms do not run out of range over many steps; float64 whatever the model is in.
        self.register_buffer("log_weights", torch.full_like(sizes, -math.log(len(sizes))))

    @classmethod
    def of_groups(cls, groups: Tensor, *, count: "int | None" = None, **options: Any) -> "GroupDRO":
        """The module for the groups of all training samples.

        Args:
            groups: # (n,), integers
            count: G; one more than the largest group number where None.
            options: `eta`, `adjustment`.

        Raises:
            ValueError: a group with no samples.
        """
        groups = labels_of("groups", groups, (groups.numel(),), count)
        return cls(torch.bincount(groups, minlength=count or 0), **options)

    @property
    def weights(self) -> Tensor:
        """q.  # (G,)"""
        return self.log_weights.softmax(-1).to(torch.get_default_dtype())

    def forward(self, losses: Tensor, groups: Tensor) -> Tensor:
        """The weighted loss of a batch.

        Args:
            losses: # (n,)
            groups: # (n,)

        Returns:
            A number, differentiable in the losses.

        Raises:
            ValueError: NaN among the losses, shapes that differ, a group number out of range.
        """
        adjusted, present = self._group_losses(losses, groups)
        if self.training:
            with torch.no_grad():
                step = self.eta * adjusted.detach().masked_fill(~present, 0.0)
                self.log_weights += step
                self.log_weights -= self.log_weights.logsumexp(-1)
        q = self.log_weights.softmax(-1).masked_fill(~present, 0.0)
        return (q * adjusted).sum().to(losses.dtype)

    def bracket(self, losses: Tensor, groups: Tensor) -> Risk:
        """The worst group of these samples: its loss from above, the mixture by q from below.

        Groups that are absent are left out, and q is scaled to sum to one over the others.
        """
        adjusted, present = self._group_losses(losses, groups)
        q = self.log_weights.masked_fill(~present, -math.inf).softmax(-1)
        lower = (q * adjusted).sum().to(losses.dtype)
        shown = adjusted.masked_fill(~present, -math.inf)
        top = shown.detach().amax()
        peak = (shown == top).to(q)
        peak = peak / peak.sum()
        value = (peak * adjusted).sum().to(losses.dtype)
        return Risk(value=value, weights=peak.to(losses.dtype), dual=top, lower=lower, upper=value)

    def _group_losses(self, losses: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        if not isinstance(losses, Tensor) or losses.dim() != 1:
            shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(f"losses: got {shape}, expected (n,), one loss a sample.")
        means, counts = group_means(losses.double(), groups, self.sizes.shape[0])
        return means + self.adjustment / self.sizes.sqrt(), counts > 0

    def extra_repr(self) -> str:
        """The number of groups and the options."""
        return f"groups={len(self.sizes)}, eta={self.eta}, adjustment={self.adjustment}"


def _sizes(sizes: Tensor) -> Tensor:
    """Sizes of groups, positive, in float64."""
    sizes = torch.as_tensor(sizes)
    if sizes.dim() != 1 or sizes.numel() == 0:
        raise ValueError(f"sizes: got shape {tuple(sizes.shape)}, expected (G,), one a group.")
    finite("sizes", sizes.double())
    empty = torch.nonzero(~(sizes > 0)).flatten().tolist()
    if empty:
        raise ValueError(
            f"sizes: got a group with no samples (group {empty[0]}), expected at least one in each; "
            "leave empty groups out and number the others from 0."
        )
    return sizes.double()
