"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sartor.errors import UsageError

_NAME_LENGTH = 40  # characters, of at most 4 bytes, of the 255 bytes that a name may have


def file_sha256(path: Path) -> str:
    """Hexadecimal digest of a file, read in parts."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_atomic(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write `data` to `path` so that a kill leaves either the old file or the new one.

    Raises:
        UsageError: the file system refuses: no such folder, no permission, no space.
    """
    return write_all({path: data})[0]


def write_all(files: Mapping[Any, bytes | Iterable[bytes | memoryview]]) -> list[Path]:
    """Write several files, each atomically, and none of them if one cannot be written.

    Args:
        files: content by path, whole or in parts; renamed into place in this order.

    Raises:
        UsageError: the file system refuses one: no such folder, no permission, no space.
    """
    written: list[tuple[Path, Path]] = []
    try:
        for path, data in files.items():
            target = Path(path)
            try:
                written.append((_temporary(target, [data] if isinstance(data, bytes) else data), target))
            except OSError as error:
                raise UsageError(f"'{target}' cannot be written: {error.strerror or error}.") from error
        for temporary, target in written:
            os.replace(temporary, target)
    finally:
        for temporary, _ in written:
            temporary.unlink(missing_ok=True)
    return [target for _, target in written]


def _temporary(target: Path, chunks: Iterable[bytes | memoryview]) -> Path:
    """A file beside `target` with its content, on disk."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    # Part of the name only: with all of it a name that is allowed would make one that is too long.
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:_NAME_LENGTH]}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream:
            for chunk in chunks:
                stream.write(chunk)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.chmod(0o644)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary
