"""What TensorRT takes, and which channel counts cost time.

Channel grid, declared and not measured (there was no GPU): NVIDIA's layouts for int8 hold 32 channels side by
side, tensor cores read float16 in rows of 16 bytes, 8 channels; of float32, 16 bytes are 4. Documented in its
performance guide under "optimizing for tensor cores". What fuses is declared from the same documentation.

What the parser does without a word, and is a rule for that reason: it computes float64 in float32 and changes the
type of inputs and outputs with it; it reads opsets newer than those it is documented for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sartor.backends import telemetry
from sartor.backends.legality import (
    Check,
    ModelRule,
    NodeRule,
    Rules,
    check_rules,
    fixed_shapes,
    no_functions,
)
from sartor.backends.precision import agreeing_precision
from sartor.backends.protocol import Capabilities, LegalityReport, TargetOptions, require_precision
from sartor.backends.tensorrt import operators
from sartor.backends.tensorrt.settings import Settings

if TYPE_CHECKING:
    import onnx_ir as ir

    from sartor.ir.program import Program

NAME = "tensorrt"
PRECISIONS = ("f32", "f16", "int8")
OPSETS = (9, 25)
MAX_RANK = 8
_GRID = {"f32": 4, "f16": 8, "int8": 32}
_GRID_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
FUSES = {"Conv": ("BatchNormalization", "Bias", "Add", "Relu", "Clip", "Gelu")}
"""From the vendor's documentation ("types of fusions"), not observed: a build without a GPU does not tell it."""
_TYPES = ("FLOAT", "FLOAT16", "BFLOAT16", "INT32", "INT64", "BOOL", "INT8")
_GEMMS = ("Einsum", "GRU", "Gemm", "LSTM", "MatMul", "RNN")
_TURING = "7.5"


def _opset(program: Program, options: TargetOptions) -> Check:
    opset = program.model.opset_imports.get("", 0)
    return OPSETS[0] <= opset <= OPSETS[1], f"opset {opset}"


def _ranks(program: Program, options: TargetOptions) -> Check:
    shapes, _ = operators.inferred(program)
    name, shape = max(shapes.items(), key=lambda item: len(item[1]), default=("", ()))
    return len(shape) <= MAX_RANK, f"value '{name}' of rank {len(shape)}"


def _integers_fit(program: Program, options: TargetOptions) -> Check:
    for name, value in program.initializers.items():
        if value.const_value is None or value.const_value.dtype.name != "INT64":
            continue
        numbers = value.const_value.numpy()
        if numbers.size and (numbers.max() >= 2**31 or numbers.min() < -(2**31)):
            return False, f"'{name}' holds values from {numbers.min()} to {numbers.max()}"
    return True, "all of them"


def _types(program: Program, node: ir.Node) -> Check:
    _, types = operators.inferred(program)
    for value in (*node.inputs, *node.outputs):
        dtype = types.get(value.name or "") if value is not None else None
        if value is None or dtype is None or dtype.name in _TYPES:
            continue
        if not (dtype.name == "UINT8" and value.is_graph_input() and node.op_type == "Cast"):
            return False, f"'{value.name}' is {dtype.name}"
    return True, "known types"


def _bytes(program: Program, node: ir.Node) -> Check:
    if node.domain or node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        return True, "quantization"
    _, types = operators.inferred(program)
    names = [v.name for v in (*node.inputs, *node.outputs) if v is not None and v.name in types]
    found = [name for name in names if name and types[name].name == "INT8"]
    return not found, f"'{found[0]}' is INT8" if found else "no INT8"


def _standard_domain(program: Program, node: ir.Node) -> Check:
    return not node.domain, f"{node.domain or 'ai.onnx'}::{node.op_type}"


def _plugin_domain(program: Program, node: ir.Node) -> Check:
    import onnx

    if node.domain:
        return True, f"plugin {node.domain}::{node.op_type}"
    version = program.model.opset_imports.get("", 0)
    return onnx.defs.has(node.op_type, max_inclusive_version=version), f"ai.onnx::{node.op_type}"


