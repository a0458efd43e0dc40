"""Checkpoints of recovery: tensors in safetensors, everything else in JSON, nothing pickled."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from sartor.errors import UsageError
from sartor.ir.files import write_atomic

SCHEMA = "sartor.recovery/3"
_STATE = "recovery.json"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """State of an interrupted recovery.

    Attributes:
        tensors: by name: `current/…`, `best/…` and `optimizer/…`.
        state: step, epoch, position, seconds, best score and history, as JSON data.
    """

    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]


def save_checkpoint(folder: Path, identity: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Write a checkpoint so that a kill leaves either the old or the new one.

    The tensors go to a file of their own step first; the JSON file, renamed into place last, names it.
    """
    name = f"recovery-{checkpoint.state['step']}-{checkpoint.state['phase']}.safetensors"
    data = save_tensors({key: tensor.contiguous() for key, tensor in checkpoint.tensors.items()})
    write_atomic(folder / name, data)
    document = {"schema": SCHEMA, "identity": dict(identity), "tensors": name, **checkpoint.state}
    write_atomic(folder / _STATE, (json.dumps(document, indent=1, sort_keys=True) + "\n").encode())
    for old in folder.glob("recovery-*.safetensors"):
        if old.name != name:
            old.unlink(missing_ok=True)


def load_checkpoint(folder: Path, identity: Mapping[str, Any]) -> Checkpoint | None:
    """The checkpoint in `folder`, or None when there is none.

    Raises:
        UsageError: it is damaged, or belongs to another recovery.
    """
    path = folder / _STATE
    if not path.exists():
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["schema"] != SCHEMA:
            raise ValueError(f"schema '{document['schema']}', expected '{SCHEMA}'")
        found = document["identity"]
        if Path(document["tensors"]).name != document["tensors"]:
            raise ValueError("the tensor file lies outside the folder")
        tensors = load_tensors((folder / document["tensors"]).read_bytes())
    except Exception as error:
        raise UsageError(
            f"The checkpoint '{path.name}' in '{folder}' cannot be read: {error}. Remove it to start anew."
        ) from error
    different = sorted(key for key in {*found, *identity} if found.get(key) != identity.get(key))
    if different:
        raise UsageError(
            f"The checkpoint in '{folder}' belongs to another recovery: '{different[0]}' is "
            f"'{found.get(different[0])}', expected '{identity.get(different[0])}'. Use another folder."
        )
    return Checkpoint(
        tensors, {k: v for k, v in document.items() if k not in ("schema", "identity", "tensors")}
    )
