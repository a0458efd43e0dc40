"""Writing an artifact folder atomically, checking it, and the contract of its inputs and outputs."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sartor.backends import manifest
from sartor.backends.manifest import MANIFEST
from sartor.backends.protocol import Artifact, TargetOptions, TensorSpec
from sartor.errors import BackendError, UsageError
from sartor.ir.files import file_sha256

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from sartor.ir.program import Program

__all__ = [
    "MANIFEST",
    "check_inputs",
    "concrete_shapes",
    "mismatch",
    "open_artifact",
    "replacing",
    "verify_files",
    "write_artifact",
]

_MOST_EXCHANGES = 100
_TAKEN = (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST)
"""Another process has moved the old folder away, or its own into place."""
_NAME_LENGTH = 40
"""Of the name of a temporary folder: with the whole name of the final one it could be longer than 255 bytes."""


def write_artifact(
    program: Program,
    folder: Path,
    options: TargetOptions,
    *,
    target: str,
    write: Callable[[Path], tuple[tuple[str, ...], Mapping[str, Any]]],
) -> Artifact:
    """Create an artifact folder: all of it, or nothing.

    Args:
        program: the legalized program, for the contract.
        folder: created, or replaced when it holds an earlier artifact.
        options: for the precision and for shapes that override the program's reference shapes.
        target: backend name.
        write: writes files into the folder it is given; returns their names, main file first, and
            metadata.

    Raises:
        UsageError: `folder` exists and is something else than an artifact, or cannot be written.
    """
    folder = Path(folder)
    with replacing(folder) as temporary:
        temporary.mkdir()
        files, metadata = write(temporary)
        artifact = Artifact(
            target=target,
            folder=folder,
            files=files,
            sha256={name: file_sha256(temporary / name) for name in files},
            precision=options.precision,
            inputs=tuple(_spec(value) for value in program.graph.inputs),
            outputs=tuple(_spec(value) for value in program.outputs),
            shapes={**program.input_shapes, **options.shapes},
            metadata=metadata,
        )
        text = json.dumps(artifact.to_dict(), indent=1, sort_keys=True) + "\n"
        (temporary / MANIFEST).write_text(text, encoding="utf-8")
    return artifact


def open_artifact(folder: Path) -> Artifact:
    """Read back an artifact that `lower` wrote.

    Raises:
        UsageError: no manifest in `folder`, or a damaged one, or one of another version.
    """
    try:
        return manifest.read(Path(folder))
    except ValueError as error:
        raise UsageError(
            f"'{folder}' is not an artifact folder: {error}. Write one with `sartor lower`."
        ) from error


def verify_files(artifact: Artifact) -> None:
    """Check every file against its recorded hash.

    Raises:
        BackendError: a file is missing or was changed.
    """
    found = mismatch(artifact)
    if found:
        raise BackendError(f"{found} Lower the model again.")


def mismatch(artifact: Artifact) -> str:
    """A sentence about the first file that does not match its recorded hash; empty when all of them do."""
    for name in artifact.files:
        path = artifact.folder / name
        observed = file_sha256(path) if path.is_file() else "missing"
        if observed != artifact.sha256[name]:
            return (
                f"Artifact file '{name}' does not match its manifest: SHA-256 is {observed}, expected "
                f"{artifact.sha256[name]}."
            )
    return ""


def concrete_shapes(inputs: Iterable[TensorSpec], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Sizes of symbolic dimensions at these input shapes.

    Raises:
        UsageError: a shape names no input, has another rank, contradicts a fixed dimension, or two
            inputs give one symbol two sizes.
    """
    specs = {spec.name: spec for spec in inputs}
    sizes: dict[str, int] = {}
    for name, shape in shapes.items():
        if name not in specs:
            raise UsageError(
                f"A shape is given for input '{name}', which does not exist; inputs are {_quoted(specs)}."
            )
        expected = specs[name].shape
        agrees = len(shape) == len(expected)
        for size, dim in zip(shape, expected, strict=False):
            if isinstance(dim, int):
                agrees = agrees and size == dim
            elif dim:
                agrees = agrees and sizes.setdefault(dim, size) == size
        if not agrees:
            raise UsageError(
                f"Input '{name}' cannot have shape {list(shape)}; the model takes {_shape_text(expected)}. "
                "Equal symbols need equal sizes. Correct --shape or capture the model at that shape."
            )
    return sizes


