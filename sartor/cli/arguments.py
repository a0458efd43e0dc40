"""Options that several commands share, and how their values are read."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sartor.errors import UsageError

if TYPE_CHECKING:
    from sartor.backends.protocol import TargetOptions
    from sartor.ir.program import Program

PRECISIONS = ("f32", "bf16", "f16", "int8")


def add_model(parser: argparse.ArgumentParser) -> None:
    """MODEL and the options that say how it is opened."""
    parser.add_argument(
        "model", metavar="MODEL", help="FILE.onnx, or FILE.py:function returning (module, inputs)"
    )
    add_shape(parser)


def add_shape(parser: argparse.ArgumentParser) -> None:
    """`--shape NAME=1,3,224,224`."""
    parser.add_argument(
        "--shape",
        action="append",
        default=[],
        metavar="NAME=1,3,224,224",
        help="shape of an input; repeat for several inputs",
    )


def add_target(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """`--target`, `--threads`, `--precision`."""
    parser.add_argument("--target", required=required, help="a name from 'sartor targets'")
    add_conditions(parser)


def add_conditions(parser: argparse.ArgumentParser) -> None:
    """`--threads` and `--precision`."""
    parser.add_argument(
        "--threads", type=thread_count, default=1, metavar="N", help="threads of the target (1)"
    )
    parser.add_argument("--precision", choices=PRECISIONS, default="f32", help="compute precision (f32)")


def add_keep(parser: argparse.ArgumentParser, what: str = "are not pruned") -> None:
    """`--keep GLOB`, with what it keeps them from."""
    parser.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="GLOB",
        help=f"parameters or nodes that {what}; repeatable",
    )


def positive(text: str) -> int:
    """An integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not an integer of at least 1")
    return value


def seed(text: str) -> int:
    """An integer of at least 0: random generators take no other."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"'{text}' is not an integer of at least 0")
    return value


def thread_count(text: str) -> int:
    """An integer from 1 to the machine's processors; more threads than those wait for each other for minutes."""
    value = positive(text)
    most = os.cpu_count() or value
    if value > most:
        raise argparse.ArgumentTypeError(f"'{text}' is more than the {most} processors of this machine")
    return value


def positive_number(text: str) -> float:
    """A finite number greater than 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number greater than 0")
    return value


def not_negative(text: str) -> float:
    """A finite number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of at least 0")
    return value


def parse_shapes(texts: list[str]) -> dict[str, tuple[int, ...]]:
    """`["x=1,3,224,224"]` as `{"x": (1, 3, 224, 224)}`.

    Raises:
        UsageError: malformed, or one name given twice with different shapes.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for text in texts:
        name, separator, dims = text.rpartition("=")
        if not separator or not name or not re.fullmatch(r"\d+(\s*[,x]\s*\d+)*", dims.strip()):
            raise UsageError(f"'--shape {text}' is malformed; expected NAME=1,3,224,224.")
        shape = tuple(int(dim) for dim in re.split(r"[,x]", dims))
        if 0 in shape:
            raise UsageError(f"'--shape {text}' has a dimension 0; every dimension must be at least 1.")
        if shapes.setdefault(name, shape) != shape:
            raise UsageError(f"Input '{name}' is given two shapes, {shapes[name]} and {shape}; give one.")
    return shapes


def open_program(options: argparse.Namespace) -> Program:
    """The canonical program of MODEL at the shapes of `--shape`."""
    from sartor.ir.capture import open_model

    return open_model(options.model, parse_shapes(options.shape) or None)


def target_options(options: argparse.Namespace, program: Program | None = None) -> TargetOptions:
    """`TargetOptions` of `--threads` and `--precision`, at the program's reference shapes."""
    from sartor.backends.protocol import TargetOptions

    shapes: dict[str, Any] = dict(program.input_shapes) if program is not None else {}
    return TargetOptions(threads=options.threads, precision=options.precision, shapes=shapes)


def output_file(text: str) -> Path:
    """A path that can be written: its folder exists or can be made, and it is not a folder itself.

    Raises:
        UsageError: it cannot be written; said before any work is done.
    """
    path = Path(text)
    if path.is_dir():
        raise UsageError(f"The output '{text}' is a folder; name a file.")
    _writable_parent(path)
    return path


def require_distinct(*paths: Path | None) -> None:
    """Refuse outputs that would overwrite each other.

    Raises:
        UsageError: two of them are one file.
    """
    given = [path.resolve() for path in paths if path is not None]
    for path in given:
        if given.count(path) > 1:
            raise UsageError(f"Two outputs are the same file, '{path.name}'; name two files.")


def output_folder(text: str) -> Path:
    """A folder to be created or replaced.

    Raises:
        UsageError: it is a file, or its parent cannot be written.
    """
    path = Path(text)
    if path.name in ("", ".."):  # its siblings are named after it
        path = path.resolve()
    if not path.name:
        raise UsageError("The output folder is the root of the file system; name another folder.")
    if path.exists() and not path.is_dir():
        raise UsageError(f"The output folder '{text}' is a file; name a folder.")
    _writable_parent(path)
    return path


def _writable_parent(path: Path) -> None:
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UsageError(f"The output '{path}' cannot be written: '{parent.name}' is not a writable folder.")


@dataclasses.dataclass(frozen=True)
class Written:
    """Files that a command wrote, for its document: `{name, bytes, sha256}` without folders."""

    paths: tuple[Path, ...]

    def to_list(self) -> list[dict[str, Any]]:
        """JSON form."""
        from sartor.ir.files import file_sha256

        return [
            {
                "file": path.name,
                "bytes": path.stat().st_size,
                "sha256": file_sha256(path),
            }
            for path in self.paths
        ]


def source_document(program: Program) -> dict[str, str]:
    """What the program was made from, for a command's document."""
    return dataclasses.asdict(program.source)


def write_provenance(program: Program, beside: Path) -> Path:
    """The sidecar `FILE.provenance.json`: module path, class and `file.py:line` per node."""
    import json

    from sartor.ir.files import write_atomic

    nodes = {name: dataclasses.asdict(record) for name, record in sorted(program.provenance.items())}
    document = {"schema": "sartor.provenance/1", "nodes": nodes}
    text = json.dumps(document, indent=1, sort_keys=True) + "\n"
    return write_atomic(beside.with_name(beside.name + ".provenance.json"), text.encode())


def pass_context(options: argparse.Namespace, program: Program) -> Any:
    """The `Context` of a pipeline: `--data`, `--seed` and `--keep`.

    Raises:
        UsageError: the data does not fit the program.
    """
    from sartor.passes.base import Context

    context = Context(seed=options.seed, keep=tuple(options.keep))
    if options.data is None:
        return context
    from sartor.data import load_data

    data = load_data(options.data, list(program.input_shapes), options.seed, program=program)
    splits = {"calibration": data.calibration, "evaluate": data.evaluate, "test": data.test}
    if data.train is not None:
        splits["train"] = data.train
    return dataclasses.replace(context, data=splits, loss=data.loss, metric=data.metric)


def plain(value: Any) -> Any:
    """`value` with dataclasses, arrays, tuples and mappings turned into JSON types."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return value.tolist()
    return value
