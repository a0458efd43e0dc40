"""Torch-Pruning on the models of the zoo: a random half of every group, run as its own examples run it.

What its documentation asks its user for is given to it: gradients on, fused attention off, the classifier and the
last layers of detectors ignored, the static attributes of attention updated after pruning, `round_to` and
`hidden_dim` for torchvision's vision transformer. `num_heads` is tried in up to three ways, for all projections
of attention, for fused ones, for none; the first under which the pruned model runs counts. Its time is that of
the graph and of the pruning; it verifies nothing, so nothing else is in it.

*Exact* is defined in `zoo_masked`. MACs before and after are counted alike, by PyTorch's FLOP counter
(convolutions and matrix products, attention included, 2 FLOP each).
"""

from __future__ import annotations

import collections
import copy
import os
import resource
import statistics
import time
import warnings
from collections.abc import Sequence
from typing import Any

import zoo_models

LAST_LAYERS = {
    "ssd": ("head",),
    "fcos": (
        "head.classification_head.cls_logits",
        "head.regression_head.bbox_reg",
        "head.regression_head.bbox_ctrness",
    ),
    "retina": ("head.classification_head.cls_logits", "head.regression_head.bbox_reg"),
    "raft": ("corr_block", "update_block", "mask_predictor"),
}
PROJECTIONS = "qkv q k v kv wq wk wv q_proj k_proj v_proj query key value".split()


