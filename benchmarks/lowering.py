"""Five networks to four targets in three precisions: what lowers, how long it takes, how exact and how fast it is.

Every cell runs in a process of its own under a time limit: the network is captured, its weights are drawn at random
with activations of order one, precisions are made by passes (`fold-batch-norm,cast` for f16,
`fold-batch-norm,quantize` with random calibration data for int8), and the target's compiler, runtime and
measurement run in subprocesses of that, with no earlier conversion kept.

*Filled* is a cell with an artifact that agrees with its program in float64 (the QDQ program, for int8) within the
tolerance of its precision, and whose latency was measured; where the artifact cannot be run on this machine
(`executed` is false), an artifact. Every other cell has a reason. `worst_rel_error` is over all artifacts that were
compared, also over those in `unverified`, which are beyond their tolerance. Times are those of this machine alone;
nothing is said about a target that did not run.

Needs timm and torchvision and the targets' packages (`pip install 'sartor[bench]'`).
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import record
from lowered_networks import lower, random_program, written

MODELS = ("resnet50", "mobilenet_v2", "efficientnet_b0", "vit_tiny_patch16_224", "unet")
TARGETS = ("onnxruntime", "openvino", "tflite", "tensorrt")
PRECISIONS = {"f32": "", "f16": "fold-batch-norm,cast", "int8": "fold-batch-norm,quantize"}
RESULT = "RESULT "
_MEASURE_S = 4.0


def program_of(name: str, precision: str) -> Any:
    """The network with random weights of order one, in a precision."""
    return written(random_program(name), PRECISIONS[precision])


def examine(name: str, target: str, precision: str, threads: int) -> dict[str, Any]:
    """One cell, in this process."""
    from sartor import backends
    from sartor.backends.measure import measure
    from sartor.backends.protocol import TargetOptions

    row: dict[str, Any] = {"model": name, "target": target, "precision": precision, "filled": False}
    try:
        capabilities = backends.get(target).capabilities()
        if precision not in capabilities.precisions:
            return {**row, "reason": f"the target has no {precision} here"}
        row["version"] = capabilities.version
        start = time.perf_counter()
        program = program_of(name, precision)
        row["prepare_s"] = round(time.perf_counter() - start, 2)
        with tempfile.TemporaryDirectory(prefix="sartor-lowering-") as folder:
            start = time.perf_counter()
            made = lower(program, target, precision, Path(folder) / "artifact", threads)
            row |= {"lower_s": round(made.seconds, 2), "bytes": made.artifact.size_bytes}
            row["verify_s"] = round(time.perf_counter() - start - made.seconds, 2)
            if made.found is None:
                return {**row, "filled": True, "executed": False, "not_run": capabilities.not_run_here}
            row |= {
                "executed": True,
                "rel_error": made.found.max_rel_error,
                "tolerance": made.found.tolerance,
                "verified": made.found.passed,
            }
            if not made.found.passed:
                return {**row, "reason": f"not equal: {made.found.summary()}"[:300]}
            options = TargetOptions(threads=threads, precision=precision)
            result = measure(target, [made.artifact], options, time_limit_s=_MEASURE_S)
            row["latency_s"] = {
                key: round(getattr(result.baseline, key), 6) for key in ("median", "p10", "p90")
            }
            row["filled"] = True
    except Exception as error:
        row["reason"] = f"{type(error).__name__}: {str(error)[:300]}"
    return row


def spawn(name: str, target: str, precision: str, options: argparse.Namespace) -> dict[str, Any]:
    """One cell in a process of its own; a hang or a crash becomes a row with the reason."""
    command = [sys.executable, __file__, "--worker", f"{name},{target},{precision}"]
    row: dict[str, Any] = {"model": name, "target": target, "precision": precision, "filled": False}
    try:
        done = subprocess.run(
            [*command, "--threads", str(options.threads)],
            capture_output=True,
            text=True,
            check=False,
            timeout=options.limit,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        )
    except subprocess.TimeoutExpired:
        return {**row, "reason": f"more than {options.limit:.0f} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith(RESULT)]
    if not lines:
        last = (done.stderr.strip().splitlines() or [""])[-1][:200]
        return {**row, "reason": f"the process ended with {done.returncode}: {last}"}
    found: dict[str, Any] = json.loads(lines[-1].removeprefix(RESULT))
    return found


def show(row: dict[str, Any]) -> str:
    parts = [f"{row['model']:<22} {row['target']:<12} {row['precision']:<5}"]
    if "lower_s" in row:
        parts.append(f"lowered in {row['lower_s']:6.1f} s, {row['bytes'] / 1e6:7.2f} MB")
    if row.get("rel_error") is not None:
        parts.append(f"error {row['rel_error']:.1e} (tolerance {row['tolerance']:.0e})")
    if "latency_s" in row:
        t = {key: 1e3 * value for key, value in row["latency_s"].items()}
        parts.append(f"{t['median']:.2f} ms (p10 {t['p10']:.2f}, p90 {t['p90']:.2f})")
    if row.get("executed") is False:
        parts.append("not executed here")
    if "reason" in row:
        parts.append(f"EMPTY: {row['reason'][:160]}")
    return "  ".join(parts)


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    compared = [row for row in rows if "rel_error" in row]
    by_precision = {p: worst([row for row in compared if row["precision"] == p]) for p in PRECISIONS}
    cell = ("model", "target", "precision", "rel_error", "tolerance")
    return {
        "cells": len(rows),
        "filled": sum(row["filled"] for row in rows),
        "reasons": dict(collections.Counter(row["reason"][:120] for row in rows if not row["filled"])),
        "worst_rel_error": worst(compared),
        "worst_rel_error_by_precision": by_precision,
        "executed": sum(row.get("executed", False) for row in rows),
        "measured": sum("latency_s" in row for row in rows),
        "unverified": [{key: row[key] for key in cell} for row in compared if not row["verified"]],
    }


def worst(compared: list[dict[str, Any]]) -> float | None:
    """The largest error; None where nothing was compared, or one is not finite (it is in `unverified`)."""
    errors = [row["rel_error"] for row in compared]
    return None if None in errors else max(errors, default=None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--precisions", default=",".join(PRECISIONS))
    parser.add_argument("--limit", type=float, default=600.0, help="seconds per cell (600)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        row = examine(*options.worker.split(","), options.threads)
        row["peak_rss_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)
        print(RESULT + json.dumps(row))
        return 0
    rows: list[dict[str, Any]] = []
    for name in options.models.split(","):
        for target in options.targets.split(","):
            for precision in options.precisions.split(","):
                rows.append(spawn(name, target, precision, options))
                print(show(rows[-1]), flush=True)
                record.write(
                    options.json,
                    "lowering",
                    rows,
                    summarise(rows),
                    threads=options.threads,
                    limit_s=options.limit,
                )
    print()
    for key, value in summarise(rows).items():
        print(f"{key:>30}  {value}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
