"""Make the batch axis of a static program symbolic, or say which node prevents it.

A label `(axis, outer, inner)` travels from the inputs along every value that depends on them: the batch
sits on `axis`, merged with `outer` faster-varying... slower-varying positions before it and `inner` after
it, so that the axis has `outer * batch * inner` positions in row-major order. Constants that spell the
static batch are rewritten on the way (`sartor.ir.batch_rules`): Reshape targets become 0 or -1, Expand
targets 1. A value that is the same for every sample and must be as long as the batch is expanded by the one
idiom `Expand(v, Concat(Shape(x, start=0, end=1), const))`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from sartor.errors import ModelError, SartorError, UsageError
from sartor.ir import batch_rules, cleanup
from sartor.ir.batch_state import Label, Refusal, State
from sartor.ir.program import BATCH_SYMBOL, Batch, Program, infer_shapes

_PRIMES = (29, 31, 37, 41, 43, 23, 47, 53, 59, 61)
_MAX_ALTERNATIVES = 32  # ways to read a size-1 batch axis that are tried before refusing
_LARGE_BYTES = 1 << 26
CHECK_TOLERANCE = 1e-4


def unusual_batch(shapes: Iterable[Sequence[int]]) -> int:
    """A small prime that divides no dimension of `shapes`: the batch to capture at."""
    dims = {int(d) for shape in shapes for d in shape if int(d) > 0}
    return next((p for p in _PRIMES if not any(d % p == 0 for d in dims)), _PRIMES[0])


def generalise(
    program: Program,
    batch_inputs: Sequence[str],
    size: int,
    reference_shapes: Mapping[str, tuple[int, ...]],
    *,
    unmistakable: bool = False,
) -> Program:
    """Return a program for any batch, or `program` itself with the reason why not.

    Args:
        program: canonical and static at batch `size` (`program.input_shapes`).
        batch_inputs: graph inputs whose axis 0 is the batch.
        size: the static batch; 1 leaves room for ambiguity, which is resolved by trying alternatives.
        reference_shapes: input shapes of the result.
        unmistakable: `size` is from `unusual_batch`, so every axis of that length is the batch.
    """
    choices: list[int] = []
    reason = ""
    for _ in range(_MAX_ALTERNATIVES):
        candidate = program.clone()
        state = State(candidate, tuple(batch_inputs), size, list(choices), unmistakable)
        try:
            _rewrite(state)
        except Refusal as refusal:
            reason = reason or str(refusal)
            following = state.next_choices()
            if following is None:
                break
            choices = following
            continue
        return _finish(candidate, state, reference_shapes)
    result = program.clone()
    result.batch = Batch(symbolic=False, inputs=tuple(batch_inputs), reason=reason)
    return result


def _rewrite(state: State) -> None:
    graph = state.program.graph
    for value in graph.inputs:
        if value.name in state.batch_inputs:
            state.labels[value] = Label(0, 1, 1)
    for node in list(graph):
        batch_rules.apply(state, node)
    for output in graph.outputs:
        label = state.labels.get(output)
        if label is None and state.size > 1 and state.size in state.shapes[output.name or ""]:
            raise Refusal(f"graph output '{output.name}' has the batch size but does not depend on the batch")
        if label is not None and not label.pure:
            raise Refusal(f"graph output '{output.name}' merges the batch axis with others ({label})")


def _finish(program: Program, state: State, reference: Mapping[str, tuple[int, ...]]) -> Program:
    graph = program.graph
    cleanup.remove_dead(graph)
    cleanup.fix_names(program.model)  # an unused output in front of a used one has lost its name
    graph.sort()
    cleanup.sort_initializers(graph)
    for node in graph.all_nodes():
        for output in node.outputs:
            if not output.is_graph_output():
                output.shape = None
    for value in graph.inputs:
        dims: list[int | str] = list(reference[value.name or ""])
        if value.name in state.batch_inputs:
            dims[0] = BATCH_SYMBOL
        value.shape = ir.Shape(dims)
    program.input_shapes = {k: tuple(v) for k, v in reference.items()}
    program.invalidate()
    for output in graph.outputs:
        dims = list(state.shapes[output.name or ""])
        label = state.labels.get(output)
        if label is not None:
            dims[label.axis] = BATCH_SYMBOL
        output.shape = ir.Shape(dims)
        output.type = ir.TensorType(state.types[output.name or ""])
    program.batch = Batch(symbolic=True, inputs=state.batch_inputs)
    return program


def fix_signature(program: Program) -> Program:
    """Write static shapes on the graph's inputs and outputs; for programs of fixed batch."""
    shapes, types = infer_shapes(program.model, program.input_shapes)
    for node in program.graph.all_nodes():
        for output in node.outputs:
            if not output.is_graph_output():
                output.shape = None
    for value in [*program.graph.inputs, *program.graph.outputs]:
        if value.name in shapes:
            value.shape = ir.Shape(shapes[value.name])
            value.type = ir.TensorType(types[value.name])
    return program


