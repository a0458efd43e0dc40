"""Whether two ONNX files compute the same function, on seeded random inputs with ONNX Runtime alone.

The error is `max|a - b| / max|a|` over all outputs and samples, A being the reference. An output that is
produced by a Softmax or LogSoftmax in both models is compared at that node's input as well: behind it
every difference looks small. NaN and infinity fail. When the models differ, the first node of A, in its
order, whose equally named and equally shaped output differs in B is named.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sartor.errors import ModelError, UsageError

if TYPE_CHECKING:
    import onnx

SCHEMA = "sartor.verify/1"
_HIDING = ("Softmax", "LogSoftmax")
_MAX_IR = 13  # ONNX Runtime 1.31 refuses newer labels; the graph itself is decided by its opset


@dataclasses.dataclass(frozen=True)
class Verification:
    """Outcome of comparing B with A.

    Attributes:
        max_abs_error: max|a - b| over compared values; None when it is not finite.
        max_rel_error: max over compared values of max|a - b| / max|a|; None when it is not finite.
        tolerance: the largest allowed `max_rel_error`.
        passed: within the tolerance and everywhere finite.
        compared: names of A's values that were compared.
        worst: the value with the largest relative error.
        first_divergent_node: node of A, or None when the models agree or no common value shows where.
        samples: number of random inputs.
        seed: of the inputs.
    """

    max_abs_error: float | None
    max_rel_error: float | None
    tolerance: float
    passed: bool
    compared: tuple[str, ...]
    worst: str
    first_divergent_node: str | None
    samples: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """The document `sartor.verify/1`."""
        document = dataclasses.asdict(self)
        document["compared"] = list(self.compared)
        return {"schema": SCHEMA, **document}

    def summary(self) -> str:
        """One sentence."""
        if self.max_rel_error is None or self.max_abs_error is None:
            what = "is zero in the reference only" if self.max_abs_error is not None else "is not finite"
            text = f"value '{self.worst}' {what}"
        else:
            text = (
                f"relative error {self.max_rel_error:.3g}, absolute {self.max_abs_error:.3g} "
                f"at '{self.worst}', {self.samples} random inputs"
            )
        if self.first_divergent_node is not None:
            text += f"; the first node that differs is '{self.first_divergent_node}'"
        return text


@dataclasses.dataclass
class _Difference:
    absolute: float = 0.0
    scale: float = 0.0
    finite: bool = True

    def update(self, a: np.ndarray, b: np.ndarray) -> None:
        if a.dtype.kind not in "fc" and b.dtype.kind not in "fc":
            a, b = a.astype(np.float64), b.astype(np.float64)
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            self.finite = False
            return
        if a.size:
            wide = a.astype(np.float64)
            self.absolute = max(self.absolute, float(np.abs(wide - b).max()))
            self.scale = max(self.scale, float(np.abs(wide).max()))

    @property
    def relative(self) -> float:
        if self.absolute == 0.0:
            return 0.0
        return self.absolute / self.scale if self.scale else float("inf")

    def exceeds(self, tolerance: float) -> bool:
        return not self.finite or self.relative > tolerance


def verify_files(
    a: str | Path,
    b: str | Path,
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    tolerance: float = 1e-4,
    samples: int = 4,
    seed: int = 0,
) -> Verification:
    """Compare two ONNX files; see the module docstring.

    Args:
        a: the reference.
        b: the model to check.
        shapes: concrete input shapes; symbolic dimensions that are not given are 1.
        tolerance: largest allowed `max|a - b| / max|a|`.
        samples: random inputs, at least 1.
        seed: of the inputs.

    Raises:
        ModelError: a file cannot be read, does not run, or the two have different inputs or outputs.
        UsageError: `shapes` does not fit the inputs.
    """
    first, second = _Model(Path(a)), _Model(Path(b))
    _require_same_signature(first, second)
    rng = np.random.default_rng(seed)
    concrete = _input_shapes(first, second, dict(shapes or {}))
    inputs = [first.random_inputs(rng, concrete) for _ in range(samples)]
    pairs = [(name, name) for name in first.outputs]
    pairs += _before_softmax(first, second)
    differences = {left: _Difference() for left, _ in pairs}
    run_a = first.session([left for left, _ in pairs])
    run_b = second.session([right for _, right in pairs])
    for feed in inputs:
        for (left, _), x, y in zip(pairs, run_a(feed), run_b(feed), strict=True):
            if x.shape != y.shape:
                raise ModelError(
                    f"Output '{left}' has shape {list(x.shape)} in '{first.name}' and {list(y.shape)} in "
                    f"'{second.name}'; only models with equal outputs can be compared."
                )
            differences[left].update(x, y)
    worst = max(differences, key=lambda name: (not differences[name].finite, differences[name].relative))
    finite = all(d.finite for d in differences.values())
    relative = max(d.relative for d in differences.values())
    passed = not any(d.exceeds(tolerance) for d in differences.values())
    absolute = max(d.absolute for d in differences.values())
    return Verification(
        max_abs_error=absolute if finite else None,
        max_rel_error=relative if finite and np.isfinite(relative) else None,
        tolerance=tolerance,
        passed=passed,
        compared=tuple(differences),
        worst=worst,
        first_divergent_node=None if passed else _first_divergent(first, second, inputs, tolerance),
        samples=samples,
        seed=seed,
    )


def _require_same_signature(a: _Model, b: _Model) -> None:
    for what, left, right in (("inputs", a.inputs, b.inputs), ("outputs", a.outputs, b.outputs)):
        if list(left) != list(right):
            raise ModelError(
                f"'{a.name}' has the {what} {list(left)} and '{b.name}' {list(right)}; only models with the "
                f"same {what} can be compared."
            )
        for name in left:
            if not left[name].agrees(right[name]):
                raise ModelError(
                    f"The {what[:-1]} '{name}' is {left[name]} in '{a.name}', {right[name]} in '{b.name}'; "
                    "types and fixed dimensions must be equal."
                )


def _input_shapes(a: _Model, b: _Model, given: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """A concrete shape per input: as given, as fixed by either model, otherwise 1."""
    unknown = sorted(set(given) - set(a.inputs))
    if unknown:
        raise UsageError(f"--shape names '{unknown[0]}'; the inputs are {sorted(a.inputs)}.")
    shapes = {}
    for name, left in a.inputs.items():
        fixed = tuple(x if x is not None else y for x, y in zip(left.dims, b.inputs[name].dims, strict=True))
        shape = given.get(name, tuple(1 if d is None else d for d in fixed))
        if len(shape) != len(fixed) or any(f not in (None, s) for f, s in zip(fixed, shape, strict=True)):
            raise UsageError(f"--shape gives {list(shape)} for '{name}', which is {left}.")
        shapes[name] = shape
    return shapes


def _before_softmax(a: _Model, b: _Model) -> list[tuple[str, str]]:
    """Inputs of Softmax nodes that produce the same output in both models."""
    pairs = []
    for output in a.outputs:
        left, right = a.producer.get(output), b.producer.get(output)
        if left is None or right is None or left.op_type != right.op_type or left.op_type not in _HIDING:
            continue
        if left.input[0] in a.producer and right.input[0] in b.producer:
            pairs.append((left.input[0], right.input[0]))
    return pairs


def _first_divergent(
    a: _Model, b: _Model, inputs: list[dict[str, np.ndarray]], tolerance: float
) -> str | None:
    names = [name for name in a.producer if name in b.producer]
    if not names:
        return None
    run_a, run_b = a.session(names), b.session(names)
    differences = {name: _Difference() for name in names}
    for feed in inputs:
        for name, x, y in zip(names, run_a(feed), run_b(feed), strict=True):
            if x.shape == y.shape:  # another shape is what pruning does; it is not a divergence by itself
                differences[name].update(x, y)
    for name in names:  # in the order in which A computes them
        if differences[name].exceeds(tolerance):
            return a.producer[name].name or name
    return None


class _Model:
    """One ONNX file, and sessions on it that return chosen values."""

    def __init__(self, path: Path):
        import onnx

        self.path, self.name = path, path.name
        if not path.is_file():
            raise ModelError(f"The file '{path}' does not exist.")
        try:
            self.proto: onnx.ModelProto = onnx.load(str(path))
            if not self.proto.graph.output:
                raise ValueError("it has no outputs")
        except Exception as error:  # protobuf and external-data errors have no common class
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ModelError(f"The file '{path}' is not a readable ONNX model: {reason}.") from error
        self.proto.ir_version = min(self.proto.ir_version, _MAX_IR)
        initializers = {tensor.name for tensor in self.proto.graph.initializer}
        self.inputs = {v.name: _Spec(v) for v in self.proto.graph.input if v.name not in initializers}
        self.outputs = {v.name: _Spec(v) for v in self.proto.graph.output}
        self.producer = {name: node for node in self.proto.graph.node for name in node.output if name}

    def random_inputs(
        self, rng: np.random.Generator, shapes: dict[str, tuple[int, ...]]
    ) -> dict[str, np.ndarray]:
        """Standard normal floats; integers 0 and 1, which are valid as ids, masks and indices alike."""
        feed = {}
        for name, spec in self.inputs.items():
            if spec.dtype.kind in "iub":
                feed[name] = rng.integers(0, 2, size=shapes[name]).astype(spec.dtype)
            else:
                feed[name] = rng.standard_normal(shapes[name]).astype(spec.dtype)
        return feed

    def session(self, names: list[str]) -> Any:
        """A function from inputs to the values `names`, computed without graph optimisation."""
        import onnx
        import onnxruntime

        model = onnx.ModelProto()
        model.CopyFrom(self.proto)
        declared = {value.name for value in model.graph.output}
        for name in names:
            if name not in declared:
                model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
                declared.add(name)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            session = onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # the runtime's exceptions derive from Exception, one class per status
            raise ModelError(f"ONNX Runtime cannot load '{self.path}': {_brief(error)}") from error

        def run(feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
            try:
                return [np.asarray(value) for value in session.run(names, dict(feed))]
            except Exception as error:
                raise ModelError(f"ONNX Runtime cannot run '{self.path}': {_brief(error)}") from error

        return run


class _Spec:
    """Element type and dimensions of an input or output; None where a dimension is open."""

    def __init__(self, value: onnx.ValueInfoProto):
        from onnx import TensorProto, helper

        tensor = value.type.tensor_type
        if not value.type.HasField("tensor_type") or tensor.elem_type == TensorProto.STRING:
            raise ModelError(f"'{value.name}' is not a tensor of numbers; only those can be compared.")
        self.dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type))
        self.dims = tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim)

    def agrees(self, other: _Spec) -> bool:
        """Same type and rank, and no dimension that both fix differently."""
        return (
            self.dtype == other.dtype
            and len(self.dims) == len(other.dims)
            and all(x is None or y is None or x == y for x, y in zip(self.dims, other.dims, strict=True))
        )

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join('?' if d is None else str(d) for d in self.dims)}]"


def _brief(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300].rstrip(".") + "."
