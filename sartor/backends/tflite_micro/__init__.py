"""TensorFlow Lite Micro: the flatbuffer of `tflite` in the interpreter of microcontrollers, on this machine.

Its kernels are portable C, so their time here says little about a microcontroller. Its memory does not depend on the
machine: the arena that its allocator plans is the memory that the model needs there.
"""

from sartor.backends.folder import FolderBackend


class TfliteMicroBackend(FolderBackend):
    """Backend `tflite-micro`. An artifact's metadata has the size of its arena, `arena_bytes`."""

    name = "tflite-micro"
    package = __name__
