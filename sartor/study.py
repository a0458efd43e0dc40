"""Measured candidates in an Optuna storage, which several runs and machines share and which outlives all of them.

A run's own truth is its journal. A study is what is known about one model on one device, whoever measured it: each
candidate is a finished trial with the plan as JSON, what was measured as values, and how far it is from each limit
as constraints, so that Optuna's own tools read it. A trial is written in one transaction when its measurement is
done; a run that is killed leaves nothing half written, and no trial that waits for it.

A study belongs to everything that changes a measurement (model, shapes, target, threads, precision, device, versions,
data), as a hash in its name: runs that differ in any of it never see each other's trials, in one storage or not.

Reference: T. Akiba et al., "Optuna: A Next-generation Hyperparameter Optimization Framework", KDD 2019.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sartor.errors import BackendError, UsageError
from sartor.ir.plan import Plan

if TYPE_CHECKING:
    from sartor.ir.program import Program
    from sartor.workbench import FitOptions

SCHEMA = "sartor.study/1"
_EXTRA = "sartor[study]"
_PIECE = 30_000
"""Characters of a plan per attribute: a text column of MySQL holds 64 KiB."""
_BUSY_S = 60.0
_ATTEMPTS = 8


@dataclasses.dataclass(frozen=True)
class Trial:
    """One measured candidate.

    Attributes:
        number: in the study, from 0.
        plan: what was done to the model.
        fields: as in the journal: `ratio`, `ci95`, `static`, and `score` where there were data.
        constraints: per limit, measured value over limit, less 1; met where not above 0.
    """

    number: int
    plan: Plan
    fields: Mapping[str, Any]
    constraints: Mapping[str, float]


class Storage:
    """A database of studies.

    Args:
        location: a file, which becomes an SQLite database, or the URL of a database, as SQLAlchemy takes it.

    Raises:
        UsageError: Optuna or the driver of the database is not installed, or the database cannot be used.
    """

    def __init__(self, location: str):
        from sartor.backends.telemetry import import_vendor

        self._url, file = _url(location)
        self._optuna = import_vendor("optuna", _EXTRA)
        self.name = _without_password(self._url)
        self._opened: Any = None
        if file is None or file.exists():  # a command that is refused leaves no file behind
            self._open()

    def study(
        self, label: str, key: Any, groups: Mapping[str, int], blocks: Sequence[str], scored: bool
    ) -> Study:
        """The study of `key`, made where there is none.

        Args:
            label: for people, at the start of its name; the model's, for example.
            key: JSON value of everything that changes a measurement.
            groups: size by channel group.
            blocks: names of the blocks that may go.
            scored: candidates have a score beside their latency.
        """
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        name = f"{label}-{digest[:16]}"
        metrics = ["latency_ratio", "score"] if scored else ["latency_ratio"]
        with _quiet(self._optuna), self._refusals("opened"):
            study = self._optuna.create_study(
                storage=self._open(),
                study_name=name,
                directions=["minimize", "maximize"][: len(metrics)],
                load_if_exists=True,
            )
            if "key" not in study.user_attrs:
                study.set_metric_names(metrics)
                study.set_user_attr("schema", SCHEMA)
                study.set_user_attr("key", key)
        return Study(self, study, groups, blocks)

    def _open(self) -> Any:
        """The storage; another process may be making its tables at this moment."""
        connection = {"connect_args": {"timeout": _BUSY_S}} if self._url.startswith("sqlite") else {}
        for attempt in range(_ATTEMPTS if self._opened is None else 0):
            try:
                with _quiet(self._optuna):
                    self._opened = self._optuna.storages.RDBStorage(self._url, engine_kwargs=connection)
                break
            except Exception as error:
                if attempt == _ATTEMPTS - 1 or not _may_pass(error):
                    raise UsageError(
                        f"The study storage '{self.name}' cannot be used ({_reason(error)}). Give a file for SQLite, "
                        "or the URL of a database whose driver is installed."
                    ) from error
                time.sleep(0.2 * (attempt + 1))
        return self._opened

    @contextlib.contextmanager
    def _refusals(self, what: str) -> Iterator[None]:
        try:
            yield
        except UsageError:
            raise
        except Exception as error:
            raise BackendError(
                f"The study in '{self.name}' could not be {what} ({_reason(error)}). What was measured is in the "
                "journal; see to the database and repeat the command."
            ) from error


class Study:
    """What was measured of one model on one device; see `Storage.study`."""

    def __init__(self, storage: Storage, study: Any, groups: Mapping[str, int], blocks: Sequence[str]):
        self._storage, self._study = storage, study
        self._optuna = storage._optuna
        self._groups, self._blocks = dict(groups), tuple(blocks)

    @property
    def name(self) -> str:
        """Its name in the storage."""
        return str(self._study.study_name)

    def record(self, plan: Plan, fields: Mapping[str, Any], constraints: Mapping[str, float]) -> None:
        """Add a measured candidate; it is in the database when this returns.

        Args:
            plan: what was done to the model.
            fields: JSON values; `ratio` is needed, `score` where the study has scores.
            constraints: see `Trial`.

        Raises:
            BackendError: the database does not take it.
        """
        text = plan.to_json()
        pieces = [text[start : start + _PIECE] for start in range(0, len(text), _PIECE)]
        values = [float(fields[key]) for key in ("ratio", "score")[: len(self._study.directions)]]
        attributes = {
            "plan_sha256": plan_digest(plan),
            "fields": json.dumps(dict(fields), allow_nan=False, sort_keys=True),
            "plan_pieces": len(pieces),
            **{f"plan_{index}": piece for index, piece in enumerate(pieces)},
        }
        params, distributions = self._choices(plan)
        with _quiet(self._optuna), self._storage._refusals("written"):
            self._study.add_trial(
                self._optuna.trial.create_trial(
                    values=values,
                    params=params,
                    distributions=distributions,
                    user_attrs=attributes,
                    constraints=dict(constraints),
                )
            )

    def find(self, digest: str) -> dict[str, Any] | None:
        """Fields of the latest trial of the plan with this digest, or None."""
        for trial in reversed(self._finished()):
            if trial.user_attrs.get("plan_sha256") == digest:
                fields: dict[str, Any] = json.loads(trial.user_attrs["fields"])
                return fields
        return None

    def trials(self) -> tuple[Trial, ...]:
        """Everything measured so far, by whoever it was."""
        return tuple(self._read(trial) for trial in self._finished())

    def _finished(self) -> list[Any]:
        """Trials that are whole and ours: another program may have added its own to the study."""
        with _quiet(self._optuna), self._storage._refusals("read"):
            complete = (self._optuna.trial.TrialState.COMPLETE,)
            found = self._study.get_trials(deepcopy=False, states=complete)
        return [trial for trial in found if "plan_sha256" in trial.user_attrs]

    def _read(self, trial: Any) -> Trial:
        attributes = trial.user_attrs
        text = "".join(attributes[f"plan_{index}"] for index in range(attributes["plan_pieces"]))
        return Trial(
            trial.number, Plan.from_json(text), json.loads(attributes["fields"]), dict(trial.constraints)
        )

    def _choices(self, plan: Plan) -> tuple[dict[str, int], dict[str, Any]]:
        """The plan as parameters, for samplers and plots: kept units per group, and whether a block is kept."""
        integer = self._optuna.distributions.IntDistribution
        kept = {
            name: len(plan.groups[name].keep) if name in plan.groups else size
            for name, size in self._groups.items()
        }
        blocks = {f"keep {name}": int(name not in plan.blocks) for name in self._blocks}
        return {**kept, **blocks}, {
            **{name: integer(1, size) for name, size in self._groups.items()},
            **{name: integer(0, 1) for name in blocks},
        }


def study_of(
    storage: Storage,
    run: Mapping[str, Any],
    options: FitOptions,
    program: Program,
    groups: Sequence[Any],
    blocks: Sequence[Any],
) -> Study:
    """The study of one run: it is about what the run's journal is about, without what the run aims at.

    Args:
        storage: where it is.
        run: key of the run's journal.
        options: of the run.
        program: the original.
        groups: its channel groups.
        blocks: its residual blocks.
    """
    from sartor.backends import host

    facts = host.conditions()
    key = {
        **{name: run[name] for name in ("source", "shapes", "versions", "data")},
        **{"target": options.target, "threads": options.threads, "precision": options.precision},
        "device": run.get("device") or {name: facts[name] for name in ("cpu", "cores", "platform")},
        # decides which samples calibrate int8; the candidates of other precisions are the same for every seed
        "seed": options.seed if options.precision == "int8" else None,
    }
    return storage.study(
        Path(program.source.name).stem[:40] or "model",
        key,
        {group.name: group.size for group in groups},
        [block.name for block in blocks if block.removable],
        run["data"] is not None,
    )


def plan_digest(plan: Plan) -> str:
    """What a plan is known by in journals and studies."""
    return hashlib.sha256(plan.to_json().encode()).hexdigest()


def _url(location: str) -> tuple[str, Path | None]:
    """The URL, and the file where it is one that was named as such."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", location):
        return location, None
    path = Path(location)
    if not location or path.is_dir() or not path.absolute().parent.is_dir():
        raise UsageError(
            f"The study '{location}' is neither a database URL nor a file in a folder that exists; give one of them."
        )
    return f"sqlite:///{path.absolute()}", path


def _without_password(url: str) -> str:
    return re.sub(r"(://[^/:@]*):[^@/]*@", r"\1:***@", url).removeprefix("sqlite:///")


def _may_pass(error: BaseException) -> bool:
    """Two processes that make the tables at once: one of them finds what the other has just made."""
    said = str(error).lower()
    return any(word in said for word in ("already exists", "locked", "unique constraint", "duplicate"))


def _reason(error: BaseException) -> str:
    """The innermost cause, which is the database's own sentence, without its SQL and without a password."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {re.sub(r':[^:@/ ]*@', ':***@', text)}"


@contextlib.contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """Neither log lines nor notes on what is experimental; afterwards everything is as the caller had it."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)
