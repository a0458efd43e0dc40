"""`Pass`: the protocol of every transformation. A strategy decides, a pass does.

A pass is a frozen dataclass whose fields are its options. `plan` looks and decides, `apply` changes the
graph through a `Rewriter`, and `run` wraps both: it clones, applies, and observes what changed.
See docs/passes.md for the list of passes, and CONTRIBUTING.md for how to write one.
"""

from __future__ import annotations

import abc
import dataclasses
import enum
import fnmatch
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, final

from sartor.errors import InternalError, UsageError
from sartor.ir.program import Program
from sartor.passes.options import Option, option, options_of, validate
from sartor.passes.rewriter import Rewriter
from sartor.passes.structure import Signature, signature_of, structure_of
from sartor.plugins import Registry

__all__ = ["Context", "Option", "Pass", "PassResult", "Planned", "Refusal", "Semantics", "option"]

CRITERIA = "random, l1, l2, fpgm, bn-gamma, taylor, fisher, taylor-map, taylor-weight, activation, hrank"
"""Criteria that come with Sartor, for the help of passes, which do not know them."""
LAYER_CRITERIA = f"{CRITERIA}, imprint; several joined by + are ranked by the sum of their ranks"
"""Those of blocks and layers, averaged over their filters (LayerPrune)."""

_IMPORTANCE = Registry("sartor.importance", "importance", {"criteria": "sartor.strategies.supply:importance"})
_SUPPLIES = Registry(
    "sartor.supplies",
    "supply",
    {
        "batches": "sartor.calibration:batches",
        "imprinted": "sartor.strategies.supply:imprinted",
        "statistics": "sartor.recovery.supply:statistics",
    },
)
CALIBRATION_SPLITS = ("calibration", "train", "evaluate")
"""Splits that passes look at: the first of them that is there."""
_KEBAB = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


class Semantics(enum.Enum):
    """What a pass promises about the function that the program computes. It selects the mandatory tests."""

    EXACT = "exact"
    """The same function, up to rounding."""
    APPROXIMATE = "approximate"
    """Another function, for which a stated oracle holds."""
    NEEDS_TRAINING = "needs-training"
    """Another function, useful only after training."""


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why something was left as it is.

    Attributes:
        node: name of the node, group or block concerned.
        reason: one sentence, observed against expected.
    """

    node: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Context:
    """What passes may look at besides the program. The same object serves a whole pipeline.

    Attributes:
        data: the data splits by name (`train`, `calibration`, `evaluate`, `test`), each a re-iterable of
            `(inputs: dict[str, ndarray], labels | None)`.
        loss: differentiable loss `(outputs, labels) → scalar`, for criteria that need gradients.
        metric: score `(outputs, labels) → number in [0, 1]` of a whole split; see `sartor.scoring` for those
            that are taken without one.
        seed: seed of passes that have no `seed` option of their own.
        keep: globs of parameter and node names that must stay as they are.
        extras: anything else, by a name that the reading pass documents.
        original: the program before all passes, for those that compare with it; a pipeline fills it in.
    """

    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    loss: Callable[..., Any] | None = None
    metric: Callable[..., Any] | None = None
    seed: int = 0
    keep: tuple[str, ...] = ()
    extras: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    original: Program | None = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def importance(self) -> Callable[..., Any]:
        """What scores units and blocks: `(criterion, program, analysis or None, blocks, context)`.

        `extras["importance"]`, or the criteria that come with Sartor. They are found through the plugin
        registry, because passes do not know strategies.
        """
        given = self.extras.get("importance")
        return given if given is not None else _IMPORTANCE.load("criteria")

    def supplied(self, name: str) -> Callable[..., Any]:
        """A function that passes need and do not know: `batches` of data, `statistics` of norms.

        `extras[name]`, or what comes with Sartor, found as `importance` is.

        Raises:
            UsageError: nothing provides it.
        """
        given = self.extras.get(name)
        return given if given is not None else _SUPPLIES.load(name)

    @property
    def has_data(self) -> bool:
        """Whether there is a split that passes may look at."""
        return any(self.data.get(name) is not None for name in CALIBRATION_SPLITS)

    def is_kept(self, name: str) -> bool:
        """Whether a `keep` glob (case-sensitive) matches the name of a parameter or node."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.keep)


@dataclasses.dataclass(frozen=True)
class Planned:
    """What `plan` returns when it also has refusals to report.

    Attributes:
        data: the plan, or None when there is nothing to do.
        refusals: what will be left as it is, and why.
    """

    data: Any
    refusals: tuple[Refusal, ...] = ()


@dataclasses.dataclass(frozen=True)
class PassResult:
    """What one pass did.

    Attributes:
        program: the new program, or the given one when nothing changed.
        modified: whether the structure or any weight changed; observed, not reported by the pass.
        refusals: what was left as it is, and why.
        counts: number of changes by kind.
        plan: what was applied, so that it can be stored and replayed; None when nothing was to be done.
    """

    program: Program
    modified: bool
    refusals: tuple[Refusal, ...] = ()
    counts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    plan: Any = None


