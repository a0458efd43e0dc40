"""Does the time grow with the graph and the memory with the model? Load, analysis, apply and save.

`exponent` is the slope of log(seconds) over log(nodes), from the smallest to the largest graph, of all steps
together; 1 is linear. `peak_ratio` is the largest resident memory of load, analysis, apply and save over the
model's size, from models whose weights lie in external data; `oracle_peak_ratio` is that of the oracle in
float64, which runs block by block. Every size runs in a process of its own, twice: without the oracle and
with it. Resident memory counts from what a process has after the same steps on a tiny model: the libraries.
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


def run(path: str, oracle: bool) -> dict[str, Any]:
    """Load, analyse, plan and apply, and save or prove, in this process."""
    import sartor
    import sartor.oracle
    import sartor.passes.prune_channels
    from sartor.ir.channels import channel_groups

    row: dict[str, Any] = {}
    libraries = 0

    def timed(name: str, step: Any) -> Any:
        start = time.perf_counter()
        result = step()
        row[f"{name}_s"] = round(time.perf_counter() - start, 4)
        row[f"{name}_peak_bytes"] = peak_bytes() - libraries
        return result

    def steps(path: Path) -> None:
        program = timed("load", lambda: sartor.load(path))
        row["nodes"] = sum(1 for _ in program.nodes())
        analysis = timed("analysis", lambda: channel_groups(program))
        pipeline = sartor.Pipeline.parse("prune-channels{ratio=0.5,criterion=random}", instruments=())
        result = timed("apply", lambda: pipeline.run(program))
        if oracle:
            plan = result.results[0].result.plan
            verdict = timed("oracle", lambda: sartor.oracle.check(program, plan, analysis=analysis))
            row["verdict"], row["max_rel_error"] = verdict.verdict, verdict.max_rel_error
        else:
            timed("save", lambda: result.program.save(path.with_name("out.onnx")))

    with tempfile.TemporaryDirectory(prefix="scale-") as folder:
        tiny = Path(folder) / "tiny.onnx"
        residual(tiny, 2, 16, True)
        steps(tiny)
    libraries = peak_bytes()
    steps(Path(path))
    return row


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(blocks: int, channels: int, external: bool, limit_s: float) -> dict[str, Any]:
    """One size; with external data the oracle, too."""
    with tempfile.TemporaryDirectory(prefix="scale-") as folder:
        path = Path(folder) / "model.onnx"
        residual(path, blocks, channels, external)
        size = sum(p.stat().st_size for p in Path(folder).iterdir())
        row: dict[str, Any] = {"blocks": blocks, "channels": channels, "model_bytes": size}
        row |= in_process(path, [], limit_s)
        if external and "reason" not in row:
            proof = in_process(path, ["--oracle"], limit_s)
            row |= {k: v for k, v in proof.items() if k not in row}
        return row


def in_process(path: Path, options: list[str], limit_s: float) -> dict[str, Any]:
    command = [sys.executable, __file__, "--worker", str(path), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=limit_s, env=environment
        )
    except subprocess.TimeoutExpired:
        return {"reason": f"more than {limit_s:.0f} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith(RESULT)]
    if not lines:
        return {"reason": (done.stderr.strip().splitlines() or ["no output"])[-1][:300]}
    row: dict[str, Any] = json.loads(lines[-1].removeprefix(RESULT))
    return row


def worst_ratio(rows: list[dict[str, Any]], key: str) -> float | None:
    """Largest memory over the model's size, of the models with external data."""
    ratios = [r[key] / r["model_bytes"] for r in rows if r["sweep"] == "parameters" and key in r]
    return round(max(ratios), 3) if ratios else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--most-nodes", type=int, default=NODES[-1])
    parser.add_argument("--most-parameters", type=float, default=PARAMETERS[-1])
    parser.add_argument("--limit", type=float, default=900.0, help="seconds per size (900)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--oracle", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(RESULT + json.dumps(run(options.worker, options.oracle)))
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
    summary = {
        "exponent": None if slope is None else round(float(slope), 3),
        "peak_ratio": worst_ratio(rows, "save_peak_bytes"),
        "oracle_peak_ratio": worst_ratio(rows, "oracle_peak_bytes"),
        "oracle_passed": sum(r.get("verdict") == "passed" for r in rows),
        "failed": sum("reason" in r for r in rows),
    }
    print(json.dumps(summary, indent=1))
    record.write(options.json, "scale", rows, summary)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
