"""The FX twin in float64: what every other target is compared with. Needs no vendor. Artifact: one `.onnx` file."""

from sartor.backends.folder import FolderBackend


class ReferenceBackend(FolderBackend):
    """Backend `reference`."""

    name = "reference"
    package = __name__
