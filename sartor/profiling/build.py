"""`sartor profile`: times kernels and networks on a target until the minutes are over, and fits a profile.

Every batch of times is one record of a journal beside the profile, so that a run which was killed goes on where
it was; the profile itself appears at the end, whole. Order: kernels drawn by `design`, whole networks with the kernels
inside them, kernels where the model so far is unsure, the fit.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sartor.backends import host
from sartor.backends.protocol import Backend, TargetOptions
from sartor.cost_models.profile import SCHEMA, Company, DeviceProfile, of_role
from sartor.cost_models.samples import empty_model
from sartor.cost_models.signatures import Signature
from sartor.errors import BackendError, UsageError
from sartor.ir.fusion_rules import CONTRACTIONS, GENERIC, FusionRules
from sartor.journal import Journal
from sartor.profiling import networks
from sartor.profiling.design import Design, Novelty, Point, Uncertainty
from sartor.profiling.inside import Inside, InsideEffort, Insider, ModelTimer
from sartor.profiling.inside_samples import UnmadeError, alike_among, carrier_model, of_carrier, whole
from sartor.profiling.records import SENTENCE, Records, best_look, look_of, network_result

_NETWORKS_AT_ONCE = len(networks.KINDS)
_CARRIED = 32  # kernels of one carrier
_ANCHORED, _LATENCY = 3, InsideEffort(visits=4, profile_s=0.0)  # rounds of networks between anchors
_DRAWN, _AGAIN, _TIMED, _REFINED = 0.05, 0.47, 0.84, 0.90
"""Of the minutes: until when kernels are drawn, networks timed for the first time only, networks timed, kernels chosen
by uncertainty. The rest is the fit. Why drawn kernels have so few: docs/profiles.md."""
_MOST_AT_ONCE = 60  # carriers that one fit chooses
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
    timer: Insider | None = None,
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
    # What was measured in another way is begun anew.
    key = {"what": SENTENCE, "schema": SCHEMA, "target": facts, "cpu": host.cpu_model(), "seed": seed}
    first = b"".join(networks.network(f"{kind}-{seed}-0") for kind in networks.KINDS)
    key["networks"] = hashlib.sha256(first).hexdigest()
    with Journal(journal_path(path), key) as journal:
        builder = _Builder(backend, journal, progress, minutes * 60, seed, clock)
        own = ModelTimer(target, options, pin=pin, seed=seed) if timer is None else None
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
    """That of a learned model which is fitted to the samples so far, of kernels that run as often as most samples did.

    None without LightGBM, or if they are too few.
    """
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

    period_s, alike = (
        float(np.median([getattr(s, name) for s in samples])) for name in ("period_s", "alike")
    )
    usual = Company(alike)

    def unsure(signature: Signature, sizes: Sequence[np.ndarray]) -> np.ndarray:
        known = model.knows(signature)
        return model.predict(signature, sizes, period_s, usual)[1] if known else np.array(math.inf)

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
        self._backend = backend.name
        self._rules = fusion_rules(backend)
        self._design = Design(backend.capabilities().fuses, seed)
        self._progress, self._seconds, self._seed = progress, seconds, seed
        self.records = Records(journal, clock)

    def measure(
        self, timer: Insider, uncertainty_of: Callable[[DeviceProfile], Uncertainty | None] | None
    ) -> str:
        """All stages that the journal does not hold yet; what ended them."""
        self._progress.stage("sampling kernels")
        if not self.records.batches("call"):
            self._call(timer)
        while self.records.spent_s < _DRAWN * self._seconds or not self.records.batches("design"):
            self._carrier(timer, "design", self._design.batch(self.records.next("design"), _CARRIED))
        self._progress.stage("timing networks and the kernels inside them")
        while self.records.spent_s < _TIMED * self._seconds or not self.records.batches("networks"):
            late = self.records.spent_s > _AGAIN * self._seconds
            if late and self.records.next("again") < self.records.next("networks"):
                self._networks_again(timer)
                continue
            if late and (doubted := self.records.doubted()):
                self._latencies("doubted", doubted[:_NETWORKS_AT_ONCE], timer, _LATENCY)
                continue
            self._networks(timer)
            if self.records.next("networks") % _ANCHORED == 0:
                self._anchors(timer)
        self._require_kernels()
        self._progress.stage("sampling where it is unsure")
        while self.records.spent_s < _REFINED * self._seconds:
            unsure: Uncertainty | None = None
            if uncertainty_of is not None:
                unsure = uncertainty_of(self.records.profile({}, host.device(), 0.0, ""))
            points = [*self.records.points()]
            number, taken = self.records.next("refine"), [p.key for p in points]
            count = _CARRIED * self._carriers_of_a_refinement()
            chosen = self._design.refine(number, count, unsure or Novelty(points), taken)
            for start in range(0, len(chosen), _CARRIED):
                if self.records.spent_s < _REFINED * self._seconds or not start:
                    self._carrier(timer, "refine", chosen[start : start + _CARRIED])
        return "minutes"

    def _call(self, timer: Insider) -> None:
        """An empty call. Where it cannot be timed, calls cost nothing that is known of."""
        inside = timer([empty_model()], InsideEffort())[0]
        self.records.saw(inside.reference_s)
        self.records.add("call", ratio=None if inside.latency is None else inside.latency.ratio)

    def _require_kernels(self) -> None:
        drawn, whole = (
            [r for record in self.records.batches(stage) for r in record["results"]]
            for stage in ("design", "networks")
        )
        results = [*drawn, *whole]
        if not any("ratio" in r for r in drawn) and not any(r.get("observed") for r in whole):
            reasons = Counter(r["reason"] for r in results if "reason" in r)
            why = (
                reasons.most_common(1)[0][0] if reasons else "it does not say which nodes its kernels compute"
            )
            raise BackendError(
                f"No kernel could be timed inside a model on '{self._backend}': {why}. A profile needs a target whose "
                "profiler tells the times of its kernels."
            )

    def _carriers_of_a_refinement(self) -> int:
        """As many as the time allows: there is time for one fit that chooses."""
        done = self.records.batches("design")
        pace = max(sum(float(r["spent_s"]) for r in done) / len(done), 1e-3)
        return max(1, min(_MOST_AT_ONCE, int((_REFINED - _TIMED) * self._seconds / pace)))

    def _carrier(self, timer: Insider, stage: str, points: Sequence[Point]) -> None:
        """Time kernels side by side; where one spoils the model, those of either half by themselves."""
        results: list[dict[str, Any]] = []
        self._carried(timer, points, results)
        self.records.add(stage, results=results)
        self._progress.advance(len(results))

    def _carried(self, timer: Insider, points: Sequence[Point], results: list[dict[str, Any]]) -> None:
        looks: list[Inside] = []
        try:
            carrier = carrier_model(points)
            inside = timer([carrier], InsideEffort())[0]
            # Where a model happens to lie in memory is a tenth of its time, for all of its kernels.
            looks = [inside, *timer([carrier], _LATENCY)] if inside.latency is not None else []
        except UnmadeError as error:
            inside = Inside(None, reason=str(error))
        if inside.latency is None and len(points) > 1:
            middle = len(points) // 2
            self._carried(timer, points[:middle], results)
            self._carried(timer, points[middle:], results)
            return
        self.records.saw(inside.reference_s)
        rows_of_model, total = whole(inside.kernels)
        model = {
            "ratio": inside.latency.ratio if inside.latency is not None else math.nan,
            "sum": total,
            "rows": rows_of_model,
            **best_look([look_of(look.latency) for look in looks if look.latency is not None]),
        }
        found = of_carrier(points, inside.kernels) if inside.latency is not None else [None] * len(points)
        alike = alike_among(points)
        for point, time_and_rows in zip(points, found, strict=True):
            described = {"spec": point.spec, "at": list(point.at), "family": point.family}
            if time_and_rows is None or not time_and_rows[0] > 0:
                results.append({**described, "reason": inside.reason or "no time was told for it"})
                continue
            role = "heldout" if point.heldout else "fit"
            ratio, rows = time_and_rows
            others = {"alike": alike[point.family, point.spec["op"]], "twins": 1, "model": model}
            results.append({**described, "ratio": ratio, "rows": rows, "role": role, **others})

    def _networks(self, timer: Insider) -> None:
        number = self.records.next("networks")
        source = networks.names(self._seed)
        for _ in range(number * _NETWORKS_AT_ONCE):
            next(source)
        chosen = [next(source) for _ in range(_NETWORKS_AT_ONCE)]
        models = [networks.network(name) for name in chosen]
        found = timer(models, InsideEffort())
        results = [
            network_result(name, networks.role_of(name), model, inside, self._rules)
            for name, model, inside in zip(chosen, models, found, strict=True)
        ]
        for inside in found:
            self.records.saw(inside.reference_s)
        self.records.add("networks", results=results, conditions=dict(getattr(timer, "conditions", {})))
        self._progress.advance(len(results))

    def _networks_again(self, timer: Insider) -> None:
        """A batch of networks, minutes later: what disturbs a machine for seconds disturbs all visits of a network."""
        batch = self.records.batches("networks")[self.records.next("again")]
        self._latencies("again", [r["name"] for r in batch["results"] if "ratio" in r], timer, _LATENCY)

    def _anchors(self, timer: Insider) -> None:
        self._latencies("anchors", networks.anchors(self._seed), timer, _LATENCY)

    def _latencies(self, stage: str, names: Sequence[str], timer: Insider, effort: InsideEffort) -> None:
        found = timer([networks.network(name) for name in names], effort)
        results = [
            {"name": name, **look_of(inside.latency)}
            for name, inside in zip(names, found, strict=True)
            if inside.latency is not None
        ]
        self.records.add(stage, results=results)
