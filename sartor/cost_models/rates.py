"""The fitted roofline of single kernels: a sum of what computing, moving and waiting take.

    t = launch + macs / rate + bytes / bandwidth + costly activations + groups + windows + waiting

Groups of a convolution, and matrices of a batch, are products of their own that a runtime may begin one by one: where
channels do not fill a register, that is what a depthwise convolution takes. So are rows of a normalization, and what
else is moved in pieces. Outside the blocked layout windows are laid out as rows of a matrix first, which takes as long
for two output channels as for many.

The longer ago a kernel last ran, the more of what it needs others have displaced from the caches: its code and what
the runtime knows of it, and its weights; what it reads has just been made. It waits for its weights in proportion to a
share that rises from 0 to 1 with the logarithm of the period (`Sample.period_s`), between two periods that are fitted:
what a cache still has of them after the shorter one is gone after the longer. Its code it shares with others of its
operator (`Sample.alike`): for that it waits in proportion to the share that the pause since one of them has reached,
the period over their number.

One law for each of the ways in which runtimes compute an operator: convolutions whose channels fill whole vectors
and those that leave the blocked layout, windows of one position, images of a few channels; products of one row and
of several with a stored matrix, whichever operator they are. A way with few samples
takes the law of its operator, and an operator that of its family, times a factor of its own. Output widths are
rounded up to the channel grid first: what a register or a block of channels computes, it computes whole.

The sum, not the maximum, because a sum has a slope everywhere: the learned model corrects it, and what it gets
wrong between the two regimes is a smooth function of the intensity.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sartor.cost_models.displacement import displaced_between, pauses_of, periods_of, share_of, waiting
from sartor.cost_models.features import COSTLY, is_movement, pieces_of, ways_of
from sartor.cost_models.least_squares import fit_logarithm
from sartor.cost_models.profile import ALONE, Company, Sample
from sartor.cost_models.signatures import Signature, variable_names
from sartor.cost_models.work import Work, item_bytes, work_of_spec
from sartor.errors import MetricUnavailableError

_ANY = "*"
_PRODUCT = "product"  # with a stored matrix: to most runtimes a Gemm is a MatMul
_FEW = 8  # samples below which there is no law of its own, but a factor
_ENOUGH = 30  # samples of networks, with which a law does without those of carriers
_BETWEEN = ("periods", "pauses", "displaced")
_LEAST_SD = 0.1
_LAW_SD = 0.2
_SLOWEST = 20.0  # times as long as for the weights of the operator at large, nobody waits for those of a way
_STEPPED = frozenset(
    {"channels", "c_in", "c_out", "in_per_group", "out_per_group", "k", "n", "input", "hidden"}
)
"""Variables that are widths of a tensor; groups, rows and bytes have no grid."""
_ROUNDED = frozenset({"channels", "c_out", "n"})
"""Output widths that are computed in whole registers. How a runtime pads the groups of a convolution, if it does,
is left to what was learned."""


@dataclasses.dataclass(frozen=True)
class Rate:
    """Coefficients of one law: seconds, seconds per MAC, byte, costly element, group and byte of windows; its waiting;
    its error.
    """

    launch_s: float
    per_mac_s: float
    per_byte_s: float
    per_element_s: float
    per_group_s: float
    per_window_byte_s: float
    waiting_s: float
    waiting_per_weight_s: float
    sd: float

    @classmethod
    def of(cls, coefficients: np.ndarray, sd: float) -> Rate:
        """From coefficients in the order of `columns_of`."""
        names = [field.name for field in dataclasses.fields(cls)][:-1]
        return cls(**dict(zip(names, map(float, coefficients), strict=True)), sd=sd)

    @property
    def coefficients(self) -> tuple[float, ...]:
        """All but the error, in the order of `columns_of`."""
        return dataclasses.astuple(self)[:-1]

    def seconds(self, columns: np.ndarray) -> np.ndarray:
        """Of kernels, from `columns_of`."""
        return np.asarray(np.tensordot(self.coefficients, columns, 1))

    def bound(self, columns: np.ndarray) -> str:
        """What most of one kernel's time goes into: `launch`, `compute` or `bandwidth`."""
        parts = np.asarray(self.coefficients) * columns
        launch, mac, byte, element, group, window, fixed, weight = (float(p) for p in parts)
        found = {
            "launch": launch + group + fixed,
            "compute": mac + element,
            "bandwidth": byte + window + weight,
        }
        return max(found, key=found.__getitem__)


