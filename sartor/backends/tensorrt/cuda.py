"""The few calls of NVIDIA's driver library that a session needs, through ctypes: no package to install.

Written from the driver API's reference and not run: there was no GPU. Tests run it on a stand-in library.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from sartor.errors import BackendError

_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU of this machine.

    Attributes:
        index: the driver's.
        name: the driver's.
        compute_capability: such as `8.6`.
    """

    index: int
    name: str
    compute_capability: str


def library() -> Any:
    """The driver library, initialised.

    Raises:
        BackendError: it is not there, or it finds no GPU.
    """
    try:
        loaded = ctypes.CDLL(_LIBRARY)
    except OSError as error:
        raise BackendError(
            f"Engines run on an NVIDIA GPU, and its driver '{_LIBRARY}' is not on this machine: {error}. Run the "
            "artifact on a machine with such a GPU."
        ) from error
    call(loaded, "cuInit", 0)
    return loaded


def call(driver: Any, name: str, *arguments: Any) -> None:
    """Call the driver.

    Raises:
        BackendError: it reports an error.
    """
    code = getattr(driver, name)(*arguments)
    if code:
        text = ctypes.c_char_p()
        driver.cuGetErrorString(code, ctypes.byref(text))
        what = text.value.decode(errors="replace") if text.value else "no description"
        raise BackendError(
            f"The GPU's driver failed in '{name}' with code {code}: {what}. See the driver's log, and whether other "
            "programs use the GPU."
        )


def gpus() -> tuple[Gpu, ...]:
    """The GPUs of this machine.

    Raises:
        BackendError: no driver, or it fails.
    """
    driver = library()
    count = ctypes.c_int()
    call(driver, "cuDeviceGetCount", ctypes.byref(count))
    found = []
    for index in range(count.value):
        device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        name = ctypes.create_string_buffer(256)
        call(driver, "cuDeviceGet", ctypes.byref(device), index)
        call(driver, "cuDeviceGetName", name, len(name), device)
        call(driver, "cuDeviceGetAttribute", ctypes.byref(major), _MAJOR, device)
        call(driver, "cuDeviceGetAttribute", ctypes.byref(minor), _MINOR, device)
        found.append(Gpu(index, name.value.decode(errors="replace"), f"{major.value}.{minor.value}"))
    return tuple(found)


def fitting(compute_capabilities: Sequence[str]) -> Gpu:
    """The first GPU of one of these compute capabilities; any GPU when none is listed.

    Raises:
        BackendError: this machine has none.
    """
    found = gpus()
    for gpu in found:
        if not compute_capabilities or gpu.compute_capability in compute_capabilities:
            return gpu
    have = ", ".join(f"'{gpu.name}' ({gpu.compute_capability})" for gpu in found) or "none"
    wanted = ", ".join(compute_capabilities) or "any"
    raise BackendError(
        f"Engines are there for compute capability {wanted}; the GPUs of this machine are: {have}. Lower the model "
        "for one of these."
    )


def why_not(compute_capabilities: Sequence[str]) -> str:
    """Why engines of these compute capabilities do not run here; empty where they do."""
    try:
        fitting(compute_capabilities)
    except BackendError as error:
        return str(error)
    return ""


class Device:
    """One GPU with its primary context, a stream, and the memory that was asked for."""

    def __init__(self, gpu: Gpu):
        self._driver = library()
        self.gpu = gpu
        self._handle = ctypes.c_int()
        self._memory: list[ctypes.c_uint64] = []
        context, stream = ctypes.c_void_p(), ctypes.c_void_p()
        call(self._driver, "cuDeviceGet", ctypes.byref(self._handle), gpu.index)
        call(self._driver, "cuDevicePrimaryCtxRetain", ctypes.byref(context), self._handle)
        self._context = context
        with self.current():
            call(self._driver, "cuStreamCreate", ctypes.byref(stream), 0)
        self._stream = stream

    @property
    def stream(self) -> int:
        """Handle of the stream."""
        return self._stream.value or 0

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Make the context current for a block, in whatever thread it runs."""
        call(self._driver, "cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            call(self._driver, "cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def allocate(self, size: int) -> int:
        """Address of `size` bytes of the GPU's memory; they live as long as this object."""
        address = ctypes.c_uint64()
        with self.current():
            call(self._driver, "cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(size, 1)))
        self._memory.append(address)
        return address.value

    def write(self, address: int, array: np.ndarray) -> None:
        """Copy a contiguous array to the GPU."""
        source = ctypes.c_void_p(array.ctypes.data)
        size = ctypes.c_size_t(array.nbytes)
        with self.current():
            call(self._driver, "cuMemcpyHtoD_v2", ctypes.c_uint64(address), source, size)

    def read(self, address: int, array: np.ndarray) -> None:
        """Fill a contiguous array from the GPU."""
        target = ctypes.c_void_p(array.ctypes.data)
        size = ctypes.c_size_t(array.nbytes)
        with self.current():
            call(self._driver, "cuMemcpyDtoH_v2", target, ctypes.c_uint64(address), size)

    def wait(self) -> None:
        """Wait until the stream has done everything."""
        with self.current():
            call(self._driver, "cuStreamSynchronize", self._stream)

    def close(self) -> None:
        """Give memory, stream and context back."""
        with contextlib.suppress(BackendError), self.current():
            for address in self._memory:
                call(self._driver, "cuMemFree_v2", address)
            call(self._driver, "cuStreamDestroy_v2", self._stream)
        self._memory.clear()
        with contextlib.suppress(BackendError):
            call(self._driver, "cuDevicePrimaryCtxRelease_v2", self._handle)
