"""ONNX Runtime, CPU provider: the embedded default target. Artifact: one `.onnx` file, symbolic batch kept."""

from sartor.backends.folder import FolderBackend


class OnnxRuntimeBackend(FolderBackend):
    """Backend `onnxruntime`. A session's `options.shapes` are free-dimension overrides."""

    name = "onnxruntime"
    package = __name__
