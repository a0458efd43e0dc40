"""Which strategy is worth using when: all of them, Torch-Pruning and training from scratch, at equal measured latency.

Every row is one network on one target: the original is measured, something makes it faster until its measured latency
is within the budget, and what is left is trained for the same minutes by the same recovery. Rows are written as they
are finished, and a run goes on where the last one stopped. Needs the trained examples (`make demo`).

Rows: data set, budget (share of the measured latency), strategy, seed, score on the test split, measured ratio, MACs
and the seconds of the search. Summary, of scores averaged over seeds: budgets at which the best of ours is at least as
good as every peer (`wins`) or not (`losses`), and the most by which `auto` is below the best of ours (`auto_gap`,
points).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import methods_peers
import record

ROOT = Path(__file__).parent.parent
STRATEGIES = (
    *("uniform", "layerprune", "budgeted-greedy", "teco", "tico", "compound-shrink", "hacscale"),
    *("adaptscale", "nsga2", "auto"),
)
BUDGETS = (0.7, 0.5, 0.35)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A trained example.

    Attributes:
        folder: with `model.onnx`, `model.py` and `data.py`.
        data: function of `data.py`.
        network: function of `model.py` that gives the trained module and example inputs.
        minutes: of recovery.
    """

    folder: Path
    data: str
    network: str
    minutes: float


DATASETS = {
    "digits": Dataset(ROOT / "examples/digits", "digits", "digits_net", 0.15),
    "cluttered-digits": Dataset(ROOT / "examples/cluttered_digits", "cluttered_digits", "clutter_net", 0.5),
}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    import logging
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        yield


def fitted(name: str, budget: float, strategy: str, seed: int, profile: Any) -> dict[str, Any]:
    """One fit."""
    import sartor
    from sartor.budget import parse_budget
    from sartor.data import load_data
    from sartor.errors import UsageError

    dataset = DATASETS[name]
    program = sartor.load(dataset.folder / "model.onnx")
    data = load_data(
        f"{dataset.folder / 'data.py'}:{dataset.data}", list(program.input_shapes), seed, program=program
    )
    options = sartor.FitOptions(
        "onnxruntime",
        parse_budget(f"latency={budget}x"),
        max_drop=100.0,
        recovery_s=60 * dataset.minutes,
        strategy=strategy,
        seed=seed,
    )
    with tempfile.TemporaryDirectory() as folder:
        try:
            report = sartor.fit(program, options, data, Path(folder) / "fit", profile=profile).report
        except UsageError as error:
            return {"refused": str(error)}
    return {
        "score": report["result"]["score"],
        "score_before": report["baseline"]["score"],
        "latency_ratio": report["ratio"]["latency"],
        "met": report["status"] != "budget-missed",
        "macs": report["result"]["macs"],
        "search_s": report["seconds"]["search"],
        "decisions": [line for line in report["decisions"] if line.startswith("strategy ")],
    }


def summary_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Wins and losses against peers, and what `auto` is short of the best."""
    means: dict[tuple[str, float], dict[str, float]] = {}
    for row in rows:
        if row.get("met"):
            same = [
                other["score"]
                for other in rows
                if other.get("met") and all(other[k] == row[k] for k in ("dataset", "budget", "strategy"))
            ]
            means.setdefault((row["dataset"], row["budget"]), {})[row["strategy"]] = statistics.fmean(same)
    wins, losses, gaps = [], [], []
    for (name, budget), scores in sorted(means.items()):
        ours = [score for strategy, score in scores.items() if strategy in STRATEGIES]
        peers = [score for strategy, score in scores.items() if strategy not in STRATEGIES]
        if not ours or not peers:
            continue
        (wins if max(ours) >= max(peers) else losses).append(f"{name} {budget}x")
        if "auto" in scores:
            gaps.append(100 * (max(ours) - scores["auto"]))
    return {"wins": wins, "losses": losses, "auto_gap": max(gaps, default=None)}


def table(rows: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over seeds, per data set, budget and strategy."""
    lines = [
        f"{'data':18} {'budget':>6} {'strategy':18} {'score %':>14} {'latency':>8} {'MACs':>10} {'search s':>9}"
    ]
    keys = list(dict.fromkeys((r["dataset"], r["budget"], r["strategy"]) for r in rows))
    for key in sorted(keys, key=lambda k: (k[0], -k[1])):
        same = [r for r in rows if (r["dataset"], r["budget"], r["strategy"]) == key]
        done = [r for r in same if "score" in r]
        if not done:
            lines.append(f"{key[0]:18} {key[1]:6} {key[2]:18} refused: {same[0]['refused'][:90]}")
            continue
        scores = [100 * r["score"] for r in done]
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        mean = {k: statistics.fmean(r[k] for r in done) for k in ("latency_ratio", "macs", "search_s")}
        missed = sum(not r["met"] for r in done)
        lines.append(
            f"{key[0]:18} {key[1]:6} {key[2]:18} {statistics.fmean(scores):7.2f} ± {spread:4.2f} "
            f"{mean['latency_ratio']:7.3f}x {mean['macs'] / 1e6:8.2f} M {mean['search_s']:9.1f}"
            + (f"  {missed} of {len(done)} missed the budget" if missed else "")
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/methods.json")
    parser.add_argument(
        "--rows", default="", help="only rows with all of these words, such as 'digits 0.5 teco'"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--profile", type=Path, help="of onnxruntime on this machine, from 'sartor profile'")
    parser.add_argument("--again", action="store_true", help="also rows that are there already")
    options = parser.parse_args()

    from sartor.cost_models.profile import DeviceProfile

    profile = None if options.profile is None else DeviceProfile.load(options.profile)
    rows = json.loads(options.json.read_text())["rows"] if options.json.exists() else []
    known = {(r["dataset"], r["budget"], r["strategy"], r["seed"]) for r in rows}
    for seed in range(options.seeds):
        for name in DATASETS:
            for budget in BUDGETS:
                for strategy in (*STRATEGIES, *methods_peers.PEERS):
                    key = (name, budget, strategy, seed)
                    words = {name, str(budget), strategy, f"seed={seed}"}
                    if not set(options.rows.split()) <= words or (key in known and not options.again):
                        continue
                    start = time.perf_counter()
                    with quiet():
                        if strategy in STRATEGIES:
                            found = fitted(name, budget, strategy, seed, profile)
                        else:
                            found = methods_peers.row(DATASETS[name], budget, strategy, seed)
                    row = dict(zip(("dataset", "budget", "strategy", "seed"), key, strict=True)) | found
                    row |= {"wall_s": round(time.perf_counter() - start, 1), "commit": record.commit()}
                    rows = [r for r in rows if (r["dataset"], r["budget"], r["strategy"], r["seed"]) != key]
                    rows.append(row)
                    print(json.dumps(row), flush=True)
                    record.write(
                        str(options.json),
                        "methods",
                        rows,
                        summary_of(rows),
                        recovery_minutes={n: d.minutes for n, d in DATASETS.items()},
                        profile=options.profile is not None,
                    )
    print(table(rows))
    print(json.dumps(summary_of(rows), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
