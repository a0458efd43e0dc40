"""What each layer costs when it is quantized, and which ones to keep in float for a score.

The cost of a layer is measured by keeping it alone in float, operands and all, while everything else is quantized:
what is gained is what somebody gets who keeps it. Quantizing one layer alone would say how sensitive it is, but count
for it the rounding of an operand that other layers read, too, and that would stay. Errors of many layers are nearly
uncorrelated, so that their squares add up, and the squared error of the outputs shows what no score of few samples
does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sartor.backends.telemetry import import_vendor
from sartor.data_sources import sample_count
from sartor.errors import BackendError
from sartor.passes.quantize import Quantize
from sartor.quantization.calibration import LARGEST
from sartor.quantization.placement import ELEMENTWISE, LAYERS

if TYPE_CHECKING:
    from sartor.ir.program import Program
    from sartor.passes.base import Context

Inputs = dict[str, np.ndarray]
Predict = Callable[[Inputs], dict[str, np.ndarray]]
Without = Callable[[Mapping[str, str]], dict[str, Any]]
"""A scheme that leaves these nodes in float, too."""
SCHEMA = "sartor.quantization-costs/1"


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """What one layer costs.

    Attributes:
        node: its name.
        op_type: its operator.
        error: squared error of the outputs, as a share of their square, if this layer alone stays in float.
        share: of the error with every layer quantized, that is gained by it; negative where errors cancel.
    """

    node: str
    op_type: str
    error: float
    share: float


@dataclasses.dataclass(frozen=True)
class Costs:
    """Costs of all layers, the dearest first.

    Attributes:
        error: squared error of the outputs, as a share of their square, with every layer quantized.
        layers: one entry per layer.
        samples: that they were measured on.
    """

    error: float
    layers: tuple[LayerCost, ...]
    samples: int

    def to_dict(self) -> dict[str, Any]:
        """The document `sartor.quantization-costs/1`."""
        return {"schema": SCHEMA, **dataclasses.asdict(self), "layers": [vars(c) for c in self.layers]}


def predictor(program: Program) -> Predict:
    """Runs a program as it is written: pairs of QuantizeLinear and DequantizeLinear round, the rest is float.

    Kernels for integers would be faster and saturate differently from one processor to the next.
    """
    runtime = import_vendor("onnxruntime", "sartor")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    model = program.understood()
    try:
        session = runtime.InferenceSession(model.to_bytes(), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise BackendError(f"ONNX Runtime could not load the program: {str(error)[:500]}") from error
    names = [value.name or "" for value in model.graph.outputs]

    def predict(inputs: Inputs) -> dict[str, np.ndarray]:
        try:
            return dict(zip(names, session.run(names, inputs), strict=True))
        except Exception as error:
            raise BackendError(f"ONNX Runtime could not run the program: {str(error)[:500]}") from error

    return predict


def costs(program: Program, data: Sequence[Inputs], scheme: Mapping[str, Any], without: Without) -> Costs:
    """The cost of every layer of a scheme.

    Args:
        program: in float.
        data: batches to compare on.
        scheme: with everything quantized that can be.
        without: makes schemes that leave more in float.
    """
    expected = [predictor(program)(inputs) for inputs in data]
    types = {node.name: node.op_type for node in program.nodes()}

    def error(tried: Mapping[str, Any]) -> float:
        quantized = Quantize().replay(program, tried).program
        return _error(expected, map(predictor(quantized), data))

    total = error(scheme)
    layers = []
    for name in scheme["nodes"]:
        if types[name] in LAYERS | ELEMENTWISE:
            left = error(without({name: ""}))
            layers.append(LayerCost(name, types[name], left, 1.0 - left / total if total else 0.0))
    layers.sort(key=lambda cost: -cost.share)
    return Costs(total, tuple(layers), sum(sample_count(i, program.batch.inputs) for i in data))


def _error(expected: Sequence[Mapping[str, np.ndarray]], found: Iterable[Mapping[str, np.ndarray]]) -> float:
    """Squared difference over square, of each output; the mean over outputs.

    What is masked, infinite or beyond what is quantized, would leave nothing to be seen of all else.
    """
    sums: dict[str, list[float]] = {}
    for a, b in zip(expected, found, strict=True):
        for name, wide in a.items():
            if wide.dtype.kind == "f":
                entry = sums.setdefault(name, [0.0, 0.0])
                seen = np.abs(wide) <= LARGEST
                exact = wide[seen].astype(np.float64)
                narrow = np.nan_to_num(b[name][seen].astype(np.float64), nan=LARGEST).clip(-LARGEST, LARGEST)
                entry[0] += float(np.square(exact - narrow).sum())
                entry[1] += float(np.square(exact).sum())
    shares = [(lost / whole if whole else float(lost > 0)) for lost, whole in sums.values()]
    return float(np.mean(shares)) if shares else 0.0


def keep_costly(
    program: Program,
    context: Context,
    data: Sequence[Inputs],
    scheme: dict[str, Any],
    without: Without,
    max_drop: float,
) -> tuple[dict[str, Any], dict[str, str]]:
    """The scheme that keeps the score, and the layers that it leaves in float, with what they cost.

    Layers are left in the order of their costs: 1, 2, 4, … until the score is kept, and then as few as suffice.

    Args:
        program: in float.
        context: its split `evaluate` and `metric` give the score.
        data: batches to find costs on.
        scheme: with everything quantized that can be.
        without: makes schemes that leave more in float.
        max_drop: largest loss of score, points.
    """
    from sartor.scoring import score

    exact = predictor(program)
    split = context.data["evaluate"]
    wanted = score(exact, split, context.metric, exact)[0] - max_drop / 100.0 - 1e-12

    def kept(tried: Mapping[str, Any]) -> bool:
        if not tried["nodes"]:
            return True
        predict = predictor(Quantize().replay(program, tried).program)
        return score(predict, split, context.metric, exact)[0] >= wanted

    if kept(scheme):
        return scheme, {}
    ranked = costs(program, data, scheme, without).layers
    schemes: dict[int, dict[str, Any]] = {}

    def first(count: int) -> dict[str, str]:
        return {
            cost.node: f"it stays in float for the score: {cost.share:.0%} of the error of the outputs is its own"
            for cost in ranked[:count]
        }

    def enough(count: int) -> bool:
        schemes[count] = without(first(count))
        return kept(schemes[count])

    low, high = 0, 1
    while high < len(ranked) and not enough(high):
        low, high = high, 2 * high
    high = min(high, len(ranked))
    while high - low > 1:
        middle = (low + high) // 2
        if enough(middle):
            high = middle
        else:
            low = middle
    if high == len(ranked) and not enough(high):  # what is left computes nothing, and rounds all the same
        return {**scheme, "nodes": []}, {name: first(len(ranked)).get(name, "") for name in scheme["nodes"]}
    return schemes[high], first(high)
