"""Put the reports of several fits side by side, and say what of them must not be compared.

DIR is a folder written by 'sartor fit'. Latencies of other machines, targets, versions or numbers of threads are
flagged, as are scores on other data. --html writes one page with the table and a chart of score against latency.
"""

from __future__ import annotations

import argparse
import shutil

from sartor.cli import arguments
from sartor.cli.output import Result

EXAMPLE = "sartor compare out/half out/third --html comparison.html"
_WIDTHS = (80, 160)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "folders", nargs="+", metavar="DIR", help="two or more folders written by 'sartor fit'"
    )
    parser.add_argument("--html", metavar="FILE", help="also write the comparison as one HTML page")


def run(options: argparse.Namespace) -> Result:
    """Read, compare, write the page."""
    from sartor.ir.files import write_atomic
    from sartor.report.compare import compare, summary
    from sartor.report.compare_page import render

    output = arguments.output_file(options.html) if options.html else None
    document = compare(options.folders)
    width = shutil.get_terminal_size((100, 24)).columns
    text = summary(document, min(max(width, _WIDTHS[0]), _WIDTHS[1]))
    if output is not None:
        write_atomic(output, render(document).encode())
        document["files"] = arguments.Written((output,)).to_list()
        text += f"\n\nwrote {output}"
    return Result(document, text)
