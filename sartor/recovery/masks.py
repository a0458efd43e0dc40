"""Masks of filters in a twin, and the loss that closes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from sartor.ir.torch_ops.dialect import filter_mask


def mask_parameters(gm: fx.GraphModule) -> list[nn.Parameter]:
    """The masks that `insert-masks` put into the program of a twin."""
    found: dict[str, nn.Parameter] = {}
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target is filter_mask:
            key = str(node.args[0].target)
            found[key] = gm.get_parameter(key)
    return list(found.values())


def kept_share(masks: Sequence[Tensor]) -> Tensor:
    """Units that are kept, as a share of all, with the gradient of the sigmoid.

    Reference: METHODS.md, joint end-to-end filter pruning (3.2).
    """
    kept = [filter_mask(mask, torch.arange(mask.numel())).sum() for mask in masks]
    return torch.stack(kept).sum() / sum(mask.numel() for mask in masks)