@dataclasses.dataclass(frozen=True)
class Pass(abc.ABC):
    """Base of all passes. Subclass it with `@dataclasses.dataclass(frozen=True)`.

    Class attributes:
        name: kebab-case verb–object; the file has the same name in snake_case.
        semantics: what the pass promises.

    Fields are options, declared with `option(default, help=…, minimum=…, choices=…)`; their types are
    bool, int, float, str, tuple[T, ...] of these, or one of these with None.
    """

    name: ClassVar[str]
    semantics: ClassVar[Semantics]
    resizes_inputs: ClassVar[bool] = False
    """Whether shapes of inputs and outputs may change; names and types never do."""
    needs_data: ClassVar[bool] = False
    """Whether it runs the network on data; without them it is refused before anything runs."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        name = cls.__dict__.get("name")
        if name is not None and not _KEBAB.fullmatch(name):
            raise InternalError(f"Pass class '{cls.__name__}' is named '{name}'; expected kebab-case.")
        if name is not None and not isinstance(getattr(cls, "semantics", None), Semantics):
            raise InternalError(f"Pass '{name}' declares no semantics; expected a `Semantics` member.")

    def __post_init__(self) -> None:
        validate(self, self.name)

    @abc.abstractmethod
    def plan(self, program: Program, context: Context) -> Any:
        """Decide what to do, without changing anything.

        Returns:
            The plan: JSON-able data or an object with `to_json()`, naming nodes and values rather than
            holding them. None when there is nothing to do. `Planned(data, refusals)` to give reasons.
        """

    @abc.abstractmethod
    def apply(self, program: Program, plan: Any, rewriter: Rewriter) -> None:
        """Do what `plan` says, mechanically, to `program`, only through `rewriter`.

        Args:
            program: a private clone of the program that was planned for.
            plan: what `plan` returned (its data), possibly read back from JSON.
            rewriter: changes `program` and counts.
        """

    @final
    def check(self, context: Context, program: Program | None = None) -> None:
        """Refuse what can be seen to be missing before anything runs.

        Args:
            context: what the pass may look at.
            program: the first one of the pipeline, if it is at hand; the message names its inputs.

        Raises:
            UsageError: the pass needs data, and there are none.
        """
        if not self.needs_data or context.has_data:
            return
        shapes = program.input_shapes if program is not None else {}
        inputs = ", ".join(f"'{name}' {list(shape)}" for name, shape in shapes.items())
        raise UsageError(
            f"There is no calibration data: pass '{self}' runs the network on real inputs"
            f"{f' ({inputs})' if inputs else ''}. Give --data FILE.npz or FILE.py:function with the split "
            "'calibration'."
        )

    @final
    def run(self, program: Program, context: Context | None = None) -> PassResult:
        """Plan and apply. `program` is never changed; the result shares its unchanged tensors.

        Raises:
            SartorError: as the pass does; a note names the pass and its options.
        """
        context = context if context is not None else Context()
        before = structure_of(program)
        try:
            self.check(context, program)
            planned = self.plan(program, context)
            if not isinstance(planned, Planned):
                planned = Planned(planned)
            self._require_untouched(program, before)
            if planned.data is None:
                return PassResult(program, False, planned.refusals)
            result = self._execute(program, planned.data)
        except Exception as error:
            error.add_note(f"In pass '{self}'.")
            raise
        return dataclasses.replace(result, refusals=planned.refusals + result.refusals)

    @final
    def replay(self, program: Program, plan: Any) -> PassResult:
        """Apply a stored plan without planning again. `program` is never changed."""
        try:
            return self._execute(program, plan)
        except Exception as error:
            error.add_note(f"In pass '{self}', replaying a plan.")
            raise

    def _execute(self, program: Program, plan: Any) -> PassResult:
        before = structure_of(program)
        clone = program.clone()
        rewriter = Rewriter(clone, self.name)
        self.apply(clone, plan, rewriter)
        clone.invalidate()
        self._require_untouched(program, before)
        known, found = (
            (_unsized(s) if self.resizes_inputs else s) for s in map(signature_of, (program, clone))
        )
        if found != known:
            raise InternalError(
                f"Pass '{self.name}' changed the signature: {signature_of(program)} became "
                f"{signature_of(clone)}. Names and types of inputs and outputs must stay, and their shapes unless the "
                "pass declares `resizes_inputs`."
            )
        modified = structure_of(clone) != before
        if modified:
            clone.applied = (*program.applied, str(self))
        refusals = tuple(Refusal(node, reason) for node, reason in rewriter.refusals)
        return PassResult(clone if modified else program, modified, refusals, dict(rewriter.counts), plan)

    def _require_untouched(self, program: Program, before: Any) -> None:
        if structure_of(program) != before:
            raise InternalError(
                f"Pass '{self.name}' changed the program it was given; only the rewriter's clone may change."
            )

    @final
    def spec(self, *, defaults: bool = False) -> str:
        """Pipeline text of this pass, e.g. `prune-channels{ratio=0.5,seed=3}`.

        Args:
            defaults: also print options that have their default value.
        """
        parts = [
            f"{entry.name}={entry.to_text(getattr(self, entry.field))}"
            for entry in options_of(type(self))
            if defaults or entry.required or getattr(self, entry.field) != entry.default
        ]
        return self.name + (f"{{{','.join(parts)}}}" if parts else "")

    def __str__(self) -> str:
        return self.spec()


def _unsized(signature: tuple[Signature, Signature]) -> tuple[tuple[tuple[str, str], ...], ...]:
    return tuple(tuple((name, kind) for name, kind, _ in side) for side in signature)
