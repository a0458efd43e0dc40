"""A foreign model made a Program again: same signature, canonical form, same batch, or refused."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from sartor.errors import SartorError, VerificationError
from sartor.ir import batch as batching
from sartor.ir import canonicalize as canonical
from sartor.ir import cleanup, opset
from sartor.ir.load import inline_functions
from sartor.ir.program import BATCH_SYMBOL, NodeProvenance, Program
from sartor.ir.verify import signature, verify_program
from sartor.passes.structure import same_bits

_FLOATS = (ir.AttributeType.FLOAT, ir.AttributeType.FLOATS)


def rebuild(
    name: str, program: Program, model: ir.Model, provenance: Mapping[str, NodeProvenance] | None = None
) -> Program:
    """The Program of a model that foreign code made from `program`.

    Args:
        name: of the pass, for messages.
        program: what the foreign code was given; not changed.
        model: its result; taken over.
        provenance: where its nodes come from; by default what names of nodes and values tell.

    Raises:
        VerificationError: the signature changed, the batch was fixed, or the result is malformed.
    """
    try:
        _check_scopes(model.graph)
        _check_signature(program, model.graph)
        result = _canonical(program, model, provenance)
        verify_program(result, signature(program))
    except Exception as error:
        kind = "" if isinstance(error, SartorError) else f"{type(error).__name__}: "
        refused = VerificationError(
            f"The foreign pass '{name}' leaves a program that is not sound: {kind}{str(error).rstrip('.')}. The "
            "program is as it was before it."
        )
        for note in getattr(error, "__notes__", ()):
            refused.add_note(note)
        raise refused from error
    _share(program, result)
    _keep_float_attributes(program, result)
    return result


def _canonical(program: Program, model: ir.Model, provenance: Mapping[str, NodeProvenance] | None) -> Program:
    for value in model.graph.initializers.values():
        if (
            value.const_value is not None
        ):  # whoever replaces a tensor easily forgets what is declared about it
            value.shape = ir.Shape(value.const_value.numpy().shape)
            value.type = ir.TensorType(value.const_value.dtype)
    cleanup.fix_names(model)
    model = opset.raise_opset(model)
    inline_functions(model)
    cleanup.sort(model.graph)
    cleanup.fix_names(model)
    origin = provenance if provenance is not None else _surviving(program, model)
    parameters = {
        n
        for n, v in model.graph.initializers.items()
        if v.const_value is not None and v.const_value.dtype.is_floating_point()
    }
    reference, carriers = program.input_shapes, program.batch.inputs
    at, size = dict(reference), 0
    if program.batch.symbolic:
        shapes = [
            v.const_value.numpy().shape
            for v in model.graph.initializers.values()
            if v.const_value is not None
        ]
        size = batching.unusual_batch([*reference.values(), *shapes])
        at = {n: (size, *s[1:]) if n in carriers else s for n, s in reference.items()}
    canonical.canonicalize(model, at, parameters=parameters, provenance=origin)
    present = {node.name for node in model.graph.all_nodes()}
    result = Program(
        model,
        source=program.source,
        input_shapes=at,
        batch=program.batch,
        provenance={n: p for n, p in origin.items() if n in present},
        applied=program.applied,
    )
    if not program.batch.symbolic:
        return batching.fix_signature(result)
    general = batching.generalise(result, carriers, size, reference, unmistakable=True)
    if not general.batch.symbolic:
        raise VerificationError(f"It computes one batch size only, because {general.batch.reason}")
    return general


def _check_scopes(graph: ir.Graph) -> None:
    """Every value that a node or an output reads must exist, before anything walks the graph."""
    known = {id(v) for v in (*graph.inputs, *graph.initializers.values())}
    known.update(id(output) for node in graph.all_nodes() for output in node.outputs)
    for body in graph.subgraphs():
        known.update(id(v) for v in (*body.inputs, *body.initializers.values()))
    for node in graph.all_nodes():
        for index, value in enumerate(node.inputs):
            if value is not None and id(value) not in known:
                raise VerificationError(
                    f"Input {index} of node '{node.name}' ({node.op_type}) is value '{value.name}', which nothing "
                    "computes and no initializer holds"
                )
    for value in graph.outputs:
        if id(value) not in known:
            raise VerificationError(f"Graph output '{value.name}' is not computed by any node")


def _check_signature(program: Program, graph: ir.Graph) -> None:
    """Same inputs and outputs in the same order; shapes and types that were dropped are restored."""
    for what, before, after in (
        ("input", program.graph.inputs, graph.inputs),
        ("output", program.graph.outputs, graph.outputs),
    ):
        old, new = [v.name for v in before], [v.name for v in after]
        if old != new:
            raise VerificationError(f"Its graph {what}s are {new}; expected {old}. Names and order must stay")
        for was, now in zip(before, after, strict=True):
            if now.dtype is not None and now.dtype != was.dtype:
                raise VerificationError(
                    f"Graph {what} '{now.name}' became {now.dtype.name}; expected {_type(was)}"
                )
            if now.shape is not None and _dims(now) != _dims(was):
                raise VerificationError(
                    f"Graph {what} '{now.name}' became {_dims(now)}; expected {_dims(was)}, '{BATCH_SYMBOL}' being the "
                    "batch"
                )
            now.type, now.shape = ir.TensorType(was.dtype) if was.dtype else was.type, was.shape


def _type(value: ir.Value) -> str:
    return value.dtype.name if value.dtype is not None else "untyped"


def _dims(value: ir.Value) -> list[int | str]:
    return [d if isinstance(d, int) else str(d) for d in value.shape or ()]


def _surviving(program: Program, model: ir.Model) -> dict[str, NodeProvenance]:
    """Provenance of nodes that kept their name, or that compute a value of a name that was there before."""
    by_value = {
        output.name: program.provenance[node.name]
        for node in program.nodes()
        if node.name in program.provenance
        for output in node.outputs
    }
    found: dict[str, NodeProvenance] = {}
    for node in model.graph:
        record = program.provenance.get(node.name or "")
        record = record or next((by_value[o.name] for o in node.outputs if o.name in by_value), None)
        if record is not None:
            found[node.name or ""] = record
    return found


def _share(program: Program, result: Program) -> None:
    """Let weights that did not change be the same tensors again: a copy of each would cost their size."""
    for name, value in result.initializers.items():
        old = program.initializers.get(name)
        if old is None or old.const_value is None or value.const_value is None:
            continue
        mine, theirs = value.const_value.numpy(), old.const_value.numpy()
        if mine.shape == theirs.shape and (np.shares_memory(mine, theirs) or same_bits(mine, theirs)):
            value.const_value = old.const_value


def _keep_float_attributes(program: Program, result: Program) -> None:
    """A protobuf rounds 1e-5 to float32; a number that only went through one has not changed."""
    before = {node.name: node for node in program.nodes()}
    for node in result.nodes():
        old = before.get(node.name)
        for name, attribute in node.attributes.items():
            was = old.attributes.get(name) if old is not None else None
            if was is None or was.type != attribute.type or was.type not in _FLOATS or was.is_ref():
                continue
            if np.array_equal(np.float32(was.value), np.float32(attribute.value)):
                node.attributes[name] = was
