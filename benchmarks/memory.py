"""Memory that is predicted, against what runtimes really allocate.

* TensorFlow Lite Micro: the arena that its own allocator plans (head and tail), against the one predicted from the
  flatbuffer without it.
  The head, too, from the program before anything is converted, by rules of what the converter does.
* LiteRT without XNNPACK: the extent of its tensors' addresses, against the arena of a planner with its rules.
* ONNX Runtime tells of no allocation in Python. A fresh process without arena and memory pattern, whose malloc takes
  every large block from the system and gives it back at once, runs the model, and the highest resident memory during a
  run, less the resident memory before it, is what the run allocated. The system counts resident pages with an error of
  some hundred pages, so the batch is chosen for 64 MB; far below that it says nothing (`resolved` is false). It is
  compared with two predictions, both with its way of handing buffers on to later ones of the same size: from the
  program and the target's rules; and from the nodes that the runtime executed (its optimised graph, sizes from its
  profile), `executed`.
* LiteRT with XNNPACK: what anonymous memory grows by. It has packed weights in it, so it is no check, but a bound.
* MobileNetV2 at 224 x 224 in one byte per number, without its classifier: 1,404,928 bytes if depthwise convolutions are
  done in place, 1,505,280 otherwise, which an independent script computes, too (`--fixture`).

Needs timm and torchvision and the targets' packages (`pip install 'sartor[bench]'`). Linux only.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import record

MODELS = ("digits", "squeezenet1_1", "mobilenet_v2", "unet", "resnet18", "shufflenet_v2_x1_0")
BY_HAND = {"depthwise in place": 1_404_928, "nothing in place": 1_505_280}
RESULT = "RESULT "
_RESOLUTION_BYTES = 64 * 4096
_RESOLVED_BYTES = 256 * _RESOLUTION_BYTES
_RUNS = 4


# ---- what runtimes do, each in a process of its own ---------------------------------------------------
def worker(kind: str, model: str, batch: int) -> dict[str, Any]:
    """One measurement, in this process."""
    if kind == "onnxruntime":
        return _onnxruntime(model, batch)
    return {"litert": _litert, "xnnpack": _xnnpack}[kind](model)


def _field(name: str, path: str) -> int:
    return int(re.findall(rf"{name}:\s+(\d+)", Path(path).read_text())[0]) * 1024


def _settle() -> None:
    import ctypes
    import gc

    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def _onnxruntime(model: str, batch: int) -> dict[str, Any]:
    import numpy as np
    import onnxruntime

    def session(**settings: Any) -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False
        for name, value in settings.items():
            setattr(options, name, value)
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    found = session()
    rng = np.random.default_rng(0)
    feeds = {}
    for value in found.get_inputs():
        shape = [d if isinstance(d, int) else batch for d in value.shape]
        feeds[value.name] = rng.random(shape, np.float32)
    rows = []
    for _ in range(_RUNS):
        _settle()
        Path("/proc/self/clear_refs").write_text("5")
        before = _field("Rss", "/proc/self/smaps_rollup")
        result = found.run(None, feeds)
        rows.append(_field("VmHWM", "/proc/self/status") - before)
        del result
    with tempfile.TemporaryDirectory() as folder:
        optimised = str(Path(folder) / "optimised.onnx")
        profiled = session(
            enable_profiling=True, profile_file_prefix=f"{folder}/p", optimized_model_filepath=optimised
        )
        profiled.run(None, feeds)
        events = json.loads(Path(profiled.end_profiling()).read_text())
        executed = _executed(optimised, events)
    return {"bytes": min(rows[1:]), "all": rows, "executed_bytes": executed}


def _executed(optimised: str, events: list[dict[str, Any]]) -> int:
    """Peak of the nodes that were executed, inputs of the model left out as the process held them before."""
    import onnx

    from sartor.ir.memory import BufferGraph, InPlace, Step, peak_with_reuse
    from sartor.ir.memory.rules import ELEMENTWISE

    graph = onnx.load(optimised).graph
    shapes: dict[str, list[Any]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            shapes[event["name"].removesuffix("_kernel_time")] = event["args"]["output_type_shape"]
    stored = {tensor.name for tensor in graph.initializer}
    item = {"float": 4, "int64": 8, "int32": 4, "bool": 1, "int8": 1, "uint8": 1, "double": 8, "float16": 2}
    sizes = {value.name: 0 for value in graph.input}
    steps = []
    for node in graph.node:
        told = shapes[node.name]
        names = [name for name in node.output if name]
        for name, entry in zip(names, told, strict=True):
            ((dtype, shape),) = entry.items()
            count = item[dtype]
            for length in shape:
                count *= length
            sizes[name] = -(-count // 4096) * 4096  # whole pages are what is resident
        reads = [name for name in dict.fromkeys(node.input) if name in sizes]
        over = (
            reads
            if node.op_type in ELEMENTWISE
            else [n for n in node.input[3:4] if n in sizes and n not in node.input[:1]]
        )
        same = [InPlace(n, names[0]) for n in over if sizes[n] == sizes[names[0]]]
        steps.append(Step(node.name, tuple(reads), tuple(names), tuple(same)))
    inputs = tuple(v.name for v in graph.input if v.name not in stored)
    sizes = {name: size for name, size in sizes.items() if name not in stored}
    made = BufferGraph(tuple(steps), sizes, inputs, tuple(v.name for v in graph.output))
    return peak_with_reuse(made)


def _litert(model: str) -> dict[str, Any]:
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    from sartor.backends.tflite.buffers import read

    tensors = read(Path(model).read_bytes())[0].tensors
    found = Interpreter(
        model,
        num_threads=1,
        experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    )
    found.allocate_tensors()

    def place(index: int) -> tuple[int, int]:
        view = found.tensor(index)()
        start = view.__array_interface__["data"][0]
        return start, start + view.nbytes

    placed = []
    for detail in found.get_tensor_details():
        index = detail["index"]
        if index < len(tensors) and tensors[index].constant:
            continue
        try:
            placed.append(place(index))
        except ValueError:  # not allocated: its operator never needs it
            continue
    home = place(found.get_input_details()[0]["index"])[0]
    blocks: list[list[int]] = []  # of tensors side by side; some temporaries have memory of their own
    for start, end in sorted(p for p in placed if p[1] > p[0]):
        if (
            blocks and start <= blocks[-1][1] + 1024
        ):  # the allocator keeps less than that between two of its own
            blocks[-1][1] = max(blocks[-1][1], end)
        else:
            blocks.append([start, end])
    (arena,) = [block for block in blocks if block[0] <= home < block[1]]
    return {"bytes": arena[1] - arena[0], "blocks": len(blocks)}


def _xnnpack(model: str) -> dict[str, Any]:
    from ai_edge_litert.interpreter import Interpreter

    found = Interpreter(model, num_threads=1)
    _settle()
    before = _field("Anonymous", "/proc/self/smaps_rollup")
    found.allocate_tensors()
    found.invoke()
    _settle()
    return {"bytes": _field("Anonymous", "/proc/self/smaps_rollup") - before}


def measured(kind: str, model: Path, batch: int = 1) -> dict[str, Any]:
    """`worker` in a fresh process whose malloc maps every block of a page or more."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "4096", "MALLOC_TOP_PAD_": "0"}
    command = [sys.executable, __file__, "--worker", kind, str(model), str(batch)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)
    lines = [line for line in done.stdout.splitlines() if line.startswith(RESULT)]
    if done.returncode or not lines:
        return {"reason": (done.stderr or done.stdout).strip().splitlines()[-1:]}
    result: dict[str, Any] = json.loads(lines[0].removeprefix(RESULT))
    return result


