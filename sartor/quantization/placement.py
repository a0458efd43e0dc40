"""Which values and constants are quantized, and with which parameters, as ONNX Runtime's static quantizer decides.

The quantizer writes a model of its own; only its decisions are taken from it, as the *scheme* that the pass
`quantize` applies. A scheme is JSON:

    {"schema": "sartor.quantization/1",
     "nodes": [names of nodes that compute on quantized operands],
     "kept": [names of nodes that read what they read as it is],
     "activations": {value: {"scale": s, "zero_point": z}},
     "weights": {initializer: {"scales": [...], "zero_point": z, "axis": a or null, "symmetric": bool}}}
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from sartor.backends.telemetry import import_vendor
from sartor.errors import BackendError
from sartor.ir.folding import names
from sartor.quantization.calibration import quiet

if TYPE_CHECKING:
    import onnx_ir as ir

    from sartor.ir.program import Program

SCHEMA = "sartor.quantization/1"
LAYERS = names("Conv ConvTranspose Gemm MatMul")
"""Operators that contract an input with weights: what quantization is for."""
ELEMENTWISE = names("Add Mul LeakyRelu Sigmoid Softmax")
ACTIVATIONS = names("Clip Relu")
"""Between a layer and its quantization; they have none of their own."""
MOVEMENT = names(
    """AveragePool Concat Flatten GlobalAveragePool MaxPool Pad Reshape Resize Slice Split Squeeze Transpose
    Unsqueeze"""
)
_RESHAPES = names("Flatten Reshape Squeeze Transpose Unsqueeze")
"""They change no number, so that one scale serves on both sides."""
OPERATORS = LAYERS | ELEMENTWISE | ACTIVATIONS | MOVEMENT
"""Operators with integer kernels. The quantizer would take more, norms for instance, without being faster for it."""


def place(
    program: Program, ranges: Any, *, per_channel: bool = True, exclude: Collection[str] = ()
) -> dict[str, Any]:
    """The scheme of a program.

    Args:
        program: in float32, with BatchNormalization folded.
        ranges: as `calibration.find_ranges` gives them.
        per_channel: one scale per output channel of a weight.
        exclude: names of nodes that stay in float, and read their operands in float: a layer whose operand is
            rounded is not kept.

    Raises:
        BackendError: the quantizer fails; names the node where its message does.
    """
    import_vendor("onnxruntime", "sartor")
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    kept = _with_movement(program, exclude)
    candidates = [n for n in program.nodes() if n.op_type in OPERATORS and not n.domain and _alone(n)]
    chosen = [n.name or "" for n in candidates if n.name not in kept]
    if not chosen:
        return scheme((), kept, {}, {})
    with quiet():
        try:
            quantizer = QDQQuantizer(
                program.understood().to_proto(),
                per_channel,
                False,  # range of weights: reduced on processors that saturate, which is the runtime's business
                QuantType.QInt8,
                QuantType.QInt8,
                ranges,
                chosen,
                [],
                sorted(OPERATORS),
                {
                    "TensorQuantOverrides": _of_products(program) if per_channel else {},
                    # the pass does it, those of grouped transposed convolutions included
                    "QuantizeBias": False,
                },
            )
            model = quantizer.quantize_model()
        except Exception as error:
            raise _failed(program, chosen, error) from error
    return _read(program, model, set(chosen), kept)


def everywhere(program: Program) -> dict[str, Any]:
    """A scheme that quantizes whatever may be, with numbers that mean nothing: a form to ask rules about."""
    types = program.types()
    chosen = [n for n in program.nodes() if n.op_type in OPERATORS and not n.domain and _alone(n)]
    computing = set(chosen)
    functions = [node.inputs[0] for node in chosen if node.op_type in ACTIVATIONS]
    within = {value for value in functions if value is not None and value.producer() in computing}
    activations: dict[str, Any] = {}
    weights: dict[str, Any] = {}
    for node in chosen:
        operands = 2 if node.op_type in LAYERS else len(node.inputs)
        if node.op_type in ACTIVATIONS | (MOVEMENT - {"Concat"}):
            operands = 1
        for value in (*node.inputs[:operands], *node.outputs):
            name = value.name or "" if value is not None else ""
            if name not in types or types[name].name != "FLOAT" or value in within:
                continue
            if name in program.initializers:
                weights[name] = {"scales": [1.0], "zero_point": 0, "axis": None, "symmetric": True}
            else:
                activations[name] = {"scale": 1.0, "zero_point": 0}
    return scheme((n.name or "" for n in chosen), (), activations, weights)


def _of_products(program: Program) -> dict[str, list[dict[str, Any]]]:
    """Overrides for constants of MatMul: one scale per column of a right one, one for all of a left one or a vector.

    The quantizer takes one axis for both, which is what a left one, and a vector, is summed over. Scales per row of
    a left one are right, but OpenVINO's CPU plugin does not compile them.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for node in program.nodes():
        for index, value in enumerate(node.inputs if node.op_type == "MatMul" else ()):
            if value is not None and value.is_initializer():
                name, rank = value.name or "", len(program.initializer_shape(value.name or ""))
                if index == 0 or rank < 2:
                    found[name] = [{"symmetric": True}]
                else:
                    found.setdefault(name, [{"axis": rank - 1}])
    return found


