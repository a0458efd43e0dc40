"""Load an ONNX file as a canonical Program. Files are untrusted: nothing in them is executed.

`sartor.ir.onnx_file` reads and checks the bytes, `sartor.ir.opset` raises the opset, and this module
decides the input shapes, canonicalizes, and makes the batch axis symbolic.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from sartor.errors import ModelError, SartorError, UsageError, VerificationError
from sartor.ir import batch as batching
from sartor.ir import canonicalize as canonical
from sartor.ir import cleanup, opset, provenance, tail
from sartor.ir.onnx_file import Limits, checker_complaint, read
from sartor.ir.opset_functions import all_nodes
from sartor.ir.program import DIALECT_DOMAIN, Batch, Program, Source
from sartor.ir.verify import verify_program

DEFAULT_LIMITS = Limits()

__all__ = ["DEFAULT_LIMITS", "Limits", "inline_functions", "load"]


def load(
    path: str | os.PathLike[str],
    *,
    shapes: Mapping[str, Sequence[int]] | None = None,
    external_root: str | os.PathLike[str] | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> Program:
    """Load, raise to the canonical opset, canonicalize, and make the batch axis symbolic.

    Args:
        path: an ONNX protobuf file.
        shapes: reference shape per graph input; needed for dynamic dimensions other than the batch.
        external_root: folder that external data must lie in; the file's own folder by default.
        limits: refusal thresholds for absurd files.

    Raises:
        ModelError: not ONNX, truncated, external data outside the folder, a cycle, a missing
            initializer, or a dimension that only `--shape` can fix.
        UnsupportedOperatorError: an operator outside the canonical table.
        UsageError: `shapes` names no input, or does not fit it.
    """
    file = Path(path)
    root = Path(external_root) if external_root is not None else None
    try:
        contents = read(file, root, limits)
        source = Source("onnx", file.name, contents.sha256)
        program = tail.understood(
            _prepared(contents.model),
            lambda model, left: _canonical(model, source, shapes or {}, limits, left),
        )
        verify_program(program)
        _require_possible(program, limits)
    except VerificationError as error:
        refused = ModelError(f"'{file.name}' is not a valid model: {error}")
        for note in getattr(error, "__notes__", ()):
            refused.add_note(note)
        raise refused from error
    except SartorError:
        raise
    except Exception as error:
        complaint = "a name is not valid UTF-8" if _undecodable(error) else checker_complaint(file)
        if complaint:
            raise ModelError(f"'{file.name}' is not a valid ONNX model: {complaint}") from error
        raise
    return program


def _require_possible(program: Program, limits: Limits) -> None:
    for name, shape in program.shapes().items():
        if math.prod(shape) > limits.activation_elements:
            raise ModelError(
                f"Value '{name}' has shape {list(shape)}: {math.prod(shape)} elements, more than the limit of "
                f"{limits.activation_elements}. Give smaller shapes with --shape."
            )


def _undecodable(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, UnicodeDecodeError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _prepared(model: ir.Model) -> ir.Model:
    """The model at the canonical opset, without functions, sorted, with unique names."""
    _drop_initialized_inputs(model.graph)
    cleanup.fix_names(model)
    _check_attributes(model)
    model = opset.raise_opset(model)
    inline_functions(model)
    cleanup.sort(model.graph)
    cleanup.fix_names(model)
    return model


def _canonical(
    model: ir.Model,
    source: Source,
    shapes: Mapping[str, Sequence[int]],
    limits: Limits,
    left: tail.Tail | None,
) -> Program:
    """The canonical program of a prepared model; the batch is fixed where a part of it is left out."""
    origin = provenance.extract(model)
    parameters = {
        name
        for name, value in model.graph.initializers.items()
        if value.const_value is not None and value.const_value.dtype.is_floating_point()
    }
    declared = _declared(model.graph)
    _check_names(shapes, declared)
    carriers, static = _batch_inputs(declared)
    reference = _reference(declared, carriers if not static else (), shapes)

    def canonical_at(at: Mapping[str, tuple[int, ...]], into: ir.Model) -> Program:
        canonical.canonicalize(
            into,
            at,
            parameters=parameters,
            provenance=origin,
            generated_elements=limits.generated_elements,
        )
        present = _present(into, origin)
        return Program(into, source=source, input_shapes=at, provenance=present, tail=left)

    if static:
        fixed = {name: tuple(int(d) for d in dims) for name, dims in declared.items()}  # type: ignore[arg-type]
        program = canonical_at(fixed, model)
        if left is not None:
            program = batching.as_fixed(program, left.reason())
        elif carriers:
            size = fixed[carriers[0]][0]
            general = batching.generalise(program, carriers, size, fixed)
            program = general if general.batch.symbolic else batching.as_fixed(general, general.batch.reason)
        else:
            program = batching.as_fixed(program, "no input has an axis to serve as the batch axis")
        return batching.with_shapes(program, shapes) if shapes else program

    if left is not None:
        program = canonical_at(reference, model)
        program.batch = Batch(symbolic=False, inputs=carriers, reason=left.reason())
        return batching.fix_signature(program)
    spare = model.clone()
    size = batching.unusual_batch(
        [
            *reference.values(),
            *(tuple(v.shape) for v in model.graph.initializers.values() if v.shape is not None),
        ]  # type: ignore[misc]
    )
    tiled = {n: (size, *s[1:]) if n in carriers else s for n, s in reference.items()}
    reason = "no input has a dynamic axis 0"
    if carriers:
        try:
            general = batching.generalise(
                canonical_at(tiled, model), carriers, size, reference, unmistakable=True
            )
        except ModelError as error:
            reason = f"the model cannot be analysed at batch {size}: {error}"
        else:
            if general.batch.symbolic:
                return general
            reason = general.batch.reason
    program = canonical_at(reference, spare)
    if carriers:  # declared dynamic, but written for one batch: read it as a file of that batch
        general = batching.generalise(program, carriers, reference[carriers[0]][0], reference)
        if general.batch.symbolic:
            return general
    program.batch = Batch(symbolic=False, inputs=carriers, reason=reason)
    return batching.fix_signature(program)


def inline_functions(model: ir.Model) -> None:
    """Inline every function except those of domain `sartor`.

    Raises:
        ModelError: functions call each other in a cycle.
    """
    if not any(f.domain != DIALECT_DOMAIN for f in model.functions.values()):
        return
    try:
        InlinePass(criteria=lambda f: f.domain != DIALECT_DOMAIN)(model)
    except (ir.passes.PreconditionError, ir.passes.PassError) as error:
        raise ModelError(f"The model's functions cannot be inlined: {error}") from error


def _check_attributes(model: ir.Model) -> None:
    """Refuse attributes of a wrong kind: every rule after this one reads them without asking."""
    versions = [v for d, v in model.opset_imports.items() if d in ("", "ai.onnx")]
    for node in all_nodes(model):
        if node.domain not in ("", "ai.onnx") or not versions:
            continue
        expected = _attribute_kinds(node.op_type, int(versions[0]))
        for name, attribute in node.attributes.items():
            if attribute.type.name != expected.get(name, attribute.type.name):
                raise ModelError(
                    f"Attribute '{name}' of node '{node.name}' ({node.op_type}) is of type {attribute.type.name}; "
                    f"the operator takes {expected[name]}. The file is damaged; export it again."
                )


@functools.cache
def _attribute_kinds(op_type: str, version: int) -> dict[str, str]:
    try:
        schema = onnx.defs.get_schema(op_type, version, "")
    except onnx.defs.SchemaError:
        return {}
    return {name: str(a.type).rpartition(".")[2] for name, a in schema.attributes.items()}


def _drop_initialized_inputs(graph: ir.Graph) -> None:
    """Files of IR version 3 list every weight as an input too; those are constants here."""
    for value in list(graph.inputs):
        if value.name in graph.initializers:
            graph.inputs.remove(value)


def _declared(graph: ir.Graph) -> dict[str, tuple[int | str | None, ...] | None]:
    """Declared dimensions of every input: a number, a symbol, None if unnamed; None if rank is unknown."""
    declared: dict[str, tuple[int | str | None, ...] | None] = {}
    for value in graph.inputs:
        if not isinstance(value.type, ir.TensorType):
            raise ModelError(f"Input '{value.name}' is not a dense tensor (type '{value.type}').")
        if value.shape is None:
            declared[value.name or ""] = None
            continue
        dims = (d if isinstance(d, int) else d.value for d in value.shape)
        declared[value.name or ""] = tuple(None if isinstance(d, int) and d < 0 else d for d in dims)
    if not declared:
        raise ModelError("The graph has no inputs; there is nothing to measure.")
    return declared


def _check_names(shapes: Mapping[str, Sequence[int]], declared: Mapping[str, object]) -> None:
    unknown = sorted(set(shapes) - set(declared))
    if unknown:
        raise UsageError(f"--shape names input '{unknown[0]}', but the model's inputs are {list(declared)}.")


def _batch_inputs(
    declared: Mapping[str, tuple[int | str | None, ...] | None],
) -> tuple[tuple[str, ...], bool]:
    """Inputs that carry the batch on axis 0, and whether every dimension is static."""
    static = all(d is not None and all(isinstance(x, int) for x in d) for d in declared.values())
    if static:
        return batching.same_leading(declared), True  # type: ignore[arg-type]
    first = [(n, d[0]) for n, d in declared.items() if d and not isinstance(d[0], int)]
    unknown = [n for n, d in declared.items() if d is None]
    if not first:
        return tuple(unknown), False
    symbol = first[0][1]
    return tuple(n for n, s in first if s == symbol or s is None) + tuple(unknown), False


def _reference(
    declared: Mapping[str, tuple[int | str | None, ...] | None],
    batch_inputs: Sequence[str],
    shapes: Mapping[str, Sequence[int]],
) -> dict[str, tuple[int, ...]]:
    """Concrete reference shapes: declared numbers, `--shape`, and 1 for the batch.

    A dimension fixed for one input is fixed for every input that uses the same symbol.
    """
    symbols: dict[str, int] = {}
    for name, given in shapes.items():
        for symbol, size in zip(declared[name] or (), given, strict=False):
            if isinstance(symbol, str):
                symbols.setdefault(symbol, int(size))
    result = {}
    for name, dims in declared.items():
        if name in shapes:
            wanted = tuple(int(d) for d in shapes[name])
            static_batch = not batch_inputs  # a fully static model may change its batch later
            fits = dims is None or (
                len(dims) == len(wanted)
                and all(
                    not isinstance(d, int) or d == w or (static_batch and axis == 0)
                    for axis, (d, w) in enumerate(zip(dims, wanted, strict=True))
                )
            )
            if not fits or min(wanted, default=1) < 1:
                raise UsageError(
                    f"--shape {name}={','.join(map(str, wanted))} does not fit input '{name}', declared as "
                    f"{_spell(dims)}."
                )
            result[name] = wanted
            continue
        if dims is None:
            raise ModelError(f"Input '{name}' declares no shape. Give it with --shape {name}=1,3,224,224.")
        sizes = []
        for axis, dim in enumerate(dims):
            if isinstance(dim, int):
                sizes.append(dim)
            elif isinstance(dim, str) and dim in symbols:
                sizes.append(symbols[dim])
            elif axis == 0 and name in batch_inputs:
                sizes.append(1)
            else:
                example = ",".join(
                    str(d) if isinstance(d, int) else ("1" if a == 0 else "224") for a, d in enumerate(dims)
                )
                raise ModelError(
                    f"Dimension {axis} of input '{name}' ('{dim or '?'}') is dynamic and is not the batch. "
                    "Fix it "
                    f"with --shape {name}={example} (your sizes)."
                )
        result[name] = tuple(sizes)
    return result


def _spell(dims: tuple[int | str | None, ...] | None) -> str:
    return (
        "of unknown rank"
        if dims is None
        else "[" + ", ".join(str(d) if d is not None else "?" for d in dims) + "]"
    )


def _present(model: ir.Model, origin: Mapping[str, object]) -> dict:
    names = {n.name for n in model.graph.all_nodes()}
    return {k: v for k, v in origin.items() if k in names}
