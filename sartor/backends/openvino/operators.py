"""What OpenVINO's ONNX reader and CPU plugin do not take of the canonical table, by operator.

Found with OpenVINO 2026.4.1 by ONNX's own node tests, compiled and run, outputs compared, and by every operator in
every element type that its schema allows. A rule stands for nodes that are refused, and for those that are taken and
give another result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sartor.backends.legality import Check, NodeRule
from sartor.backends.node_rules import (
    absent,
    attribute,
    attribute_of,
    constant,
    merged,
    missing_types,
    not_converted,
    numbers,
    operand,
    rank_at_most,
    sequence_first,
    shape_of,
    sign_of_dividend,
    type_of,
    whole_sizes,
)

if TYPE_CHECKING:
    import onnx_ir as ir

    from sartor.ir.program import Program

_MISSING = {
    "DOUBLE": "DFT STFT",
    "BOOL": "Resize",
    "INT16": "Resize",
    "UINT16": "QuantizeLinear.T2 Resize",
    "UINT32": "Resize",
    "UINT64": "Resize",
}
_COORDINATES = ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric", "tf_half_pixel_for_nn")


def _two_sizes(program: Program, node: ir.Node) -> Check:
    sizes = numbers(operand(node, 1))
    return sizes is None or len(sizes) <= 2, f"image_shape {sizes}"


def _along_axis_1(program: Program, node: ir.Node) -> Check:
    shape, axis = shape_of(program, operand(node, 0)), numbers(operand(node, 2))
    given = axis[0] if axis else -2
    if shape is None:
        return given == 1, f"axis {given}"
    return given % len(shape) == 1, f"axis {given} of shape {list(shape)}"


def _windows_start_inside(program: Program, node: ir.Node) -> Check:
    shape = shape_of(program, operand(node, 0))
    if not attribute_of(node, "ceil_mode", 0) or shape is None:
        return True, "does not apply"
    kernel = attribute_of(node, "kernel_shape", ())
    sizes = shape[2:]
    strides = attribute_of(node, "strides", None) or [1] * len(sizes)
    dilations = attribute_of(node, "dilations", None) or [1] * len(sizes)
    pads = attribute_of(node, "pads", None) or [0] * (2 * len(sizes))
    for axis, size in enumerate(sizes):
        before, behind = pads[axis], pads[axis + len(sizes)]
        reach = size + before + behind - (kernel[axis] - 1) * dilations[axis] - 1
        start = -(-reach // strides[axis]) * strides[axis]
        if start >= size + before:
            return False, f"a window that starts at {start} of {size + before} along axis {axis + 2}"
    return True, "every window starts inside"


def _nothing_shrinks(program: Program, node: ir.Node) -> Check:
    before, behind = shape_of(program, operand(node, 0)), shape_of(program, node.outputs[0])
    if not attribute_of(node, "antialias", 0):
        return True, "antialias=0"
    shrinks = before is None or behind is None or any(b > a for b, a in zip(before, behind, strict=True))
    return not shrinks, f"antialias=1 from {before} to {behind}"


def _zero_point_of_blocks(program: Program, node: ir.Node) -> Check:
    size, given = attribute_of(node, "block_size", 0), operand(node, 2) is not None
    return given or not size, f"block_size={size}, {'with' if given else 'no'} zero point"


def _same_types(program: Program, node: ir.Node) -> Check:
    kinds = {kind for i in range(5) if (kind := type_of(program, operand(node, i)))}
    return len(kinds) <= 1, ", ".join(sorted(kind.lower() for kind in kinds)) or "unknown"


OPERATORS = merged(
    missing_types(_MISSING),
    {
        "BatchNormalization": (
            NodeRule("same-types", "The input and all parameters are of one element type.", _same_types),
        ),
        "Col2Im": (NodeRule("image-axes", "The image has at most two axes.", _two_sizes),),
        "DFT": (
            attribute("onesided", (0,), 0, "'onesided' is 0; with 1, the result has another shape."),
            NodeRule("axis", "The transform runs along axis 1; 'axis' is not read.", _along_axis_1),
        ),
        "DeformConv": (not_converted("OpenVINO's ONNX reader has no DeformConv."),),
        "GRU": (sequence_first(),),
        "GridSample": (rank_at_most(4, "The input has at most two spatial axes."),),
        "LSTM": (
            sequence_first(),
            absent(7, "peepholes", "There are no peepholes ('P'): they are not read."),
        ),
        "MaxPool": (
            NodeRule(
                "windows-start-inside",
                "With 'ceil_mode', no window starts in the padding behind the input; ONNX leaves such out.",
                _windows_start_inside,
            ),
        ),
        "MaxUnpool": (not_converted("OpenVINO's ONNX reader has no MaxUnpool."),),
        "Mod": (sign_of_dividend(),),
        "Pad": (
            constant(2, "value", "'constant_value' is a constant; a computed one is taken for 0."),
            attribute("mode", ("constant", "reflect", "edge"), "constant", "'mode' is not 'wrap'."),
        ),
        "QuantizeLinear": (
            NodeRule(
                "zero-point-of-blocks", "With 'block_size' there is a zero point.", _zero_point_of_blocks
            ),
        ),
        "RNN": (sequence_first(),),
        "Resize": (
            attribute(
                "coordinate_transformation_mode",
                _COORDINATES,
                "half_pixel",
                "'coordinate_transformation_mode' is neither 'tf_crop_and_resize' nor 'half_pixel_symmetric'.",
            ),
            attribute(
                "keep_aspect_ratio_policy",
                ("stretch",),
                "stretch",
                "'keep_aspect_ratio_policy' is 'stretch'; others are not read.",
            ),
            attribute("exclude_outside", (0,), 0, "'exclude_outside' is 0; it is not read."),
            NodeRule(
                "antialias",
                "'antialias' is 0 where an axis shrinks: it is computed otherwise.",
                _nothing_shrinks,
            ),
            whole_sizes(),
        ),
        "RoiAlign": (attribute("mode", ("avg",), "avg", "'mode' is 'avg'; 'max' gives other values."),),
    },
)
"""Rules by operator."""
