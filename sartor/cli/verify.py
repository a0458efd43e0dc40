"""Compare the outputs of two ONNX files on seeded random inputs, before a final Softmax."""

from __future__ import annotations

import argparse

from sartor.cli import arguments
from sartor.cli.output import Result
from sartor.errors import EXIT_VERIFICATION_FAILED

EXAMPLE = "sartor verify original.onnx rewritten.onnx --tolerance 1e-4"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("a", metavar="A.onnx", help="the reference")
    parser.add_argument("b", metavar="B.onnx", help="the model to check")
    arguments.add_shape(parser)
    parser.add_argument(
        "--tolerance", type=arguments.positive_number, default=1e-4, help="largest max|a-b| / max|a| (1e-4)"
    )
    parser.add_argument(
        "--samples", type=arguments.positive, default=4, metavar="N", help="random inputs (4)"
    )
    parser.add_argument("--seed", type=arguments.seed, default=0, help="seed of the inputs (0)")


def run(options: argparse.Namespace) -> Result:
    """Run both and compare."""
    from sartor.verification import verify_files

    outcome = verify_files(
        options.a,
        options.b,
        shapes=arguments.parse_shapes(options.shape),
        tolerance=options.tolerance,
        samples=options.samples,
        seed=options.seed,
    )
    document = outcome.to_dict()
    verdict = "equal within" if outcome.passed else "DIFFERENT beyond"
    text = f"{verdict} the tolerance {outcome.tolerance:g}: {outcome.summary()}"
    return Result(document, text, 0 if outcome.passed else EXIT_VERIFICATION_FAILED)
