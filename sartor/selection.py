"""Chooses the plan of a fit: propose, apply, measure, recalibrate, tighten or loosen, repeat."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from sartor.cost_models.ladder import Ladder
from sartor.cost_models.profile import DeviceProfile
from sartor.errors import BackendError, MetricUnavailableError, UsageError
from sartor.fit_profile import outdated, sampled_precision
from sartor.ir.channels import ChannelAnalysis
from sartor.ir.fusion import CONTRACTIONS
from sartor.ir.plan import Plan
from sartor.ir.workload import Workload
from sartor.journal import Journal
from sartor.judge import Judge
from sartor.landing import Landing, Seen
from sartor.plan_prices import PlanPrices, channel_step, sized_programs, unreachable
from sartor.profiling.build import fusion_rules
from sartor.strategies.importance import Importance
from sartor.strategies.protocol import strategy
from sartor.strategies.space import Decision, Space, levels
from sartor.study import plan_digest
from sartor.unit_scores import unit_scores
from sartor.workbench import Workbench, static_costs

_MOST_ITERATIONS = 5
_TABLE_S, _SELECT_S = 20.0, 25.0
_PRUNING_SD = 0.04
"""Of the latency of a random pruning: together they weigh no more than a few measured candidates."""


class Selection:
    """Search under limits, steered by a kernel table and corrected by measurements.

    Args:
        bench: target, data and baseline.
        analysis: channel groups of the original.
        blocks: its residual blocks that may go.
        journal: of the run; what it holds is not measured again.
        profile: of the target on this machine; None: the network's own kernels are timed.
        progress: see `sartor.fit.fit`.
    """

    def __init__(
        self,
        bench: Workbench,
        analysis: ChannelAnalysis,
        blocks: Sequence[Any],
        journal: Journal,
        progress: Any,
        profile: DeviceProfile | None = None,
    ):
        self.bench, self.analysis, self.blocks, self.journal = bench, analysis, blocks, journal
        self.program, self.options, self.backend = bench.program, bench.options, bench.backend
        self.progress, self.profile = progress, profile
        self.strategy = strategy(self.options.strategy)
        removable = [b for b in blocks if b.removable]
        self.sizes, reason = sized_programs(
            self.program,
            analysis,
            removable,
            fusion_rules(self.backend),
            resizes=self.strategy.resizes,
            grows=self.strategy.grows,
            keep=self.options.keep,
        )
        self.workload = self.sizes[0].workload
        self.history: list[dict[str, Any]] = []
        self.decisions: list[str] = []
        if reason:
            self.decisions.append(f"the inputs stay as large as they are: {reason}")

    def require_reachable(self, limits: Mapping[str, float], baseline: Mapping[str, float]) -> None:
        """Refuse limits that no plan of the strategy can reach, before anything is measured.

        Args:
            limits: absolute limit by budget key; a latency is not looked at.
            baseline: the original's value by budget key.

        Raises:
            UsageError: a limit is below the floor; the strategy needs data that there are not.
        """
        if self.strategy.needs_data and self.bench.data is None:
            raise UsageError(
                f"Strategy '{self.strategy.name}' judges candidates on data, and there are none; give data, or use "
                "strategy budgeted-greedy."
            )
        static = {key: limit for key, limit in limits.items() if key != "latency"}
        self._check_floor(static, baseline, PlanPrices(self.sizes, static))

    def run(self, limits: Mapping[str, float], baseline: Mapping[str, float]) -> tuple[Plan, float]:
        """The chosen plan and its predicted latency, seconds.

        Args:
            limits: absolute limit by budget key.
            baseline: the original's value by budget key, latency in seconds included.

        Raises:
            UsageError: a limit is below what any plan can reach.
        """
        self.limits, self.baseline = dict(limits), baseline
        self.progress.stage("cost model")
        self.model = self._cost_model()
        self.decisions.append(f"latency is predicted by the {self.model.method}")
        self.prices = PlanPrices(self.sizes, limits, self.model)
        self._check_floor(limits, baseline, self.prices)
        self.progress.stage("search", _MOST_ITERATIONS)
        space = self._space(self.prices)
        landing = Landing(self.limits, self._predict)
        best = landing.run(self.strategy.prepare(space), self._try, _MOST_ITERATIONS)
        self.decisions += [*space.notes, *landing.decisions]
        return best.plan, float(best.predicted["latency"])

    def _step(self, group: Any) -> int:
        return channel_step(self.backend, self.program, self.options.precision, group)

    def _space(self, prices: PlanPrices) -> Space:
        judge = Judge(self.bench, self.analysis, self.blocks, self.journal, self.progress)
        return Space(
            self.analysis,
            self.blocks,
            self._importance,
            prices.input_sizes(),
            self._step,
            judge,
            self.options.seed,
        )

    def _importance(self) -> Importance:
        scores, lines = unit_scores(self.bench, self.analysis, self.blocks)
        self.decisions.extend(lines)
        return scores

    def _predict(self, decision: Decision) -> float:
        """Latency of a decision by the table as it is now, seconds."""
        return float(self.model.estimate_batch(*self._variables(decision.plan)))

    def _variables(self, plan: Plan) -> tuple[Workload, dict[str, float], dict[str, bool]]:
        """What a plan is for a cost model."""
        grown = {name: 1.0 + len(one.copies) / one.size for name, one in plan.widened.items()}
        fractions = {**self.analysis.fractions(plan), **grown}
        return self.prices.workload(plan), fractions, {name: True for name in plan.blocks}

    def _try(self, decisions: Sequence[Decision], iteration: int) -> list[Seen]:
        """Apply, lower and measure decisions, interleaved, or take them from the journal."""
        records = self._known(decisions)
        new = [i for i, record in enumerate(records) if record is None]
        if new:
            from sartor.passes.prune import apply_plan

            pruned = [apply_plan(self.program, decisions[i].plan, self.analysis) for i in new]
            folders = [self.bench.folder / f"step{len(self.history) + i + 1}" for i in new]
            artifacts = [self.bench.lower(p, f) for p, f in zip(pruned, folders, strict=True)]
            measured = self.bench.measure([self.bench.baseline, *artifacts], _SELECT_S * (1 + len(new)) / 2)
            for i, candidate, artifact, ratio in zip(new, pruned, artifacts, measured.ratios, strict=True):
                fields: dict[str, Any] = {
                    "plan": plan_digest(decisions[i].plan),
                    "ratio": ratio.latency,
                    "ci95": list(ratio.latency_ci95),
                    "predicted_latency_s": float(decisions[i].predicted["latency"]),
                    "static": static_costs(candidate),
                }
                if self.bench.data is not None:
                    fields["score"] = self.bench.score(artifact, "evaluate")[0]
                records[i] = self.journal.append("measured", **fields)
                self.bench.share(decisions[i].plan, fields, self.limits, self.baseline["latency"])
        found = [record for record in records if record is not None]
        for decision, record in zip(decisions, found, strict=True):
            self._learn(decision, record, iteration)
        self.progress.advance()
        baseline_s = self.baseline.get("latency", 0.0)
        return [Seen(r["static"], r["ratio"] * baseline_s, r["ci95"][1] * baseline_s) for r in found]

    def _known(self, decisions: Sequence[Decision]) -> list[Mapping[str, Any] | None]:
        """Records of decisions that this run, or another of its study, has measured."""
        records: list[Mapping[str, Any] | None] = []
        for decision in decisions:
            digest = plan_digest(decision.plan)
            known = self.journal.find("measured", plan=digest)
            if known is None and (shared := self.bench.shared(digest)) is not None:
                known = self.journal.append("measured", **shared)
            records.append(known)
        return records

    def _learn(self, decision: Decision, known: Mapping[str, Any], iteration: int) -> None:
        """Note a measured decision, and correct the cost model by it."""
        step = len(self.history) + 1
        entry: dict[str, Any] = {
            "step": step,
            "iteration": iteration,
            "change": describe(decision),
            "measured_ratio": known["ratio"],
            "measured_ci95": known["ci95"],
            "predicted_latency_s": known["predicted_latency_s"],
        }
        if "score" in known:
            entry["score"] = known["score"]
        self.history.append(entry)
        if "latency" in self.limits:
            workload, fractions, removed = self._variables(decision.plan)
            latency_s = known["ratio"] * self.baseline["latency"]
            self.model.calibrate(workload, latency_s, fractions, removed)
            entry["scales"] = {family: round(scale, 4) for family, scale in self.model.scales.items()}
        self.progress(f"step {step}: {known['ratio']:.3f}x measured, {entry['change']}")

    def _cost_model(self) -> Ladder:
        """What predicts latency: the profile that was given, or one of this network's own kernels."""
        known = self.journal.find("table")
        if known is not None:
            self.decisions += known["notes"]
            return Ladder.from_json(known["table"])
        notes: list[str] = []
        prunings: Sequence[tuple[Plan, float]] = ()
        profile = self.profile
        if profile is not None and (why := self._refreshed(profile)):
            notes.append(f"the device profile is not used: {why}")
            profile = None
        if profile is None:
            profile, prunings, more = self._sampled()
            notes += more
        model = Ladder(profile)
        model.calibrate(self.workload, self.baseline["latency"])
        for plan, ratio in prunings:
            latency_s = ratio * self.baseline["latency"]
            removed = {name: True for name in plan.blocks}
            model.calibrate(self.workload, latency_s, self.analysis.fractions(plan), removed, sd=_PRUNING_SD)
        self.decisions += notes
        self.journal.append("table", table=model.to_json(), notes=notes)
        return model

    def _refreshed(self, profile: DeviceProfile) -> str:
        """Why a profile does not help here, in words; empty where it does."""
        if why := outdated(profile, self.backend, self.bench.runner):
            return why
        model, measured_s = Ladder(profile), self.baseline["latency"]
        if self.options.precision != sampled_precision(self.options.precision) or not profile.interval:
            return ""
        predicted_s, low, high = map(float, model.intervals_batch(self.workload))
        if low <= measured_s <= high:
            return ""
        return f"it says {predicted_s:.3g} s of the original ({low:.3g} to {high:.3g}), which takes {measured_s:.3g} s"

    def _sampled(self) -> tuple[DeviceProfile, Sequence[tuple[Plan, float]], list[str]]:
        """Kernels inside the network and prunings of it, with what these take, and what is to be said about it.

        Alone where the target does not tell, and for precisions that a pass makes: networks follow other laws in them.
        """
        from sartor.backends import host
        from sartor.cost_models.sampling import sample_kernels
        from sartor.profiling.prunings import sample_prunings

        precision = sampled_precision(self.options.precision)
        options = dataclasses.replace(self.bench.target, flush_denormals=True, precision=precision)
        target = {"name": self.options.target, **self.bench.target.to_dict()}
        device = {"name": runner.device} if (runner := self.bench.runner).device else host.device()

        def grid(op_type: str) -> int:
            return self.backend.channel_grid(op_type, self.options.precision)

        try:
            if precision != self.options.precision:
                raise MetricUnavailableError(f"they are timed in {precision} for {self.options.precision}")
            with Journal(self.bench.folder / "kernels.jsonl", {}) as journal:
                found = sample_prunings(
                    self.program,
                    self.analysis,
                    [block.name for block in self.blocks if block.removable],
                    lambda models, effort: self.bench.time_inside(models, options, effort),
                    journal,
                    levels=lambda group: levels(group, self._step(group)),
                    rules=fusion_rules(self.backend),
                    target={**target, "channel_grid": {op: grid(op) for op in sorted(CONTRACTIONS)}},
                    device=device,
                    seconds=_TABLE_S,
                    seed=self.options.seed,
                )
            note = f"kernels were timed inside the network and {len(found.ratios)} random prunings of it"
            return found.profile, found.ratios, [note]
        except (MetricUnavailableError, BackendError) as error:
            notes = [f"kernels were timed one by one: {error}"]
        profile = sample_kernels(
            self.workload,
            lambda models: self.bench.time_models(models, options, repeats=3),
            target=target,
            device=device,
            channel_grid=grid,
            seconds=_TABLE_S,
        )
        return profile, (), notes

    def _check_floor(
        self, limits: Mapping[str, float], baseline: Mapping[str, float], prices: PlanPrices
    ) -> None:
        space = self._space(prices)
        states = self.strategy.smallest(space)
        priced = space.priced(states, {})
        for key, limit in limits.items():
            at = min(range(len(states)), key=lambda i: priced[i][key])
            least = priced[at][key]
            slack = 0.9 if key == "latency" else 1.0  # the latency floor is a prediction
            if least * slack > limit:
                state = states[at]
                fractions = {name: state.kept[name] / counts[0] for name, counts in space.levels.items()}
                removed = {name: True for name in state.removed}
                term = prices.largest_term(key, state.size, fractions, removed)
                raise unreachable(key, limit, least, baseline[key], term)


def describe(decision: Decision) -> str:
    """One line: how many groups have other widths, which blocks are removed, and the size of the inputs."""
    plan = decision.plan
    parts = [f"{len(plan.groups)} groups narrowed"]
    if plan.widened:
        parts.append(f"{len(plan.widened)} widened")
    if plan.blocks:
        parts.append(f"{len(plan.blocks)} blocks removed ({', '.join(itertools.islice(plan.blocks, 4))})")
    parts += [f"input '{name}' {'x'.join(map(str, shape))}" for name, shape in plan.sizes.items()]
    return ", ".join(parts)