def _not_on_turing(program: Program, node: ir.Node) -> Check:
    _, types = operators.inferred(program)
    first = node.inputs[0]
    dtype = types.get(first.name or "") if first is not None else None
    return dtype is None or dtype.name != "FLOAT", f"{node.op_type} in float32"


def rules_for(settings: Settings) -> Rules:
    """The rules of one flavour with its compute capabilities and surgery."""
    domain = (
        NodeRule(
            "operator-domain",
            "Operators are of domain 'ai.onnx', or plugins in a domain of their own.",
            _plugin_domain,
        )
        if settings.hooks()
        else NodeRule("operator-domain", "Operators are of domain 'ai.onnx'.", _standard_domain)
    )
    by_operator = dict(operators.BY_OPERATOR)
    if settings.chosen().ahead_of_time and _TURING in settings.compute_capabilities:
        turing = NodeRule(
            "turing-gemm",
            f"For compute capability {_TURING}, matrix products are in float16; use cast{{fp16}}.",
            _not_on_turing,
        )
        for op_type in _GEMMS:
            by_operator[op_type] = (*by_operator.get(op_type, ()), turing)
    return Rules(
        model=(
            ModelRule("opset-version", f"The opset is between {OPSETS[0]} and {OPSETS[1]}.", _opset),
            agreeing_precision(),
            fixed_shapes(),
            ModelRule("tensor-rank", f"Tensors have at most {MAX_RANK} axes.", _ranks),
            ModelRule(
                "int64-range",
                "Constants of type int64 fit into int32; bounds of Slice are clamped.",
                _integers_fit,
            ),
        ),
        nodes=(
            no_functions(),
            domain,
            NodeRule(
                "element-type",
                f"Values are of type {', '.join(_TYPES)}, or UINT8 for an input that a Cast reads.",
                _types,
            ),
            NodeRule(
                "int8-arithmetic", "INT8 stands between QuantizeLinear and DequantizeLinear only.", _bytes
            ),
        ),
        operators=by_operator,
    )


RULES = rules_for(Settings(flavour="tensorrt_rtx"))


def check(program: Program, options: TargetOptions, settings: Settings) -> LegalityReport:
    """Apply the rule tables to a legalized program; no vendor package is imported."""
    require_precision(NAME, PRECISIONS, options)
    return check_rules(program, options, rules_for(settings))


def channel_grid(op_type: str, precision: str, attributes: Mapping[str, Any] | None = None) -> int:
    """Channel step of `op_type`; see the module docstring."""
    return _GRID.get(precision, 1) if op_type in _GRID_OPS else 1


def capabilities(settings: Settings, name: str = NAME) -> Capabilities:
    """Capabilities on this machine."""
    from sartor.backends.tensorrt import cuda

    flavour = settings.chosen()
    vendor = telemetry.import_vendor(flavour.module, flavour.requirement)
    built = ", ".join(settings.compute_capabilities) if flavour.ahead_of_time else "this machine's GPU"
    return Capabilities(
        name=name,
        version=f"{flavour.module} {vendor.__version__}",
        precisions=PRECISIONS,
        channel_grid={(op, p): _GRID[p] for op in _GRID_OPS for p in PRECISIONS},
        control_flow=True,
        max_rank=MAX_RANK,
        fuses=FUSES,
        notes=(
            f"Engines are built for compute capability {built}, strongly typed, TF32 off, at fixed shapes.",
            "Running, verifying and measuring were written without a GPU and are untested.",
            "Channel grid and fusion are declared from the vendor's documentation, not measured.",
            f"'{flavour.module}' is under its vendor's proprietary licence.",
        ),
        not_run_here=cuda.why_not(settings.compute_capabilities if flavour.ahead_of_time else ()),
    )
