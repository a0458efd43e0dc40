"""Writing an artifact folder atomically, checking it, and the contract of its inputs and outputs."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sartor.backends.protocol import Artifact, TargetOptions, TensorSpec
from sartor.errors import BackendError, UsageError
from sartor.ir.files import file_sha256

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from sartor.ir.program import Program

MANIFEST = "artifact.json"


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
        UsageError: `folder` exists and is something else than an artifact.
    """
    folder = Path(folder)
    with replacing(folder) as temporary:
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
        UsageError: no readable manifest in `folder`.
    """
    manifest = Path(folder) / MANIFEST
    try:
        return Artifact.from_dict(json.loads(manifest.read_text(encoding="utf-8")), Path(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"'{folder}' is not an artifact folder: '{MANIFEST}' cannot be read "
            f"({type(error).__name__}: {error}). Write one with `sartor lower`."
        ) from error


def verify_files(artifact: Artifact) -> None:
    """Check every file against its recorded hash.

    Raises:
        BackendError: a file is missing or was changed.
    """
    for name in artifact.files:
        path = artifact.folder / name
        observed = file_sha256(path) if path.is_file() else "missing"
        if observed != artifact.sha256[name]:
            raise BackendError(
                f"Artifact file '{name}' does not match its manifest: SHA-256 is {observed}, expected "
                f"{artifact.sha256[name]}. Lower the model again."
            )


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
        UsageError: missing or unknown name, wrong type or shape.
    """
    expected = {spec.name: spec for spec in specs}
    if set(inputs) != set(expected):
        raise UsageError(f"Inputs are {_quoted(inputs)}; the model takes exactly {_quoted(expected)}.")
    for name, spec in expected.items():
        array = inputs[name]
        if array.dtype.name != spec.dtype:
            raise UsageError(
                f"Input '{name}' has type {array.dtype.name}; the model takes {spec.dtype}. Cast it first."
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
    """A temporary folder beside `folder` that takes its place when the block succeeds.

    Raises:
        UsageError: `folder` exists and is something else than an artifact.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"'{folder}' is a file; an artifact is a folder. Choose another --out.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise UsageError(
            f"'{folder}' exists and holds no artifact; it would be overwritten. Choose an empty folder."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    old = temporary.with_name(temporary.name + ".old")
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp makes it private
        if folder.is_dir():
            os.rename(folder, old)
        os.rename(temporary, folder)
    except BaseException:
        if old.is_dir() and not folder.exists():
            os.rename(old, folder)
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


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
