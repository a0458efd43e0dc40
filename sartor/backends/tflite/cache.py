"""Conversions kept by content: an equal program, options and tool versions give the file that they gave before.

An entry is one file, `SHA-256 of the rest | length of the facts | facts as JSON | flatbuffer`, written atomically.
What cannot be read, or does not match its hash, is no entry. Nothing here fails a conversion: a folder that
cannot be written means no cache.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sartor.errors import UsageError
from sartor.ir.files import write_atomic

LIMIT_BYTES = 4 << 30
_ABANDONED_S = 3600.0  # no entry takes that long to write; who began one that old was killed
_PACKAGES = ("litert-torch", "litert-converter", "ai-edge-litert", "torch")
_SOURCES = (
    "backends/tflite",
    "ir/torch_ops",
    "ir/fx.py",
    "ir/fx_build.py",
    "ir/fx_tensors.py",
    "ir/host_values.py",
)
_HEADER = struct.Struct("<32sQ")

Conversion = tuple[bytes, dict[str, Any]]


def kept(key: str, convert: Callable[[], Conversion]) -> Conversion:
    """The conversion stored under `key`, or what `convert` gives, stored."""
    place = folder()
    if place is None:
        return convert()
    path = place / f"{key}.tflite-entry"
    found = _read(path)
    if found is not None:
        with contextlib.suppress(OSError):
            os.utime(path)  # the least recently used go first
        return found
    content, facts = convert()
    text = json.dumps(facts, sort_keys=True).encode()
    rest = text + content
    with contextlib.suppress(OSError, UsageError):
        write_atomic(path, _HEADER.pack(hashlib.sha256(rest).digest(), len(text)) + rest)
        _evict(path)
    return content, facts


def key_of(program_sha256: str, options: Mapping[str, Any]) -> str:
    """SHA-256 of everything that a conversion depends on; nothing is imported for it."""
    document = {
        "program": program_sha256,
        "options": dict(options),
        "packages": {name: _version(name) for name in _PACKAGES},
        "sources": _sources_sha256(),
    }
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def folder() -> Path | None:
    """`tflite` in `$SARTOR_CACHE`, else in `sartor` in the user's cache folder; None where `$SARTOR_CACHE` is `off`."""
    chosen = os.environ.get("SARTOR_CACHE")
    if chosen == "off":
        return None
    if chosen:
        return Path(chosen) / "tflite"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sartor" / "tflite"


def _read(path: Path) -> Conversion | None:
    try:
        data = path.read_bytes()
        digest, length = _HEADER.unpack_from(data)
        rest = data[_HEADER.size :]
        if hashlib.sha256(rest).digest() != digest:
            return None
        facts: dict[str, Any] = json.loads(rest[:length])
        return rest[length:], facts
    except (OSError, ValueError, struct.error):
        return None


def _evict(newest: Path) -> None:
    """Delete the least recently used entries beyond `LIMIT_BYTES`, never the newest, and what a kill left of others."""
    for path in newest.parent.glob(".*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _ABANDONED_S:
                path.unlink()
    entries = []
    for path in newest.parent.glob("*.tflite-entry"):
        with contextlib.suppress(OSError):  # another process evicts, too
            stat = path.stat()
            entries.append((path != newest, stat.st_mtime_ns, stat.st_size, path))
    total = sum(size for _, _, size, _ in entries)
    for old, _, size, path in sorted(entries, key=lambda entry: entry[1]):
        if total <= LIMIT_BYTES:
            return
        if old:
            path.unlink(missing_ok=True)
            total -= size


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


@functools.cache
def _sources_sha256() -> str:
    """Of our own part in a conversion: an entry of an older version of it is not found."""
    root = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for name in _SOURCES:
        place = root / name
        for path in sorted(place.glob("*.py")) if place.is_dir() else [place]:
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
