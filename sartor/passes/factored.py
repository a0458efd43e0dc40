"""Layers as products of cheaper ones, in a program."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from sartor.errors import PlanError
from sartor.ir.cleanup import array_of
from sartor.ir.plan import Factorization
from sartor.ir.program import Program
from sartor.passes import factors, polyadic
from sartor.passes.rewriter import Rewriter


def factorize(program: Program, chosen: Mapping[str, Factorization], rewriter: Rewriter) -> None:
    """Replace layers of `program` in place. The last of the new layers keeps the name, and the bias.

    Raises:
        PlanError: a layer does not exist, or cannot be factorized so.
    """
    nodes = {node.name or "": node for node in program.graph}
    for name, found in chosen.items():
        node = nodes.get(name)
        weight = array_of(node, 1) if node is not None and len(node.inputs) > 1 else None
        if node is None or weight is None:
            raise PlanError(
                f"The plan factorizes layer '{name}', which the program does not have with a constant weight."
            )
        reason = unsuitable(node, found.kind)
        matrix = stored(node, weight)
        most = _full_rank(matrix, found.kind)
        if not reason and any(rank > full for rank, full in zip(found.rank, most, strict=True)):
            reason = f"its rank is {' x '.join(map(str, most))} at most"
        if reason:
            raise PlanError(
                f"The plan factorizes layer '{name}' by {found.kind} with rank {list(found.rank)}, which is not "
                f"possible: {reason}."
            )
        _replace(node, [w.astype(weight.dtype) for w in _weights(matrix, found)], found, rewriter)
        rewriter.count("layers_factorized")
    if chosen:
        program.invalidate()


def _weights(matrix: np.ndarray, found: Factorization) -> Sequence[np.ndarray]:
    """Weights of the new layers, first to last."""
    if found.kind == "spatial":
        return factors.spatial_svd(matrix, found.rank[0])
    if found.kind == "tucker":
        return factors.tucker2(matrix, *found.rank)
    if found.kind == "cp":
        return polyadic.cp(matrix, found.rank[0])
    first, last = factors.svd(matrix.reshape(matrix.shape[0], -1), found.rank[0])
    if matrix.ndim == 2:
        return first, last
    return first.reshape(found.rank[0], *matrix.shape[1:]), last[:, :, None, None]


def _full_rank(matrix: np.ndarray, kind: str) -> tuple[int, ...]:
    """The largest ranks that mean anything."""
    out, into = matrix.shape[:2]
    height, width = matrix.shape[2:] if matrix.ndim == 4 else (1, 1)
    if kind == "tucker":
        return into, out
    if kind == "cp":  # of all others one vector each
        return (matrix.size // max(matrix.shape),)
    return (min(into * height, out * width) if kind == "spatial" else min(out, into * height * width),)


def _replace(node: ir.Node, weights: Sequence[np.ndarray], found: Factorization, rewriter: Rewriter) -> None:
    """Put the new layers in front of the node, and make it the last of them."""
    source = node.inputs[0]
    transposed = node.op_type == "MatMul" or (
        node.op_type == "Gemm" and not node.attributes.get_int("transB", 0)
    )
    steps: Sequence[Mapping[str, Any]] = (
        [{}] * len(weights) if node.op_type != "Conv" else _windows(node, found.kind, found.rank)
    )
    for number, (weight, attributes) in enumerate(zip(weights[:-1], steps[:-1], strict=True)):
        stored = np.ascontiguousarray(weight.T if transposed else weight)
        own = rewriter.add_initializer(f"{weight_of(node).name}.{number}", stored)
        if node.op_type == "Gemm":
            attributes = {"transB": 0 if transposed else 1}
        made = rewriter.insert_before(
            node, node.op_type, [source, own], attributes, name=f"{node.name}.{number}"
        )
        source = made.outputs[0]
    rewriter.set_input(node, 0, source)
    last = weights[-1].T if transposed else weights[-1]
    rewriter.set_initializer(rewriter.private_initializer(node, 1), np.ascontiguousarray(last))
    if node.op_type == "Conv":
        for name, value in steps[-1].items():
            rewriter.set_attribute(node, name, value)


def _windows(node: ir.Node, kind: str, rank: Sequence[int]) -> list[dict[str, Any]]:
    """Attributes of the convolutions that replace one."""
    attributes = node.attributes
    kernel = list(weight_of(node).shape.numpy())[2:]  # type: ignore[union-attr]
    strides = list(attributes.get_ints("strides", ())) or [1, 1]
    dilations = list(attributes.get_ints("dilations", ())) or [1, 1]
    pads = list(attributes.get_ints("pads", ())) or [0] * 4

    def of(axes: Sequence[int], **more: int) -> dict[str, Any]:
        """The window along these axes only."""
        return {
            "kernel_shape": [kernel[a] if a in axes else 1 for a in (0, 1)],
            "strides": [strides[a] if a in axes else 1 for a in (0, 1)],
            "dilations": [dilations[a] if a in axes else 1 for a in (0, 1)],
            "pads": [pads[a] if a % 2 in axes else 0 for a in range(4)],
            **more,
        }

    if kind == "spatial":
        return [of([0]), of([1])]
    if kind == "cp":
        return [of([]), of([0], group=rank[0]), of([1], group=rank[0]), of([])]
    return [of([]), of([0, 1]), of([])] if kind == "tucker" else [of([0, 1]), of([])]


def multiplications(program: Program, node: ir.Node, found: Factorization) -> tuple[int, int]:
    """MACs of the layer, and of those that would replace it."""
    shapes = program.shapes()
    source, result = (shapes[value.name or ""] for value in (node.inputs[0], node.outputs[0]))  # type: ignore[union-attr]
    matrix = stored(node, np.empty(tuple(weight_of(node).shape.numpy())))  # type: ignore[union-attr]
    out, into = matrix.shape[:2]
    if node.op_type != "Conv":
        positions = math.prod(result) // out
        return matrix.size * positions, found.rank[0] * (into + out) * positions
    batch, height, width = result[0], matrix.shape[2], matrix.shape[3]
    here, before = batch * result[2] * result[3], batch * source[2] * source[3]
    old, rank = matrix.size * here, found.rank
    if found.kind == "spatial":
        between = batch * result[2] * source[3]
        return old, rank[0] * (into * height * between + out * width * here)
    if found.kind == "cp":
        between = batch * result[2] * source[3]
        return old, rank[0] * (into * before + height * between + (width + out) * here)
    if found.kind == "tucker":
        return old, rank[0] * into * before + rank[0] * rank[1] * height * width * here + out * rank[1] * here
    return old, rank[0] * (into * height * width + out) * here


def unsuitable(node: ir.Node, kind: str) -> str:
    """Why a layer cannot be factorized so; empty where it can."""
    weight, attributes = weight_of(node), node.attributes
    if not weight.is_initializer() or weight.is_graph_input() or len(weight.uses()) > 1:
        return "its weight is computed, or read by other nodes"
    if node.op_type == "Conv":
        kernel = tuple(weight.shape.numpy())[2:]  # type: ignore[union-attr]
        if attributes.get_int("group", 1) != 1:
            return "it is grouped"
        if attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
            return "it pads by itself (auto_pad)"
        if (
            len(kernel) != 2
            or (kind in ("spatial", "cp") and min(kernel) < 2)
            or (kind == "tucker" and max(kernel) < 2)
        ):
            return f"its kernel is {' x '.join(map(str, kernel))}"
        return ""
    if kind != "svd":
        return "it has no kernel"
    if node.op_type == "Gemm" and (
        attributes.get_int("transA", 0) == 1
        or attributes.get_float("alpha", 1.0) != 1.0
        or attributes.get_float("beta", 1.0) != 1.0
    ):
        return "it transposes or scales its operands"
    return ""


def stored(node: ir.Node, weight: np.ndarray) -> np.ndarray:
    """The weight with output channels first."""
    straight = node.op_type == "Conv" or (
        node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1
    )
    return weight if straight else weight.T


def weight_of(node: ir.Node) -> ir.Value:
    """The operand that is factorized."""
    value = node.inputs[1]
    assert value is not None
    return value
