"""The study: the score that is left by every cut alone, most of the network first, as far as time allows.

original → importance → every group at the middle ratio and every block → the other ratios → page and document. What is
scored goes to a journal beside the output, from which an interrupted study resumes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sartor.errors import BackendError, UsageError
from sartor.fit import Silent
from sartor.ir.blocks import Block, residual_blocks
from sartor.ir.channels import ChannelAnalysis, channel_groups
from sartor.ir.program import Program
from sartor.journal import Journal
from sartor.passes.base import Context
from sartor.passes.candidates import kept_by
from sartor.passes.prune import apply_plan
from sartor.sensitivity.cuts import COSTS, Cut, Cuts
from sartor.sensitivity.trial import HeldSamples, Trial, predictor, reestimated
from sartor.strategies.criteria import criterion
from sartor.strategies.importance import Subject, block_weights
from sartor.versions import versions

if TYPE_CHECKING:
    from sartor.data import Data

SCHEMA = "sartor.sensitivity/1"
SPLIT = "evaluate"
"""What is scored: the split that selection may look at. `test` stays unseen."""
_CALIBRATION_SAMPLES = 1024
_STATISTICS_SAMPLES = 128
_PIECE = 16
"""Samples that are run at once: what fits a time limit is found out in steps of so many."""
_FIRST_ROUND_SHARE, _STATISTICS_PASSES = 0.7, 5
"""Share of a time limit for the first round, and how many scores a pass in torch for statistics takes."""


@dataclasses.dataclass(frozen=True)
class StudyOptions:
    """What is cut and how it is judged.

    Attributes:
        criterion: what says which units of a group go first; see `sartor.strategies.criteria.CRITERIA`.
        ratios: shares of a group's units to remove, each inside (0, 1); kept ascending and once each.
        samples: most samples of `evaluate` that are scored.
        seconds: time limit, seconds; None for none. Where it is short, fewer samples are scored, and what was not
            reached is named.
        reestimate: take the running statistics of BatchNormalization anew after each cut, on `calibration`.
        seed: of criteria that draw.
        keep: globs of parameters, nodes and modules that stay.

    Raises:
        UsageError: an option outside its range, or an unknown criterion.
    """

    criterion: str = "l2"
    ratios: tuple[float, ...] = (0.25, 0.5, 0.75)
    samples: int = 512
    seconds: float | None = None
    reestimate: bool = False
    seed: int = 0
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        wrong = [ratio for ratio in self.ratios if not 0.0 < ratio < 1.0]
        if wrong or not self.ratios:
            found = f"{wrong[0]:g}" if wrong else "none"
            raise UsageError(
                f"A ratio of units to remove is {found}; give one or more, each above 0 and below 1."
            )
        object.__setattr__(self, "ratios", tuple(sorted(set(self.ratios))))
        if self.samples < 1:
            raise UsageError(f"{self.samples} samples are to be scored; a score needs at least one.")
        if self.seconds is not None and not self.seconds > 0.0:
            raise UsageError(f"The time limit is {self.seconds:g} s; it must be above 0.")
        criterion(self.criterion)


def study(
    program: Program,
    options: StudyOptions,
    data: Data,
    out_dir: str | os.PathLike[str],
    progress: Any = None,
) -> dict[str, Any]:
    """Score every cut alone and write `sensitivity.json` and `sensitivity.html` to `out_dir`.

    Keys of the document, schema `sartor.sensitivity/1`:

    - `source` `{kind, name, sha256}`; `criterion`, `ratios`, `seed`, `keep`, `reestimate`, `time_limit_s` (absent
      without one), as in the options; `versions`.
    - `data` `{source, fingerprint, split, short_of}`: `short_of` is `time` or `memory` where fewer samples were scored
      than asked for.
    - `baseline` `{score, samples, macs, parameters, weight_bytes}`: of the original. With `reestimate` also
      `reestimated_score`, of the original with statistics taken anew: what is lost to that alone.
    - `batch_normalizations`: how many there are, whose statistics a cut leaves behind unless they are taken anew.
    - `groups` `[{name, size, granularity, points}]`, in execution order; `points`, by ascending ratio,
      `[{ratio, units_removed, score, drop, macs_saved, macs_share, parameters_saved, parameters_share,
      weight_bytes_saved}]`. `drop` is the original's score minus `score`; a share is of the original's.
    - `blocks` `[{name, weights, score, drop, …}]`: the same of removable residual blocks, with the names of the weights
      inside.
    - A point without a score has a `reason` in its place, such as an output that is not finite.
    - `missing` `[{kind, name, ratio}]`: what the time did not suffice for; `complete`: whether there is none.
    - `uncut` `[{name, ratio, reason}]`: groups too small for a ratio.
    - `seconds`: wall time of the run that delivered.

    Args:
        program: canonical program.
        options: what is cut, and how it is judged.
        data: splits; `evaluate` is scored, criteria and statistics see `calibration`.
        out_dir: folder to write; an earlier study there is replaced.
        progress: callable with a line of text, with `stage` and `advance`; silent by default.

    Returns:
        The document.

    Raises:
        UsageError: nothing can be removed, the data give no score, the criterion does not apply, or the folder holds
            something else; nothing is written.
        BackendError: ONNX Runtime cannot run the network.
    """
    from sartor.report.bundle import check_destination

    folder = Path(out_dir)
    check_destination(folder)
    missing = [path for path in folder.parents if not path.exists()]
    try:
        return _Study(program, options, data, folder, progress or Silent()).run()
    except BaseException:
        for path in missing:
            with contextlib.suppress(OSError):  # there is something in it
                path.rmdir()
        raise


class _Study:
    def __init__(self, program: Program, options: StudyOptions, data: Data, folder: Path, progress: Any):
        self.program, self.options, self.data = program, options, data
        self.folder, self.progress = folder, progress
        self.started = time.monotonic()
        self.limit_s = math.inf if options.seconds is None else options.seconds
        self._carriers = program.batch.inputs if program.batch.symbolic else ()
        self.analysis: ChannelAnalysis = channel_groups(program, options.keep)
        kept = Context(keep=options.keep)
        self.blocks: list[Block] = [
            b for b in residual_blocks(program) if b.removable and kept_by(program, b, kept) is None
        ]
        if not self.analysis.groups and not self.blocks:
            besides = " besides what --keep protects" if options.keep else ""
            raise UsageError(
                f"Nothing of '{program.source.name}' can be removed: it has no channel group and no removable residual "
                f"block{besides}. 'sartor inspect' says why."
            )

    def run(self) -> dict[str, Any]:
        path = self.folder.with_name(f".{self.folder.name}.journal.jsonl")
        # Not the time limit: it changes how much is scored, never what a score is.
        options = {k: v for k, v in dataclasses.asdict(self.options).items() if k != "seconds"}
        key = {
            "schema": SCHEMA,
            "source": self.program.source.sha256,
            "shapes": {k: list(v) for k, v in self.program.input_shapes.items()},
            "options": options,
            "versions": versions("onnxruntime"),
            "data": self.data.fingerprint(),
        }
        with Journal(path, key) as self.journal:
            if self.journal.find(
                "delivered"
            ):  # killed before it could be removed: a finished study, not ours
                self.journal.clear()
            try:
                document = self._run()
                self._write(document)
            except BaseException as error:
                if self.journal.find("scored"):
                    error.add_note(f"What was scored is kept in '{path}'; the same command resumes from it.")
                else:
                    path.unlink(missing_ok=True)
                raise
        path.unlink()
        return document

    # ---- stages ----------------------------------------------------------------------------
    def _run(self) -> dict[str, Any]:
        self.progress.stage("scoring the original")
        held, trial, baseline = self._baseline()
        self.statistics: HeldSamples | None = None
        if self.options.reestimate:
            baseline["reestimated_score"] = self._control(trial, held.samples)
        self.progress.stage(f"importance by '{self.options.criterion}'")
        cuts = Cuts(self.program, self.analysis, self.blocks, self._importance(), self.options.ratios)
        found: dict[Cut, dict[str, Any]] = {}
        for members in cuts.rounds:
            if members and self._in_time():
                self.progress.stage(_title(members), len(members))
            for cut in members:
                known = self._scored(trial, cut, self._in_time() or not found)
                if known is not None:
                    found[cut] = known
                self.progress.advance()
        return self._document(cuts, found, {**baseline, **cuts.costs}, held.short_of)

    def _in_time(self) -> bool:
        return time.monotonic() - self.started < self.limit_s

    def _baseline(self) -> tuple[HeldSamples, Trial, dict[str, Any]]:
        """The samples, what scores on them, and the original's score."""
        known = self.journal.find("baseline")
        started = time.perf_counter()
        predict = predictor(self.program)
        load_s = time.perf_counter() - started
        cuts = 1 + len(self.analysis.groups) + len(self.blocks)
        passes = 1 + (_STATISTICS_PASSES if self.options.reestimate else 0)
        held = HeldSamples(
            self.data.evaluate,
            self.options.samples if known is None else known["samples"],
            self._carriers,
            piece=_PIECE,
            seconds=(_FIRST_ROUND_SHARE * self.limit_s / cuts - load_s) / passes
            if known is None
            else math.inf,
        )
        trial = Trial(held, self.data.metric)
        value = trial.score(predict)
        if known is None:
            samples, short_of = held.samples, held.short_of
            known = self.journal.append("baseline", score=value, samples=samples, short_of=short_of)
        held.short_of = known["short_of"]
        return held, trial, {"score": known["score"], "samples": held.samples}

    def _control(self, trial: Trial, samples: int) -> float:
        """The score of the original with statistics taken anew, on no more samples than are scored."""
        most = min(_STATISTICS_SAMPLES, samples)
        self.statistics = HeldSamples(self.data.calibration, most, self._carriers)
        return trial.score(predictor(reestimated(self.program, self.statistics)))

    def _importance(self) -> Mapping[str, np.ndarray]:
        """Scores of units by group.

        Raises:
            UsageError: the criterion does not apply, or gives no finite number.
        """
        samples = HeldSamples(self.data.calibration, _CALIBRATION_SAMPLES)
        found = criterion(self.options.criterion).unit_importance(
            Subject(self.program, self.analysis, (), samples, self.data.loss, self.options.seed)
        )
        for name, scores in found.groups.items():
            if not np.isfinite(scores).all():
                raise UsageError(
                    f"Criterion '{self.options.criterion}' gives group '{name}' a score that is no finite number; use "
                    "another one, or --keep the group."
                )
        return found.groups

    def _scored(self, trial: Trial, cut: Cut, in_time: bool) -> dict[str, Any] | None:
        """The record of a cut; None where it has none yet and there is no time left for it."""
        digest = hashlib.sha256(cut.plan.to_json().encode()).hexdigest()
        known = self.journal.find("scored", plan=digest)
        if known is None and in_time:
            result: dict[str, Any]
            try:
                pruned = apply_plan(self.program, cut.plan, self.analysis)
                if self.statistics is not None:
                    pruned = reestimated(pruned, self.statistics)
                result = {"score": trial.score(predictor(pruned))}
            except (
                UsageError,
                BackendError,
            ) as error:  # the original had a score: it is the cut that has none
                result = {"reason": str(error)}
            known = self.journal.append("scored", plan=digest, cut=cut.label, **result)
        return known

    # ---- result ----------------------------------------------------------------------------
    def _document(
        self, cuts: Cuts, found: Mapping[Cut, Mapping[str, Any]], baseline: dict[str, Any], short_of: str
    ) -> dict[str, Any]:
        points = {(c.kind, c.name, c.ratio): _point(c, record, baseline) for c, record in found.items()}
        missing = [cut.label for cut in cuts if cut not in found]
        options = dataclasses.asdict(self.options)
        limit_s = options.pop("seconds")
        return {
            "schema": SCHEMA,
            "source": dataclasses.asdict(self.program.source),
            **{key: options[key] for key in ("criterion", "seed", "reestimate")},
            **{key: list(options[key]) for key in ("ratios", "keep")},
            **({} if limit_s is None else {"time_limit_s": limit_s}),
            "data": {
                "source": self.data.source,
                "fingerprint": self.data.fingerprint(),
                "split": SPLIT,
                "short_of": short_of,
            },
            "baseline": baseline,
            "batch_normalizations": sum(n.op_type == "BatchNormalization" for n in self.program.nodes()),
            "complete": not missing,
            "groups": [
                {
                    "name": group.name,
                    "size": group.size,
                    "granularity": group.granularity,
                    "points": [
                        points["group", group.name, ratio]
                        for ratio in self.options.ratios
                        if ("group", group.name, ratio) in points
                    ],
                }
                for group in self.analysis.groups
            ],
            "blocks": [
                {
                    "name": block.name,
                    "weights": block_weights(self.program, block),
                    **points["block", block.name, None],
                }
                for block in self.blocks
                if ("block", block.name, None) in points
            ],
            "missing": missing,
            "uncut": [dataclasses.asdict(one) for one in cuts.uncut],
            "seconds": round(time.monotonic() - self.started, 3),
            "versions": versions("onnxruntime"),
        }

    def _write(self, document: dict[str, Any]) -> None:
        from sartor.report.bundle import Bundle
        from sartor.report.sensitivity_page import render

        with Bundle(self.folder) as bundle:
            text = json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
            (bundle.folder / "sensitivity.json").write_text(text, encoding="utf-8")
            (bundle.folder / "sensitivity.html").write_text(render(document), encoding="utf-8")
            self.journal.append("delivered")
            bundle.commit(source={"sha256": self.program.source.sha256, "name": self.program.source.name})


def _title(members: Sequence[Cut]) -> str:
    ratios = {cut.ratio for cut in members if cut.ratio is not None}
    parts = [f"{100 * ratio:g} % of each group" for ratio in ratios]
    if any(cut.kind == "block" for cut in members):
        parts.append("each block")
    return f"scoring without {' and without '.join(parts)}"


def _point(cut: Cut, record: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[str, Any]:
    """One cut of the document: what it leaves of the score, and what it saves."""
    point: dict[str, Any] = {}
    if cut.ratio is not None:
        entry = cut.plan.groups[cut.name]
        point |= {"ratio": cut.ratio, "units_removed": entry.size - len(entry.keep)}
    if "score" in record:
        point |= {"score": record["score"], "drop": baseline["score"] - record["score"]}
    else:
        point["reason"] = record["reason"]
    for key in COSTS:
        point[f"{key}_saved"] = cut.saved[key]
        if key != "weight_bytes":
            point[f"{key}_share"] = round(cut.saved[key] / (baseline[key] or 1), 6)
    return point
