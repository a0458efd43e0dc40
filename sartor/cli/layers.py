"""What quantizing each layer of MODEL to int8 costs, the dearest first.

Every layer is kept in float in turn while all others are quantized. Its share is what that gains of the squared error
of the outputs. `--keep` of `sartor lower` keeps layers by name, `--max-drop` as many of the dearest as a score needs.
"""

from __future__ import annotations

import argparse

from sartor.cli import arguments
from sartor.cli.output import Result, table

EXAMPLE = "sartor layers model.onnx --data data.py:digits --samples 64"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    arguments.add_model(parser)
    parser.add_argument(
        "--data", metavar="DATA", help="FILE.npz or FILE.py:function with the split 'calibration'"
    )
    parser.add_argument(
        "--calibration", choices=("minmax", "entropy", "percentile"), default="minmax",
        help="how ranges are found (minmax)",
    )  # fmt: skip
    parser.add_argument(
        "--samples", type=arguments.positive, default=64, metavar="N", help="most samples looked at (64)"
    )
    parser.add_argument("--seed", type=arguments.seed, default=0, help="of data splits (0)")
    arguments.add_keep(parser, "stay in float32 and are not listed")


def run(options: argparse.Namespace) -> Result:
    """Calibrate once, then quantize once per layer."""
    from sartor.passes.pipeline import Pipeline
    from sartor.quantization.supply import layer_costs

    program = arguments.open_program(options)
    context = arguments.pass_context(options, program)
    folded = Pipeline.parse("fold-batch-norm").run(program).program
    found = layer_costs(folded, context, calibration=options.calibration, samples=options.samples)
    rows = [(cost.node, cost.op_type, f"{cost.share:.1%}") for cost in found.layers]
    text = [
        f"relative error of the outputs {found.error**0.5:.3g} (root mean square) with every layer quantized, "
        f"{found.samples} samples",
        table(rows, ("layer", "operator", "share of the squared error")),
    ]
    document = {**found.to_dict(), "source": arguments.source_document(program)}
    return Result(document, "\n".join(text))
