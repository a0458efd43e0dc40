"""Write the canonical ONNX model of MODEL: same function, same names, symbolic batch axis."""

from __future__ import annotations

import argparse

from sartor.cli import arguments
from sartor.cli.output import Result

EXAMPLE = "sartor capture model.py:make -o canonical.onnx"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    arguments.add_model(parser)
    parser.add_argument("-o", "--output", required=True, metavar="CANON.onnx", help="file to write")
    parser.add_argument(
        "--keep-source",
        action="store_true",
        help="also write CANON.onnx.provenance.json with module paths and source lines per node",
    )


def run(options: argparse.Namespace) -> Result:
    """Capture, verify and write."""
    from sartor.ir.files import write_all
    from sartor.ir.verify import verify_program

    output = arguments.output_file(options.output)
    program = arguments.open_program(options)
    verify_program(program)
    paths = write_all(program.files(output))
    if options.keep_source:
        paths.append(arguments.write_provenance(program, output))
    written = arguments.Written(tuple(paths))
    document = {
        "schema": "sartor.capture/1",
        "source": arguments.source_document(program),
        "inputs": {name: list(shape) for name, shape in program.input_shapes.items()},
        "batch": {"symbolic": program.batch.symbolic, "reason": program.batch.reason},
        "files": written.to_list(),
    }
    batch = "symbolic" if program.batch.symbolic else f"fixed: {program.batch.reason}"
    shapes = ", ".join(f"{name} {list(shape)}" for name, shape in program.input_shapes.items())
    text = f"wrote {output} ({sum(1 for _ in program.nodes())} nodes; inputs {shapes}; batch {batch})"
    return Result(document, text)
