"""Reduce a model with static shapes to the canonical dialect (docs/adr/0003-canonical-opset.md).

`canonicalize` works at *one* set of concrete input shapes: shape arithmetic folds away completely, and
`sartor.ir.batch` afterwards makes the batch axis symbolic again. Parameters keep their names and are
never folded; graph inputs and outputs keep their names and element types.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Set

import onnx
import onnx_ir as ir

from sartor.errors import UnsupportedOperatorError
from sartor.ir import branches, cleanup, folding, normalise, sequences
from sartor.ir import canonicalize_static as static
from sartor.ir.bodies import with_inner_nodes
from sartor.ir.folding import names
from sartor.ir.program import (
    CANONICAL_IR_VERSION,
    CANONICAL_OPSET,
    DIALECT_DOMAIN,
    NodeProvenance,
    infer_shapes,
    unknown_shapes,
    where,
)

ELEMENTWISE_UNARY = names(
    """Abs Acos Acosh Asin Asinh Atan Atanh BitwiseNot Cast Ceil Celu Clip Cos Cosh Elu Erf Exp Floor Gelu
    HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal Relu Round Selu
    Shrink Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Tan Tanh ThresholdedRelu"""
)
ELEMENTWISE_BROADCAST = names(
    """Add And BitShift BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less LessOrEqual
    Max Mean Min Mod Mul Or PRelu Pow Sub Sum Where Xor"""
)
REDUCTIONS = names(
    """ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
    ReduceSumSquare"""
)
CONTRACTIONS = names("Conv ConvTranspose Einsum Gemm MatMul")
POOLS = names(
    "AveragePool GlobalAveragePool GlobalLpPool GlobalMaxPool LpPool MaxPool DepthToSpace SpaceToDepth"
)
NORMS = names(
    """BatchNormalization GroupNormalization InstanceNormalization LayerNormalization LpNormalization
    LRN MeanVarianceNormalization"""
)
ALONG_AXIS = names("ArgMax ArgMin CumSum Hardmax LogSoftmax Softmax TopK")
MOVEMENT = names(
    """Concat Expand Flatten Gather GatherElements GatherND Pad Reshape Resize Shape Slice Split Squeeze
    Tile Transpose Trilu Unsqueeze"""
)
PLACEMENT = names("Col2Im MaxUnpool OneHot ReverseSequence ScatterElements ScatterND")
SAMPLING = names("DeformConv GridSample RoiAlign")
RECURRENT = names("GRU LSTM RNN")
QUANTIZED = names("ConvInteger DequantizeLinear MatMulInteger QLinearConv QLinearMatMul QuantizeLinear")
SPECTRAL = names("DFT STFT")
CANONICAL_OPS = frozenset(
    ELEMENTWISE_UNARY
    | ELEMENTWISE_BROADCAST
    | REDUCTIONS
    | CONTRACTIONS
    | POOLS
    | NORMS
    | ALONG_AXIS
    | MOVEMENT
    | PLACEMENT
    | SAMPLING
    | RECURRENT
    | QUANTIZED
    | SPECTRAL
    | static.GENERATORS
)
"""Operators of the default domain that a canonical program may contain. `If` passes structurally."""
STRUCTURAL_OPS = frozenset({"If"})
_REASONS = {
    **dict.fromkeys(
        names("Compress NonMaxSuppression NonZero Unique"), "the shape of its result depends on data"
    ),
    **dict.fromkeys(
        names("Bernoulli Multinomial RandomNormal RandomNormalLike RandomUniform RandomUniformLike"),
        "its result is random, so that no two runs can be compared",
    ),
    **dict.fromkeys(names("Loop Scan SequenceMap"), "it is a loop; export the model with it unrolled"),
    **dict.fromkeys(
        names(
            """ConcatFromSequence Optional OptionalGetElement OptionalHasElement SequenceAt SequenceConstruct
            SequenceEmpty SequenceErase SequenceInsert SequenceLength SplitToSequence"""
        ),
        "its values are not plain tensors",
    ),
    **dict.fromkeys(
        names("ImageDecoder RegexFullMatch StringConcat StringNormalizer StringSplit TfIdfVectorizer"),
        "it is data preparation",
    ),
}
"""Why an operator is not in the table, where there is more to say than that nothing needed it."""

_MAX_ROUNDS = 12


def canonicalize(
    model: ir.Model,
    input_shapes: Mapping[str, tuple[int, ...]],
    *,
    parameters: Collection[str] = (),
    provenance: Mapping[str, NodeProvenance] | None = None,
    generated_elements: int = folding.MAX_FOLDED_ELEMENTS,
) -> None:
    """Rewrite `model` in place into the canonical dialect at concrete input shapes.

    Args:
        model: opset 21, no functions but those of domain `sartor`.
        input_shapes: the concrete shape of every graph input.
        parameters: initializers that must survive by name (trainable weights and buffers); nodes that
            read them are never folded.
        provenance: source location by node name, for messages.
        generated_elements: limit on all constants together that nodes compute, weights stored as
            ConstantOfShape included: a file of a few bytes could otherwise ask for any amount of memory.

    Raises:
        ModelError: a cycle, a contradiction of shapes, or a shape that depends on data.
        UnsupportedOperatorError: an operator is outside the table; names operator, node and source.
    """
    model.ir_version = CANONICAL_IR_VERSION
    graph = model.graph
    graph.metadata_props.clear()
    model.metadata_props.clear()
    constants = cleanup.constants_to_initializers(graph)
    cleanup.fix_names(model)
    check_operators(model, provenance, before_folding=True)
    cleanup.sort(graph)
    protected = frozenset(parameters) | static.materialise(graph, generated_elements)
    static.prepare(graph)
    folded: set[str] = {v.name for v in constants if v.name}
    shapes, types = _reduce(model, input_shapes, protected, folded, generated_elements)
    if branches.has_choices(graph):  # those that no constant decides; before, a branch may make no sense
        moved = branches.flatten(graph)
        folded.update(v.name for v in cleanup.constants_to_initializers(graph) if v.name)
        protected |= {v.name or "" for v in moved if v.dtype is not None and v.dtype.is_floating_point()}
        protected |= static.materialise(graph, generated_elements)
        static.prepare(graph)
        shapes, types = _reduce(model, input_shapes, protected, folded, generated_elements)
    plain = (node for node in graph if node.op_type not in STRUCTURAL_OPS)
    error = unknown_shapes(plain, shapes, provenance or {})
    if error is not None:
        check_operators(model, provenance)  # an operator outside the table is the better reason
        raise error
    normalise.normalise(graph, shapes, types, protected)
    cleanup.remove_dead(graph)
    cleanup.fix_names(model)
    graph.sort()
    static.check_generators(graph, shapes, generated_elements)
    check_operators(model, provenance)
    branches.nest(graph)
    cleanup.sort_initializers(graph)
    cleanup.drop_metadata(model)
    for domain in list(model.opset_imports):
        if domain not in ("", DIALECT_DOMAIN):
            del model.opset_imports[domain]
    model.opset_imports[""] = CANONICAL_OPSET


def _reduce(
    model: ir.Model,
    input_shapes: Mapping[str, tuple[int, ...]],
    protected: Set[str],
    folded: set[str],
    generated_elements: int,
) -> tuple[Mapping[str, tuple[int, ...]], Mapping[str, ir.DataType]]:
    """Fold and simplify the main graph until nothing changes; returns the shapes and types of its values."""
    graph = model.graph
    for _ in range(_MAX_ROUNDS):
        shapes, types = infer_shapes(model, input_shapes)
        changed = folding.fold(graph, shapes, types, protected, folded, limit=generated_elements)
        changed += sequences.remove_sequences(graph, shapes)
        changed += static.rewrite(graph, shapes, protected, folded)
        changed += static.widen(graph, types)
        changed += cleanup.simplify(graph, shapes, types, protected, folded)
        changed += cleanup.remove_dead(graph)
        if not changed:
            break
    return shapes, types


def check_operators(
    model: ir.Model,
    provenance: Mapping[str, NodeProvenance] | None = None,
    *,
    before_folding: bool = False,
) -> None:
    """Refuse operators outside the canonical table.

    Args:
        model: the model; bodies of `If` are checked too.
        provenance: source location by node name.
        before_folding: also allow operators that only compute shapes and must fold away.

    Raises:
        UnsupportedOperatorError: names operator, node and source line.
    """
    refused: dict[str, str] = {}
    message = ""
    pairs = ((outer, node) for outer in model.graph for node in with_inner_nodes(outer))
    for outer, node in pairs:
        if node.domain == DIALECT_DOMAIN and node.op_identifier() in model.functions:
            continue
        if node.domain in ("", "ai.onnx"):
            if node.op_type in CANONICAL_OPS or node.op_type in STRUCTURAL_OPS:
                continue
            if node is not outer and node.op_type == "Constant":
                continue
            if before_folding and onnx.defs.has(node.op_type, CANONICAL_OPSET, ""):
                continue
        domain = f" of domain '{node.domain}'" if node.domain not in ("", "ai.onnx") else ""
        reason = f": {_REASONS[node.op_type]}" if not domain and node.op_type in _REASONS else ""
        refused.setdefault(
            outer.name or "", f"operator '{node.op_type}'{domain} is not in the canonical table{reason}"
        )
        message = message or (
            f"Node {where(node, provenance or {})} uses operator '{node.op_type}'{domain}, which is outside the "
            f"canonical table of {len(CANONICAL_OPS)} operators{reason}. Replace it by supported operators, or "
            "cut the model before it."
        )
    if refused:
        raise UnsupportedOperatorError(message, refused)