def _failed(program: Program, chosen: Collection[str], error: Exception) -> BackendError:
    """The quantizer's error as one of ours, with the node whose name, or that of a value of it, its message has."""
    text = str(error) or type(error).__name__
    words = {word.strip("'\".,:;()") for word in text.split()}
    at = ""
    for node in program.nodes():
        around = (node.name, *(v.name for v in (*node.inputs, *node.outputs) if v is not None))
        if node.name in chosen and words.intersection(around):
            at = f" at node {program.where(node)}"
            break
    line = text.splitlines()[0][:500].rstrip(".")
    return BackendError(
        f"ONNX Runtime could not quantize the program{at}: {line}. Leave the node in float with 'keep'."
    )


def _alone(node: ir.Node) -> bool:
    """Whether the quantizer may take a node; an activation function only as the one reader of its layer.

    It gives the layer the range of the function's result, and sees neither that the layer is an output of the graph
    nor that a body reads it.
    """
    source = node.inputs[0]
    return node.op_type not in ACTIVATIONS or (
        source is not None and not source.is_graph_output() and len(source.uses()) == 1
    )


def _with_movement(program: Program, exclude: Collection[str]) -> set[str]:
    """`exclude`, and what only moves numbers to nodes of it."""
    kept = set(exclude)
    for node in reversed(list(program.nodes())):
        readers = [user.name for output in node.outputs for user, _ in output.uses()]
        shown = any(output.is_graph_output() for output in node.outputs)
        if node.op_type in MOVEMENT and readers and not shown and kept.issuperset(readers):
            kept.add(node.name or "")
    return kept


def scheme(
    nodes: Iterable[str], kept: Iterable[str], activations: dict[str, Any], weights: dict[str, Any]
) -> dict[str, Any]:
    """The document."""
    return {
        "schema": SCHEMA,
        "nodes": list(nodes),
        "kept": sorted(kept),
        "activations": activations,
        "weights": weights,
    }


def _read(program: Program, model: Any, chosen: set[str], kept: set[str]) -> dict[str, Any]:
    """What the quantizer decided, read from the model that it wrote."""
    from onnx import numpy_helper
    from onnxruntime.quantization.quant_utils import TENSOR_NAME_QUANT_SUFFIX, add_quant_input_suffix

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    outputs = {add_quant_input_suffix(v.name or ""): v.name or "" for v in program.graph.outputs}
    activations: dict[str, Any] = {}
    weights: dict[str, Any] = {}
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        source = node.input[0]
        scale, zero = (numpy_helper.to_array(constants[name]) for name in node.input[1:3])
        if node.op_type == "QuantizeLinear":
            name = outputs.get(source, source)
            activations[name] = {"scale": float(scale.item()), "zero_point": int(zero.item())}
        elif source in constants and zero.dtype == np.int8:
            axis = next((a.i for a in node.attribute if a.name == "axis"), None) if scale.ndim else None
            name = source.removesuffix(TENSOR_NAME_QUANT_SUFFIX)
            rank = len(program.initializer_shape(name))
            weights[name] = {
                "scales": [float(s) for s in scale.reshape(-1)],
                "zero_point": int(zero.reshape(-1)[0]),
                "axis": None if axis is None else axis % rank,
                "symmetric": _symmetric(program, name),
            }
    _extend_over_reshapes(program, activations, chosen)
    activations = {
        name: activations[name]
        for value in _values(program)
        if (name := value.name or "") in activations
        and (value.is_graph_output() or any(user.name not in kept for user, _ in value.uses()))
    }
    touched = [
        node.name or ""
        for node in program.nodes()
        if node.name in chosen
        and any(
            value is not None and (value.name in activations or value.name in weights)
            for value in (*node.inputs, *node.outputs)
        )
    ]
    present = {node.name for node in program.nodes()}
    return scheme(touched, kept & present, activations, dict(sorted(weights.items())))


def _extend_over_reshapes(program: Program, activations: dict[str, Any], chosen: set[str]) -> None:
    """Quantize what a node that only reshapes reads as what it writes.

    The quantizer leaves it in float unless its operand is quantized already, and with it the node that computes that.
    """
    for node in reversed(list(program.nodes())):
        source, result = node.inputs[0] if node.inputs else None, node.outputs[0]
        moves = node.op_type in _RESHAPES and node.name in chosen and result.name in activations
        if moves and source is not None and not source.is_initializer():
            activations.setdefault(source.name or "", activations[result.name or ""])


def _values(program: Program) -> list[ir.Value]:
    """All values of the main graph but constants, in execution order."""
    return [*program.graph.inputs, *(output for node in program.nodes() for output in node.outputs)]


def _symmetric(program: Program, name: str) -> bool:
    """Whether a constant is some layer's weight; other operands are quantized as activations are."""
    uses = program.initializers[name].uses()
    return any(node.op_type == "MatMul" or (node.op_type in LAYERS and index == 1) for node, index in uses)
