"""The machine that a measurement ran on, as plain data, and the width of its vector unit."""

from __future__ import annotations

import contextlib
import contextvars
import os
import platform
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

_ASSUMED: contextvars.ContextVar[int | None] = contextvars.ContextVar("vector_floats", default=None)
_CPUINFO = Path("/proc/cpuinfo")
_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


@cache
def _cpuinfo() -> dict[str, str]:
    try:
        text = _CPUINFO.read_text(encoding="utf-8")
    except OSError:  # not Linux
        return {}
    first = text.split("\n\n", 1)[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def cpu_model() -> str:
    """Model name of the processor."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def vector_floats() -> int:
    """32-bit floats in one vector register as CPU kernels use it: 8 with AVX2 alone, else 16.

    16 is measured (AVX-512). On other architectures it is unmeasured and chosen because it is a
    multiple of every smaller block.
    """
    assumed = _ASSUMED.get()
    if assumed is not None:
        return assumed
    flags = _cpuinfo().get("flags", "").split()
    return 8 if "avx2" in flags and "avx512f" not in flags else 16


@contextlib.contextmanager
def assuming(vector_floats: int) -> Iterator[None]:
    """Another vector unit than this machine's, for documents that are the same on every machine."""
    token = _ASSUMED.set(vector_floats)
    try:
        yield
    finally:
        _ASSUMED.reset(token)


def integer_dot() -> bool:
    """Whether the processor multiplies and adds bytes in one instruction: without, int8 is hardly faster.

    VNNI or AMX on x86-64, the dot product extension on 64-bit ARM.
    """
    flags = (_cpuinfo().get("flags") or _cpuinfo().get("Features") or "").split()
    return not {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"}.isdisjoint(flags)


def bfloat16() -> bool:
    """Whether the processor computes in bfloat16: by AVX-512, AMX or AVX-NE-CONVERT, or on 64-bit ARM."""
    flags = (_cpuinfo().get("flags") or _cpuinfo().get("Features") or "").split()
    return not {"avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16"}.isdisjoint(flags)


def load_average() -> tuple[float, ...]:
    """1, 5 and 15 minute load, or empty where the system has none."""
    try:
        return tuple(round(value, 2) for value in os.getloadavg())
    except OSError:
        return ()


def conditions() -> dict[str, Any]:
    """Everything about the machine that a latency depends on and that can be read without privilege."""
    facts: dict[str, Any] = {
        "cpu": cpu_model(),
        "cores": os.cpu_count() or 0,
        "integer_dot": integer_dot(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    if hasattr(os, "sched_getaffinity"):
        facts["cores_allowed"] = len(os.sched_getaffinity(0))
    try:
        facts["governor"] = _GOVERNOR.read_text(encoding="utf-8").strip()
    except OSError:
        facts["governor"] = "not readable"
    return facts
