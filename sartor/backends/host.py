"""The machine that a measurement ran on, as plain data, and the width of its vector unit."""

from __future__ import annotations

import contextlib
import contextvars
import os
import platform
import time
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from sartor.backends.memory import available_bytes

_ASSUMED: contextvars.ContextVar[int | None] = contextvars.ContextVar("vector_floats", default=None)
_CPUINFO = Path("/proc/cpuinfo")
_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_STAT = Path("/proc/stat")
_EXTENSIONS = (
    *("sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx_vnni", "avx512_vnni"),
    *("avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimdhp", "asimddp", "sve", "sve2", "i8mm", "bf16"),
)
_allowed: frozenset[int] | None = None  # processors that this process was given, before it pinned itself


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


def instruction_sets() -> tuple[str, ...]:
    """Vector and matrix extensions that change how fast kernels are, of those that this processor has."""
    flags = set((_cpuinfo().get("flags") or _cpuinfo().get("Features") or "").split())
    return tuple(name for name in _EXTENSIONS if name in flags)


def caches() -> dict[str, int]:
    """Bytes of the caches of one core by level, `l1d_bytes`, `l2_bytes`…; empty where they cannot be read."""
    found: dict[str, int] = {}
    for folder in sorted(_CACHES.glob("index*")):
        try:
            level, kind, size = (
                (folder / name).read_text(encoding="utf-8").strip() for name in ("level", "type", "size")
            )
        except OSError:
            continue
        unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(size[-1:], 1)
        if kind != "Instruction" and size.rstrip("KMG").isdigit():
            found[f"l{level}d_bytes" if level == "1" else f"l{level}_bytes"] = int(size.rstrip("KMG")) * unit
    return found


def clocks() -> dict[str, Any]:
    """What can be read of the clock: governor, its limits and what it is now, in kHz."""
    found: dict[str, Any] = {}
    for key, name in (
        ("governor", "scaling_governor"),
        ("khz_min", "cpuinfo_min_freq"),
        ("khz_max", "cpuinfo_max_freq"),
        ("khz_seen", "scaling_cur_freq"),
    ):
        try:
            text = (_GOVERNOR.parent / name).read_text(encoding="utf-8").strip()
        except OSError:
            continue
        found[key] = int(text) if text.isdigit() else text
    megahertz = _cpuinfo().get("cpu MHz", "")
    if "khz_seen" not in found and megahertz.replace(".", "", 1).isdigit():
        found["khz_seen"] = round(float(megahertz) * 1000)
    return {"governor": "not readable", **found}


def pin(threads: int) -> tuple[int, ...]:
    """Keep this thread, and those that it starts from now on, on the `threads` processors that are least busy.

    Returns:
        Their numbers; empty where the system cannot do it, or where there are no others to stay away from.
    """
    global _allowed
    if not hasattr(os, "sched_setaffinity"):
        return ()
    if _allowed is None:
        _allowed = frozenset(os.sched_getaffinity(0))
    chosen = set(least_busy(_allowed, threads))
    try:
        os.sched_setaffinity(0, chosen)
    except OSError:
        return ()
    return tuple(sorted(chosen))


def least_busy(allowed: Iterable[int], count: int, look_s: float = 0.05) -> tuple[int, ...]:
    """The `count` processors of `allowed` that were idle for most of a short look; the last of equal ones."""
    numbers = sorted(allowed)
    if count >= len(numbers):
        return tuple(numbers)
    before = _idle_ticks()
    time.sleep(look_s)
    after = _idle_ticks()
    idle = {number: after.get(number, 0) - before.get(number, 0) for number in numbers}
    return tuple(sorted(sorted(numbers, key=lambda n: (idle[n], n))[-count:]))


def _idle_ticks() -> dict[int, int]:
    try:
        lines = _STAT.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    rows = (line.split() for line in lines if line.startswith("cpu"))
    return {int(row[0][3:]): int(row[4]) for row in rows if row[0][3:].isdigit() and len(row) > 4}


def device() -> dict[str, Any]:
    """The machine as a device profile describes it."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count() or 0,
        "cores_allowed": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0,
        "isa": list(instruction_sets()),
        "caches": caches(),
        "memory_bytes": available_bytes(),
        "clocks": clocks(),
        "platform": f"{platform.system()} {platform.machine()}",
    }


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
