"""What the pass `quantize` asks for: a scheme, and what is left in float with the reasons."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from sartor.errors import UsageError
from sartor.quantization.calibration import calibration_data, find_ranges, pieces, unusable
from sartor.quantization.placement import LAYERS, OPERATORS, place

if TYPE_CHECKING:
    import onnx_ir as ir

    from sartor.ir.program import Program
    from sartor.passes.base import Context
    from sartor.quantization.costs import Costs

Left = dict[str, str]


def quantization(
    program: Program,
    context: Context,
    *,
    per_channel: bool = True,
    calibration: str = "minmax",
    samples: int = 256,
    max_drop: float | None = None,
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """A scheme for `program`, and `(node, reason)` of what stays in float.

    Args:
        program: in float32, with BatchNormalization folded; not changed.
        context: data, and what to keep.
        per_channel: one scale per output channel of a weight.
        calibration: `minmax`, `entropy` or `percentile`.
        samples: most samples that ranges are taken on.
        max_drop: largest loss of score in points, or None.

    Raises:
        UsageError: there are no data, or they do not fit; the score of the float program cannot be taken.
        BackendError: the runtime fails on the data.
    """
    if max_drop is not None and context.data.get("evaluate") is None:
        raise UsageError(
            "'max-drop' compares scores, and there is no split 'evaluate' to take them on; give data with it."
        )
    data, left, without = _calibrated(program, context, per_channel, calibration, samples)
    scheme = without({})
    if max_drop is not None and scheme["nodes"]:
        from sartor.quantization.costs import keep_costly

        scheme, costly = keep_costly(program, context, data, scheme, without, max_drop)
        left |= costly
    return scheme, list(left.items())


def layer_costs(
    program: Program,
    context: Context,
    *,
    per_channel: bool = True,
    calibration: str = "minmax",
    samples: int = 256,
) -> Costs:
    """What quantizing each layer costs, on calibration data; see `sartor.quantization.costs`.

    Args:
        program: as for `quantization`, and so are the others.
        context: data, and what to keep.
        per_channel: one scale per output channel of a weight.
        calibration: `minmax`, `entropy` or `percentile`.
        samples: most samples that ranges and errors are taken on.

    Raises:
        UsageError: there are no data, or they do not fit.
        BackendError: the runtime fails on the data.
    """
    from sartor.quantization.costs import costs

    data, _, without = _calibrated(program, context, per_channel, calibration, samples)
    return costs(program, data, without({}), without)


def _calibrated(
    program: Program, context: Context, per_channel: bool, calibration: str, samples: int
) -> tuple[list[dict[str, Any]], Left, Callable[[Mapping[str, str]], dict[str, Any]]]:
    """The data, what must stay in float, and what makes schemes that leave more of it."""
    data = list(pieces(calibration_data(program, context), samples, program))
    left = _impossible(program, context)
    ranges = find_ranges(program, data, "minmax")
    bad = unusable(program, ranges)
    if calibration != "minmax" and not set(ranges.keys()) <= set(bad):
        ranges = find_ranges(program, data, calibration, without=bad)
        bad = {**unusable(program, ranges), **bad}
    left |= {k: v for k, v in _out_of_range(program, bad).items() if k not in left}
    always = frozenset(left)

    def without(more: Mapping[str, str]) -> dict[str, Any]:
        return place(program, ranges, per_channel=per_channel, exclude={*always, *more})

    return data, left, without


def _impossible(program: Program, context: Context) -> Left:
    """Nodes that cannot be quantized, or must not be."""
    left: Left = {}
    main = set(program.nodes())
    for node in program.graph.all_nodes():
        name = node.name or ""
        if node.domain or node.op_type not in OPERATORS:
            continue
        if node not in main:
            if node.op_type in LAYERS:
                left[name] = "it lies in a body of If, where nothing is quantized"
        elif reason := _kept(node, context) or _scaled(node):
            left[name] = reason
    return left


def _kept(node: ir.Node, context: Context) -> str:
    for name in (node.name, *(value.name for value in node.inputs if value is not None)):
        if name and context.is_kept(name):
            return f"'keep' names '{name}'"
    return ""


def _scaled(node: ir.Node) -> str:
    """Gemm with factors: the integer sums have no place for them."""
    if node.op_type == "Gemm":
        for name in ("alpha", "beta"):
            attribute = node.attributes.get(name)
            if attribute is not None and attribute.as_float() != 1.0:
                return f"it has {name} = {attribute.as_float():g}, which integer sums have no place for"
    return ""


def _out_of_range(program: Program, values: Any) -> Left:
    """Nodes that read or write a value whose range no scale can stand for."""
    left: Left = {}
    for node in program.nodes():
        for value in (*node.inputs, *node.outputs):
            if value is not None and value.name in values and node.op_type in OPERATORS:
                left.setdefault(node.name or "", values[value.name])
    return left
