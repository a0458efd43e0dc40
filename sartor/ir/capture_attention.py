"""Attention of any rank, spelt out before the exporter sees it: its own translation takes four axes only."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.export import ExportedProgram

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


def decompose_attention(exported: ExportedProgram) -> ExportedProgram:
    """The program with attention of other than four axes as products and a Softmax."""
    nodes = [n for n in exported.graph.nodes if n.op == "call_function" and n.target is _ATTENTION]
    if all(n.args[0].meta["val"].dim() == 4 for n in nodes):
        return exported
    return exported.run_decompositions({_ATTENTION: attention})


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(q kᵀ · scale + mask) v, as `torch.nn.functional.scaled_dot_product_attention` defines it.

    Args:
        query: `[..., heads, L, E]`.
        key: `[..., key heads, S, E]`.
        value: `[..., key heads, S, Ev]`.
        attn_mask: boolean (True takes part) or additive, broadcast to `[..., L, S]`.
        dropout_p: without effect: programs are captured for inference.
        is_causal: position i sees positions up to i; not together with a mask.
        scale: 1 / √E by default.
        enable_gqa: each key head serves heads / key heads consecutive query heads.
    """
    if enable_gqa:
        repeats = query.size(-3) // key.size(-3)
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    scores = torch.matmul(query * (1.0 / math.sqrt(query.size(-1)) if scale is None else scale), key.mT)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return torch.matmul(torch.softmax(scores, -1), value)