# ---- predictions beside them --------------------------------------------------------------------------
def compare(name: str) -> list[dict[str, Any]]:
    """All rows of one network."""
    from lowered_networks import random_program, written

    with tempfile.TemporaryDirectory(prefix="sartor-memory-") as folder:
        program = random_program(name)
        saved = program.save(Path(folder) / "model.onnx")
        rows = [_row_of_onnxruntime(name, program, saved)]
        for precision, passes in (("f32", ""), ("int8", "fold-batch-norm,quantize")):
            try:
                rows += _rows_of_flatbuffers(name, written(program, passes), precision, Path(folder))
            except Exception as error:
                rows.append(
                    {"model": name, "runtime": "tflite-micro", "precision": precision, "reason": str(error)}
                )
        return rows


def _row_of_onnxruntime(name: str, program: Any, saved: Path) -> dict[str, Any]:
    from sartor import backends
    from sartor.ir.fusion import FusionRules
    from sartor.ir.load import load
    from sartor.ir.memory import Rules, peak, peak_with_reuse, program_buffers

    rules = Rules(fusion=FusionRules.of(backends.get("onnxruntime").capabilities().fuses), layout=True)
    batch = 1
    if program.batch.symbolic:  # enough samples for the resolution of resident memory not to matter
        batch = -(-_RESOLVED_BYTES // peak(program_buffers(program, rules).graph()).bytes)
        shapes = {
            n: (batch, *s[1:]) if n in program.batch.inputs else s for n, s in program.input_shapes.items()
        }
        program = load(saved, shapes=shapes)
    graph = program_buffers(program, rules).graph()
    held = sum(graph.sizes[i] for i in graph.inputs)
    row = {"model": name, "runtime": "onnxruntime", "precision": "f32", "batch": batch}
    row |= {"predicted": peak_with_reuse(graph) - held, "peak": peak(graph).bytes - held}
    found = measured("onnxruntime", saved, batch)
    row |= {"measured": found.get("bytes"), "executed": found.get("executed_bytes"), "all": found.get("all")}
    row["resolved"] = (found.get("bytes") or 0) > 64 * _RESOLUTION_BYTES
    return {**row, **_error(row), **({"reason": found["reason"]} if "reason" in found else {})}


def _rows_of_flatbuffers(name: str, program: Any, precision: str, folder: Path) -> list[dict[str, Any]]:
    from sartor.backends import isolation
    from sartor.backends.protocol import TargetOptions
    from sartor.backends.tflite.buffers import buffer_graph, builtin_scratch
    from sartor.backends.tflite.legality import FUSES
    from sartor.backends.tflite_micro import memory
    from sartor.ir.fusion import FusionRules
    from sartor.ir.memory import MICROCONTROLLER, best_fit_by_size, greedy_by_size, peak, plan_arena, schedule
    from sartor.ir.memory import program_buffers as buffers_of

    rules = dataclasses.replace(MICROCONTROLLER, fusion=FusionRules.of(FUSES))
    planning = greedy_by_size(buffers_of(program, rules).graph()).bytes
    options = TargetOptions(precision=precision)
    artifact = isolation.lower("tflite-micro", program, folder / precision, options)
    content, planned = artifact.main_file.read_bytes(), artifact.metadata["arena_bytes"]
    predicted = memory.arena_bytes(content)
    graph = buffer_graph(content, memory.scratch)
    best = schedule(graph)
    common = {"model": name, "precision": precision}
    rows = []
    for part in ("head", "total"):
        row = {"runtime": f"tflite-micro {part}", "measured": planned[part], "predicted": predicted[part]}
        rows.append({**common, **row, **_error(row), "resolved": True})
    rows[0] |= {
        "peak": peak(graph).bytes,
        "best_order": best.peak_bytes,
        "optimal": best.optimal,
        "best_arena": plan_arena(graph.reordered(best.order)).bytes,
    }
    row = {
        "runtime": "tflite-micro head, from the program",
        "measured": planned["head"],
        "predicted": planning,
    }
    rows.append({**common, **row, **_error(row), "resolved": True})
    own = best_fit_by_size(buffer_graph(content, builtin_scratch, inputs_held=True), 64).bytes
    found = measured("litert", artifact.main_file)
    row = {"runtime": "litert arena", "measured": found.get("bytes"), "predicted": own, **common}
    rows.append(
        {**row, **_error(row), "resolved": True, **({"reason": found["reason"]} if "reason" in found else {})}
    )
    grown = measured("xnnpack", artifact.main_file).get("bytes")
    bound = peak(graph).bytes + graph.constant_bytes()
    rows.append({**common, "runtime": "xnnpack, weights too", "measured": grown, "predicted": bound})
    return rows


def _error(row: dict[str, Any]) -> dict[str, float]:
    return {"error": row["predicted"] / row["measured"] - 1} if row.get("measured") else {}


def by_hand(fixture: str | None) -> list[dict[str, Any]]:
    """MobileNetV2 in one byte per number against numbers of other origin."""
    from lowered_networks import random_program

    from sartor.ir.memory import Rules, peak, program_buffers

    program = random_program("mobilenet_v2")
    said = ""
    if fixture is not None:
        said = subprocess.run([sys.executable, fixture], capture_output=True, text=True, check=True).stdout
    told = [float(kib) for kib in re.findall(r"per-layer inplace_dw=\w+: peak ([\d.]+) KiB", said)]
    rows = []
    for index, (name, expected) in enumerate(BY_HAND.items()):
        rules = Rules(depthwise=index == 0, inputs_held=False)
        found = peak(program_buffers(program, rules).graph()).bytes / 4
        row = {"model": "mobilenet_v2", "runtime": f"by hand, {name}", "precision": "one byte"}
        row |= {"measured": expected, "predicted": found, "resolved": True}
        row |= {"fixture_kib": told[index]} if told else {}
        rows.append({**row, **_error(row)})
    return rows


def summary_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The largest error of each runtime, over the rows that can be resolved."""
    found: dict[str, Any] = {}
    for row in rows:
        if row.get("resolved") and "error" in row:
            key = re.sub(r"\W+", "_", row["runtime"]) + "_worst"
            found[key] = max(found.get(key, 0.0), abs(row["error"]))
    for row in rows:
        if row["runtime"] == "onnxruntime" and row.get("resolved") and row.get("executed"):
            error = abs(row["executed"] / row["measured"] - 1)
            found["onnxruntime_executed_worst"] = max(found.get("onnxruntime_executed_worst", 0.0), error)
    return found


def show(rows: list[dict[str, Any]]) -> None:
    print(
        f"{'network':<15} {'runtime':<36} {'':<9} {'measured':>11} {'predicted':>11} {'error':>8}", flush=True
    )
    for row in rows:
        error = f"{row['error']:+.2%}" if "error" in row else ""
        more = {
            k: row[k] for k in ("batch", "executed", "peak", "best_order", "best_arena", "reason") if k in row
        }
        note = " ".join(
            f"{key} {value:,}" if isinstance(value, int) else f"{key} {value}" for key, value in more.items()
        )
        note += "" if row.get("resolved", True) else " (too small to be resolved)"
        figures = [f"{row[k]:>11,.0f}" if row.get(k) else f"{'':>11}" for k in ("measured", "predicted")]
        print(
            f"{row['model']:<15} {row['runtime']:<36} {row['precision']:<9} {' '.join(figures)} {error:>8} {note}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--fixture", metavar="FILE", help="a script that prints MobileNetV2's peaks in KiB")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--worker", nargs=3, metavar=("RUNTIME", "MODEL", "BATCH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        kind, model, batch = options.worker
        print(RESULT + json.dumps(worker(kind, model, int(batch))))
        return
    rows = by_hand(options.fixture)
    show(rows)
    for name in options.models:
        found = compare(name)
        show(found)
        rows += found
    summary = summary_of(rows)
    print(json.dumps(summary))
    record.write(options.json, "memory", rows, summary)


if __name__ == "__main__":
    main()