def check_inputs(
    specs: Iterable[TensorSpec], fixed: Mapping[str, int], inputs: Mapping[str, np.ndarray]
) -> None:
    """Check the arguments of `Session.run`.

    Args:
        specs: the input contract.
        fixed: sizes of symbols that the session was specialised for.
        inputs: arrays by name.

    Raises:
        UsageError: missing or unknown name, wrong type, byte order or shape.
    """
    expected = {spec.name: spec for spec in specs}
    if set(inputs) != set(expected):
        raise UsageError(f"Inputs are {_quoted(inputs)}; the model takes exactly {_quoted(expected)}.")
    for name, spec in expected.items():
        array = inputs[name]
        # The name leaves the byte order out, and runtimes read memory as it is.
        if array.dtype.name != spec.dtype or not array.dtype.isnative:
            order = "" if array.dtype.isnative else " in foreign byte order"
            raise UsageError(
                f"Input '{name}' has type {array.dtype.name}{order}; the model takes {spec.dtype}. Cast it first."
            )
        dims = [fixed.get(d, d) if isinstance(d, str) else d for d in spec.shape]
        wrong = len(dims) != array.ndim or any(
            isinstance(dim, int) and dim != size for dim, size in zip(dims, array.shape, strict=True)
        )
        if wrong:
            raise UsageError(
                f"Input '{name}' has shape {list(array.shape)}; this session takes {_shape_text(dims)}. "
                "Reshape it, or load the artifact for that shape."
            )


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A path where the block creates a folder, which takes the place of `folder` when the block succeeds.

    It lies in a hidden folder beside `folder`, which is removed in any case, with all that the block, or a
    subprocess that died, left in there. What a link points to is replaced, and not the link. Where several
    processes do this at once, each succeeds, and the last one's folder stays.

    Raises:
        UsageError: `folder` exists and is something else than an artifact, or cannot be written.
    """
    place = Path(os.path.realpath(folder))
    with _refusals_of(folder):
        _require_replaceable(place, folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        hidden = Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{place.name[:_NAME_LENGTH]}."))
    try:
        yield hidden / "new"
        with _refusals_of(folder):
            _exchange(hidden, place)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def _exchange(hidden: Path, place: Path) -> None:
    for attempt in range(_MOST_EXCHANGES):
        old = hidden / f"old{attempt}"
        try:
            if place.exists():
                os.rename(place, old)
                _require_replaceable(old, place)  # once nobody else can change what is there
            os.rename(hidden / "new", place)
        except OSError as error:
            if error.errno not in _TAKEN or attempt == _MOST_EXCHANGES - 1:
                raise
        else:
            return
        finally:
            if old.exists() and not place.exists():
                with contextlib.suppress(OSError):  # another process was faster, and its folder stays
                    os.rename(old, place)


def _require_replaceable(place: Path, called: Path) -> None:
    try:
        names = os.listdir(place)
    except FileNotFoundError:
        return
    except NotADirectoryError:
        if not place.exists():  # a folder above it is a file
            raise
        raise UsageError(f"'{called}' is a file; an artifact is a folder. Choose another --out.") from None
    if names and MANIFEST not in names:
        raise UsageError(
            f"'{called}' exists and holds no artifact; it would be overwritten. Choose an empty folder."
        )


@contextlib.contextmanager
def _refusals_of(folder: Path) -> Iterator[None]:
    """What the file system refuses is about the folder that was asked for."""
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"The folder '{folder}' cannot be written: {error.strerror or error}. Choose another one."
        ) from error


def _spec(value: ir.Value) -> TensorSpec:
    if value.shape is None or value.dtype is None:
        raise BackendError(
            f"Value '{value.name}' at the graph's boundary has no declared type or rank. Canonicalize first."
        )
    dims: list[int | str] = []
    for dim in value.shape:
        dims.append(dim if isinstance(dim, int) else (dim.value or ""))
    return TensorSpec(value.name or "", value.dtype.numpy().name, tuple(dims))


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names) or "none"


def _shape_text(dims: Iterable[int | str]) -> str:
    return "[" + ", ".join(str(dim) if dim != "" else "?" for dim in dims) + "]"
