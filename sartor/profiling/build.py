"""`sartor profile`: times kernels and networks on a target until the minutes are over, and fits a profile.

Every batch of times is one record of a journal beside the profile, so that a run which was killed goes on where
it was; the profile itself appears at the end, whole. Order: the cost of entering the runtime's layout, kernels
drawn by `design`, kernels where the model so far is unsure, whole networks, the fit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sartor.backends import host
from sartor.backends.protocol import Backend, TargetOptions
from sartor.cost_models.boundary import Boundary
from sartor.cost_models.profile import DeviceProfile, of_role
from sartor.cost_models.samples import sample_model
from sartor.cost_models.signatures import Signature
from sartor.errors import UsageError
from sartor.ir.fusion_rules import CONTRACTIONS, GENERIC, FusionRules
from sartor.journal import Journal
from sartor.profiling import layout, networks
from sartor.profiling.design import Design, Novelty, Point, Uncertainty
from sartor.profiling.records import Records
from sartor.profiling.timing import BATCH, NETWORKS, Batch, Effort, Job, KernelTimer, Timed, Timer, cold_extra

_NETWORKS_AT_ONCE = len(networks.KINDS)
_DRAWN, _REFINED, _TIMED = 0.40, 0.64, 0.94
"""Of the minutes: until when kernels are drawn, chosen by uncertainty, and networks timed. The rest is the fit."""
_REFINEMENTS, _MOST_AT_ONCE = 3, 40  # fits between batches; batches after one
PRECISIONS = ("f32", "bf16")

Fit = Callable[[DeviceProfile], DeviceProfile]


class Progress(Protocol):
    """What `sartor.cli.progress.Progress` does of it."""

    def stage(self, text: str, total: int = 0) -> None:
        """Begin a stage."""
        ...

    def advance(self, steps: int = 1) -> None:
        """Count steps."""
        ...


def journal_path(out: Path) -> Path:
    """Where the measurements of an unfinished profile are kept."""
    return out.parent / f".{out.name}.journal.jsonl"


def build_profile(
    target: str,
    options: TargetOptions,
    out: str | Path,
    *,
    minutes: float = 10.0,
    progress: Progress,
    seed: int = 0,
    pin: bool = True,
    timer: Timer | None = None,
    fit: Fit | None = None,
    uncertainty_of: Callable[[DeviceProfile], Uncertainty | None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> DeviceProfile:
    """Build the profile of this machine as `target` uses it, and write it.

    Args:
        target: registered backend.
        options: threads and precision.
        out: JSON file; a journal lies beside it until it is written.
        minutes: for measuring and fitting together, those of earlier runs that were cut off included.
        progress: is told the stages.
        seed: of the design.
        pin: keep the measuring process on the least busy processors.
        timer: instead of the target, for tests.
        fit: what fits the models; by default `sartor.cost_models.ladder.fit_profile`.
        uncertainty_of: what chooses later samples, from the profile so far; by default, and where it has none,
            the distance to what was sampled.
        clock: monotonic seconds.

    Raises:
        UsageError: the target cannot be profiled so.
        BackendError: it cannot run even a convolution.
    """
    from sartor import backends

    backend = backends.get(target)
    require_profilable(backend, options)
    path = Path(out)
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(
            f"The profile '{out}' cannot be written; '--out' names a file in a folder that exists."
        )
    facts = _facts(backend, options, pin)
    key = {"what": "device-profile/1", "target": facts, "cpu": host.cpu_model(), "seed": seed}
    with Journal(journal_path(path), key) as journal:
        builder = _Builder(backend, journal, progress, minutes * 60, seed, clock)
        own = KernelTimer(target, options, pin=pin, seed=seed) if timer is None else None
        try:
            ended_by = builder.measure(timer or own, uncertainty_of)  # type: ignore[arg-type]
        except KeyboardInterrupt as error:
            error.add_note("What was measured is kept; the same command goes on from there.")
            raise
        finally:
            if own is not None:
                own.close()
        profile = builder.records.profile(facts, host.device(), minutes, ended_by)
        progress.stage("fitting")
        profile = (fit or default_fit)(profile)
        profile.save(path)
        journal.path.unlink(missing_ok=True)
    return profile


def require_profilable(backend: Backend, options: TargetOptions) -> None:
    """Refuse before minutes are spent.

    Raises:
        UsageError: the target does not run here, or kernels cannot be timed in this precision.
    """
    capabilities = backend.capabilities()
    if capabilities.not_run_here:
        raise UsageError(
            f"'{backend.name}' cannot be profiled on this machine: {capabilities.not_run_here}. Run the command on a "
            "machine that runs it."
        )
    if options.precision not in capabilities.precisions:
        raise UsageError(
            f"'{backend.name}' does not compute in {options.precision}; choose of {', '.join(capabilities.precisions)}."
        )
    if options.precision not in PRECISIONS:
        raise UsageError(
            f"A profile in {options.precision} needs kernels with quantized or converted weights, which are not "
            f"timed one by one; profile in {' or '.join(PRECISIONS)}, and measure {options.precision} networks whole."
        )


def fusion_rules(backend: Backend) -> FusionRules:
    """What the target runs as one kernel; the generic rules where it does not say."""
    fuses = backend.capabilities().fuses
    return FusionRules.of(fuses) if fuses else GENERIC


def learned_uncertainty(profile: DeviceProfile) -> Uncertainty | None:
    """That of a learned model which is fitted to the samples so far; None without LightGBM, or if they are too few."""
    import importlib.util

    from sartor.cost_models import learned, rates
    from sartor.errors import SartorError

    if importlib.util.find_spec("lightgbm") is None:
        return None
    samples = of_role(profile.samples, "fit")
    try:
        model = learned.fit(samples, rates.fitted(samples)).model
    except SartorError:
        return None

    def unsure(signature: Signature, sizes: Sequence[np.ndarray]) -> np.ndarray:
        return model.predict(signature, sizes)[1] if model.knows(signature) else np.array(math.inf)

    return unsure


def default_fit(profile: DeviceProfile) -> DeviceProfile:
    """Models, law, interval and errors; without LightGBM the learned tier is left out."""
    import importlib.util

    from sartor.cost_models.ladder import fit_profile

    return fit_profile(profile, learned=importlib.util.find_spec("lightgbm") is not None)


def _facts(backend: Backend, options: TargetOptions, pin: bool) -> dict[str, Any]:
    return {
        "name": backend.name,
        "version": backend.capabilities().version,
        "threads": options.threads,
        "precision": options.precision,
        "channel_grid": {op: backend.channel_grid(op, options.precision) for op in sorted(CONTRACTIONS)},
        "settings": {
            "flush_denormals": True,
            "pinned": pin,
            "fusion_sha256": fusion_rules(backend).sha256,
        },
    }


class _Builder:
    """One run of the builder on a journal."""

    def __init__(
        self,
        backend: Backend,
        journal: Journal,
        progress: Progress,
        seconds: float,
        seed: int,
        clock: Callable[[], float],
    ):
        self._rules = fusion_rules(backend)
        self._design = Design(backend.capabilities().fuses, seed)
        self._progress, self._seconds, self._seed = progress, seconds, seed
        self.records = Records(journal, clock)

    def measure(
        self, timer: Timer, uncertainty_of: Callable[[DeviceProfile], Uncertainty | None] | None
    ) -> str:
        """All stages that the journal does not hold yet; what ended them."""
        self._progress.stage("layout and calls")
        boundary = self._boundary(timer)
        self._progress.stage("sampling kernels")
        while self.records.spent_s < _DRAWN * self._seconds or not self.records.batches("design"):
            self._kernels(timer, boundary, "design", self._design.batch(self.records.next("design"), BATCH))
        self._progress.stage("sampling where it is unsure")
        while self.records.spent_s < _REFINED * self._seconds:
            points = [*self.records.points()]
            unsure: Uncertainty | None = None
            if uncertainty_of is not None:
                unsure = uncertainty_of(self.records.profile({}, host.device(), 0.0, ""))
            number, taken = self.records.next("refine"), [p.key for p in points]
            count = BATCH * self._batches_of_a_refinement()
            chosen = self._design.refine(number, count, unsure or Novelty(points), taken)
            for start in range(0, len(chosen), BATCH):
                if self.records.spent_s < _REFINED * self._seconds or not start:
                    self._kernels(timer, boundary, "refine", chosen[start : start + BATCH])
        self._progress.stage("timing whole networks")
        while self.records.spent_s < _TIMED * self._seconds or self.records.next("networks") < 2:
            self._networks(timer)
        return "minutes"

    def _batches_of_a_refinement(self) -> int:
        """A third of what the time allows, so that the model learns twice from what it asked for."""
        done = self.records.batches("design")
        pace = max(sum(float(r["spent_s"]) for r in done) / len(done), 1e-3)
        return max(1, min(_MOST_AT_ONCE, int((_REFINED - _DRAWN) * self._seconds / pace / _REFINEMENTS)))

    def _boundary(self, timer: Timer) -> Boundary:
        chosen = layout.probes_of()
        known = self.records.find("boundary")
        if known is None:
            ratios, reference = layout.time_probes(chosen, timer)
            for seconds in reference:
                self.records.saw(seconds)
            # JSON has no NaN: a probe that failed is null
            known = self.records.add("boundary", ratios=[None if math.isnan(r) else r for r in ratios])
        ratios = [math.nan if r is None else r for r in known["ratios"]]
        return layout.boundary_of(chosen, ratios, self._rules)

    def _kernels(self, timer: Timer, boundary: Boundary, stage: str, points: Sequence[Point]) -> None:
        jobs, kept, failed = [], [], []
        for point in points:
            try:
                jobs.append(Job(sample_model(point.spec, point.at), point.cold))
                kept.append(point)
            except Exception as error:  # a kernel that no model can be made of is a failure of that kernel
                failed.append((point, f"no sample model: {type(error).__name__}: {str(error)[:200]}"))
        batch = timer(jobs, Effort())
        results = [
            *(_kernel_result(p, t, batch, boundary) for p, t in zip(kept, batch.times, strict=True)),
            *({**_point(p), "reason": reason} for p, reason in failed),
        ]
        self.records.saw(batch.reference_s)
        self.records.add(stage, results=results, conditions=dict(batch.conditions))
        self._progress.advance(len(results))

    def _networks(self, timer: Timer) -> None:
        number = self.records.next("networks")
        source = networks.names(self._seed)
        for _ in range(number * _NETWORKS_AT_ONCE):
            next(source)
        chosen = [next(source) for _ in range(_NETWORKS_AT_ONCE)]
        models = [networks.network(name) for name in chosen]
        batch = timer([Job(model) for model in models], NETWORKS)
        results = [
            self._network_result(name, model, timed)
            for name, model, timed in zip(chosen, models, batch.times, strict=True)
        ]
        self.records.saw(batch.reference_s)
        self.records.add("networks", results=results)
        self._progress.advance(len(results))

    def _network_result(self, name: str, model: bytes, timed: Timed) -> dict[str, Any]:
        if timed.warm is None:
            return {"name": name, "reason": timed.reason}
        kernels, weight_bytes = networks.described(model, self._rules)
        return {
            "name": name,
            "ratio": timed.warm.ratio,
            "half_width": min(timed.warm.half_width, 1.0),
            "weight_bytes": weight_bytes,
            "kernels": [[signature.spec, list(sizes), count] for signature, sizes, count in kernels],
            "role": "heldout" if networks.is_heldout(name) else "fit",
        }


def _point(point: Point) -> dict[str, Any]:
    return {"spec": point.spec, "at": list(point.at), "family": point.family}


def _kernel_result(point: Point, timed: Timed, batch: Batch, boundary: Boundary) -> dict[str, Any]:
    """A record of one kernel, in units of the reference; call and layout are not its own."""
    if timed.warm is None:
        return {**_point(point), "reason": timed.reason}
    own = boundary.own_s(point.signature, point.at, timed.warm.ratio)
    extra = cold_extra(timed, batch.call)
    return {
        **_point(point),
        "ratio": own,
        "half_width": min(timed.warm.half_width * timed.warm.ratio / own, 1.0),
        "visits": timed.warm.visits,
        "cold_extra": extra,
        "role": "heldout" if point.heldout else "fit",
    }
