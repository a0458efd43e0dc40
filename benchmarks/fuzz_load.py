"""Hostile and broken files: a corpus and a seeded mutation fuzzer against `sartor.load`.

Every file is loaded, and where it loads, analysed and saved, by worker processes that are replaced when they
die or take too long. An audit hook in the worker reports every file that is opened for reading beside the
model's folder (external data that climbs out of it) and every file that is written outside the output folder.
One clear error is a `SartorError` of one line; anything else that is raised is a crash.
"""

from __future__ import annotations

import argparse
import collections
import json
import multiprocessing as mp
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import fuzz_models
import numpy as np
import record

LIMIT_S = 30.0


def _worker(folder: str, tasks: Any, results: Any) -> None:
    """Load files until told to stop; every file that is opened where it must not be is an escape."""
    out = Path(folder) / "out"
    watched: list[str] = []
    canary = str(Path(folder) / "canary")
    scratch = tempfile.gettempdir() + "/sartor"

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[0], str | bytes):
            path = os.path.realpath(os.fsdecode(args[0]))
            writes = isinstance(args[1], str) and set(args[1]) & set("wax+")
            inside = path.startswith(str(out)) or path.startswith(scratch)
            if path in (canary, "/etc/hostname") or (writes and not inside and not path.startswith("/dev/")):
                watched.append(path)

    import sartor
    import sartor.passes.prune_channels
    from sartor.errors import SartorError
    from sartor.ir.channels import channel_groups

    sys.addaudithook(hook)
    os.chdir(Path(folder) / "in")
    while (number := tasks.get()) is not None:
        watched.clear()
        start = time.perf_counter()
        try:
            program = sartor.load(f"{number}.onnx")
            channel_groups(program)
            program.save(out / f"{number}.onnx")
            outcome, text = "loaded", ""
        except SartorError as error:
            outcome, text = f"refused: {type(error).__name__}", str(error)
            if error.exit_code == 70 or "\n" in text:
                outcome = "crashed"
        except MemoryError:
            outcome, text = "crashed", "MemoryError"
        except BaseException as error:
            outcome, text = "crashed", f"{type(error).__name__}: {error}"
        results.put(
            (
                number,
                "escaped" if watched else outcome,
                watched[0] if watched else text,
                time.perf_counter() - start,
            )
        )


def fuzz(count: int, seed: int, keep: Path | None) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    context = mp.get_context("spawn")
    models = fuzz_models.seeds()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(os.path.realpath(name))
        for part in ("in", "out"):
            (folder / part).mkdir()
        (folder / "canary").write_bytes(bytes(4096))
        (folder / "in" / "data.bin").write_bytes(bytes(4096))
        (folder / "in" / "link").symlink_to(folder / "canary")
        for number in range(count):
            generator = np.random.default_rng([seed, number])
            data = fuzz_models.mutate(models[number % len(models)], generator)
            (folder / "in" / f"{number}.onnx").write_bytes(data)
        number = 0
        worker: Any = None
        while number < count:
            if worker is None:
                tasks, results = context.Queue(), context.Queue()
                worker = context.Process(target=_worker, args=(str(folder), tasks, results), daemon=True)
                worker.start()
                waited = LIMIT_S + 30.0  # the first file also waits for imports
            tasks.put(number)
            row = _result(worker, results, waited)
            waited = LIMIT_S
            if row is None:
                hung = worker.is_alive()
                worker.kill()
                worker.join()
                row = (
                    number,
                    "hung" if hung else "crashed",
                    f"process ended with {worker.exitcode}",
                    LIMIT_S,
                )
                worker = None
            rows.append(
                {"file": row[0], "outcome": row[1], "text": row[2][:300], "seconds": round(row[3], 3)}
            )
            if row[1] in ("crashed", "hung", "escaped"):
                print(f"{row[1]}: seed {seed}, file {number}: {row[2][:200]}", flush=True)
                if keep is not None:
                    keep.mkdir(parents=True, exist_ok=True)
                    (keep / f"{seed}-{number}.onnx").write_bytes(
                        (folder / "in" / f"{number}.onnx").read_bytes()
                    )
            number += 1
        if worker is not None:
            tasks.put(None)
            worker.join(10)
    return rows


def _result(worker: Any, results: Any, limit_s: float) -> Any:
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        try:
            return results.get(timeout=0.5)
        except Exception:  # empty: look whether the worker still lives
            if not worker.is_alive():
                return None
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--n", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the files that crashed, hung or escaped")
    options = parser.parse_args()
    rows = fuzz(options.n, options.seed, options.keep)
    histogram = collections.Counter(row["outcome"] for row in rows)
    for outcome, count in histogram.most_common():
        print(f"{count:>6}  {outcome}")
    summary = {key: histogram.get(key, 0) for key in ("crashed", "hung", "escaped")}
    summary |= {
        "n": len(rows),
        "loaded": histogram.get("loaded", 0),
        "slowest_s": max(r["seconds"] for r in rows),
    }
    print(json.dumps(summary, indent=1))
    record.write(options.json, "fuzz_load", rows, summary, seed=options.seed)
    return 1 if summary["crashed"] or summary["hung"] or summary["escaped"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
