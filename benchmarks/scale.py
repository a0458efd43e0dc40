"""Does the time grow with the graph and the memory with the model? Load, analysis, apply and save.

`exponent` is the slope of log(seconds) over log(nodes), from the smallest to the largest graph, of all steps
together; 1 is linear. `peak_ratio` is the largest resident memory over the model's size, from models whose
weights lie in external data. Every size runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import record

NODES = (100, 500, 2000, 8000, 20000)
PARAMETERS = (25e6, 100e6, 400e6, 1e9)
RESULT = "RESULT "


def residual(path: Path, blocks: int, channels: int, external: bool) -> None:
    """A chain of residual blocks of two 1×1 convolutions, written without ever holding all weights."""
    import onnx
    from onnx import TensorProto, helper

    data = path.with_suffix(".bin")
    generator = np.random.default_rng(0)
    initializers, nodes = [], []
    with open(data, "wb") as stream:

        def weight(name: str, *shape: int) -> str:
            array = generator.standard_normal(shape, dtype=np.float32) / math.sqrt(shape[1])
            tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape)
            if external:
                tensor.data_location = TensorProto.EXTERNAL
                for key, value in (
                    ("location", data.name),
                    ("offset", stream.tell()),
                    ("length", array.nbytes),
                ):
                    tensor.external_data.add(key=key, value=str(value))
                stream.write(array.tobytes())
            else:
                tensor.raw_data = array.tobytes()
            initializers.append(tensor)
            return name

        nodes.append(helper.make_node("Conv", ["x", weight("stem", channels, 3, 1, 1)], ["v0"], name="stem"))
        for i in range(blocks):
            a, b = f"block{i}.conv1", f"block{i}.conv2"
            nodes += [
                helper.make_node(
                    "Conv", [f"v{i}", weight(f"{a}.weight", channels, channels, 1, 1)], [a], name=a
                ),
                helper.make_node("Relu", [a], [f"{a}.relu"], name=f"{a}.relu"),
                helper.make_node(
                    "Conv", [f"{a}.relu", weight(f"{b}.weight", channels, channels, 1, 1)], [b], name=b
                ),
                helper.make_node("Add", [f"v{i}", b], [f"sum{i}"], name=f"sum{i}"),
                helper.make_node("Relu", [f"sum{i}"], [f"v{i + 1}"], name=f"v{i + 1}"),
            ]
        nodes.append(helper.make_node("GlobalAveragePool", [f"v{blocks}"], ["pooled"], name="pool"))
        nodes.append(helper.make_node("Flatten", ["pooled"], ["flat"], name="flat"))
        nodes.append(
            helper.make_node("Gemm", ["flat", weight("fc", 10, channels)], ["y"], transB=1, name="fc")
        )
    if not external:
        data.unlink()
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 10])],
        initializers,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)


def run(path: str) -> dict[str, Any]:
    """Load, analyse, plan and apply, save, in this process."""
    import sartor
    import sartor.passes.prune_channels
    from sartor.ir.channels import channel_groups

    row: dict[str, Any] = {}
    empty = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def timed(name: str, step: Any) -> Any:
        start = time.perf_counter()
        result = step()
        row[f"{name}_s"] = round(time.perf_counter() - start, 4)
        row[f"{name}_peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - empty
        return result

    program = timed("load", lambda: sartor.load(path))
    row["nodes"] = sum(1 for _ in program.nodes())
    timed("analysis", lambda: channel_groups(program))
    pipeline = sartor.Pipeline.parse("prune-channels{ratio=0.5,criterion=random}", instruments=())
    result = timed("apply", lambda: pipeline.run(program))
    timed("save", lambda: result.program.save(Path(path).with_name("out.onnx")))
    return row


def measure(blocks: int, channels: int, external: bool, limit_s: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="scale-") as folder:
        path = Path(folder) / "model.onnx"
        residual(path, blocks, channels, external)
        size = sum(p.stat().st_size for p in Path(folder).iterdir())
        command = [sys.executable, __file__, "--worker", str(path)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        row: dict[str, Any] = {"blocks": blocks, "channels": channels, "model_bytes": size}
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=limit_s, env=environment
            )
        except subprocess.TimeoutExpired:
            return {**row, "reason": f"more than {limit_s:.0f} s"}
        lines = [line for line in done.stdout.splitlines() if line.startswith(RESULT)]
        if not lines:
            return {**row, "reason": (done.stderr.strip().splitlines() or ["no output"])[-1][:300]}
        return {**row, **json.loads(lines[-1].removeprefix(RESULT))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--most-nodes", type=int, default=NODES[-1])
    parser.add_argument("--most-parameters", type=float, default=PARAMETERS[-1])
    parser.add_argument("--limit", type=float, default=900.0, help="seconds per size (900)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(RESULT + json.dumps(run(options.worker)))
        return 0
    rows = []
    for nodes in (n for n in NODES if n <= options.most_nodes):
        rows.append({"sweep": "nodes", **measure(max(nodes // 5, 1), 16, False, options.limit)})
        print(rows[-1], flush=True)
    for parameters in (p for p in PARAMETERS if p <= options.most_parameters):
        channels = 1024
        blocks = max(int(parameters / (2 * channels**2)), 1)
        rows.append({"sweep": "parameters", **measure(blocks, channels, True, options.limit)})
        print(rows[-1], flush=True)
    steps = ("load_s", "analysis_s", "apply_s", "save_s")
    timed = [(r["nodes"], sum(r[s] for s in steps)) for r in rows if r["sweep"] == "nodes" and "nodes" in r]
    slope = np.polyfit(*np.log(np.array(timed, float).T), 1)[0] if len(timed) > 1 else None
    ratios = [
        r["save_peak_bytes"] / r["model_bytes"] for r in rows if r["sweep"] == "parameters" and "nodes" in r
    ]
    summary = {
        "exponent": None if slope is None else round(float(slope), 3),
        "peak_ratio": round(max(ratios), 3) if ratios else None,
        "failed": sum("reason" in r for r in rows),
    }
    print(json.dumps(summary, indent=1))
    record.write(options.json, "scale", rows, summary)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
