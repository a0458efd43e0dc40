"""The report in its folder: written after each step, and by several processes one after the other.

A benchmark takes hours, and results from elsewhere arrive while it runs. So what is there is written whole after each
step, imported results stay when a benchmark writes, and reading, changing and writing are one step for others.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sartor.bench.document import PAGE, REPORT, finish, read_report, write_report
from sartor.errors import UsageError
from sartor.ir.files import write_atomic

PREVIOUS = "bench.previous.json"
"""The report of an earlier benchmark while another one replaces it."""
UNFINISHED = "unfinished"
"""State of a row that the benchmark has not come to the end of."""

Document = dict[str, Any]


def change(folder: Path, made: Callable[[Document], Document]) -> tuple[Document, tuple[Path, Path]]:
    """Replace the report in `folder` by what `made` makes of it, while nobody else changes it.

    Raises:
        UsageError: there is none, or it is damaged; what `made` raises.
    """
    read_report(folder)  # before anything is created
    with _alone(folder):
        document = made(read_report(folder))
        return document, write_report(document, folder)


class Store:
    """Where a benchmark writes its report.

    Args:
        folder: with the report, or to be created.

    Attributes:
        begun: something of this benchmark is there.
        paths: of the report and of its page.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.paths: tuple[Path, Path] = (folder / REPORT, folder / PAGE)
        self.begun = False

    def write(self, document: Document) -> Document:
        """Write what there is of the benchmark, with the imported results that are in the folder.

        Raises:
            UsageError: those belong to other models, or the file system refuses.
        """
        with _alone(self.folder):
            if (self.folder / REPORT).exists():
                earlier = read_report(self.folder)
                document = with_imports(document, earlier)
                if not self.begun and is_finished(earlier):
                    write_atomic(self.folder / PREVIOUS, (self.folder / REPORT).read_bytes())
            self.begun = True
            self.paths = write_report(document, self.folder)
            if is_finished(document):
                (self.folder / PREVIOUS).unlink(missing_ok=True)
        return document


def is_finished(document: Mapping[str, Any]) -> bool:
    """Whether the benchmark of this report came to its end."""
    return all(row["state"] != UNFINISHED for row in document["rows"])


def with_imports(document: Document, earlier: Document) -> Document:
    """`document` with the imported results of an earlier report, for targets of which it has none.

    Raises:
        UsageError: they are of a model that `document` does not have, or of a target that it measures.
    """
    have = {entry["target"] for entry in document["imports"]}
    imports = [entry for entry in earlier["imports"] if entry["target"] not in have]
    if not imports:
        return document
    targets = {entry["target"] for entry in imports}
    rows = [row for row in earlier["rows"] if row["state"] == "imported" and row["target"] in targets]
    known = {model["name"]: model["sha256"] for model in earlier["models"]}
    models = {model["name"]: model["sha256"] for model in document["models"]}
    measured = {row["target"] for row in document["rows"] if row["state"] != "imported"}
    for row in rows:
        if models.get(row["model"]) != known[row["model"]] or row["target"] in measured:
            why = "target" if row["target"] in measured else "model"
            what = "is measured now" if why == "target" else "is not among the models, or is another file"
            raise UsageError(
                f"'{REPORT}' in the output folder has imported results of target '{row['target']}' for model "
                f"'{row['model']}', and that {why} {what}; choose another --out, where nothing would be lost."
            )
    return finish(
        {**document, "rows": [*document["rows"], *rows], "imports": [*document["imports"], *imports]}
    )


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold a folder; it is created. The lock goes with the process, and leaves no file."""
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            raise UsageError(f"'{folder}' cannot be written: {error.strerror}.") from error
        yield
