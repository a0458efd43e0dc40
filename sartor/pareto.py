"""Several budgets at once: a front of verified networks between the tightest limits and the original.

Each point is a whole fit of its own, with a bundle, proof and measurement. Limits are geometric between those that
were asked for and the original's, the tightest first: what cannot be reached is said at once. A front that was
interrupted goes on behind the last point that was delivered.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sartor.budget import Limit
from sartor.errors import EXIT_MET, EXIT_USAGE, UsageError
from sartor.fit import FitOptions, Silent, fit
from sartor.ir.files import write_atomic
from sartor.journal import Journal
from sartor.report import read_report
from sartor.versions import versions

if TYPE_CHECKING:
    from sartor.cost_models.profile import DeviceProfile
    from sartor.data import Data
    from sartor.ir.program import Program
    from sartor.study import Storage
    from sartor.tasks import Runner

SCHEMA = "sartor.pareto/1"
_MOST = 32


@dataclasses.dataclass(frozen=True)
class Front:
    """Outcome of a front.

    Attributes:
        document: of `pareto.json`.
        exit_code: that of the worst point.
        folder: with a bundle per point.
    """

    document: dict[str, Any]
    exit_code: int
    folder: Path


def pareto(
    program: Program,
    options: FitOptions,
    data: Data | None,
    out_dir: str | os.PathLike[str],
    count: int,
    progress: Any = None,
    *,
    runner: Runner | None = None,
    storage: Storage | None = None,
    profile: DeviceProfile | None = None,
) -> Front:
    """Fit `program` to `count` budgets and write `out_dir` with a bundle per point, `pareto.json` and `pareto.html`.

    Args:
        program: as for `sartor.fit.fit`, like all that follows.
        options: of the tightest point.
        data: splits, or None.
        out_dir: folder of the front. It must be empty, or what an interrupted front has left.
        count: points, 2 to 32.
        progress: see `sartor.fit.fit`.
        runner: see `sartor.fit.fit`.
        storage: see `sartor.fit.fit`.
        profile: see `sartor.fit.fit`.

    Raises:
        UsageError: a count out of range, a folder with something else in it, or as `sartor.fit.fit`.
        VerificationError: as `sartor.fit.fit`.
    """
    if not 2 <= count <= _MOST:
        raise UsageError(f"A front has 2 to {_MOST} points, got {count}; use a fit for one.")
    folder, progress = Path(out_dir), progress or Silent()
    journal_path = folder.with_name(f".{folder.name}.pareto.jsonl")
    if folder.exists() and any(folder.iterdir()) and not journal_path.exists():
        raise UsageError(f"The folder '{out_dir}' is not empty; a front needs one of its own.")
    key = {
        "source": program.source.sha256,
        "shapes": {k: list(v) for k, v in program.input_shapes.items()},
        "options": dataclasses.asdict(options),
        "versions": versions(options.target),
        "data": None if data is None else data.fingerprint(),
        "profile": None if profile is None else profile.sha256(),
        "count": count,
    }
    started = folder.exists()
    with Journal(journal_path, key) as journal:
        try:
            reports = []
            budget = options.budget
            for number in range(1, count + 1):
                share = (count + 1 - number) / count
                point = dataclasses.replace(options, budget=eased(budget, share))
                name = f"point-{number}"
                if journal.find("point", number=number) is None:
                    progress(f"point {number} of {count}: {_told(point.budget)}")
                    fit(
                        program, point, data, folder / name, progress,
                        runner=runner, storage=storage, profile=profile,
                    )  # fmt: skip
                    journal.append("point", number=number)
                reports.append(read_report(folder / name))
                if number == 1:
                    budget = as_shares(options.budget, reports[0])
            document = _document(reports)
            write_atomic(folder / "pareto.json", (json.dumps(document, indent=1) + "\n").encode())
            _write_page(folder, count)
        except BaseException as error:
            if getattr(error, "exit_code", None) == EXIT_USAGE and not journal.records:
                journal_path.unlink(missing_ok=True)
                if not started:
                    shutil.rmtree(folder, ignore_errors=True)
            raise
    journal_path.unlink()
    return Front(document, max((p["exit_code"] for p in document["points"]), default=EXIT_MET), folder)


def eased(budget: Mapping[str, Limit], share: float) -> dict[str, Limit]:
    """Limits between those that are given, at a share of 1, and the original's, at 0.

    Absolute limits stay at a share of 1 and are not eased: make them shares first (`as_shares`).
    """
    if share == 1.0:
        return dict(budget)
    return {key: Limit(limit.value**share, True) for key, limit in budget.items()}


def as_shares(budget: Mapping[str, Limit], report: Mapping[str, Any]) -> dict[str, Limit]:
    """Limits as shares of what the original was measured at."""
    found = {}
    for key, limit in budget.items():
        before = report["baseline"]["latency_s"]["median"] if key == "latency" else report["baseline"][key]
        found[key] = limit if limit.relative else Limit(limit.value / before, True)
    return found


def dominated(points: list[tuple[float, float]]) -> list[bool]:
    """Whether another point is at least as fast and as good, and one of both better.

    Args:
        points: latency and score of each.
    """
    return [
        any(other[0] <= mine[0] and other[1] >= mine[1] and other != mine for other in points)
        for mine in points
    ]


def _document(reports: list[dict[str, Any]]) -> dict[str, Any]:
    points = []
    codes = {"met": 0, "budget-missed": 3, "quality-missed": 4}
    for number, report in enumerate(reports, 1):
        result = report["result"]
        points.append(
            {
                "folder": f"point-{number}",
                "status": report["status"],
                "exit_code": codes[report["status"]],
                "budget": report["budget"],
                "latency_ratio": report["ratio"]["latency"],
                "latency_ci95": report["ratio"]["latency_ci95"],
                "macs": result["macs"],
                "weight_bytes": result["weight_bytes"],
                "score": result.get("score"),
            }
        )
    flags = dominated([(p["latency_ratio"], p["score"] or 0.0) for p in points])
    return {
        "schema": SCHEMA,
        "baseline": {key: reports[0]["baseline"].get(key) for key in ("latency_s", "macs", "score")},
        "points": [{**p, "dominated": flag} for p, flag in zip(points, flags, strict=True)],
    }


def _write_page(folder: Path, count: int) -> None:
    from sartor.report.compare import compare
    from sartor.report.compare_page import render

    document = compare([str(folder / f"point-{number}") for number in range(1, count + 1)])
    for bundle in document["bundles"]:
        bundle["folder"] = Path(bundle["folder"]).name
    write_atomic(folder / "pareto.html", render(document).encode())


def _told(budget: Mapping[str, Limit]) -> str:
    return ", ".join(
        f"{key} {limit.value:.3g}{'x' if limit.relative else ''}" for key, limit in budget.items()
    )
