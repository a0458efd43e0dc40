"""Show what MODEL consists of and what can be cut from it: channel groups with what half of each saves,
blocked axes with the reason and the source line, residual blocks; with --target, which nodes that target takes,
which it rewrites, and which stop it and why; with --html, as a page."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from sartor.cli import arguments
from sartor.cli.output import Result
from sartor.errors import UsageError

EXAMPLE = "sartor inspect model.onnx --shape input=1,3,224,224 --html model.html"
_WIDTHS = (80, 120)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    arguments.add_model(parser)
    arguments.add_keep(parser)
    parser.add_argument(
        "--layer",
        action="append",
        default=[],
        metavar="NAME",
        help="only what concerns this layer: a module, node, parameter, group or block, the beginning of a "
        "dotted name, or a glob; repeatable",
    )
    parser.add_argument(
        "--target", help="also say what this target makes of each node: a name from 'sartor targets'"
    )
    parser.add_argument(
        "--precision", choices=arguments.PRECISIONS, default="f32", help="precision on that target (f32)"
    )
    parser.add_argument("--all", action="store_true", help="leave nothing out of the text")
    parser.add_argument("--html", metavar="FILE", help="also write the report as one HTML page")


def run(options: argparse.Namespace) -> Result:
    """Analyse and describe."""
    from sartor import backends
    from sartor.backends.coverage import coverage
    from sartor.backends.protocol import TargetOptions
    from sartor.inspection import inspect_program
    from sartor.report import write_inspection
    from sartor.report.tree import describe

    output = arguments.output_file(options.html) if options.html else None
    # FILE.py:function as well as FILE.onnx: the page must not replace what it describes.
    models = [Path(options.model), Path(options.model.rpartition(":")[0])]
    if output is not None and output.is_file() and any(m.is_file() and output.samefile(m) for m in models):
        raise UsageError(f"--html '{options.html}' is the file of the model; name another one.")
    backend = backends.get(options.target) if options.target is not None else None
    program = arguments.open_program(options)
    document = inspect_program(program, keep=tuple(options.keep), layers=tuple(options.layer))
    if backend is not None:
        target = TargetOptions(precision=options.precision, shapes=program.input_shapes)
        document["target"] = coverage(program, backend, target).to_dict()
    width = shutil.get_terminal_size((100, 24)).columns
    text = describe(document, min(max(width, _WIDTHS[0]), _WIDTHS[1]), everything=options.all)
    if output is not None:
        write_inspection(document, output)
        document["files"] = arguments.Written((output,)).to_list()
        text += f"\n\nwrote {output}"
    return Result(document, text)
