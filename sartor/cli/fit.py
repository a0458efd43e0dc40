"""Fit MODEL to a budget: prune, prove, recover, lower, measure, repeat; write the bundle to DIR.

DIR receives model.onnx, the target's artifact, plan.json, report.json, report.html, manifest.json and, from
before recovery, pruned.onnx and masked.onnx. A missed budget (exit 3) or quality (exit 4) still writes it.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sartor.budget import Limit, parse_budget
from sartor.cli import arguments
from sartor.cli.output import Result, count, table
from sartor.cli.progress import Progress
from sartor.errors import UsageError
from sartor.strategies.registry import REGISTRY

if TYPE_CHECKING:
    from sartor.cost_models.profile import DeviceProfile
    from sartor.data import Data
    from sartor.ir.program import Program
    from sartor.study import Storage
    from sartor.tasks import Runner
    from sartor.workbench import FitOptions

EXAMPLE = (
    "sartor fit model.onnx --target onnxruntime --budget latency=0.5x --data data.py:digits "
    "--recovery minutes=1 --max-drop 1 --out out"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    arguments.add_model(parser)
    arguments.add_target(parser)
    parser.add_argument(
        "--budget",
        required=True,
        metavar="KEY=VALUE,...",
        help="upper limits: latency, macs, weight_bytes, peak_activation_bytes; 0.5x of the baseline, or "
        "absolute such as 12ms, 1.2G, 4MB",
    )
    parser.add_argument("--data", help="FILE.py:function or FILE.npz; see the README for what it returns")
    parser.add_argument(
        "--max-drop",
        type=arguments.not_negative,
        default=1.0,
        metavar="POINTS",
        help="largest loss of score in points, 1 point = 0.01 (1)",
    )
    parser.add_argument(
        "--recovery",
        metavar="none|minutes=M[,OPTION=VALUE...]",
        help="train with the original as the teacher for M minutes (minutes=5); options: teacher=always|never|wrong, "
        "temperature=T, features=W, rat=GAMMA, precision=f32|bf16, as of 'sartor recover', repair=yes|no (yes): begin "
        "with least squares of the layers behind what went, and rounds=N (1): cut and train N times, each time by what "
        "matters least then",
    )
    parser.add_argument(
        "--strategy",
        default="budgeted-greedy",
        metavar="NAME{OPTION=VALUE,...}",
        help=f"what decides: {', '.join(REGISTRY.names())} (budgeted-greedy); see docs/strategies.md",
    )
    parser.add_argument(
        "--seed", type=arguments.seed, default=0, help="of data splits, importance and training (0)"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the bundle")
    parser.add_argument(
        "--pareto",
        type=arguments.positive,
        metavar="N",
        help="N fits between the budget and the original instead of one: DIR gets a bundle per point, pareto.json and "
        "pareto.html",
    )
    parser.add_argument(
        "--profile",
        type=Path,
        metavar="FILE",
        help="a profile of the target on this machine, from 'sartor profile'; without, the network's own kernels are "
        "timed for 20 seconds",
    )
    parser.add_argument(
        "--workers",
        default="local",
        metavar="local|ray://HOST:PORT[/DEVICE]",
        help="where candidates are measured and scored: here, or on the devices of a Ray cluster that you trust; see "
        "docs/scale_out.md (local)",
    )
    parser.add_argument(
        "--study",
        metavar="FILE|URL",
        help="also keep what is measured in an Optuna study, which other runs and machines share: a file for SQLite, "
        "or the URL of a database",
    )
    parser.add_argument(
        "--keep-source",
        action="store_true",
        help="also write model.onnx.provenance.json: module paths and source lines per node",
    )
    arguments.add_keep(parser)


def parse_recovery(text: str | None, has_data: bool) -> tuple[float, dict[str, Any]]:
    """Seconds of recovery, 0 for none, and the options of `sartor.recovery.RecoveryOptions` that were given.

    Raises:
        UsageError: malformed, or data is missing and `none` was not said.
    """
    if text is None and has_data:
        return 300.0, {}
    if text is None:
        raise UsageError(
            "There is no --data, so nothing can be recovered and the quality stays unmeasured; give data, or "
            "say so with --recovery none."
        )
    if text == "none":
        return 0.0, {}
    found: dict[str, Any] = {}
    for part in text.split(","):
        key, _, value = part.partition("=")
        try:
            if key in found:
                raise ValueError("given twice")
            found[key] = _RECOVERY[key](value)
        except (KeyError, ValueError, argparse.ArgumentTypeError):
            raise UsageError(
                f"'--recovery {text}' is malformed at '{part}'; expected none, or minutes=M with M above 0, and any of "
                "teacher=always|never|wrong, temperature=T (above 0), features=W (at least 0), rat=GAMMA (above 0, at "
                "most 1), precision=f32|bf16, repair=yes|no, rounds=N (at least 1), each once, separated by commas."
            ) from None
    if "minutes" not in found:
        raise UsageError(f"'--recovery {text}' does not say how long; add minutes=M with M above 0.")
    if not has_data:
        raise UsageError(f"'--recovery {text}' needs --data to train on; give data, or say --recovery none.")
    return 60.0 * found.pop("minutes"), found


def _one_of(*known: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in known:
            raise ValueError(text)
        return text

    return read


def _share(text: str) -> float:
    value = arguments.positive_number(text)
    if value > 1:
        raise ValueError(text)
    return value


_RECOVERY: dict[str, Callable[[str], Any]] = {
    "minutes": arguments.positive_number,
    "teacher": _one_of("always", "never", "wrong"),
    "temperature": arguments.positive_number,
    "features": arguments.not_negative,
    "rat": _share,
    "precision": _one_of("f32", "bf16"),
    "repair": _one_of("yes", "no"),
    "rounds": arguments.positive,
}


def run(options: argparse.Namespace) -> Result:
    """Check everything that can be checked before the first expensive step, then fit."""
    from sartor import backends
    from sartor.study import Storage
    from sartor.tasks import open_runner

    budget = parse_budget(options.budget)
    recovery = parse_recovery(options.recovery, options.data is not None)
    backends.get(options.target)
    folder = arguments.output_folder(options.out)
    storage = None if options.study is None else Storage(options.study)
    runner = open_runner(options.workers, options.target, options.threads)
    with contextlib.closing(runner):
        return _fit(options, budget, recovery, folder, runner, storage)


def _fit(
    options: argparse.Namespace,
    budget: dict[str, Limit],
    recovery: tuple[float, dict[str, Any]],
    folder: Path,
    runner: Runner,
    storage: Storage | None,
) -> Result:
    program = arguments.open_program(options)
    data = None
    if options.data is not None:
        from sartor.data import load_data

        data = load_data(options.data, list(program.input_shapes), options.seed, program=program)

    from sartor.cost_models.profile import DeviceProfile
    from sartor.fit import FitOptions, fit
    from sartor.report import summary
    from sartor.report.bundle import refresh_manifest

    fit_options = FitOptions(
        target=options.target,
        budget=budget,
        threads=options.threads,
        precision=options.precision,
        max_drop=options.max_drop,
        recovery_s=recovery[0],
        recovery={key: value for key, value in recovery[1].items() if key not in ("repair", "rounds")},
        repair=recovery[1].get("repair", "yes") == "yes",
        rounds=recovery[1].get("rounds", 1),
        strategy=options.strategy,
        seed=options.seed,
        keep=tuple(options.keep),
    )
    profile = None if options.profile is None else DeviceProfile.load(options.profile)
    if options.pareto is not None:
        return _front(options, fit_options, program, data, folder, runner, storage, profile)
    with Progress.on_stderr() as progress:
        result = fit(
            program, fit_options, data, folder, progress, runner=runner, storage=storage, profile=profile
        )
    if options.keep_source:
        arguments.write_provenance(program, folder / "model.onnx")
        refresh_manifest(folder)
    return Result(result.report, f"{summary(result.report)}\nwrote {folder}", result.exit_code)


def _front(
    options: argparse.Namespace,
    fit_options: FitOptions,
    program: Program,
    data: Data | None,
    folder: Path,
    runner: Runner,
    storage: Storage | None,
    profile: DeviceProfile | None,
) -> Result:
    from sartor.pareto import pareto
    from sartor.report.bundle import refresh_manifest

    with Progress.on_stderr() as progress:
        front = pareto(
            program,
            fit_options,
            data,
            folder,
            options.pareto,
            progress,
            runner=runner,
            storage=storage,
            profile=profile,
        )
    rows = []
    for point in front.document["points"]:
        low, high = point["latency_ci95"]
        score = "" if point["score"] is None else f"{point['score']:.2%}"
        rows.append(
            (
                point["folder"],
                f"{point['latency_ratio']:.3f}x [{low:.3f}, {high:.3f}]",
                score,
                f"{count(point['macs'])}",
                point["status"] + (", dominated" if point["dominated"] else ""),
            )
        )
        if options.keep_source:
            arguments.write_provenance(program, folder / point["folder"] / "model.onnx")
            refresh_manifest(folder / point["folder"])
    text = table(rows, ("point", "latency", "score", "MACs", "status"))
    return Result(front.document, f"{text}\nwrote {folder}", front.exit_code)
