"""Benchmark MODELS on TARGETS: latency, throughput, accuracy, FLOPS, power, efficiency and conversion time.

Each number has its own protocol, which stands beside it. Generated models of many sizes draw what each target can
give, and the models are placed on that. With --out the report is written after each step, so that Ctrl-C leaves what
was measured until then; imported results in OUT stay. Without --out nothing is written.

A target that only its vendor's tools reach: --emit-config NAME writes models, data and instructions to OUT/NAME;
--import FILE checks the results that come back and adds them to the report in OUT.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sartor.cli import arguments
from sartor.cli.output import Result
from sartor.cli.progress import Progress
from sartor.errors import SartorError, UsageError

if TYPE_CHECKING:
    from sartor.bench.protocol import Settings
    from sartor.ir.program import Program

EXAMPLE = "sartor bench --models model.onnx --targets onnxruntime,openvino --precisions f32,int8 --out bench"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--models", action="append", default=[], metavar="MODEL,…", help="FILE.onnx or FILE.py:function, each"
    )
    parser.add_argument(
        "--targets", action="append", default=[], metavar="NAME,…", help="names from 'sartor targets'"
    )
    parser.add_argument(
        "--precisions", default="f32", metavar="f32,…", help="of f32, bf16, f16, int8 (f32); made by passes"
    )
    parser.add_argument(
        "--data", metavar="DATA", help="FILE.py:function or FILE.npz: calibration of int8, and accuracy"
    )
    arguments.add_shape(parser)
    parser.add_argument(
        "--threads", type=arguments.thread_count, default=1, metavar="N", help="threads of every target (1)"
    )
    parser.add_argument(
        "--batch-limit", type=arguments.positive, default=256, metavar="N", help="of the throughput (256)"
    )
    parser.add_argument(
        "--time-limit",
        type=arguments.positive_number,
        default=30.0,
        metavar="S",
        help="of one model's latency runs, and again of its throughput (30)",
    )
    parser.add_argument(
        "--roofline-limit",
        type=arguments.not_negative,
        default=60.0,
        metavar="S",
        help="of the generated models of one target and precision, conversion included; 0: no roofline (60)",
    )
    parser.add_argument("--seed", type=arguments.seed, default=0, help="of inputs and of the order (0)")
    parser.add_argument("--out", metavar="FOLDER", help="write bench.json and bench.html there")
    parser.add_argument(
        "--emit-config", metavar="NAME", help="configure a measurement elsewhere; measures nothing"
    )
    parser.add_argument(
        "--import",
        dest="results",
        action="append",
        default=[],
        metavar="FILE.json",
        help="results from elsewhere",
    )


def run(options: argparse.Namespace) -> Result:
    """Measure, emit or import, according to the options."""
    models, targets = _listed(options.models), _listed(options.targets)
    out = arguments.output_folder(options.out) if options.out else None
    if options.emit_config is not None:
        if targets or options.results:
            raise UsageError("--emit-config measures and imports nothing; leave --targets and --import away.")
        return _emit(options, models, out)
    from sartor.bench.vendor import read_results

    imported = [read_results(Path(path)) for path in options.results]
    if targets or models:
        if not targets or not models:
            raise UsageError("A benchmark needs --models and --targets; give both.")
        return _measure(options, models, targets, imported, out)
    if not imported or out is None:
        raise UsageError(
            "There is nothing to do: give --models and --targets, or --import with --out of an earlier report."
        )
    from sartor.bench.store import change

    return _result(*change(out, lambda document: _merged(document, imported)))


def _measure(
    options: argparse.Namespace,
    models: list[str],
    targets: list[str],
    imported: Sequence[Mapping[str, Any]],
    out: Path | None,
) -> Result:
    """Measure, and write what there is after each step."""
    from sartor.bench.run import run_bench
    from sartor.bench.store import Store

    settings = _settings(options)
    store = Store(out) if out is not None else None

    def keep(document: dict[str, Any]) -> dict[str, Any]:
        document = _merged(document, imported)
        return document if store is None else store.write(document)

    with Progress.on_stderr() as progress:
        programs = _programs(options, models, progress)
        try:
            document = run_bench(programs, targets, settings, data=options.data, say=progress, keep=keep)
        except BaseException as error:
            if store is not None and store.begun:
                error.add_note(f"What was measured until then is in '{out}'.")
            raise
    return _result(keep(document), store.paths if store is not None else ())


def _merged(document: dict[str, Any], imported: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    from sartor.bench.vendor import merge

    for results in imported:
        document = merge(document, results)
    return document


def _result(document: dict[str, Any], paths: Sequence[Path]) -> Result:
    from sartor.report.bench_table import summary

    return Result(document, "\n".join([summary(document), *(f"wrote {path}" for path in paths)]))


def _emit(options: argparse.Namespace, models: list[str], out: Path | None) -> Result:
    from sartor.bench.vendor import CONFIG_SCHEMA, emit_config

    if out is None or not models:
        raise UsageError("--emit-config needs --models and --out; give both.")
    settings = _settings(options)
    with Progress.on_stderr() as progress:
        programs = _programs(options, models, progress)
        folder = out / options.emit_config
        paths = emit_config(programs, options.emit_config, settings, folder, data=options.data)
    document = {
        "schema": CONFIG_SCHEMA,
        "target": options.emit_config,
        "files": arguments.Written(tuple(paths)).to_list(),
    }
    return Result(document, "\n".join(f"wrote {path}" for path in paths))


def _settings(options: argparse.Namespace) -> Settings:
    from sartor.bench.protocol import Settings

    return Settings(
        precisions=tuple(_listed([options.precisions])),
        threads=options.threads,
        batch_limit=options.batch_limit,
        time_limit_s=options.time_limit,
        family_limit_s=options.roofline_limit,
        seed=options.seed,
    )


def _programs(options: argparse.Namespace, models: list[str], progress: Progress) -> list[Program]:
    from sartor.ir.capture import open_model

    shapes = arguments.parse_shapes(options.shape) or None
    programs = []
    for spec in models:
        progress.stage(f"opening {spec}")
        try:
            programs.append(open_model(spec, shapes))
        except SartorError as error:
            raise type(error)(f"'{spec}': {error}") from error
    return programs


def _listed(texts: list[str]) -> list[str]:
    return [item.strip() for text in texts for item in text.split(",") if item.strip()]
