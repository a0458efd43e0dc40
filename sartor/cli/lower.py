"""Write the artifact of a target, for example OpenVINO IR, with its manifest."""

from __future__ import annotations

import argparse

from sartor.cli import arguments
from sartor.cli.output import Result, count

EXAMPLE = "sartor lower model.onnx --target openvino -o artifact"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    arguments.add_model(parser)
    arguments.add_target(parser)
    parser.add_argument("-o", "--output", required=True, metavar="FOLDER", help="folder to write")


def run(options: argparse.Namespace) -> Result:
    """Check legality and lower; the folder appears at once or not at all."""
    from sartor.backends import isolation

    folder = arguments.output_folder(options.output)
    program = arguments.open_program(options)
    artifact = isolation.lower(options.target, program, folder, arguments.target_options(options, program))
    sizes = {name: (folder / name).stat().st_size for name in artifact.files}
    text = "\n".join(f"wrote {folder / name} ({count(size, 'B')})" for name, size in sizes.items())
    return Result(artifact.to_dict(), text)
