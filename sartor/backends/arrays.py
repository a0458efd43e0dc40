"""Arrays in a file between our own processes: any names, any element type of numpy or `ml_dtypes`, no pickle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import IO

import numpy as np

from sartor.errors import UsageError


def require_arrays(inputs: Mapping[str, object]) -> None:
    """Refuse whatever numpy would have to guess an element type for.

    Raises:
        UsageError: an input is no numpy array.
    """
    for name, value in inputs.items():
        if not isinstance(value, np.ndarray):
            raise UsageError(
                f"Input '{name}' is a {type(value).__name__}; a session takes numpy arrays. Make one of it with "
                "the type of the input."
            )


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays to an `.npz` file."""
    names = np.array(list(arrays), dtype=np.str_)
    types = np.array([array.dtype.name for array in arrays.values()], dtype=np.str_)
    np.savez(path, names, types, *arrays.values())


def load_arrays(path: Path | IO[bytes]) -> dict[str, np.ndarray]:
    """The arrays that `save_arrays` wrote to a file, or its content as a stream."""
    with np.load(path, allow_pickle=False) as archive:
        names, types, *arrays = (archive[f"arr_{index}"] for index in range(len(archive.files)))
    return {
        name: _typed(array, kind)
        for name, kind, array in zip(names.tolist(), types.tolist(), arrays, strict=True)
    }


def _typed(array: np.ndarray, kind: str) -> np.ndarray:
    if array.dtype.name == kind:
        return array
    import ml_dtypes  # numpy stores its types as plain bytes

    return array.view(getattr(ml_dtypes, kind))