def with_shapes(program: Program, shapes: Mapping[str, Sequence[int]]) -> Program:
    """Return `program` at other reference shapes; only the batch axis may differ.

    Raises:
        UsageError: an unknown input, another rank, or a change of a fixed dimension.
    """
    names = list(program.input_shapes)
    updated = dict(program.input_shapes)
    for name, shape in shapes.items():
        if name not in updated:
            raise UsageError(f"--shape names input '{name}', but the model's inputs are {names}.")
        wanted, current = tuple(int(d) for d in shape), updated[name]
        first = 1 if program.batch.symbolic and name in program.batch.inputs else 0
        if len(wanted) != len(current) or wanted[first:] != current[first:] or min(wanted, default=1) < 1:
            hint = f" The batch is fixed because {program.batch.reason}." if wanted[1:] == current[1:] else ""
            raise UsageError(
                f"--shape {name}={','.join(map(str, wanted))} does not fit input '{name}' of shape "
                f"{list(current)}; capture the model at that shape instead.{hint}"
            )
        updated[name] = wanted
    batches = {updated[n][0] for n in program.batch.inputs} if program.batch.symbolic else set()
    if len(batches) > 1:
        raise UsageError(
            f"--shape gives different batch sizes {sorted(batches)} to inputs that share one batch."
        )
    result = program.clone()
    result.input_shapes = updated
    result.invalidate()
    return result


def check_batch(program: Program, *, size: int = 3, seed: int = 0) -> str:
    """Run ONNX Runtime at batch `size` and sample by sample on random input, and compare.

    A model with many weights is run on its twin, without a second copy of them, at batch 2 and with the last
    sample alone.

    Returns:
        Empty if equal within 1e-4 of the largest output, otherwise what differs.
    """
    if not program.batch.symbolic:
        return program.batch.reason
    if program.serialised_bytes() > _LARGE_BYTES:
        together, apart = _run_twin(program, 2, seed, last_only=True)
        return _difference(program, together, apart)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = 1, 1
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(
            program.to_bytes(), options, providers=["CPUExecutionProvider"]
        )
        inputs = random_inputs(program, size=size, seed=seed)
        together = session.run(None, inputs)
        apart = [
            session.run(
                None, {k: v[i : i + 1] if k in program.batch.inputs else v for k, v in inputs.items()}
            )
            for i in range(size)
        ]
    except Exception as error:  # a type that it has no kernels for, such as bfloat16
        try:
            together, apart = _run_twin(program, size, seed)
        except SartorError:
            return f"ONNX Runtime cannot run it at batch {size}: {str(error).splitlines()[0][:300]}"
    return _difference(program, together, apart)


