"""Operators of the `sartor` dialect whose gradient is not that of their body."""

from __future__ import annotations

import torch
from torch import Tensor


def filter_mask(mask: Tensor, index: Tensor) -> Tensor:
    """`sartor.FilterMask`: which filters a mask keeps, with the gradient of the sigmoid.

    Reference: METHODS.md, joint end-to-end filter pruning (3.4) and (3.5); the estimator is of Bengio et al.,
    "Estimating or propagating gradients through stochastic neurons", 2013.
    """
    values = mask[index.clamp(min=0)]
    soft = torch.sigmoid(values)
    hard = (values >= 0).to(mask.dtype) + (soft - soft.detach())
    return torch.where(index < 0, torch.ones_like(hard), hard)


DIALECT_OPERATORS = {"FilterMask": filter_mask}
"""By operator type; the others of the dialect are expanded to their bodies."""