def examine(name: str, threads: int) -> dict[str, Any]:
    """One model, in this process."""
    os.environ["TIMM_FUSED_ATTN"] = "0"  # read when timm is imported
    import torch
    import zoo_masked

    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    row: dict[str, Any] = {"model": name, "captured": False}
    try:
        module, examples = zoo_models.build(name)
    except Exception as error:
        return {**row, "reason": f"the library cannot build it: {type(error).__name__}: {str(error)[:200]}"}
    try:
        zoo_masked.randomise(module, examples, seed=1)
        original = copy.deepcopy(module)
        before = count_macs(module, examples)
    except Exception as error:
        return {**row, "reason": f"the model does not run: {type(error).__name__}: {str(error)[:200]}"}
    present = [p for p in PROJECTIONS if any(_projections(m, [p]) for m in module.modules())]
    first: dict[str, Any] = {}
    for told in dict.fromkeys([tuple(present), tuple({"qkv"} & {*present}), ()]):
        result = attempt(name, original, examples, before, told)
        first = first or result
        if result.get("runs"):
            break
    row |= result if result.get("runs") else first
    row["peak_rss_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)
    return row


def attempt(
    name: str, original: Any, examples: tuple[Any, ...], macs: int, told: Sequence[str]
) -> dict[str, Any]:
    """Prune a copy, with `num_heads` given for projections of these names, and judge it."""
    import zoo_masked

    module, row = copy.deepcopy(original), {"captured": False, "num_heads_of": list(told)}
    try:
        removed, untracked = prune(name, module, examples, original, row, told)
    except Exception as error:
        return {**row, "reason": f"{type(error).__name__}: {str(error)[:300]}"}
    row |= {"captured": True, "macs": macs, "removed": removed.count(), "runs": False}
    try:
        after = count_macs(module, examples)
    except Exception as error:
        reason = f"does not run: {type(error).__name__}: {str(error)[:200]}"
        return {**row, "exact": False, "inexact_reason": reason}
    row |= {"runs": True, "macs_removed": 1.0 - after / macs}
    if untracked:
        return {**row, "exact": None, "untracked": True, "inexact_reason": f"cannot be tracked: {untracked}"}
    if row["removed"] == 0:
        return {**row, "exact": None, "inexact_reason": "nothing was removed"}
    return row | zoo_masked.compare(original, module, removed, examples)


def prune(
    name: str,
    module: Any,
    examples: tuple[Any, ...],
    original: Any,
    row: dict[str, Any],
    told: Sequence[str] = (),
) -> tuple[Any, str]:
    """Prune in place; what was removed, and why that cannot be said, if it cannot.

    Args:
        row: gets `build_graph_s`, `prune_s`, `seconds`, `groups` and `mixing_norms`, how many
            LayerNorms and GroupNorms lost units.
        told: names of the projections whose number of heads it is given.
    """
    import torch
    import torch_pruning as tp
    from zoo_masked import Removed, Untracked

    removed, untracked = Removed(original), ""
    norms: set[str] = set()
    torch.manual_seed(1)
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    heads = {layer: owner.num_heads for owner in module.modules() for layer in _projections(owner, told)}
    start = time.perf_counter()
    pruner = tp.pruner.BasePruner(
        module,
        examples,
        importance=tp.importance.RandomImportance(),
        pruning_ratio=0.5,
        ignored_layers=ignored_layers(name, module),
        num_heads=dict(heads),
        round_to=module.encoder.layers[0].num_heads if name.startswith("torchvision/vit") else None,
        in_channel_groups={},  # its defaults are shared between instances
        out_channel_groups={},
    )
    row["build_graph_s"] = round(time.perf_counter() - start, 3)
    names = {m: n for n, m in module.named_modules()}
    graph, groups, tracking = pruner.DG, 0, 0.0
    begin = time.perf_counter()
    for group in pruner.step(interactive=True):
        pause = time.perf_counter()
        groups += 1
        try:
            for item in group:
                record(item, graph, names, removed, norms)
        except Untracked as error:
            untracked = str(error)
        tracking += time.perf_counter() - pause
        group.prune()
    _update_attributes(name, module, pruner, told)
    row["prune_s"] = round(time.perf_counter() - begin - tracking, 3)
    row |= {
        "seconds": round(row["build_graph_s"] + row["prune_s"], 3),
        "groups": groups,
        "mixing_norms": len(norms),
    }
    return removed, untracked


def record(item: Any, graph: Any, names: dict[Any, str], removed: Any, norms: set[str]) -> None:
    """Note what one member of a group is about to lose."""
    from torch import nn

    target, handler, indices = item.dep.target.module, item.dep.handler, list(item.idxs)
    if isinstance(target, nn.Parameter):
        removed.parameter(graph._param_to_name[target], item.dep.target.pruning_dim, indices)
    elif target in names:
        outer = graph.is_out_channel_pruning_fn(handler)
        if isinstance(target, nn.LayerNorm | nn.GroupNorm):
            norms.add(names[target])
        removed.module(names[target], "out" if outer else "in", indices)
    # Everything else in a group (concatenations, splits, element-wise operators) has no parameters.


def ignored_layers(name: str, module: Any) -> list[Any]:
    """Layers whose outputs are the model's: its classifier, and what its examples name for detectors."""
    from torch import nn

    model = name.partition("/")[2]
    ignored = [module.get_submodule(p) for key, ps in LAST_LAYERS.items() if key in model for p in ps]
    classes = {1000, 21} if name.startswith("torchvision/") else {getattr(module, "num_classes", 1000)}
    for layer in module.modules():
        width = getattr(layer, "out_features" if isinstance(layer, nn.Linear) else "out_channels", None)
        if isinstance(layer, nn.Linear | nn.Conv2d) and width in classes:
            ignored.append(layer)
    return ignored


def _projections(owner: Any, names: Sequence[str]) -> list[Any]:
    """The layers of an attention module that make queries, keys and values."""
    from torch import nn

    if not isinstance(getattr(owner, "num_heads", None), int):
        return []
    layers = (getattr(owner, name, None) for name in names)
    return [layer for layer in layers if isinstance(layer, nn.Linear)]


def _update_attributes(name: str, module: Any, pruner: Any, told: Sequence[str]) -> None:
    """Numbers that a forward reads from attributes and that no dependency graph can know."""
    for owner in module.modules():
        for layer in _projections(owner, told)[:1]:
            fused = 3 if layer is getattr(owner, "qkv", None) else 1
            owner.num_heads = pruner.num_heads[layer]
            for attribute, value in (
                ("head_dim", layer.out_features // (fused * owner.num_heads)),
                ("attn_dim", layer.out_features // fused),
            ):
                if isinstance(getattr(owner, attribute, None), int):
                    setattr(owner, attribute, value)
    if name.startswith("torchvision/vit"):
        module.hidden_dim = module.conv_proj.out_channels


def count_macs(module: Any, examples: tuple[Any, ...]) -> int:
    """Multiply-accumulates of one inference, functional calls included."""
    from torch.utils.flop_counter import FlopCounterMode

    # With gradients on, MultiheadAttention runs as operators that are counted, not as one that is not.
    with FlopCounterMode(display=False) as counter:
        module(*examples)
    return int(counter.get_total_flops()) // 2


# ---- what is printed -------------------------------------------------------------------------
def summarise(rows: list[dict[str, Any]], prunable: float) -> dict[str, Any]:
    """The keys of the zoo's summary with `torch_pruning_` in front, and how many pruned models run.

    `inconclusive` are pruned models that run of which nothing can be said; `untracked` of them are those whose
    removed units have no counterpart in the original's parameters.
    """
    captured = [r for r in rows if r["captured"]]
    removed = [r["macs_removed"] for r in captured if "macs_removed" in r]
    seconds = [r["seconds"] for r in captured]
    counts = {
        "total": len(rows),
        "captured": len(captured),
        "runs": sum(r["runs"] for r in captured),
        "prunable": sum(r >= prunable for r in removed),
        "exact": sum(r["exact"] is True for r in captured),
        "inconclusive": sum(r["exact"] is None for r in captured),
        "untracked": sum(r.get("untracked", False) for r in captured),
        "median_macs_removed": round(statistics.median(removed), 4) if removed else None,
        "median_s": round(statistics.median(seconds), 2) if seconds else None,
        "worst_s": round(max(seconds), 2) if seconds else None,
    }
    return {f"torch_pruning_{key}": value for key, value in counts.items()}


def show(row: dict[str, Any]) -> str:
    if not row["captured"]:
        return f"not captured: {row['reason'][:110]}"
    parts = [f"{row['groups']} groups"]
    if "macs_removed" in row:
        parts.append(f"{row['macs_removed']:.1%} of MACs removed")
    parts.append({True: "exact", False: "not exact", None: "inconclusive"}[row["exact"]])
    if row.get("max_rel_error") is not None:
        parts[-1] += f", error {row['max_rel_error']:.1e}"
    if row["exact"] is not True:
        parts.append(row["inexact_reason"][:110])
    return ", ".join([*parts, f"{row['seconds']:.1f} s"])


def report(rows: list[dict[str, Any]]) -> None:
    """Print why models were not pruned, or not exactly."""
    print("\nTorch-Pruning: why models were not captured, or not exact")
    reasons = [r["inexact_reason" if r["captured"] else "reason"] for r in rows if not r.get("exact")]
    kinds = (": ".join(reason.split(": ")[:2])[:60] for reason in reasons)
    for reason, count in collections.Counter(kinds).most_common():
        print(f"{count:>5}  {reason}")
