"""Device profiles of a machine whose law is known: kernels with steps and penalties, networks made of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sartor.cost_models.features import family_of
from sartor.cost_models.profile import DeviceProfile, NetworkTime, Sample
from sartor.cost_models.work import work_of_spec

STEP = 16
PERIODS = (2e-4, 2e-2)
"""Seconds between two runs of a kernel within which all that it needs is displaced, in the logarithm evenly."""
CALL_S = 5e-6


def conv_spec(
    size: int, kernel: int = 3, stride: int = 1, epilogue: Sequence[str] = ("Relu",)
) -> dict[str, Any]:
    out = (size + 2 * (kernel // 2) - kernel) // stride + 1
    return {
        "op": "Conv",
        "dtype": "FLOAT",
        "batch": 1,
        "spatial": [size, size],
        "out": [out, out],
        "attributes": {
            "strides": [stride] * 2,
            "dilations": [1, 1],
            "pads": [kernel // 2] * 4,
            "kernel_shape": [kernel, kernel],
        },
        "group": 1,
        "epilogue": [[op, {}] for op in epilogue],
    }


def depthwise_spec(size: int, kernel: int = 3, stride: int = 1, epilogue: Sequence[str] = ("Relu",)) -> dict:
    spec = conv_spec(size, kernel, stride, epilogue)
    del spec["group"]
    return {**spec, "multiplier": 1}


def grouped_spec(size: int, kernel: int = 3, epilogue: Sequence[str] = ("Relu",)) -> dict[str, Any]:
    return {**conv_spec(size, kernel, 1, epilogue), "group": "*"}


def gemm_spec(rows: int = 1) -> dict[str, Any]:
    return {"op": "Gemm", "dtype": "FLOAT", "rows": [rows], "epilogue": []}


def true_s(spec: Mapping[str, Any], at: Sequence[float]) -> float:
    """Seconds on the machine right after a run of the same kernel, without noise.

    Channels that are made are padded to the grid; a convolution that reads channels which do not fill a vector is
    computed another way, slower and without padding.
    """
    found = work_of_spec(spec, [np.asarray(float(v)) for v in at])
    macs, moved = float(found.macs), float(found.moved)
    if "inputs" in spec:
        return 1e-6 + moved / (6e9 if "Pool" in spec["op"] else 12e9)
    family = family_of(spec)
    c_out, c_in = float(found.groups * found.columns), float(found.groups * found.channels)
    taps = float(found.taps)
    rate = 40e9 * (1.25 if taps > 1 else 1.0) * float(found.rows) / (float(found.rows) + 30.0)
    if family == "depthwise":
        rate = 6e9
    if family != "gemm" and c_in % 4 and c_in > 4:
        return (1.5e-6 + macs / rate + moved / 15e9) * (3.0 if family == "depthwise" else 1.3)
    return 1.5e-6 + macs * math.ceil(c_out / STEP) * STEP / c_out / rate + moved / 15e9


def waiting_s(spec: Mapping[str, Any], at: Sequence[float], period_s: float) -> float:
    """Seconds more after a period."""
    low, high = PERIODS
    share = min(max(math.log(max(period_s, low) / low) / math.log(high / low), 0.0), 1.0)
    weights = float(work_of_spec(spec, [np.asarray(float(v)) for v in at]).weight_bytes)
    return share * (2e-6 + weights / 8e9)


def sample(
    spec: dict,
    at: Sequence[float],
    rng: np.random.Generator,
    noise: float,
    role: str = "fit",
    period_s: float = 0.0,
) -> Sample:
    seconds = (true_s(spec, at) + waiting_s(spec, at, period_s)) * math.exp(noise * rng.standard_normal())
    return Sample(spec, tuple(map(float, at)), family_of(spec), seconds, 1.96 * noise, role, period_s)


def draw_period(rng: np.random.Generator) -> float:
    return math.exp(rng.uniform(*np.log(PERIODS)))


def width(rng: np.random.Generator, low: int = 8, high: int = 256) -> int:
    """Mostly on the grid of 16, one in four anywhere."""
    value = math.exp(rng.uniform(math.log(low), math.log(high)))
    return max(1, round(value) if rng.random() < 0.25 else max(1, round(value / STEP)) * STEP)


def draw_kernel(rng: np.random.Generator) -> tuple[dict[str, Any], tuple[float, ...]]:
    size = int(rng.choice([7, 14, 28, 56]))
    kind = rng.choice(["conv", "conv", "depthwise", "grouped", "gemm"])
    ends = [("Relu",), (), ("Add", "Relu")][int(rng.integers(3))]
    if kind == "conv":
        return conv_spec(size, int(rng.choice([1, 3, 5])), int(rng.choice([1, 2])), ends), (
            width(rng),
            width(rng),
        )
    if kind == "depthwise":
        return depthwise_spec(size, int(rng.choice([3, 5])), int(rng.choice([1, 2])), ends), (
            width(rng, 8, 512),
        )
    if kind == "grouped":
        groups = int(rng.choice([2, 4, 8, 32]))
        return grouped_spec(size, 3, ends), (
            groups,
            max(1, width(rng) // groups),
            max(1, width(rng) // groups),
        )
    return gemm_spec(), (width(rng, 16, 1024), width(rng, 16, 1024))


def network(
    name: str,
    rng: np.random.Generator,
    bias: float,
    noise: float = 0.005,
    role: str = "fit",
    scales: Mapping[str, float] | None = None,
    in_models: bool = False,
) -> NetworkTime:
    """A network that takes `call + Σ scale · (seconds + waiting)`, the period being what it takes; times a bias."""
    drawn = [(*draw_kernel(rng), int(rng.integers(1, 4))) for _ in range(12)]
    kernels = [(spec, tuple(map(float, at)), count) for spec, at, count in drawn]
    scales = scales or {}
    total = 0.0
    for _ in range(20 if in_models else 1):  # until the period is what it takes
        period_s = CALL_S + total if in_models else 0.0
        total = sum(
            n * scales.get(family_of(s), 1.0) * (true_s(s, at) + waiting_s(s, at, period_s))
            for s, at, n in kernels
        )
    latency = (CALL_S + total) * math.exp(bias * rng.standard_normal() + noise * rng.standard_normal())
    half = 1.96 * noise * latency
    return NetworkTime(name, tuple(kernels), latency, (latency - half, latency + half), role)


def make_profile(
    samples: int = 900,
    networks: int = 0,
    noise: float = 0.02,
    bias: float = 0.04,
    seed: int = 0,
    heldout: float = 0.2,
    scales: Mapping[str, float] | None = None,
    in_models: bool = False,
) -> DeviceProfile:
    rng = np.random.default_rng(seed)
    kernels = [draw_kernel(rng) for _ in range(samples)]
    roles = np.where(rng.random(samples) < heldout, "heldout", "fit")
    others = np.random.default_rng([seed, 1])
    taken = tuple(
        sample(s, at, rng, noise, str(r), draw_period(others) if in_models else 0.0)
        for (s, at), r in zip(kernels, roles, strict=True)
    )
    kinds = ("plain", "residual", "inverted", "grouped", "dense")
    nets = tuple(
        network(
            f"{kinds[i % 5]}-{i}",
            rng,
            bias,
            role="heldout" if i % 2 else "fit",
            scales=scales,
            in_models=in_models,
        )
        for i in range(networks)
    )
    return DeviceProfile(
        target={
            "name": "fake",
            "version": "1",
            "threads": 1,
            "precision": "f32",
            "channel_grid": {"Conv": STEP, "Gemm": STEP},
        },
        device={"cpu": "synthetic", "cores": 1, "caches": {"l2_bytes": 2e6, "l3_bytes": 2e6}},
        protocol={"minutes": 1},
        call_s=CALL_S,
        samples=taken,
        networks=nets,
    )


def with_samples(profile: DeviceProfile, more: Sequence[Sample]) -> DeviceProfile:
    return dataclasses.replace(profile, samples=(*profile.samples, *more))
