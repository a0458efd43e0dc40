"""Which kernels a profile samples. No network is looked at: what is drawn is what networks are made of.

Widths are log-spread, half of them multiples of 8 and a third next to a multiple of 4, 8 or 16, where time
steps. Later samples go where a model is unsure (`refine`). Costs are bounded, so that a sample takes
milliseconds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from sartor.cost_models.samples import moved_bytes, nearest_sizes, weight_bytes
from sartor.cost_models.signatures import Signature, key_of
from sartor.cost_models.work import work_of_spec
from sartor.profiling import shapes as made

HELD_OUT = 0.2
MOST_MACS, MOST_WEIGHT_BYTES, MOST_MOVED_BYTES = 4e8, 24 << 20, 16 << 20
_POOL = 6  # candidates looked at for every sample that `refine` takes
_MOST_ALIKE = 4  # of one signature in one refinement

Uncertainty = Callable[[Signature, Sequence[np.ndarray]], np.ndarray]
"""Standard deviation of the logarithm of a predicted time, per size; as `KernelModel.predict` gives it."""


@dataclasses.dataclass(frozen=True, eq=False)
class Point:
    """A kernel to sample: a spec with sizes."""

    spec: Mapping[str, Any]
    at: tuple[float, ...]
    family: str

    @property
    def key(self) -> tuple[str, tuple[float, ...]]:
        """Equal for equal kernels."""
        return key_of(self.spec), self.at

    @property
    def signature(self) -> Signature:
        """Without variables: no plan stands behind it."""
        kind = "movement" if "inputs" in self.spec else "contraction"
        return Signature(key_of(self.spec), self.family, kind, dict(self.spec), ())

    @property
    def heldout(self) -> bool:
        """A fifth of all kernels, chosen by what they are; widths within half an octave share their fate."""
        coarse = [round(2 * math.log2(max(size, 1.0))) for size in self.at]
        digest = hashlib.sha256(f"{key_of(self.spec)}{coarse}".encode()).digest()
        return digest[0] < 256 * HELD_OUT

    def _activation_bytes(self) -> float:
        work = work_of_spec(self.spec, self.at)
        return float(work.read + work.written)

    def affordable(self) -> bool:
        """Whether timing it takes milliseconds and little memory."""
        if "inputs" in self.spec:
            return self.at[0] <= MOST_MOVED_BYTES
        macs = float(work_of_spec(self.spec, self.at).macs)
        moved = self._activation_bytes()
        return (
            macs <= MOST_MACS
            and weight_bytes(self.spec, self.at) <= MOST_WEIGHT_BYTES
            and moved <= MOST_MOVED_BYTES
        )


class Design:
    """Draws kernels for one target.

    Args:
        fuses: as `Capabilities.fuses`: which epilogues the target runs inside a kernel.
        seed: equal seeds draw equal kernels.
    """

    SHARES: Mapping[str, float] = {
        "conv": 0.34,
        "steps": 0.14,
        "depthwise": 0.12,
        "grouped": 0.06,
        "gemm": 0.04,
        "matmul": 0.08,
        "attention": 0.04,
        "pool": 0.04,
        "elementwise": 0.05,
        "norm": 0.04,
        "movement": 0.05,
    }

    def __init__(self, fuses: Mapping[str, Sequence[str]] | None = None, seed: int = 0):
        self._fuses = {op: tuple(names) for op, names in (fuses or {}).items()}
        self._seed = seed

    def batch(self, number: int, count: int) -> list[Point]:
        """The `number`-th batch of `count` kernels; families in the proportion of `SHARES`."""
        rng = random.Random(f"{self._seed}/{number}")
        names, shares = zip(*self.SHARES.items(), strict=True)
        found: dict[Any, Point] = {}
        while len(found) < count:
            for point in self._draw(rng.choices(names, shares)[0], rng):
                if point.affordable():
                    found.setdefault(point.key, point)
        return list(found.values())[:count]

    def refine(
        self, number: int, count: int, uncertainty: Uncertainty, taken: Iterable[tuple[str, Any]] = ()
    ) -> list[Point]:
        """The `count` kernels of a larger draw that a model is least sure of, not too many of one signature.

        Args:
            number: of the batch; other numbers draw other kernels.
            count: how many.
            uncertainty: of the model so far.
            taken: keys of points that have been sampled.
        """
        known = set(taken)
        pool = [p for p in self.batch(-1 - number, count * _POOL) if p.key not in known]
        by_signature: dict[str, list[Point]] = {}
        for point in pool:
            by_signature.setdefault(point.key[0], []).append(point)
        scored: list[tuple[float, Point]] = []
        for points in by_signature.values():
            columns = [np.array([p.at[i] for p in points]) for i in range(len(points[0].at))]
            sds = np.broadcast_to(uncertainty(points[0].signature, columns), len(points))
            best = sorted(zip(map(float, sds), points, strict=True), key=lambda pair: -pair[0])
            scored += best[:_MOST_ALIKE]
        scored.sort(key=lambda pair: -pair[0])
        return [point for _, point in scored[:count]]

    def _draw(self, family: str, rng: random.Random) -> list[Point]:
        if family == "steps":
            return self._steps(rng)
        spec, at, kernel_family = getattr(self, f"_{family}")(rng)
        return [Point(spec, nearest_sizes(spec, at), kernel_family)]

    # ---- families ----------------------------------------------------------------------------
    def _conv(self, rng: random.Random) -> tuple[Any, ...]:
        if rng.random() < 0.08:  # the first layer
            side = rng.choice(made.INPUT_SIDES)
            taps, stride = rng.choice([(3, 1), (3, 2), (3, 2), (5, 2), (7, 2), (7, 2), (4, 4), (16, 16)])
            spec = made.convolution((side, side), (taps, taps), stride, self._epilogue(rng, "Conv"))
            return spec, (3, width(rng, 8, 768 if taps > 7 else 96)), "conv"
        last = rng.random() < 0.15  # stages of most networks: their weights are what takes time
        side = rng.choice([3, 4, 5, 6, 7, 8]) if last else made.side(rng)
        kernel = rng.choices([(1, 1), (3, 3), (5, 5), (7, 7), (1, 7), (7, 1)], [45, 36, 7, 4, 4, 4])[0]
        stride = rng.choices([1, 2], [80, 20])[0]
        spec = made.convolution((side, side), kernel, stride, self._epilogue(rng, "Conv"))
        least = 1 if rng.random() < 0.3 else 4  # what is left of a layer that was pruned far
        least, most = (96, 1024) if last else (least, min(2048, 40_000 // side))
        return spec, (width(rng, least, most), width(rng, least, most)), "conv"

    def _steps(self, rng: random.Random) -> list[Point]:
        """One kernel at widths around two neighbouring steps, once for what it reads and once for what it makes."""
        family = rng.choice(["conv", "conv", "depthwise", "grouped", "matmul", "gemm"])
        spec, at, kernel_family = getattr(self, f"_{family}")(rng)
        axis = rng.randrange(len(at))
        step = rng.choice([4, 8, 8, 16])
        first = max(1, round(at[axis] / step)) * step
        found = []
        for size in {first - 1, first, first + 1, first + step // 2, first + step - 1, first + step}:
            if size >= 1:
                sizes = tuple(float(size if i == axis else s) for i, s in enumerate(at))
                found.append(Point(spec, sizes, kernel_family))
        return found

    def _depthwise(self, rng: random.Random) -> tuple[Any, ...]:
        side = made.side(rng)
        kernel = rng.choices([3, 5, 7], [70, 22, 8])[0]
        stride = rng.choices([1, 2], [75, 25])[0]
        epilogue = self._epilogue(rng, "Conv", residual=False)
        spec = made.convolution((side, side), (kernel, kernel), stride, epilogue, depthwise=True)
        return spec, (width(rng, 1 if rng.random() < 0.3 else 4, min(2048, 60_000 // side)),), "depthwise"

    def _grouped(self, rng: random.Random) -> tuple[Any, ...]:
        side = made.side(rng)
        groups = rng.choice([2, 2, 3, 4, 8, 16, 24, 32, 32, 64])
        kernel = rng.choice([1, 3, 3, 3])
        stride = rng.choices([1, 2], [75, 25])[0]
        epilogue = self._epilogue(rng, "Conv", residual=False)
        spec = made.convolution((side, side), (kernel, kernel), stride, epilogue, grouped=True)
        inner = width(rng, 2, max(2, min(128, 2048 // groups)))  # of one channel, groups are depthwise
        outer = inner if rng.random() < 0.75 else width(rng, 1, max(2, min(128, 2048 // groups)))
        return spec, (groups, inner, outer), "conv"

    def _gemm(self, rng: random.Random) -> tuple[Any, ...]:
        rows = 1 if rng.random() < 0.6 else made.tokens(rng)
        most = 4096 if rows == 1 else 3072
        spec = made.product("Gemm", (rows,), self._epilogue(rng, "Gemm", residual=False))
        return spec, (width(rng, 16, most), width(rng, 8, most)), "gemm"

    def _matmul(self, rng: random.Random) -> tuple[Any, ...]:
        spec = made.product("MatMul", (1, made.rows(rng)), self._epilogue(rng, "MatMul", residual=False))
        return spec, (width(rng, 16, 3072), width(rng, 16, 3072)), "matmul"

    def _attention(self, rng: random.Random) -> tuple[Any, ...]:
        heads, tokens, channels = rng.choice([1, 2, 3, 4, 6, 8, 12]), made.tokens(rng), width(rng, 8, 96)
        if rng.random() < 0.2:  # between channels
            if rng.random() < 0.5:
                return made.activations_product(heads, "*", tokens, "*"), (channels, channels), "matmul"
            return made.activations_product(heads, "*", "*", tokens), (channels, channels), "matmul"
        scores = rng.random() < 0.5
        m, k, n = (tokens, "*", tokens) if scores else (tokens, tokens, "*")
        return made.activations_product(heads, m, k, n), (channels,), "matmul"

    def _pool(self, rng: random.Random) -> tuple[Any, ...]:
        return _scaled(rng, made.pool(rng), "pool")

    def _elementwise(self, rng: random.Random) -> tuple[Any, ...]:
        return _scaled(rng, made.elementwise(rng), "elementwise")

    def _norm(self, rng: random.Random) -> tuple[Any, ...]:
        return _scaled(rng, made.norm(rng), "norm")

    def _movement(self, rng: random.Random) -> tuple[Any, ...]:
        return _scaled(rng, made.movement(rng), "other")

    def _epilogue(self, rng: random.Random, op_type: str, *, residual: bool = True) -> list[list[Any]]:
        """What follows inside the kernel, of what the target fuses."""
        fuses = self._fuses.get(op_type, ())
        found: list[list[Any]] = []
        if residual and {"Add", "BlockedAdd", "InPlaceAdd"} & set(fuses) and rng.random() < 0.2:
            found.append(["Add", {}])
        options = [
            [name, dict(attributes)]
            for name, attributes, weight in made.ACTIVATIONS
            if name in fuses
            for _ in range(weight)
        ]
        if options and rng.random() < 0.7:
            found.append(rng.choice(options))
        return found


def width(rng: random.Random, low: int, high: int) -> int:
    """A channel count, log-spread; half are multiples of 8, a third lies next to a step."""
    drawn = math.exp(rng.uniform(math.log(low), math.log(high)))
    kind = rng.random()
    if kind < 0.5 and drawn >= 8:
        return int(min(high, max(low, 8 * round(drawn / 8))))
    if kind < 0.8 and drawn >= 5:
        step = rng.choice([4, 8, 16])
        near = max(step, step * round(drawn / step)) + rng.choice([-1, 0, 1])
        return int(min(high, max(low, near)))
    return int(min(high, max(low, round(drawn))))


def _scaled(rng: random.Random, described: tuple[Any, int], family: str) -> tuple[Any, ...]:
    """A kernel that moves data, at a random width; `described` is its spec and its largest width."""
    spec, most = described
    return spec, (moved_bytes(spec, width(rng, 4, max(most, 8))),), family


class Novelty:
    """Stands in for a model's uncertainty: the distance to the nearest kernel of the family that was sampled.

    Distances are between logarithms of work, of bytes and of sizes, in which neighbours take similar time.
    """

    def __init__(self, points: Iterable[Point]):
        self._known: dict[str, list[np.ndarray]] = {}
        for point in points:
            self._known.setdefault(_kind(point.spec), []).append(_place(point.spec, point.at))

    def __call__(self, signature: Signature, sizes: Sequence[np.ndarray]) -> np.ndarray:
        """Distance per size."""
        known = self._known.get(_kind(signature.spec))
        rows = np.broadcast_arrays(*sizes) if sizes else [np.zeros(1)]
        if not known:
            return np.full(rows[0].shape, math.inf)
        found = []
        for at in zip(*(np.atleast_1d(row).ravel() for row in rows), strict=True):
            place = _place(signature.spec, at if sizes else ())
            found.append(min(float(np.linalg.norm(place - other)) for other in known))
        return np.array(found)


def _kind(spec: Mapping[str, Any]) -> str:
    return f"{spec['op']}/{len(spec.get('inputs', ()))}/{'multiplier' in spec}/{spec.get('group', '')}"


def _place(spec: Mapping[str, Any], at: Sequence[float]) -> np.ndarray:
    work = work_of_spec(spec, at)
    parts = (work.macs, work.weight_bytes, work.moved, work.groups, work.columns, work.channels, work.taps)
    odd = [0.5 * (float(c) % 8 != 0) for c in (work.columns, work.channels)]
    return np.array([*(math.log(max(float(v), 1.0)) for v in parts), *odd, len(spec.get("epilogue", ()))])
