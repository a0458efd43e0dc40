"""Write report.html again from the report.json in FOLDER, and print its summary."""

from __future__ import annotations

import argparse
from pathlib import Path

from sartor.cli.output import Result

EXAMPLE = "sartor report out"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("folder", metavar="FOLDER", help="a folder written by 'sartor fit'")


def run(options: argparse.Namespace) -> Result:
    """Read, render, write."""
    from sartor.report import read_report, summary, write_html

    folder = Path(options.folder)
    report = read_report(folder)
    path = write_html(report, folder)
    return Result(report, f"{summary(report)}\nwrote {path}")
