"""Reading `artifact.json`, which may be damaged, of another version, or made to name files elsewhere."""

from __future__ import annotations

import json
import os
from pathlib import Path, PurePosixPath
from typing import Any

from sartor.backends.protocol import ARTIFACT_SCHEMA, Artifact

MANIFEST = "artifact.json"
_KINDS = {
    "target": (str, "text"),
    "files": (list, "a list"),
    "sha256": (dict, "an object"),
    "precision": (str, "text"),
    "inputs": (list, "a list"),
    "outputs": (list, "a list"),
    "shapes": (dict, "an object"),
    "metadata": (dict, "an object"),
}


def read(folder: Path) -> Artifact:
    """The artifact that the manifest in `folder` describes; its files are not opened.

    Raises:
        ValueError: there is none, or it is damaged; the message is half a sentence that says what is wrong.
    """
    try:
        data = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"'{MANIFEST}' cannot be read ({type(error).__name__}: {error})") from error
    _require(isinstance(data, dict), "it is no JSON object")
    found = data.get("schema")
    _require(
        found == ARTIFACT_SCHEMA, f"its schema is {found!r}; this version of Sartor reads '{ARTIFACT_SCHEMA}'"
    )
    for key, (kind, called) in _KINDS.items():
        _require(isinstance(data.get(key), kind), f"'{key}' is not {called}")
    _check_files(data, folder)
    _check_tensors(data)
    return Artifact.from_dict(data, folder)


def _check_files(data: dict[str, Any], folder: Path) -> None:
    files = data["files"]
    _require(bool(files), "'files' names no file")
    for name in files:
        _require(isinstance(name, str) and _inside(folder, name), f"{name!r} is no file inside the artifact")
        _require(isinstance(data["sha256"].get(name), str), f"'sha256' has nothing for the file {name!r}")
    _require(len(set(files)) == len(files), "'files' names a file twice")


def _inside(folder: Path, name: str) -> bool:
    path = PurePosixPath(name)
    if "\0" in name or not path.parts or path.is_absolute() or ".." in path.parts:
        return False
    # A link may lead out of the folder as well.
    return Path(os.path.realpath(folder / name)).is_relative_to(os.path.realpath(folder))


def _check_tensors(data: dict[str, Any]) -> None:
    for side in ("inputs", "outputs"):
        for spec in data[side]:
            fits = (
                isinstance(spec, dict)
                and isinstance(spec.get("name"), str)
                and isinstance(spec.get("dtype"), str)
                and _is_shape(spec.get("shape"), (int, str))
            )
            _require(fits, f"'{side}' holds {json.dumps(spec)[:80]}, which is not name, dtype and shape")
        names = [spec["name"] for spec in data[side]]
        _require(len(set(names)) == len(names), f"'{side}' names one tensor twice")
    inputs = {spec["name"] for spec in data["inputs"]}
    for name, shape in data["shapes"].items():
        _require(
            name in inputs and _is_shape(shape, (int,)),
            f"'shapes' holds {json.dumps(shape)[:80]} for {name!r}, which is not the shape of an input",
        )


def _is_shape(value: object, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, list) and all(
        type(dim) in kinds and (isinstance(dim, str) or dim >= 0) for dim in value
    )


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)
