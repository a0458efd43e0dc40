"""The fuzzer of the loader: a short run finds nothing, and planted faults are found."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import fuzz_load
import fuzz_models
import numpy as np
import pytest

from sartor.errors import ModelError

BENCHMARKS = Path(fuzz_load.__file__).parent
PLANT = """
import queue, sys
sys.path.insert(0, {benchmarks!r})
import fuzz_load, sartor
from pathlib import Path

def load(path):
    {body}

sartor.load = load
tasks, results = queue.Queue(), queue.Queue()
tasks.put(0); tasks.put(None)
fuzz_load._worker({folder!r}, tasks, results)
print(results.get()[1])
"""


def test_a_short_run_is_clean() -> None:
    rows = fuzz_load.fuzz(150, seed=11, keep=None)
    outcomes = {row["outcome"] for row in rows}
    assert len(rows) == 150 and not outcomes & {"crashed", "hung", "escaped"}
    assert {"loaded", "refused: ModelError", "refused: UnsupportedOperatorError"} <= outcomes


@pytest.mark.parametrize(
    ("body", "outcome"),
    [
        ("raise KeyError('x')", "crashed"),
        ("raise SystemExit(3)", "crashed"),
        ("raise sartor.errors.InternalError('x')", "crashed"),
        ("open('../canary', 'rb').read(); raise sartor.errors.ModelError('late')", "escaped"),
        ("open('../elsewhere', 'w').write('x'); raise sartor.errors.ModelError('late')", "escaped"),
        ("open('data.bin', 'rb').read(); raise sartor.errors.ModelError('fine')", "refused: ModelError"),
    ],
)
def test_planted_faults_are_found(tmp_path: Path, body: str, outcome: str) -> None:
    for part in ("in", "out"):
        (tmp_path / part).mkdir()
    (tmp_path / "canary").write_bytes(b"secret")
    (tmp_path / "in" / "data.bin").write_bytes(b"own")
    code = PLANT.format(benchmarks=str(BENCHMARKS), folder=str(tmp_path), body=body)
    done = subprocess.run(
        [sys.executable, "-c", "import sartor.errors\n" + code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == outcome


def test_every_mutation_can_be_written() -> None:
    models = fuzz_models.seeds()
    files = [
        fuzz_models.mutate(models[number % len(models)], np.random.default_rng([seed, number]))
        for seed in range(5)
        for number in range(400)
    ]
    assert len(set(files)) > 1200


def test_every_error_is_one_line() -> None:
    assert str(ModelError("Node 'a\nb\x1b[31m' is wrong.")) == "Node 'a b [31m' is wrong."
