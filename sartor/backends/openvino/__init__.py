"""OpenVINO, CPU device. Artifact: OpenVINO IR (`.xml` and `.bin`) at the reference shapes."""

from sartor.backends.folder import FolderBackend


class OpenVinoBackend(FolderBackend):
    """Backend `openvino`. A session is compiled at `options.shapes`, without them as symbolic as the contract."""

    name = "openvino"
    package = __name__