@dataclasses.dataclass(frozen=True)
class Rates:
    """Satisfies `KernelModel`; knows every kernel that has a signature.

    Attributes:
        laws: by way of computing: `family/operator/way`, of products with a stored matrix `product/way`;
            `family/operator`, `family`, and `*` for all others.
        periods: the shortest and the longest seconds between two runs of a kernel, see the module docstring; zeros
            where all samples ran alone.
        pauses: likewise, between runs of two kernels of its operator.
        displaced: of the periods, those between which weights are displaced.
        grid: channel grid by family or operator; widths of others are not rounded.
    """

    laws: Mapping[str, Rate]
    periods: tuple[float, float] = (0.0, 0.0)
    pauses: tuple[float, float] = (0.0, 0.0)
    displaced: tuple[float, float] = (0.0, 0.0)
    grid: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def tier(self) -> str:
        """See `KernelModel`."""
        return "roofline"

    def knows(self, signature: Signature) -> bool:
        """See `KernelModel`."""
        return True

    def predict(
        self, signature: Signature, sizes: Sequence[np.ndarray], period_s: Any = 0.0, company: Company = ALONE
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `KernelModel`."""
        spec, family = signature.spec, signature.family
        found = _work(spec, family, sizes, self.grid)
        ways = _ways(spec, sizes)
        columns = self._columns(period_s, company.alike, **_parts(spec, found, ways))
        seconds, sd = np.zeros(columns.shape[1:]), np.zeros(columns.shape[1:])
        for way in np.unique(ways):
            law = self._law(family, str(spec["op"]), str(way))
            here = np.broadcast_to(ways == way, seconds.shape)
            seconds = np.where(here, law.seconds(columns), seconds)
            sd = np.where(here, law.sd, sd)
        return np.maximum(seconds, 1e-9), sd

    def seconds(
        self, family: str, macs: Any, moved: Any, period_s: Any, alike: Any = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `predict`, of kernels without a signature."""
        law = self._law(family, "", "")
        columns = self._columns(period_s, alike, macs=macs, moved=moved)
        total = np.maximum(law.seconds(columns), 1e-9)
        return total, np.full(total.shape, law.sd)

    def bound(
        self,
        family: str,
        op: str,
        macs: float,
        moved: float,
        weight_bytes: float,
        period_s: float,
        alike: int = 1,
    ) -> str:
        """What most of a kernel's time goes into, see `Rate.bound`."""
        columns = self._columns(period_s, alike, macs=macs, moved=moved, weight_bytes=weight_bytes)
        return self._law(family, op, "").bound(columns)

    def _columns(self, period_s: Any, alike: Any, **parts: Any) -> np.ndarray:
        code = share_of(np.asarray(period_s, float) / alike, self.pauses)
        return columns_of(code=code, share=share_of(period_s, self.displaced), **parts)

    def update(self, samples: Sequence[Sample]) -> Rates:
        """See `KernelModel`: the laws of these samples are fitted anew, to them alone."""
        anew = fitted(samples, self.grid, self.periods, self.pauses, self.displaced)
        return dataclasses.replace(self, laws={**self.laws, **anew.laws})

    def save(self) -> dict[str, Any]:
        """See `KernelModel`."""
        laws = {name: dataclasses.asdict(law) for name, law in sorted(self.laws.items())}
        between = {name: list(getattr(self, name)) for name in _BETWEEN}
        return {"laws": laws, **between}

    @staticmethod
    def load(document: Mapping[str, Any], grid: Mapping[str, int]) -> Rates:
        """Inverse of `save`; the grid is that of the profile."""
        between = {name: tuple(map(float, document[name])) for name in _BETWEEN}
        if any(len(ends) != 2 for ends in between.values()):
            raise ValueError(f"{', '.join(_BETWEEN)} are two numbers each")
        laws = {name: Rate(**entry) for name, entry in document["laws"].items()}
        return Rates(laws, grid=grid, **between)  # type: ignore[arg-type]

    def _law(self, family: str, op: str, way: str) -> Rate:
        return next(self.laws[name] for name in _names(family, op, way) if name in self.laws)


def grid_step(grid: Mapping[str, int], family: str, op: str) -> int:
    """Channel grid of an operator; 1 where it has none."""
    return int(grid.get(family, grid.get(op, 1)))


def stepped(spec: Mapping[str, Any]) -> list[int]:
    """Which variables are widths that have a grid; the last of them is the output's."""
    return [i for i, name in enumerate(variable_names(spec)) if name in _STEPPED]


def columns_of(
    *,
    macs: Any = 0.0,
    moved: Any = 0.0,
    costly: Any = 0.0,
    groups: Any = 1.0,
    windows: Any = 0.0,
    weight_bytes: Any = 0.0,
    code: Any = 0.0,
    share: Any = 0.0,
) -> np.ndarray:
    """What the coefficients of a law multiply, `[coefficients, …]`.

    Args:
        macs: multiply-accumulates.
        moved: bytes read and written.
        costly: elements that pass through an activation which is itself work.
        groups: products that are begun one by one.
        windows: bytes of windows that are laid out as rows.
        weight_bytes: of weights that may have to be waited for.
        code: share of the kernel's code that others have displaced.
        share: of its weights. Their column is the last one.
    """
    several = np.where(np.asarray(groups) > 1, groups, 0.0)  # one group is the kernel itself
    parts = (1.0, macs, moved, costly, several, windows, code, share * weight_bytes)
    return np.stack(np.broadcast_arrays(*(np.asarray(part, float) for part in parts)))


def _parts(spec: Mapping[str, Any], found: Work, ways: np.ndarray) -> dict[str, Any]:
    """Of a kernel, what `columns_of` asks for but for the caches."""
    return {
        "macs": found.macs,
        "moved": found.moved,
        "costly": _costly(spec, found),
        "groups": pieces_of(spec, found) if is_movement(spec) else found.groups,
        "windows": _windows(spec, found, ways),
        "weight_bytes": _weights(spec, found),
    }


def fitted(
    samples: Sequence[Sample],
    grid: Mapping[str, int] | None = None,
    periods: tuple[float, float] | None = None,
    pauses: tuple[float, float] | None = None,
    displaced: tuple[float, float] | None = None,
) -> Rates:
    """Laws that fit the logarithms of the samples best, with coefficients that are not negative.

    Args:
        samples: timed kernels.
        grid: channel grid by family or operator.
        periods: as `Rates.periods`; by default those of the samples.
        pauses: as `Rates.pauses`; likewise.
        displaced: as `Rates.displaced`; by default fitted, and where `periods` are given, those.

    Raises:
        MetricUnavailableError: there are no samples.
    """
    if not samples:
        raise MetricUnavailableError(
            "No kernel could be timed on the target, so there is nothing to fit a latency to; look at the reasons "
            "that the timer gives."
        )
    samples = _in_networks(samples)
    between = periods_of(samples) if periods is None else periods
    paused = pauses_of(samples) if pauses is None else pauses
    table = np.array([_row(sample, grid or {}, paused) for sample in samples])
    period = np.array([sample.period_s for sample in samples])
    names = [names_of_laws(sample) for sample in samples]
    gone = displaced
    if gone is None:
        gone = (
            between
            if periods is not None
            else displaced_between(table, period, [own[0] for own in names], between)
        )
    table = waiting(table, period, gone)
    places: dict[str, list[int]] = {}
    for place, own in enumerate(names):
        for name in own:
            places.setdefault(name, []).append(place)
    carried = np.array([sample.carried for sample in samples])
    laws: dict[str, Rate] = {}
    for name in sorted(
        places, key=lambda name: (name != _ANY, name.count("/"))
    ):  # from the general to the special
        mine, here = table[places[name]], carried[places[name]]
        wider = name.rpartition("/")[0]
        if len(mine) >= _FEW or name == _ANY:
            laws[name] = _fit(mine, laws.get(wider, laws.get(_ANY)))
        else:
            laws[name] = _scaled(laws[wider] if wider in laws else laws[_ANY], mine)
        if here.any() and not here.all():
            laws[name] = _scaled(laws[name], mine[~here])
    return Rates(laws, between, paused, gone, dict(grid or {}))


def _in_networks(samples: Sequence[Sample]) -> list[Sample]:
    """Without those of carriers, where laws have enough samples of networks; with fewer, these scale the law.

    A carrier has other layouts and no two kernels of one shape: its kernels take up to three times as long. Trees tell
    them apart; a law of a few numbers cannot.
    """
    seen = Counter(names_of_laws(sample)[0] for sample in samples if not sample.carried)
    return [s for s in samples if not s.carried or seen[names_of_laws(s)[0]] < _ENOUGH]


def _row(sample: Sample, grid: Mapping[str, int], pauses: tuple[float, float]) -> np.ndarray:
    """Of a sample: columns as of one whose weights are displaced, seconds, weight of its error."""
    found = _work(sample.spec, sample.family, sample.at, grid)
    parts = _parts(sample.spec, found, _ways(sample.spec, sample.at))
    columns = columns_of(code=share_of(sample.period_s / sample.alike, pauses), share=1.0, **parts)
    # How well a time is known matters only where it is known worse than a law of a few numbers can say it.
    return np.array([*columns, sample.seconds, 1.0 / np.hypot(_LAW_SD, sample.half_width / 1.96)])


def names_of_laws(sample: Sample) -> tuple[str, ...]:
    """The laws that a sample says something about, its own first."""
    return _names(sample.family, str(sample.spec["op"]), str(_ways(sample.spec, sample.at)))


def _names(family: str, op: str, way: str) -> tuple[str, ...]:
    """Where the law of a kernel is looked for, its own first."""
    own = f"{_PRODUCT}/{way}" if way in ("vector", "matrix") else f"{family}/{op}/{way}"
    return tuple(dict.fromkeys((own, f"{family}/{op}", family, _ANY)))


def _ways(spec: Mapping[str, Any], sizes: Sequence[Any]) -> np.ndarray:
    return ways_of(spec, work_of_spec(spec, [np.asarray(s, float) for s in sizes]))


def _costly(spec: Mapping[str, Any], found: Work) -> np.ndarray:
    """Elements that pass through an activation which is itself work."""
    count = sum(op in COSTLY for op, _ in spec.get("epilogue", ()))
    return count * found.written / item_bytes(str(spec.get("dtype", "FLOAT")))


def _windows(spec: Mapping[str, Any], found: Work, ways: np.ndarray) -> Any:
    """Bytes of windows that are laid out as rows; those of depthwise kernels are their MACs."""
    if "multiplier" in spec:
        return 0.0
    laid_out = found.groups * found.channels * found.taps * found.rows
    return np.where(ways == "unblocked window", item_bytes(str(spec.get("dtype", "FLOAT"))) * laid_out, 0.0)


def _weights(spec: Mapping[str, Any], found: Work) -> Any:
    """Bytes that a kernel waits for.

    Stored operands of others than products are vectors, or read in part. Those of a depthwise kernel are a few numbers
    per channel, next to what it takes to begin a channel: in a law, one would be taken for the other.
    """
    return 0.0 if is_movement(spec) or "multiplier" in spec else found.weight_bytes


def _work(spec: Mapping[str, Any], family: str, sizes: Sequence[Any], grid: Mapping[str, int]) -> Work:
    """Work with the output width rounded up, in the layout that has whole blocks."""
    step, names = grid_step(grid, family, str(spec["op"])), variable_names(spec)
    rounded = [np.asarray(s, float) for s in sizes]
    if step > 1 and names[-1:] and names[-1] in _ROUNDED:
        plain = np.char.startswith(_ways(spec, sizes), "unblocked")
        rounded[-1] = np.where(plain, rounded[-1], np.ceil(rounded[-1] / step - 1e-9) * step)
    return work_of_spec(spec, rounded)


def _fit(rows: np.ndarray, wider: Rate | None = None) -> Rate:
    """The law of these samples.

    Those of one way may be of networks that take equally long, or have weights of a few numbers: then any waiting for
    them fits, and a larger kernel in a longer network would wait for ages. Memory is as fast for all ways.
    """
    columns, seconds, weight = rows[:, :-2], rows[:, -2], rows[:, -1]
    best, sd = fit_logarithm(columns, seconds, weight)
    if wider is not None and best[-1] > _SLOWEST * max(wider.waiting_per_weight_s, wider.per_byte_s):
        known = wider.waiting_per_weight_s * columns[:, -1]
        rest = np.maximum(seconds - known, seconds / 2)
        best, _ = fit_logarithm(columns * np.append(np.ones(columns.shape[1] - 1), 0.0), rest, weight)
        best[-1] = wider.waiting_per_weight_s
        sd = float(np.sqrt(np.mean(np.square(np.log(np.maximum(columns @ best, 1e-12) / seconds)))))
    return Rate.of(best, max(sd, _LEAST_SD))


def _scaled(law: Rate, rows: np.ndarray) -> Rate:
    """A law times what its few samples have in common, drawn towards 1 as if one more had said so."""
    error = np.log(rows[:, -2] / np.maximum(law.seconds(rows[:, :-2].T), 1e-12))
    factor = float(np.exp(error.sum() / (len(error) + 1)))
    return Rate.of(factor * np.asarray(law.coefficients), law.sd)
