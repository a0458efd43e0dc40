"""What the pass `reestimate-batch-norm` asks for: statistics on data, and which norms keep theirs with the reasons."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, fx

from sartor.calibration import Inputs
from sartor.data_sources import sample_count
from sartor.errors import UsageError
from sartor.ir.fx import pull_weights, to_fx, to_tensor, twin_info
from sartor.ir.program import Program
from sartor.ir.torch_ops import BatchNorm
from sartor.recovery.twins import batch_norms, reestimate_statistics

if TYPE_CHECKING:
    from sartor.passes.base import Context


def statistics(
    program: Program, context: Context, *, samples: int, batch: int
) -> tuple[dict[str, np.ndarray], list[tuple[str, str]]]:
    """Running statistics on calibration data, by initializer, and `(node, reason)` of norms that keep theirs.

    They are the plain average over batches of the mean and the unbiased variance of a batch, `[C]`. All norms are
    estimated at once: each sees what those before it make with the statistics of the batch.

    Args:
        program: in any float type; run in float32.
        context: data, and what to keep.
        samples: most samples that are looked at.
        batch: samples of one batch; what is left at the end is not looked at.

    Raises:
        UsageError: there are no data, or they do not fit; a statistic is not finite.
    """
    nodes = [
        node for node in program.graph.all_nodes() if node.op_type == "BatchNormalization" and not node.domain
    ]
    if not nodes:
        return {}, []
    gm = to_fx(program, dtype=torch.float32)
    modules = _modules(gm)
    parts = _whole(
        context.supplied("batches")(program, context, samples=samples, batch=batch), program, batch
    )
    first = next(parts, None)
    if first is None:
        raise UsageError("The calibration data are empty; statistics need at least one batch.")
    count = sample_count(first, program.batch.inputs)
    main = set(program.nodes())
    left = {}
    for node in nodes:
        reason = "it lies in a body of If" if node not in main else _obstacle(program, node, count, context)
        if not reason and node.name not in modules:
            reason = "no result depends on it"
        if reason:
            left[node.name or ""] = reason
    chosen = [node for node in nodes if (node.name or "") not in left]
    moving = {modules[node.name or ""] for node in chosen}
    if not moving:
        return {}, list(left.items())
    info = twin_info(gm)

    def tensors() -> Iterator[list[Tensor]]:
        for inputs in (first, *parts):
            yield [to_tensor(inputs[name], info.dtype) for name in info.inputs]

    frozen = [module for module in batch_norms(gm) if module not in moving]
    reestimate_statistics(gm, tensors(), frozen=frozen)
    pulled = pull_weights(program, gm)
    names = [value.name or "" for node in chosen for value in node.inputs[3:5] if value is not None]
    found = {name: pulled.initializer_array(name) for name in names}
    for name, array in found.items():
        if not np.isfinite(array).all():
            raise UsageError(
                f"The statistic '{name}' is not finite on the calibration data; look for weights or samples that make "
                "the network overflow."
            )
    return found, list(left.items())


def _modules(gm: fx.GraphModule) -> dict[str, BatchNorm]:
    """The BatchNormalization calls of the main graph by node name."""
    found = {}
    for node in gm.graph.nodes:
        module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, BatchNorm):
            found[str(node.meta.get("onnx_node"))] = module
    return found


def _whole(batches: Iterator[Inputs], program: Program, batch: int) -> Iterator[Inputs]:
    """Batches without a shorter one, unless there is no other: a handful of samples would count as much as many."""
    any_whole = False
    short: Inputs = {}
    for inputs in batches:
        if program.batch.symbolic and sample_count(inputs, program.batch.inputs) < batch:
            short = short or inputs
        else:
            any_whole = True
            yield inputs
    if short and not any_whole:
        yield short


def _obstacle(program: Program, node: ir.Node, count: int, context: Context) -> str:
    """Why a norm keeps its statistics; empty where it need not."""
    if node.attributes.get_int("training_mode", 0):
        return "it normalises by the statistics of each batch"
    for value in node.inputs[3:5]:
        if value is None or not value.is_initializer() or value.is_graph_input() or value.const_value is None:
            return f"its statistic '{value.name if value is not None else ''}' is not a constant initializer"
        others = sorted({user.name or "" for user, _ in value.uses() if user is not node})
        if others or len(value.uses()) > 1:
            return f"its statistic '{value.name}' is shared with node '{others[0] if others else node.name}'"
    for name in (node.name, *(value.name for value in node.inputs[3:5] if value is not None)):
        if name and context.is_kept(name):
            return f"'{name}' is kept"
    shape = program.shapes()[node.inputs[0].name or ""]  # type: ignore[union-attr]
    carrier = next(iter(program.batch.inputs), None) if program.batch.symbolic else None
    times = count / program.input_shapes[carrier][0] if carrier is not None else 1.0
    values = round(math.prod(shape) / shape[1] * times)
    return "" if values > 1 else f"a batch gives it {values} value per channel, expected 2 or more"
