"""Which strategy is worth using when: all of them, Torch-Pruning and training from scratch, at equal measured latency.

Something makes the network faster until its measured latency is within the budget, once per data set, budget and
strategy; what is left is then repaired and trained by the same recovery for the same minutes, once per seed. Networks
are kept in the folder `--work` and rows are written as they are finished, so a run goes on where the last one stopped.
Needs the trained examples (`make demo`, and `python examples/cluttered_digits/train.py`) and a machine with nothing
else to do.

Rows: data set, budget (share of the measured latency), strategy, seed, score on the test split, measured ratio, MACs
and the seconds of the search. Summary, of scores averaged over seeds: budgets at which the best of ours is at least as
good as every peer (`wins`) or not (`losses`), and the most by which `auto` is below the best of ours (`auto_gap`,
points).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import shutil
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


_SELECT_S = 6.0
"""Most seconds that a candidate of a search is measured for: less than a fit takes, so that the table ends."""


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
    "digits": Dataset(ROOT / "examples/digits", "digits", "digits_net", 0.2),
    "cluttered-digits": Dataset(
        ROOT / "examples/cluttered_digits", "cluttered_digits", "cluttered_digits_net", 0.33
    ),
}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    import logging
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        yield


@functools.cache
def opened(dataset: Dataset, seed: int) -> tuple[Any, Any]:
    """The trained original and its data."""
    import sartor
    from sartor.data import load_data

    program = sartor.load(dataset.folder / "model.onnx")
    spec = f"{dataset.folder / 'data.py'}:{dataset.data}"
    return program, load_data(spec, list(program.input_shapes), seed, program=program)


def fitted(name: str, budget: float, strategy: str, folder: Path, profile: Any) -> dict[str, Any]:
    """What a strategy leaves of a network, in `folder`, and what it took."""
    import sartor
    from sartor.budget import parse_budget
    from sartor.errors import UsageError

    dataset = DATASETS[name]
    program, data = opened(dataset, 0)
    options = sartor.FitOptions(
        "onnxruntime",
        parse_budget(f"latency={budget}x"),
        max_drop=100.0,
        recovery_s=60 * dataset.minutes if strategy == "auto" else 0.0,  # its trials are a part of that time
        strategy=strategy,
    )
    with tempfile.TemporaryDirectory() as scratch:
        bundle = Path(scratch) / "fit"
        try:
            report = sartor.fit(program, options, data, bundle, profile=profile).report
        except UsageError as error:
            return {"refused": str(error)}
        shutil.copy(bundle / "pruned.onnx", folder / "network.onnx")
    return {
        "latency_ratio": report["ratio"]["latency"],
        "met": report["status"] != "budget-missed",
        "macs": report["result"]["macs"],
        "search_s": report["seconds"]["search"],
        "decisions": [line for line in report["decisions"] if line.startswith("strategy ")],
    }


def prepared(
    name: str, budget: float, strategy: str, work: Path, profile: Any
) -> tuple[Path, dict[str, Any]]:
    """The network of a data set, budget and strategy, made once, and its facts."""
    folder = work / f"{name}-{budget}-{strategy}"
    facts = folder / "facts.json"
    if not facts.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with quiet():
            if strategy in STRATEGIES:
                found = fitted(name, budget, strategy, folder, profile)
            else:
                found = methods_peers.made(
                    DATASETS[name], *opened(DATASETS[name], 0), budget, strategy, folder
                )
        facts.write_text(json.dumps({**found, "commit": record.commit()}))
    return folder / "network.onnx", json.loads(facts.read_text())


def trained(dataset: Dataset, network: Path, strategy: str, seed: int) -> dict[str, float]:
    """Score on the test split after recovery, as the target runs it."""
    import sartor
    from sartor.data import JUDGING_SHARE, InTime
    from sartor.fit_recovery import repaired
    from sartor.recovery.distillation import distill
    from sartor.scoring import score

    program, data = opened(dataset, seed)

    begun, seconds = time.perf_counter(), 60 * dataset.minutes
    judged = InTime(data.evaluate, JUDGING_SHARE * seconds)

    def evaluate(predict: Any) -> float:
        return score(predict, judged, data.metric)[0]

    with quiet():
        start = sartor.load(network)
        start, _ = repaired(start, program, data, seconds, seed, evaluate)
        left_s = max(seconds - (time.perf_counter() - begun), 0.1 * seconds)
        found = distill(
            start,
            program,
            data.train,
            minutes=left_s / 60,
            seed=seed,
            threads=2,
            learning_rate=methods_peers.LEARNING_RATES.get(strategy),
            evaluate=evaluate,
        )
    before, after = tested(dataset, None), tested(dataset, found.program)
    return {"score": after, "score_before": before, "steps": found.steps}


@functools.lru_cache(maxsize=4)
def tested(dataset: Dataset, program: Any) -> float:
    """Score of a program, by default the original, on the test split as the target runs it."""
    import sartor
    from sartor.budget import parse_budget
    from sartor.workbench import Workbench

    original, data = opened(dataset, 0)
    with tempfile.TemporaryDirectory() as scratch:
        options = sartor.FitOptions("onnxruntime", parse_budget("latency=1x"))
        bench = Workbench(original, options, data, Path(scratch))
        with contextlib.closing(bench):
            artifact = bench.exact if program is None else bench.lower(program, Path(scratch) / "network")
            return bench.score(artifact, "test")[0]


def summary_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Wins and losses against peers, and what `auto` is short of the best."""
    means: dict[tuple[str, float], dict[str, float]] = {}
    for row in rows:
        if row.get("met") and "score" in row:
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


