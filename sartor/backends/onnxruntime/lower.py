"""Lowering to ONNX Runtime: the ONNX bytes of the legalized program are the artifact.

Beside them lies the graph that the runtime makes of them, for people who want to see what was fused. It is written at
the level `extended`. Sessions load `model.onnx` at the level `all`, which adds layouts for the CPU that they run on:
a file of those would be another one on every machine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sartor.backends import telemetry
from sartor.backends.artifact import write_artifact
from sartor.backends.legality import require_legal
from sartor.backends.onnxruntime import legality, legalize, run
from sartor.backends.protocol import Artifact, TargetOptions
from sartor.errors import BackendError
from sartor.ir.files import write_all

if TYPE_CHECKING:
    from sartor.ir.program import Program

FILE = "model.onnx"
OPTIMIZED = "model.optimized.onnx"


def lower(program: Program, folder: Path, options: TargetOptions) -> Artifact:
    """Write `model.onnx`: `legalize(program).to_bytes()`, beyond 2 GiB with external data beside it.

    A program in which nothing is quantized is legal as it is, and its bytes are its own. `model.optimized.onnx` is
    written where the runtime can write it; `optimized_graph` of the metadata says by which settings, or why not.

    Raises:
        UsageError: precision or folder.
        BackendError: the program breaks a legality rule.
    """
    runtime = telemetry.import_vendor("onnxruntime", "sartor")
    legal = legalize.legalize(program)
    require_legal(legality.NAME, legality.check(legal, options))

    def write(temporary: Path) -> tuple[tuple[str, ...], Mapping[str, Any]]:
        beside = [path.name for path in write_all(legal.files(temporary / FILE)) if path.name != FILE]
        kept = {"reason": "weights are in a file of their own"} if beside else _optimized(temporary, options)
        shown = [OPTIMIZED] if "file" in kept else []
        metadata = {
            "runtime": f"onnxruntime {runtime.__version__}",
            "optimized_graph": kept,
            "not_needed_to_run": shown,
        }
        return (FILE, *beside, *shown), metadata

    return write_artifact(legal, folder, options, target=legality.NAME, write=write)


def _optimized(folder: Path, options: TargetOptions) -> dict[str, Any]:
    """Write the graph that the runtime makes of the file; returns the settings, or the reason why there is none."""
    runtime = telemetry.import_vendor("onnxruntime", "sartor")
    made, _, settings = run.session_options((), dataclasses.replace(options, shapes={}))
    made.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    made.optimized_model_filepath = str(folder / OPTIMIZED)
    try:
        run.create(str(folder / FILE), made)
    except BackendError as error:  # whoever loads the artifact is told so
        (folder / OPTIMIZED).unlink(missing_ok=True)
        return {"reason": str(error)}
    recorded = ("provider", "execution_mode", "intra_op_threads", "inter_op_threads")
    return {
        "file": OPTIMIZED,
        "graph_optimization_level": "extended",
        **{key: settings[key] for key in recorded},
    }
