"""What Sartor itself costs: import, inspect, and plan + apply + verify on ResNet-50, beside Torch-Pruning.

Every step runs in a fresh process; the rounds of the steps alternate, and the summary takes the minimum,
because everything else on the machine can only add. Torch-Pruning's step is left out, and so is its
summary key, where the package is not installed (`pip install 'sartor[bench]'`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import record

FOLDER = Path(__file__).parent

IMPORT = """
import time; start = time.perf_counter()
import sartor
spent = {"import_s": time.perf_counter() - start}
"""

INSPECT = """
import time; start = time.perf_counter()
import contextlib, io, json
from sartor.cli import main
with contextlib.redirect_stdout(io.StringIO()) as out:
    code = main(["inspect", MODEL, "--json"])
spent = {"inspect_s": time.perf_counter() - start}
assert code == 0 and json.loads(out.getvalue())["groups"]
"""

PRUNE = """
import time
import sartor
from sartor.ir.verify import verify_program
program = sartor.load(MODEL)
import sartor.passes.prune_channels  # imports are import_s's business, not the pass's
start = time.perf_counter()
result = sartor.Pipeline.parse("prune-channels{ratio=0.5,criterion=l1}", instruments=()).run(program)
middle = time.perf_counter()
verify_program(result.program)
spent = {"prune_s": time.perf_counter() - start, "plan_and_apply_s": middle - start}
assert result.modified
"""

TORCH_PRUNING = """
import sys, time; sys.path.insert(0, FOLDER)
import torch, torch_pruning
from models import resnet50
module, inputs = resnet50()
start = time.perf_counter()
pruner = torch_pruning.pruner.MagnitudePruner(
    module, inputs, importance=torch_pruning.importance.MagnitudeImportance(p=1), pruning_ratio=0.5,
    ignored_layers=[module.classifier])
middle = time.perf_counter()
pruner.step()
spent = {"torch_pruning_s": time.perf_counter() - start, "dependency_graph_s": middle - start}
module(*inputs)
"""


def run(code: str, threads: int, **names: str) -> dict[str, float]:
    head = "".join(f"{name} = {value!r}\n" for name, value in names.items())
    tail = "\nimport sys, json; sys.stderr.write('RESULT' + json.dumps(spent))"
    done = subprocess.run(
        [sys.executable, "-c", head + code + tail],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )
    if done.returncode:
        raise SystemExit(f"a step failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stderr.rpartition("RESULT")[2])


def installed(package: str) -> bool:
    try:
        return bool(metadata.version(package))
    except metadata.PackageNotFoundError:
        return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()

    steps = {"import": IMPORT, "inspect": INSPECT, "prune": PRUNE}
    if installed("torch-pruning"):
        steps["torch-pruning"] = TORCH_PRUNING
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        model = f"{folder}/resnet50.onnx"
        capture = "from sartor.ir.capture import open_model\nopen_model(SPEC).save(MODEL)\nspent = {}"
        run(capture, options.threads, SPEC=f"{FOLDER}/models.py:resnet50", MODEL=model)
        for number in range(options.rounds):
            for step, code in steps.items():
                spent = run(code, options.threads, MODEL=model, FOLDER=str(FOLDER))
                rows.append({"round": number, "step": step, **spent})
                print(f"round {number}  " + "  ".join(f"{k} {v:.3f}" for k, v in spent.items()), flush=True)
    summary = {}
    for key in ("import_s", "inspect_s", "prune_s", "torch_pruning_s"):
        values = [row[key] for row in rows if key in row]
        if values:
            summary[key] = min(values)
    record.write(
        options.json, "overhead", rows, summary, model="ResNet-50, 224 px", threads=options.threads,
        rounds=options.rounds, statistic="minimum over rounds",
    )  # fmt: skip
    print(json.dumps(summary, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
