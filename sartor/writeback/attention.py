"""`NarrowMultiheadAttention`: multi-head attention whose heads do not add up to the embedding."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from sartor.errors import PlanError
from sartor.writeback.tensors import Kept


class NarrowMultiheadAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` with fewer heads, or with fewer features per head.

    torch's module computes the width of a head as `embed_dim / num_heads`, so that it cannot lose a head
    while the embedding stays. This one keeps the widths as numbers of their own. Names and meaning of
    parameters, arguments and results are those of `nn.MultiheadAttention`; queries and keys have
    `qk_head_dim` features per head, values `v_head_dim`, and `scale` is that of the original heads.
    A module becomes one by `narrow_attention`; it is not constructed.

    Attributes:
        qk_head_dim: features of a query or key per head.
        v_head_dim: features of a value per head.
        scale: factor of the scores, 1/√(original features per head).
    """

    qk_head_dim: int
    v_head_dim: int
    scale: float

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `nn.MultiheadAttention.forward`.

        Args:
            query: `[N, L, E]`, `[L, N, E]` without `batch_first`, or `[L, E]`.
            key: `[N, S, kdim]`, likewise.
            value: `[N, S, vdim]`, likewise.
            key_padding_mask: `[N, S]`, True or −inf where a key is ignored.
            need_weights: also return the attention weights.
            attn_mask: `[L, S]` or `[N · num_heads, L, S]`, with the number of heads that are left.
            average_attn_weights: average the weights over the heads that are left.
            is_causal: a hint that `attn_mask` is causal; the mask itself is used.
        """
        del is_causal
        batched = query.dim() == 3
        q, k, v = query, key, value
        if not batched:
            q, k, v = (t.unsqueeze(0) for t in (q, k, v))
            key_padding_mask = key_padding_mask.unsqueeze(0) if key_padding_mask is not None else None
        elif not self.batch_first:
            q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        n, length, source = q.shape[0], q.shape[1], k.shape[1]
        q, k, v = self._project(q, k, v)
        q = q.view(n, length, self.num_heads, self.qk_head_dim).transpose(1, 2)
        k = k.view(n, source, self.num_heads, self.qk_head_dim).transpose(1, 2)
        v = v.view(n, source, self.num_heads, self.v_head_dim).transpose(1, 2)
        mask = self._mask(attn_mask, key_padding_mask, n, q.dtype)
        weights = None
        if need_weights:
            scores = (q * self.scale) @ k.transpose(-2, -1)
            weights = functional.softmax(scores if mask is None else scores + mask, dim=-1)
            result = functional.dropout(weights, self.dropout, self.training) @ v
        else:
            dropout = self.dropout if self.training else 0.0
            result = functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, scale=self.scale
            )
        result = self.out_proj(result.transpose(1, 2).reshape(n, length, self.num_heads * self.v_head_dim))
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
        if not batched:
            return result.squeeze(0), weights.squeeze(0) if weights is not None else None
        return result if self.batch_first else result.transpose(0, 1), weights

    def _project(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        sizes = [self.num_heads * d for d in (self.qk_head_dim, self.qk_head_dim, self.v_head_dim)]
        biases: Any = self.in_proj_bias.split(sizes) if self.in_proj_bias is not None else (None,) * 3
        if self.in_proj_weight is None:
            weights: Any = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        else:
            weights = self.in_proj_weight.split(sizes)
        q, k, v = (functional.linear(t, w, b) for t, w, b in zip((q, k, v), weights, biases, strict=True))
        return q, k, v

    def _mask(
        self, attn: torch.Tensor | None, padding: torch.Tensor | None, n: int, dtype: torch.dtype
    ) -> torch.Tensor | None:
        """Both masks as one addend `[N or 1, heads or 1, L or 1, S]`."""
        total = None
        if attn is not None and attn.dim() == 3:
            if attn.shape[0] != n * self.num_heads:
                raise ValueError(
                    f"attn_mask has {attn.shape[0]} matrices; expected {n} samples times the {self.num_heads} heads "
                    "that are left."
                )
            attn = attn.view(n, self.num_heads, *attn.shape[1:])
        elif attn is not None:
            attn = attn[None, None]
        padding = padding[:, None, None, :] if padding is not None else None
        for mask in (attn, padding):
            if mask is None:
                continue
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
            total = mask if total is None else total + mask
        return total

    def extra_repr(self) -> str:
        """The widths, which the parameters alone do not show."""
        return f"num_heads={self.num_heads}, qk_head_dim={self.qk_head_dim}, v_head_dim={self.v_head_dim}"


def narrow_attention(
    path: str, module: nn.MultiheadAttention, kept: Kept, old: Mapping[str, tuple[int, ...]]
) -> None:
    """Bring the attributes of an attention module up to date whose tensors are cut, changing its class if needed.

    Args:
        path: of the module.
        module: of the private copy.
        kept: kept positions by tensor name and axis.
        old: shapes before the cut.

    Raises:
        PlanError: heads would have different widths, or the module adds keys and values of its own.
    """
    prefix = f"{path}." if path else ""
    own = [n for n in old if n.startswith(prefix) and n.removeprefix(prefix) in _OWN]
    if not own:
        return
    heads = module.num_heads
    qk, v = getattr(module, "qk_head_dim", module.head_dim), getattr(module, "v_head_dim", module.head_dim)
    widths = (qk, qk, v)
    rows = _rows(prefix, module, kept, [heads * w for w in widths])
    # features left of each head
    counts = [np.bincount(r // w, minlength=heads) for r, w in zip(rows, widths, strict=True)]
    living = counts[2] > 0
    dims = [set(c[living].tolist()) for c in counts]
    ragged = any(len(d) != 1 for d in dims) or any(c[~living].any() for c in counts)
    if ragged or dims[0] != dims[1]:
        raise PlanError(
            f"The plan leaves the heads of '{path}' (MultiheadAttention) with different widths; expected one for "
            "all. Plan whole heads, or the same features of every head."
        )
    if module.bias_k is not None or module.add_zero_attn:
        raise PlanError(
            f"Attention '{path}' adds keys and values of its own (add_bias_kv or add_zero_attn), which a narrowed "
            "one cannot; leave its groups out of the plan."
        )
    scale, width = getattr(module, "scale", module.head_dim**-0.5), module.head_dim
    qk, v = dims[0].pop(), dims[2].pop()
    module.num_heads = int(living.sum())
    weight = module.in_proj_weight if module.in_proj_weight is not None else module.q_proj_weight
    assert weight is not None
    module.embed_dim = weight.shape[1]
    module.kdim = module.embed_dim if module.k_proj_weight is None else module.k_proj_weight.shape[1]
    module.vdim = module.embed_dim if module.v_proj_weight is None else module.v_proj_weight.shape[1]
    module.head_dim = qk
    if type(module) is nn.MultiheadAttention:
        if qk == v == width and module.num_heads * qk == module.embed_dim:
            return
        module.__class__ = NarrowMultiheadAttention
    if isinstance(module, NarrowMultiheadAttention):
        module.qk_head_dim, module.v_head_dim, module.scale = qk, v, scale
        module._qkv_same_embed_dim = (
            False  # keeps TransformerEncoder off its fused path, which knows one width
        )


_OWN = (
    *("in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
    *("out_proj.weight", "out_proj.bias"),
)


def _rows(prefix: str, module: nn.MultiheadAttention, kept: Kept, sizes: list[int]) -> list[np.ndarray]:
    """Kept rows of the query, key and value projections, each counted from 0."""
    if module.in_proj_weight is not None:
        rows = kept.get(f"{prefix}in_proj_weight", {}).get(0, np.arange(sum(sizes)))
        edges = np.cumsum([0, *sizes])
        return [rows[(rows >= a) & (rows < b)] - a for a, b in itertools.pairwise(edges)]
    names = [f"{prefix}{letter}_proj_weight" for letter in "qkv"]
    return [kept.get(name, {}).get(0, np.arange(size)) for name, size in zip(names, sizes, strict=True)]
