"""A program on disk, whole and exact, for another process of ours: nothing is canonicalized again.

Not a format to ship or to keep: that is ONNX (`Program.save`). Nothing is checked when it is read.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from sartor.ir import serialise
from sartor.ir.program import Batch, NodeProvenance, Program, Source
from sartor.ir.tail import Tail

_CORE = "program.onnx"
_TAIL = "tail.onnx"
_REST = "program.json"


def write(program: Program, folder: Path) -> None:
    """Write `program` to files in `folder`."""
    program.understood().save(folder / _CORE)
    rest = {
        "source": dataclasses.asdict(program.source),
        "input_shapes": {name: list(shape) for name, shape in program.input_shapes.items()},
        "batch": dataclasses.asdict(program.batch),
        "applied": list(program.applied),
        "provenance": {name: dataclasses.asdict(entry) for name, entry in program.provenance.items()},
        "tail": None if program.tail is None else _write_tail(program.tail, folder),
    }
    (folder / _REST).write_text(json.dumps(rest), encoding="utf-8")


def read(folder: Path) -> Program:
    """The program that `write` wrote; large weights are read when they are needed."""
    rest = json.loads((folder / _REST).read_text(encoding="utf-8"))
    return Program(
        ir.load(folder / _CORE),
        source=Source(**rest["source"]),
        input_shapes=rest["input_shapes"],
        batch=Batch(**{**rest["batch"], "inputs": tuple(rest["batch"]["inputs"])}),
        provenance={name: NodeProvenance(**entry) for name, entry in rest["provenance"].items()},
        applied=tuple(rest["applied"]),
        tail=None if rest["tail"] is None else _read_tail(rest["tail"], folder),
    )


def _write_tail(tail: Tail, folder: Path) -> dict[str, object]:
    shell = onnx.ModelProto(ir_version=10, graph=onnx.GraphProto(name="tail"))
    shell.graph.node.extend(tail.nodes)
    shell.graph.output.extend(info for _, info in tail.outputs)
    weights = [serialise.weights_of(name, tensor) for name, tensor in sorted(tail.weights.items())]
    model, data = serialise.with_external_data(shell, weights, "tail.data")
    (folder / _TAIL).write_bytes(model)
    with (folder / "tail.data").open("wb") as stream:
        stream.writelines(data)
    return {
        "positions": [position for position, _ in tail.outputs],
        "added": sorted(tail.added),
        "opset_imports": dict(tail.opset_imports),
        "reasons": dict(tail.reasons),
        "readers": dict(tail.readers),
    }


def _read_tail(rest: dict[str, Any], folder: Path) -> Tail:
    graph = onnx.load(folder / _TAIL, load_external_data=False).graph
    outputs = tuple(zip(rest["positions"], graph.output, strict=True))
    graph_weights = ir.load(folder / _TAIL).graph.initializers
    return Tail(
        nodes=tuple(graph.node),
        weights={
            name: value.const_value for name, value in graph_weights.items() if value.const_value is not None
        },
        outputs=outputs,
        added=frozenset(rest["added"]),
        opset_imports=rest["opset_imports"],
        reasons=rest["reasons"],
        readers=rest["readers"],
    )
