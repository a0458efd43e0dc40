"""`Pipeline`: passes in the order they are written, with instruments between them.

The order is never changed, and a fixpoint exists only as an explicit, bounded `repeat{max=N}(…)`.
`Pipeline.parse(str(pipeline)) == pipeline`; see `pipeline_text` for the grammar.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from sartor.errors import UsageError
from sartor.ir.program import Program
from sartor.passes.base import Context, Pass, PassResult
from sartor.passes.instruments import Instrument, Step, VerifyAfterEach
from sartor.passes.item_values import made, values_of
from sartor.passes.options import option, options_of, validate
from sartor.passes.pipeline_text import ItemText, parse, text_error
from sartor.passes.registry import REGISTRY, pass_class

REPEAT = "repeat"


@dataclasses.dataclass(frozen=True)
class RepeatOptions:
    """Options of `repeat{max=N}(…)`."""

    max: int = option(help="Upper bound of the number of rounds.", minimum=1, maximum=1000)

    def __post_init__(self) -> None:
        validate(self, REPEAT)


@dataclasses.dataclass(frozen=True)
class Repeat:
    """Run `items` in order, again and again, until a whole round changes nothing or `max` is reached."""

    items: tuple[Item, ...]
    max: int

    def __post_init__(self) -> None:
        RepeatOptions(self.max)
        if not self.items:
            raise UsageError(
                "'repeat' has nothing to repeat; write repeat{max=3}(fold-constants,remove-dead)."
            )

    def __str__(self) -> str:
        return f"{REPEAT}{{max={self.max}}}({_text(self.items)})"


Item = Pass | Repeat


@dataclasses.dataclass(frozen=True)
class StepResult:
    """One executed pass: where it stood, and what it did."""

    step: Step
    result: PassResult


@dataclasses.dataclass(frozen=True)
class PipelineResult:
    """What a pipeline did.

    Attributes:
        program: the final program; the given one when nothing changed.
        results: every executed pass in order, rounds of a repeat unrolled.
        unconverged: text of each repeat that still changed the program in its last allowed round.
    """

    program: Program
    results: tuple[StepResult, ...] = ()
    unconverged: tuple[str, ...] = ()

    @property
    def modified(self) -> bool:
        """Whether any pass changed the program."""
        return any(entry.result.modified for entry in self.results)


class Pipeline:
    """An immutable sequence of passes.

    Args:
        passes: passes and repeats, executed as given.
        instruments: called between passes, in order. By default every pass is followed by the verifier;
            an explicit empty sequence switches that off.
    """

    def __init__(self, passes: Iterable[Item], instruments: Sequence[Instrument] | None = None):
        self.passes: tuple[Item, ...] = tuple(passes)
        for item in self.passes:
            if not isinstance(item, (Pass, Repeat)):
                raise UsageError(f"A pipeline is made of passes, got {item!r}; use Pipeline.parse for text.")
        self.instruments = tuple((VerifyAfterEach(),) if instruments is None else instruments)

    @classmethod
    def parse(cls, text: str, instruments: Sequence[Instrument] | None = None) -> Pipeline:
        """Build a pipeline from text such as `prune-channels{ratio=0.5},fold-batch-norm`.

        Raises:
            UsageError: bad syntax, unknown pass or option, or a bad value; names the column.
        """
        return cls((_build(text, item) for item in parse(text)), instruments)

    def __str__(self) -> str:
        return _text(self.passes)

    def __repr__(self) -> str:
        return f"Pipeline.parse({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pipeline) and self.passes == other.passes

    def __hash__(self) -> int:
        return hash(self.passes)

    def check(self, context: Context, program: Program | None = None) -> None:
        """Refuse what can be seen to be missing before anything runs; see `Pass.check`.

        Raises:
            UsageError: a pass needs data, and there are none.
        """
        for item in _passes(self.passes):
            item.check(context, program)

    def run(self, program: Program, context: Context | None = None) -> PipelineResult:
        """Run every pass in order. `program` is never changed.

        Raises:
            UsageError: a pass needs data, and there are none; said before the first pass runs.
            SartorError: a pass or an instrument failed; notes name the step, and the reproducer if one
                was asked for.
        """
        context = context if context is not None else Context()
        self.check(context, program)
        if context.original is None:
            context = dataclasses.replace(context, original=program)
        execution = _Execution(program, context, self.instruments)
        execution.run(self.passes, "")
        return PipelineResult(execution.program, tuple(execution.results), tuple(execution.unconverged))


class _Execution:
    """State of one run: the current program and what happened so far."""

    def __init__(self, program: Program, context: Context, instruments: tuple[Instrument, ...]):
        self.program = program
        self.context = context
        self.instruments = instruments
        self.results: list[StepResult] = []
        self.unconverged: list[str] = []

    def run(self, items: tuple[Item, ...], following: str) -> bool:
        """Run `items`; `following` is the text of what comes after them. Returns whether any modified."""
        modified = False
        for index, item in enumerate(items):
            rest = _join(_text(items[index + 1 :]), following)
            if isinstance(item, Repeat):
                modified |= self._repeat(item, rest)
            else:
                modified |= self._step(item, _join(str(item), rest))
        return modified

    def _repeat(self, item: Repeat, rest: str) -> bool:
        modified = False
        for left in range(item.max - 1, -1, -1):
            again = str(Repeat(item.items, left)) if left else ""
            if not self.run(item.items, _join(again, rest)):
                return modified
            modified = True
        self.unconverged.append(str(item))
        return modified

    def _step(self, item: Pass, remaining: str) -> bool:
        number = 1 + sum(type(entry.step.item) is type(item) for entry in self.results)
        step = Step(len(self.results) + 1, item, f"{item.name} #{number}", remaining, self.context)
        before = self.program
        try:
            for instrument in self.instruments:
                instrument.before_pass(step, before)
            result = item.run(before, self.context)
            for instrument in self.instruments:
                instrument.after_pass(step, before, result)
        except Exception as error:
            error.add_note(f"In step {step.index} ({step.label}) of the pipeline.")
            for instrument in self.instruments:
                instrument.on_failure(step, before, error)
            raise
        self.program = result.program
        self.results.append(StepResult(step, result))
        return result.modified


def _passes(items: Iterable[Item]) -> Iterator[Pass]:
    """Every pass, those of repeats once."""
    for item in items:
        if isinstance(item, Repeat):
            yield from _passes(item.items)
        else:
            yield item


def _text(items: Iterable[Item]) -> str:
    return ",".join(str(item) for item in items)


def _join(*parts: str) -> str:
    return ",".join(part for part in parts if part)


def _build(text: str, item: ItemText) -> Item:
    if item.name == REPEAT:
        if item.body is None:
            raise text_error(text, item.column, "'repeat' needs passes in parentheses.")
        values = values_of(text, item, options_of(RepeatOptions))
        body = tuple(_build(text, inner) for inner in item.body)
        return made(text, item, lambda: Repeat(body, **values))
    if item.body is not None:
        raise text_error(
            text, item.column, f"'{item.name}' takes no passes in parentheses; only 'repeat' does."
        )
    try:
        cls = pass_class(item.name)
    except UsageError as error:
        located = text_error(text, item.column, str(error).rstrip("."))
        for note in getattr(error, "__notes__", ()):
            located.add_note(note)
        raise located from error
    values = values_of(text, item, options_of(cls))
    return made(text, item, lambda: cls(**values))


__all__ = ["REGISTRY", "Pipeline", "PipelineResult", "Repeat", "RepeatOptions", "StepResult"]