def _difference(program: Program, together: list[np.ndarray], apart: list[list[np.ndarray]]) -> str:
    """What differs between one run of a batch and runs of its last samples, one by one."""
    for index, output in enumerate(program.graph.outputs):
        dims = [str(d) for d in output.shape] if output.shape is not None else []
        found = together[index]
        if BATCH_SYMBOL not in dims:
            expected = apart[0][index]
        else:
            axis = dims.index(BATCH_SYMBOL)
            expected = np.concatenate([run[index] for run in apart], axis=axis)
            if found.shape[axis : axis + 1] > expected.shape[axis : axis + 1]:
                first = found.shape[axis] - expected.shape[axis]
                found = np.take(found, range(first, found.shape[axis]), axis=axis)
        gap = relative_error(found, expected)
        if not gap <= CHECK_TOLERANCE:
            return f"output '{output.name}' at batch size above 1 differs from per-sample runs by {gap:.1e}"
    return ""


def _run_twin(
    program: Program, size: int, seed: int, last_only: bool = False
) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
    """The FX twin's outputs at batch `size`, and sample by sample."""
    from sartor.ir.fx import run_twin

    inputs = random_inputs(program, size=size, seed=seed)
    split = [
        {k: v[i : i + 1] if k in program.batch.inputs else v for k, v in inputs.items()}
        for i in range(size - 1 if last_only else 0, size)
    ]
    names = [output.name or "" for output in program.graph.outputs]
    runs = (run_twin(program, x, dtype="float32" if last_only else "float64") for x in (inputs, *split))
    together, *apart = ([run[n] for n in names] for run in runs)
    return together, apart


def relative_error(a: np.ndarray, b: np.ndarray) -> float:
    """max|a - b| / max|a|; infinite for different shapes, NaN where only one of the two is NaN."""
    if a.shape != b.shape:
        return float("inf")
    if a.size == 0:
        return 0.0
    a, b = a.astype(np.float64), b.astype(np.float64)
    differ = ~((a == b) | (np.isnan(a) & np.isnan(b)))
    if not differ.any():
        return 0.0
    finite = np.abs(a[np.isfinite(a)])
    scale = max(float(finite.max()) if finite.size else 0.0, 1e-30)
    return float(np.max(np.abs(a[differ] - b[differ]))) / scale


def random_inputs(
    program: Program, *, size: int | None = None, seed: int = 0, kind: str = "normal"
) -> dict[str, np.ndarray]:
    """Random arrays for every graph input; batch axes have `size` samples if it is given.

    Args:
        program: whose inputs.
        size: of the batch, in place of that of the reference shapes.
        seed: of the draws.
        kind: `normal`: floats ~ N(0, 1), integers in {0, 1}, the only range that most uses as an index allow;
            `positive`: floats uniform in [0.5, 1.5], integers 1; `zeros`: floats ~ N(0, 1), integers 0.
    """
    lowest, above = {"normal": (0, 2), "positive": (1, 2), "zeros": (0, 1)}[kind]
    generator = np.random.default_rng(seed)
    arrays: dict[str, np.ndarray] = {}
    for value in program.graph.inputs:
        name = value.name or ""
        shape = list(program.input_shapes[name])
        if size is not None and name in program.batch.inputs and shape:
            shape[0] = size
        if value.dtype is None:
            raise ModelError(f"Input '{name}' declares no element type.")
        dtype = value.dtype.numpy()
        if np.issubdtype(dtype, np.integer) or dtype == np.bool_:
            arrays[name] = generator.integers(lowest, above, size=shape).astype(dtype)
        elif kind == "positive":
            arrays[name] = (generator.random(shape) + 0.5).astype(dtype)
        else:
            arrays[name] = generator.standard_normal(shape).astype(dtype)
    return arrays


def same_leading(shapes: Mapping[str, Sequence[int]]) -> tuple[str, ...]:
    """Inputs whose axis 0 is as long as that of the first input: these carry the batch."""
    items = list(shapes.items())
    if not items or not items[0][1]:
        return ()
    first = items[0][1][0]
    return tuple(itertools.compress((n for n, _ in items), (bool(s) and s[0] == first for _, s in items)))


def as_fixed(program: Program, reason: str) -> Program:
    """Return `program` with a fixed batch and the reason for it."""
    program.batch = dataclasses.replace(program.batch, symbolic=False, reason=reason)
    return fix_signature(program)