_KEY = ("dataset", "budget", "strategy", "seed")


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[part] for part in _KEY)


def averaged(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows of several seeds as one: means, and the standard deviation of the score as `spread`."""
    done = [row for row in rows if "score" in row]
    if not done:
        return dict(rows[0])
    means = {k: statistics.fmean(r[k] for r in done) for k in ("score", "latency_ratio", "macs", "search_s")}
    scores = [row["score"] for row in done]
    spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
    return {**done[0], **means, "spread": spread, "met": all(row["met"] for row in done)}


def table(rows: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over seeds, per data set, budget and strategy."""
    lines = [
        f"{'data':18} {'budget':>6} {'strategy':22} {'score %':>14} {'latency':>8} {'MACs':>10} {'search s':>9}"
    ]
    keys = dict.fromkeys(key_of(row)[:3] for row in rows)
    for key in sorted(keys, key=lambda k: (k[0], -k[1])):
        one = averaged([row for row in rows if key_of(row)[:3] == key])
        head = f"{key[0]:18} {key[1]:6} {key[2]:22}"
        if "score" not in one:
            lines.append(f"{head} refused: {one['refused'][:90]}")
            continue
        lines.append(
            f"{head} {100 * one['score']:7.2f} ± {100 * one['spread']:4.2f} {one['latency_ratio']:7.3f}x "
            f"{one['macs'] / 1e6:8.2f} M {one['search_s']:9.1f}" + ("" if one["met"] else "  over the budget")
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
    parser.add_argument("--work", type=Path, default=ROOT / "out/bench/methods")
    parser.add_argument("--again", action="store_true", help="also rows that are there already")
    options = parser.parse_args()

    from sartor import selection
    from sartor.cost_models.profile import DeviceProfile

    selection._SELECT_S = _SELECT_S
    profile = None if options.profile is None else DeviceProfile.load(options.profile)
    rows = json.loads(options.json.read_text())["rows"] if options.json.exists() else []
    everything = itertools.product(
        DATASETS, BUDGETS, (*STRATEGIES, *methods_peers.PEERS), range(options.seeds)
    )
    for key in everything:
        name, budget, strategy, seed = key
        known = [row for row in rows if key_of(row) == key]
        words = {name, str(budget), strategy, f"seed={seed}"}
        if not set(options.rows.split()) <= words or (known and not options.again):
            continue
        start = time.perf_counter()
        network, facts = prepared(name, budget, strategy, options.work, profile)
        row = dict(zip(_KEY, key, strict=True)) | facts
        if "refused" not in facts:
            row |= trained(DATASETS[name], network, strategy, seed)
        row["wall_s"] = round(time.perf_counter() - start, 1)
        rows = [*(other for other in rows if key_of(other) != key), row]
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
