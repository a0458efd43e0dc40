"""Documents that a module generates from the code, each in its file: `python -m MODULE FILE`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sartor.ir.files import write_atomic


def write_document(text: str, arguments: Sequence[str]) -> int:
    """Write a document to the file named by the only argument, or to standard output without one."""
    if arguments:
        write_atomic(arguments[0], text.encode())
    else:
        sys.stdout.write(text)
    return 0
