"""Five networks to four targets in three precisions: what lowers, how long it takes, how exact and how fast it is.

Every cell runs in a process of its own under a time limit: the network is captured, its weights are drawn at random
with activations of order one, precisions are made by passes (`fold-batch-norm,cast` for f16,
`fold-batch-norm,quantize` with random calibration data for int8), and the target's compiler, runtime and
measurement run in subprocesses of that. *Filled* is a cell with an artifact that agrees with its program in float64
(the QDQ program, for int8) within the tolerance of its precision, or, where the artifact cannot be run on this
machine, an artifact. Times are those of this machine alone; nothing is said about a target that did not run.

Needs timm and torchvision and the targets' packages (`pip install 'sartor[bench]'`).
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
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
import zoo_models

MODELS = ("resnet50", "mobilenet_v2", "efficientnet_b0", "vit_tiny_patch16_224", "unet")
TARGETS = ("onnxruntime", "openvino", "tflite", "tensorrt")
PRECISIONS = {"f32": "", "f16": "fold-batch-norm,cast", "int8": "fold-batch-norm,quantize"}
RESULT = "RESULT "
_CALIBRATION = 8
_MEASURE_S = 4.0


def build(name: str) -> tuple[Any, tuple[Any, ...]]:
    """A network with random weights, in inference mode, and its example inputs."""
    import torch

    if name == "unet":
        torch.manual_seed(0)
        return unet(), (torch.randn(1, 3, 128, 128),)
    if name.startswith("vit_"):
        zoo_models.import_torchvision()  # timm imports it
        import timm

        torch.manual_seed(0)
        return timm.create_model(name, pretrained=False).eval(), (torch.randn(1, 3, 224, 224),)
    return zoo_models.build(f"torchvision/{name}")


def unet() -> Any:
    """Four levels, 16 to 128 channels, transposed convolutions upwards (Ronneberger et al., 2015)."""
    import torch
    from torch import nn

    def double(inputs: int, outputs: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for width in (inputs, outputs):
            layers += [
                nn.Conv2d(width, outputs, 3, padding=1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
            ]
        return nn.Sequential(*layers)

    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            widths = (16, 32, 64, 128)
            self.down = nn.ModuleList(double(i, o) for i, o in zip((3, *widths), widths, strict=False))
            self.up = nn.ModuleList(
                nn.ConvTranspose2d(o, i, 2, stride=2) for i, o in itertools.pairwise(widths)
            )
            self.join = nn.ModuleList(double(2 * i, i) for i in widths[:-1])
            self.pool = nn.MaxPool2d(2)
            self.head = nn.Conv2d(16, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            kept = []
            for index, block in enumerate(self.down):
                x = block(x if index == 0 else self.pool(x))
                kept.append(x)
            for up, join, beside in zip(
                reversed(self.up), reversed(self.join), reversed(kept[:-1]), strict=True
            ):
                x = join(torch.cat([up(x), beside], dim=1))
            return self.head(x)

    return UNet().eval()


def program_of(name: str, precision: str) -> Any:
    """The network with random weights of order one, in a precision."""
    import sartor
    from sartor.ir.channels import channel_groups
    from sartor.passes.base import Context
    from sartor.random_weights import randomise

    module, examples = build(name)
    program = sartor.capture(module, examples)
    program = randomise(program, channel_groups(program), seed=0)
    if not PRECISIONS[precision]:
        return program
    (key, shape) = next(iter(program.input_shapes.items()))
    draw = np.random.default_rng(1).standard_normal
    calibration = [({key: draw(shape).astype(np.float32)}, None) for _ in range(_CALIBRATION)]
    pipeline = sartor.Pipeline.parse(PRECISIONS[precision])
    return pipeline.run(program, Context(data={"calibration": calibration})).program


def examine(name: str, target: str, precision: str, threads: int) -> dict[str, Any]:
    """One cell, in this process."""
    from sartor import backends, lowered
    from sartor.backends import isolation
    from sartor.backends.measure import measure
    from sartor.backends.protocol import TargetOptions

    row: dict[str, Any] = {"model": name, "target": target, "precision": precision, "filled": False}
    try:
        capabilities = backends.get(target).capabilities()
        if precision not in capabilities.precisions:
            return {**row, "reason": f"the target has no {precision} here"}
        start = time.perf_counter()
        program = program_of(name, precision)
        row["prepare_s"] = round(time.perf_counter() - start, 2)
        options = TargetOptions(threads=threads, precision=precision)
        with tempfile.TemporaryDirectory(prefix="sartor-lowering-") as folder:
            start = time.perf_counter()
            artifact = isolation.lower(target, program, Path(folder) / "artifact", options)
            row["lower_s"] = round(time.perf_counter() - start, 2)
            row["bytes"] = sum((artifact.folder / file).stat().st_size for file in artifact.files)
            row["version"] = capabilities.version
            if capabilities.not_run_here:
                return {**row, "filled": True, "executed": False, "not_run": capabilities.not_run_here}
            found = lowered.verify(program, artifact, options, samples=2)
            row |= {
                "executed": True,
                "rel_error": found.max_rel_error,
                "tolerance": found.tolerance,
                "verified": found.passed,
            }
            if not found.passed:
                return {**row, "reason": f"not equal: {found.summary()}"[:300]}
            row["filled"] = True
            result = measure(target, [artifact], options, time_limit_s=_MEASURE_S)
            row["latency_s"] = {
                key: round(getattr(result.baseline, key), 6) for key in ("median", "p10", "p90")
            }
    except Exception as error:
        row["reason"] = f"{type(error).__name__}: {str(error)[:300]}"
    return row


def spawn(name: str, target: str, precision: str, options: argparse.Namespace) -> dict[str, Any]:
    """One cell in a process of its own; a hang or a crash becomes a row with the reason."""
    command = [sys.executable, __file__, "--worker", f"{name},{target},{precision}"]
    row: dict[str, Any] = {"model": name, "target": target, "precision": precision, "filled": False}
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    try:
        done = subprocess.run(
            [*command, "--threads", str(options.threads)],
            capture_output=True,
            text=True,
            check=False,
            timeout=options.limit,
            env=environment,
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
    errors = [row["rel_error"] for row in rows if row["filled"] and row.get("rel_error") is not None]
    by_precision = {
        precision: max(
            (
                r["rel_error"]
                for r in rows
                if r["filled"] and r["precision"] == precision and "rel_error" in r
            ),
            default=None,
        )
        for precision in PRECISIONS
    }
    return {
        "cells": len(rows),
        "filled": sum(row["filled"] for row in rows),
        "reasons": dict(collections.Counter(row["reason"][:120] for row in rows if not row["filled"])),
        "worst_rel_error": max(errors, default=None),
        "worst_rel_error_by_precision": by_precision,
        "executed": sum(row.get("executed", False) for row in rows),
    }


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
