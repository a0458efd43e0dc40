"""The folder that a fit ships: complete or absent, with a manifest of every file.

`manifest.json` has the schema `sartor.manifest/1`: every file with its size and SHA-256, and the sections
`exits`, `gates`, `tiles` and `precision`, reserved for passes that make a bundle of several models.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from sartor.errors import UsageError

SCHEMA = "sartor.manifest/1"
MANIFEST = "manifest.json"
RESERVED = ("exits", "gates", "tiles", "precision")


class Bundle:
    """Files are written to `folder`, a hidden sibling; `commit` puts it in place of `destination`.

    Leaving the context without `commit`, or with an exception, leaves nothing behind.

    Args:
        destination: the bundle's folder. An earlier bundle there is replaced as a whole.

    Raises:
        UsageError: the destination is a file, or a folder with something else than a bundle in it.
    """

    def __init__(self, destination: str | os.PathLike[str]):
        self.destination = Path(destination)
        check_destination(self.destination)
        self.destination.parent.mkdir(parents=True, exist_ok=True)
        # A fixed name, so that what a killed run left there goes with the next run to this destination.
        self.folder = self.destination.with_name(f".{self.destination.name}.partial")
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()

    def __enter__(self) -> Bundle:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def commit(self, **sections: Any) -> Path:
        """Write the manifest and put the folder in place.

        Args:
            sections: further JSON sections of the manifest.

        Returns:
            The destination.
        """
        write_manifest(self.folder, **sections)
        for path in self.folder.rglob("*"):
            _sync(path)
        old = self.folder.with_name(self.folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        if self.destination.exists():
            os.rename(self.destination, old)
        try:
            os.rename(self.folder, self.destination)
        except BaseException:
            if old.exists():
                os.rename(old, self.destination)
            raise
        _sync(self.destination.parent)
        shutil.rmtree(old, ignore_errors=True)
        return self.destination


def check_destination(destination: Path) -> None:
    """Refuse a destination whose content is not ours to replace.

    Raises:
        UsageError: it is a file, or holds other files than a bundle.
    """
    if destination.exists() and not destination.is_dir():
        raise UsageError(f"The output folder '{destination}' is a file; name a folder.")
    if not destination.is_dir():
        return
    ours = _listed(destination / MANIFEST)
    found = (path.relative_to(destination).as_posix() for path in destination.rglob("*") if path.is_file())
    foreign = sorted(name for name in found if name not in ours)
    if foreign:
        raise UsageError(
            f"The output folder '{destination}' holds '{foreign[0]}', which is not part of a bundle that may be "
            "replaced; move it away, or name another folder."
        )


def _listed(manifest: Path) -> set[str]:
    """The files of a bundle by its manifest, the manifest among them; empty without a readable one."""
    try:
        return {MANIFEST, *(str(entry["file"]) for entry in json.loads(manifest.read_text())["files"])}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def write_manifest(folder: Path, **sections: Any) -> Path:
    """Write `manifest.json` for everything that is in `folder`."""
    from sartor.ir.files import file_sha256, write_atomic

    files = [
        {
            "file": path.relative_to(folder).as_posix(),
            "bytes": path.stat().st_size,
            "sha256": file_sha256(path),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    ]
    document: dict[str, Any] = {"schema": SCHEMA, "files": files}
    document.update({name: {} for name in RESERVED})
    document.update(sections)
    return write_atomic(folder / MANIFEST, (json.dumps(document, indent=1, sort_keys=True) + "\n").encode())


def refresh_manifest(folder: Path) -> Path:
    """List the files of a bundle anew, after one was added to it; other sections stay as they are."""
    document = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return write_manifest(folder, **{k: v for k, v in document.items() if k not in ("schema", "files")})


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
