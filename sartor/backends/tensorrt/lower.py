"""Lowering to TensorRT engines."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sartor.backends.artifact import write_artifact
from sartor.backends.legality import require_legal
from sartor.backends.protocol import Artifact, TargetOptions
from sartor.backends.tensorrt import builder, cuda, legality, legalize
from sartor.backends.tensorrt.settings import Settings
from sartor.errors import UsageError
from sartor.ir.files import write_all

if TYPE_CHECKING:
    from sartor.ir.program import Program

ONNX = "model.onnx"
LAYERS = "layers.json"
TIMING_CACHE = "timing.cache"


def engine_name(compute_capability: str) -> str:
    """File name of the engine of one compute capability."""
    return f"model.sm{compute_capability.replace('.', '')}.engine"


def lower(program: Program, folder: Path, options: TargetOptions, settings: Settings, name: str) -> Artifact:
    """Write one engine per compute capability, the ONNX file they were built from, and the record of its layers.

    Raises:
        UsageError: precision, shapes or folder; the vendor's package is not installed; the timing cache.
        BackendError: the program breaks a legality rule, or the parser or builder refuses.
    """
    legal = legalize.legalize(program, settings)
    require_legal(name, legality.check(legal, options, settings))
    flavour = settings.chosen()
    fixed = _at_fixed_shapes(legal, options)
    if flavour.ahead_of_time and settings.timing_cache is not None:
        raise UsageError(f"'{flavour.module}' times nothing when it builds; leave 'timing_cache' out.")
    pinned = settings.timing_cache.read() if settings.timing_cache is not None else None
    vendor = builder.Vendor(flavour)
    capabilities: tuple[str | None, ...] = settings.compute_capabilities
    if not flavour.ahead_of_time:
        capabilities = (cuda.fitting(()).compute_capability,)

    def write(temporary: Path) -> tuple[tuple[str, ...], Mapping[str, Any]]:
        beside = [path.name for path in write_all(fixed.files(temporary / ONNX)) if path.name != ONNX]
        engines, cache, fused = [], b"", {}
        for capability in capabilities:
            # Parsed anew for each: what a build leaves in the network is not documented.
            parsed = builder.Parsed(vendor, temporary / ONNX)
            engine, cache = parsed.build(capability if flavour.ahead_of_time else None, pinned)
            engines.append({"compute_capability": capability, "file": engine_name(str(capability))})
            fused.update(parsed.fused())
            (temporary / engine_name(str(capability))).write_bytes(engine)
            record = parsed.record
        text = json.dumps({**record.to_dict(), "fused": fused}, indent=1, sort_keys=True) + "\n"
        (temporary / LAYERS).write_text(text, encoding="utf-8")
        metadata: dict[str, Any] = {
            "runtime": vendor.version,
            "flavour": flavour.module,
            "engines": engines,
            "strongly_typed": True,
            "tf32": False,
            "nodes": len(record.nodes),
            "inserted_layers": len(record.inserted),
            "surgery": [hook for hook, _ in settings.hooks()],
            "executed": False,
            "not_executed_because": cuda.why_not([str(c) for c in capabilities]) or "lowering runs nothing",
        }
        files = [*(engine["file"] for engine in engines), ONNX, *beside, LAYERS]
        if cache:
            (temporary / TIMING_CACHE).write_bytes(cache)
            files.append(TIMING_CACHE)
            metadata["timing_cache"] = {
                "started_from": settings.timing_cache.sha256 if settings.timing_cache is not None else "",
                "sha256": hashlib.sha256(cache).hexdigest(),
            }
        return tuple(str(file) for file in files), metadata

    return write_artifact(fixed, folder, options, target=name, write=write)


def _at_fixed_shapes(program: Program, options: TargetOptions) -> Program:
    """The program at the shapes of the artifact: engines are built for these only."""
    from sartor.ir.batch import as_fixed, with_shapes

    copy = with_shapes(program.clone(), options.shapes)
    return as_fixed(copy, "TensorRT engines are built for one shape")
