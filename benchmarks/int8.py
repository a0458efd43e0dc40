"""int8 against float32, measured interleaved, of networks as they are and with half of their channels removed.

Weights are random (variance preserving), and so are calibration data: time does not depend on them, accuracy would.
`kept_speedup` is the speed-up by int8 of the pruned network over that of the unpruned one. A ratio is claimed only
where the processor multiplies bytes in one instruction (`claimed`); the error is against the float64 twin of the
quantized program, so that a fast wrong artifact does not count.

Speed-ups are of the fastest rounds: on a shared machine whatever else runs only adds, and adds more often to the slower
of two. The median over rounds of the ratio and its quartiles stand beside them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import record

TARGETS = ("onnxruntime", "openvino")
MODELS = ("resnet50", "mobilenet_v2")
GRID = 16  # both runtimes' kernels work on so many channels at once
CALIBRATION_SAMPLES = 16


def program_of(name: str) -> Any:
    """The network with random weights, at batch 1; `digits` is the small one of the examples."""
    import sartor
    from sartor.ir.channels import channel_groups
    from sartor.random_weights import randomise

    if name == "digits":
        import sys

        import torch

        sys.path.insert(0, str(Path(__file__).parents[1] / "examples/digits"))
        from model import DigitsNet

        program = sartor.capture(DigitsNet().eval(), (torch.zeros(1, 1, 32, 32),), name=name)
    else:
        from zoo_models import build

        module, inputs = build(f"torchvision/{name}")
        program = sartor.capture(module, inputs, name=name)
    return randomise(program, channel_groups(program), seed=0)


def written(program: Any, passes: str, seed: int = 1) -> Any:
    """The program after some passes, calibrated on random inputs."""
    from sartor.ir.batch import random_inputs
    from sartor.passes.base import Context
    from sartor.passes.pipeline import Pipeline

    data = {"calibration": [(random_inputs(program, size=CALIBRATION_SAMPLES, seed=seed), None)]}
    return Pipeline.parse(passes).run(program, Context(data=data)).program


def agreement(program: Any, artifact: Any, threads: int) -> float:
    """Relative error of an artifact against the float64 twin."""
    from sartor import backends
    from sartor.backends.protocol import TargetOptions
    from sartor.comparison import relative_error
    from sartor.ir.batch import random_inputs
    from sartor.ir.fx import run_twin

    inputs = random_inputs(program, seed=2)
    options = TargetOptions(threads=threads, precision=artifact.precision)
    session = backends.get(artifact.target).load(artifact, options)
    return relative_error(run_twin(program, inputs), session.run(inputs))


def measured(name: str, target: str, forms: dict[str, Any], seconds: float, threads: int) -> dict[str, Any]:
    """float32 and int8 of the network and of the pruned one, all interleaved."""
    from sartor import backends
    from sartor.backends.measure import measure
    from sartor.backends.protocol import TargetOptions

    with tempfile.TemporaryDirectory() as folder:
        artifacts = {}
        for form, program in forms.items():
            precision = form.rpartition("/")[2]
            options = TargetOptions(threads=threads, precision=precision)
            at = Path(folder) / form.replace("/", "-")
            artifacts[form] = backends.get(target).lower(program, at, options)
        errors = {f: agreement(forms[f], a, threads) for f, a in artifacts.items() if f.endswith("int8")}
        found = measure(
            target,
            list(artifacts.values()),
            TargetOptions(threads=threads),
            time_limit_s=seconds,
            target_half_width=0.01,
        )
    medians = {form: latency.median for form, latency in zip(artifacts, found.latencies, strict=True)}
    by_round = {form: [r.seconds(i) for r in found.rounds] for i, form in enumerate(artifacts)}
    row: dict[str, Any] = {"model": name, "target": target, "rounds": len(found.rounds)}
    row["latency_s"] = medians
    row["rel_error"] = errors
    for kind in ("unpruned", "pruned"):
        ratios = np.divide(by_round[f"{kind}/f32"], by_round[f"{kind}/int8"])
        row[f"{kind}_speedup"] = float(
            np.divide(*(np.min(by_round[f"{kind}/{precision}"]) for precision in ("f32", "int8")))
        )
        row[f"{kind}_speedup_median"] = float(np.median(ratios))
        row[f"{kind}_speedup_iqr"] = [float(q) for q in np.quantile(ratios, (0.25, 0.75))]
    row["kept_speedup"] = row["pruned_speedup"] / row["unpruned_speedup"]
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--model", action="append", help="repeatable; resnet50 and mobilenet_v2 by default")
    parser.add_argument("--target", action="append", choices=TARGETS, help="repeatable; both by default")
    parser.add_argument("--seconds", type=float, default=120.0, help="of measuring, per model and target")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()

    from sartor.backends import host

    rows = []
    for name in options.model or MODELS:
        program = program_of(name)
        plain = written(program, "fold-batch-norm")
        small = written(program, f"prune-channels{{ratio=0.5,criterion=l1,grid={GRID}}},fold-batch-norm")
        forms = {
            "unpruned/f32": plain,
            "unpruned/int8": written(plain, "quantize"),
            "pruned/f32": small,
            "pruned/int8": written(small, "quantize"),
        }
        for target in options.target or TARGETS:
            rows.append(measured(name, target, forms, options.seconds, options.threads))
            print(json.dumps(rows[-1]), flush=True)
    claimed = host.integer_dot()
    summary: dict[str, Any] = {
        "claimed": claimed,
        "worst_rel_error": max(max(r["rel_error"].values()) for r in rows),
    }
    if claimed:
        summary["least_speedup"] = min(r["unpruned_speedup"] for r in rows)
        summary["least_kept_speedup"] = min(r["kept_speedup"] for r in rows)
    record.write(options.json, "int8", rows, summary, threads=options.threads, seconds=options.seconds)
    print(json.dumps(summary, indent=1))
    return 0


if __name__ == "__main__":
    import sys

    sys.exit(main())
