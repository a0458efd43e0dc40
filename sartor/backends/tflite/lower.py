"""Lowering to a flatbuffer, through the cache."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sartor.backends.artifact import write_artifact
from sartor.backends.legality import require_legal
from sartor.backends.protocol import Artifact, LegalityReport, TargetOptions, TensorSpec
from sartor.backends.tflite import cache, legalize
from sartor.errors import BackendError, ModelError

if TYPE_CHECKING:
    from sartor.backends.tflite.flatbuffer import Operator
    from sartor.ir.program import Program

FILE = "model.tflite"
FIXED_SCALES = {"SOFTMAX": (1 / 256, -128), "LOG_SOFTMAX": (16 / 256, 127)}
"""Scale and zero point that int8 kernels demand of their output (tflite/kernels/activations.cc)."""
_IMAGE_RANK = 4
_LONGEST_CHAIN = 8


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a target wants its flatbuffer.

    Attributes:
        target: backend name.
        check: its legality, of a legalized program.
        legalize: what it needs rewritten.
        channel_last: images are channel-last at the border of the file.
        fixed_scales: see `FIXED_SCALES`.
        same: see `Flatbuffer.respell`.
        clamps: see `Flatbuffer.respell`.
    """

    target: str
    check: Callable[[Program, TargetOptions], LegalityReport]
    legalize: Callable[[Program], Program] = legalize.legalize
    channel_last: bool = False
    fixed_scales: Mapping[str, tuple[float, int]] = dataclasses.field(default_factory=lambda: FIXED_SCALES)
    same: Mapping[str, str] = dataclasses.field(default_factory=dict)
    clamps: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A flatbuffer and what is known of it.

    Attributes:
        content: the file.
        inputs: the program's input contract, concrete.
        metadata: for `Artifact.metadata`.
    """

    content: bytes
    inputs: tuple[TensorSpec, ...]
    metadata: Mapping[str, Any]


def write(
    program: Program,
    folder: Path,
    options: TargetOptions,
    recipe: Recipe,
    finish: Callable[[Lowered], Lowered] = lambda lowered: lowered,
) -> Artifact:
    """Write `model.tflite` at the reference shapes; `finish` may add to its metadata.

    Raises:
        UsageError: precision, shapes or folder; litert-torch is not installed.
        BackendError: the program breaks a legality rule, or conversion fails.
    """
    fixed = _legal(program, options, recipe)

    def into(temporary: Path) -> tuple[tuple[str, ...], Mapping[str, Any]]:
        lowered = finish(_lowered(fixed, options, recipe))
        (temporary / FILE).write_bytes(lowered.content)
        return (FILE,), lowered.metadata

    return write_artifact(fixed, folder, options, target=recipe.target, write=into)


def convert_bytes(model: bytes, options: TargetOptions, recipe: Recipe) -> Lowered:
    """The flatbuffer of a serialized ONNX model. Raises as `write`."""
    from sartor.ir.load import load

    with tempfile.TemporaryDirectory(prefix="sartor-tflite-") as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(model)
        try:
            program = load(path, shapes=options.shapes)
        except ModelError as error:
            raise BackendError(f"The model cannot be converted: {error}") from error
        return _lowered(_legal(program, options, recipe), options, recipe)


def _legal(program: Program, options: TargetOptions, recipe: Recipe) -> Program:
    legal = recipe.legalize(program)
    require_legal(recipe.target, recipe.check(legal, options))
    return legalize.at_shapes(legal, {**program.input_shapes, **options.shapes})


def _lowered(program: Program, options: TargetOptions, recipe: Recipe) -> Lowered:
    """Convert a legal program of concrete shapes, or find its conversion."""
    inputs = tuple(_spec(value) for value in program.graph.inputs)
    outputs = tuple(_spec(value) for value in program.graph.outputs)
    turned = tuple(_images(specs) if recipe.channel_last else () for specs in (inputs, outputs))
    settings = {
        "precision": options.precision,
        "channel_last": recipe.channel_last,
        "fixed_scales": {name: list(pair) for name, pair in recipe.fixed_scales.items()},
        "same": dict(recipe.same),
        "clamps": {name: list(pair) for name, pair in recipe.clamps.items()},
    }
    content, facts = cache.kept(
        cache.key_of(program.sha256(), settings),
        lambda: _convert(program, options, recipe, (inputs, outputs), (turned[0], turned[1])),
    )
    metadata = {
        "runtime": f"litert {importlib.metadata.version('ai-edge-litert')}",
        "converter": f"litert-torch {importlib.metadata.version('litert-torch')}",
        "channel_last": {
            "inputs": [inputs[i].name for i in turned[0]],
            "outputs": [outputs[i].name for i in turned[1]],
        },
        "outputs": {spec.name: spec.dtype for spec in outputs},
        **facts,
    }
    return Lowered(content, inputs, metadata)


def _convert(
    program: Program,
    options: TargetOptions,
    recipe: Recipe,
    border: tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]],
    turned: tuple[tuple[int, ...], tuple[int, ...]],
) -> cache.Conversion:
    import torch

    from sartor.backends.tflite.convert import convert
    from sartor.backends.tflite.flatbuffer import Flatbuffer
    from sartor.backends.tflite.modules import traceable
    from sartor.backends.tflite.parity import require_same

    inputs, outputs = border
    made = traceable(program, channel_last=turned)
    examples = []
    for position, spec in enumerate(inputs):
        shape = [int(d) for d in spec.shape]
        if position in turned[0]:
            shape.append(shape.pop(1))
        # float16 stands in the program only: what computes, computes in float32, and weights are packed afterwards.
        held = "float32" if spec.dtype == "float16" else spec.dtype
        examples.append(torch.zeros(shape, dtype=getattr(torch, held)))
    content = convert(made.module, tuple(examples), quantized=options.precision == "int8")
    flatbuffer = Flatbuffer(content, made.nodes_of)
    flatbuffer.name_signature([s.name for s in inputs], [s.name for s in outputs])
    flatbuffer.tell_outputs({v.name or "": _chain(v) for v in program.graph.outputs})
    floats = [[s.name for s in specs if s.dtype.startswith("float")] for specs in border]
    flatbuffer.float_border(*floats)
    flatbuffer.float_where_fixed(recipe.fixed_scales)
    flatbuffer.respell(recipe.same, recipe.clamps)
    if options.precision == "f16":
        flatbuffer.halve_weights()
    flatbuffer.name_tensors()
    operators = _completed(flatbuffer.operators(), program)
    int8 = options.precision == "int8"
    facts = {
        "quantized_tensors": require_same(program, flatbuffer, operators) if int8 else 0,
        "order": flatbuffer.order(),
        "transposes": flatbuffer.transposes(),
        "operators": [
            {"op_type": o.op_type, "nodes": list(o.nodes), "outputs": list(o.outputs)} for o in operators
        ],
    }
    return flatbuffer.to_bytes(), facts


def _chain(value: Any) -> list[str]:
    """Nodes behind an output along first inputs, the nearest first, without those that only change precision."""
    found: list[str] = []
    node = value.producer()
    while node is not None and len(found) < _LONGEST_CHAIN:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            found.append(node.name)
        source = node.inputs[0] if node.inputs else None
        node = source.producer() if source is not None else None
    return found


def _completed(operators: list[Operator], program: Program) -> list[Operator]:
    """Operators with the nodes that no name tells of, which went into the operator of what they read.

    Normalizations and activations that were fused into a layer lose their names. Nodes stand in the program's order.
    """
    owner = {name: index for index, operator in enumerate(operators) for name in operator.nodes}
    order: dict[str, int] = {}
    for position, node in enumerate(program.nodes()):
        name = node.name or ""
        order[name] = position
        source = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
        if source is not None and (source.name or "") in owner:
            owner.setdefault(name, owner[source.name or ""])
    gathered: list[list[str]] = [[] for _ in operators]
    for name in sorted(owner, key=order.__getitem__):
        gathered[owner[name]].append(name)
    unseen = {n.name for n in program.nodes() if n.op_type in ("QuantizeLinear", "DequantizeLinear")}
    return [
        dataclasses.replace(o, nodes=tuple(sorted({*o.nodes, *more} - unseen, key=order.__getitem__)))
        for o, more in zip(operators, gathered, strict=True)
    ]


def _images(specs: tuple[TensorSpec, ...]) -> tuple[int, ...]:
    return tuple(
        i for i, s in enumerate(specs) if len(s.shape) == _IMAGE_RANK and s.dtype.startswith("float")
    )


def _spec(value: Any) -> TensorSpec:
    return TensorSpec(value.name or "", value.dtype.numpy().name, tuple(int(d) for d in value.shape))
