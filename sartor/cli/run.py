"""Run a pipeline of passes on MODEL, in the order written, verifying the program after each pass.

With --profile or --target, passes that replace layers by others do so only where these are predicted to be faster.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from sartor.cli import arguments, pricing
from sartor.cli.output import Result, table
from sartor.errors import UsageError

if TYPE_CHECKING:
    from sartor.passes.pipeline import PipelineResult

EXAMPLE = (
    "sartor run model.onnx --passes 'prune-channels{ratio=0.5,criterion=l1},fold-batch-norm' -o small.onnx"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    arguments.add_model(parser)
    parser.add_argument(
        "--passes", required=True, metavar="PIPELINE", help="comma-separated passes with options"
    )
    parser.add_argument("-o", "--output", required=True, metavar="OUT.onnx", help="file to write")
    parser.add_argument("--plan-out", metavar="PLAN.json", help="write the plan that 'sartor apply' replays")
    parser.add_argument(
        "--data", metavar="DATA", help="FILE.npz or FILE.py:function, for passes and criteria that need data"
    )
    parser.add_argument(
        "--seed", type=arguments.seed, default=0, help="seed of passes without one, and of data splits (0)"
    )
    pricing.add_pricing(parser)
    arguments.add_keep(parser)


def run(options: argparse.Namespace) -> Result:
    """Parse the pipeline first: a typing error, or data that are missing, must not cost a capture."""
    from sartor.ir.files import write_all
    from sartor.passes.base import Context
    from sartor.passes.pipeline import Pipeline

    pipeline = Pipeline.parse(options.passes)
    if options.data is None:
        pipeline.check(Context())
    output = arguments.output_file(options.output)
    plan_output = arguments.output_file(options.plan_out) if options.plan_out else None
    arguments.require_distinct(output, plan_output)
    extras: dict[str, Any] = {}
    if options.profile is not None or options.target is not None or options.precision is not None:
        extras["latency"] = pricing.pricer_of(options).latency
    program = arguments.open_program(options)
    context = dataclasses.replace(arguments.pass_context(options, program), extras=extras)
    result = pipeline.run(program, context)
    plan_text = _plan_text(result) if plan_output else None
    files = result.program.files(output)
    if plan_output is not None and plan_text is not None:
        files[plan_output] = [plan_text.encode()]
    paths = write_all(files)
    steps: list[dict[str, Any]] = [
        {
            "pass": str(entry.step.item),
            "modified": entry.result.modified,
            "counts": dict(entry.result.counts),
            "refusals": [{"node": r.node, "reason": r.reason} for r in entry.result.refusals],
        }
        for entry in result.results
    ]
    document = {
        "schema": "sartor.run/1",
        "source": arguments.source_document(program),
        "passes": str(pipeline),
        "steps": steps,
        "unconverged": list(result.unconverged),
        "files": arguments.Written(tuple(paths)).to_list(),
    }
    rows = [(s["pass"], "yes" if s["modified"] else "no", _counts(s["counts"])) for s in steps]
    text = [table(rows, ("pass", "modified", "changes"))]
    text += [f"{s['pass']}: left '{r['node']}': {r['reason']}" for s in steps for r in s["refusals"]]
    text += [f"wrote {path}" for path in paths]
    return Result(document, "\n".join(text))


def _plan_text(result: PipelineResult) -> str:
    """The one plan of a pipeline: a second one is for a program that exists only in between."""
    from sartor.ir.plan import Plan

    plans = [e.result.plan for e in result.results if isinstance(e.result.plan, Plan)]
    if len(plans) != 1:
        raise UsageError(
            f"--plan-out needs exactly one pass that makes a plan (prune-channels, remove-blocks, rescale …) "
            f"and this pipeline ran {len(plans)}; split the pipeline, or leave --plan-out away."
        )
    return plans[0].to_json()


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in counts.items())
