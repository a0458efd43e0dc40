"""Pipeline text, construction, order, repeat."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import numpy as np
import pytest
from builders import node, program_from_nodes, random_inputs, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from models import ALL, captured

from sartor.errors import InternalError, UsageError
from sartor.ir.fx import run_twin
from sartor.passes import registry
from sartor.passes.base import Context, Pass, PassResult, Semantics, option
from sartor.passes.fold_batch_norm import FoldBatchNorm
from sartor.passes.fold_constants import FoldConstants
from sartor.passes.instruments import Instrument
from sartor.passes.pipeline import Pipeline, Repeat
from sartor.passes.pipeline_text import parse
from sartor.passes.registry import REGISTRY, pass_class
from sartor.passes.remove_dead import RemoveDead
from sartor.passes.rewriter import Rewriter


@dataclasses.dataclass(frozen=True)
class Everything(Pass):
    """A pass with one option of every kind."""

    name: ClassVar[str] = "test-everything"
    semantics: ClassVar[Semantics] = Semantics.EXACT
    flag: bool = option(False, help="A flag.")
    count: int = option(0, help="A count.")
    ratio_kept: float = option(0.5, help="A ratio.", minimum=-1e6, maximum=1e6)
    word: str = option("w", help="A word.")
    choice: str = option("a", help="A choice.", choices=("a", "b"))
    names: tuple[str, ...] = option((), help="Names.")
    flags: tuple[bool, ...] = option((), help="Flags.")
    sizes: tuple[int, ...] = option((1,), help="Sizes.")
    scales: tuple[float, ...] | None = option(None, help="Scales.")
    maybe: str | None = option(None, help="Perhaps a word.")
    limit: int | None = option(None, help="Perhaps a limit.", minimum=0)

    def plan(self, program, context):
        return None

    def apply(self, program, plan, rewriter):
        raise AssertionError("nothing was planned")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needy(Everything):
    """A pass with a required option and a rule over two options."""

    name: ClassVar[str] = "test-needy"
    low: int = option(0, help="Low.")
    high: int = option(help="High.")

    def __post_init__(self):
        super().__post_init__()
        if self.low > self.high:
            raise UsageError(f"Options 'low' and 'high' must ascend, got {self.low} and {self.high}.")


@dataclasses.dataclass(frozen=True)
class Twins(Everything):
    """A pass with a choice that two options have."""

    name: ClassVar[str] = "test-twins"
    other: str = option("a", help="Another choice.", choices=("a", "c"))


@dataclasses.dataclass(frozen=True)
class Halve(Pass):
    """Halve weight `w` until it is below a limit."""

    name: ClassVar[str] = "test-halve"
    semantics: ClassVar[Semantics] = Semantics.APPROXIMATE
    limit: float = option(1.0, help="Limit.")

    def plan(self, program, context):
        return {} if program.initializer_array("w").max() > self.limit else None

    def apply(self, program, plan, rewriter):
        rewriter.set_initializer("w", program.initializer_array("w") / np.float32(2))


PASSES = (Everything, Needy, Twins, Halve)


@pytest.fixture(autouse=True, scope="module")
def registered():
    """Make the passes of this file known by name, as an entry point would."""
    for cls in PASSES:
        REGISTRY._builtin[cls.name] = f"{__name__}:{cls.__name__}"
    REGISTRY.refresh()
    for cls in PASSES:
        REGISTRY._loaded[cls.name] = cls
    yield
    for cls in PASSES:
        del REGISTRY._builtin[cls.name]
    REGISTRY.refresh()


def scaled(value=8.0):
    return program_from_nodes(
        [node("Mul", ["x", "w"], ["y"])], {"x": ("N", 3)}, ["y"], {"w": np.full(3, value, np.float32)}
    )


finite = st.floats(-1e6, 1e6, allow_nan=False)
words = st.text(max_size=12)
everything = st.builds(
    Everything,
    flag=st.booleans(),
    count=st.integers(),
    ratio_kept=finite,
    word=words | st.sampled_from(["none", "true", "3", "layer1.*", "a b", '"', "\\", "ü", "a,b", "[x]", ""]),
    choice=st.sampled_from(["a", "b"]),
    names=st.lists(words, max_size=3).map(tuple),
    flags=st.lists(st.booleans(), max_size=3).map(tuple),
    sizes=st.lists(st.integers(), max_size=3).map(tuple),
    scales=st.none() | st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=3).map(tuple),
    maybe=st.none() | words | st.just("none"),
    limit=st.none() | st.integers(0),
)
passes = everything | st.sampled_from([FoldBatchNorm(), RemoveDead(), FoldConstants(max_bytes=7)])
items = st.recursive(
    passes,
    lambda inner: st.builds(Repeat, st.lists(inner, min_size=1, max_size=3).map(tuple), st.integers(1, 1000)),
    max_leaves=5,
)


class TestRoundTrip:
    @settings(max_examples=300, deadline=None)
    @given(st.lists(items, max_size=4))
    def test_parse_of_print(self, made):
        pipeline = Pipeline(made)
        again = Pipeline.parse(str(pipeline))
        assert again == pipeline and str(again) == str(pipeline)
        signs = [math.copysign(1, p.ratio_kept) for p in made if isinstance(p, Everything)]
        assert signs == [math.copysign(1, p.ratio_kept) for p in again.passes if isinstance(p, Everything)]

    @settings(max_examples=300, deadline=None)
    @given(everything)
    def test_with_all_defaults_printed(self, made):
        assert Pipeline.parse(made.spec(defaults=True)).passes == (made,)

    @settings(max_examples=300, deadline=None)
    @given(st.text(alphabet='ab-,{}()[]="\\ 0.5\n', max_size=30))
    def test_any_text_parses_or_is_a_usage_error(self, text):
        try:
            parse(text)
        except UsageError as error:
            assert "of the pipeline)" in str(error)

    @pytest.mark.parametrize(
        ("text", "printed"),
        [
            ("", ""),
            ("fold-batch-norm", "fold-batch-norm"),
            (" fold-batch-norm { } , remove-dead ", "fold-batch-norm,remove-dead"),
            ("fold-constants{max_bytes=5}", "fold-constants{max-bytes=5}"),
            ("fold-constants{max-bytes=67108864}", "fold-constants"),
            ("test-everything{ratio-kept=1}", "test-everything{ratio-kept=1.0}"),
            ("test-everything{ratio-kept=1e-3}", "test-everything{ratio-kept=0.001}"),
            ('test-everything{word="none",maybe="none"}', 'test-everything{word=none,maybe="none"}'),
            ("test-everything{maybe=none,sizes=[]}", "test-everything{sizes=[]}"),
            ("repeat{max=3}(fold-constants,remove-dead)", "repeat{max=3}(fold-constants,remove-dead)"),
        ],
    )
    def test_canonical_text(self, text, printed):
        assert str(Pipeline.parse(text)) == printed
        assert repr(Pipeline.parse(text)) == f"Pipeline.parse({printed!r})"


class TestErrors:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (
                "fold-batchnorm",
                r"Unknown pass 'fold-batchnorm'.*Did you mean 'fold-batch-norm'\? \(at column 1",
            ),
            ("remove-dead,fold-constant{}", r"Did you mean 'fold-constants'\? \(at column 13 "),
            (
                "fold-constants{max-byte=3}",
                r"Unknown option 'max-byte' of 'fold-constants'; known: 'max-bytes'. "
                r"Did you mean 'max-bytes'\? \(at column 16 ",
            ),
            (
                "remove-dead{ratio=1}",
                r"Unknown option 'ratio' of 'remove-dead'; known: none\. \(at column 13 ",
            ),
            (
                "fold-constants{max-bytes=-3}",
                r"'max-bytes' of 'fold-constants' must be int ≥ 0 \(bytes\), got '-3' \(at column 26 ",
            ),
            ("fold-constants{max-bytes=1_0}", r"got '1_0'"),
            ("fold-constants{max-bytes=1.5}", r"got '1.5'"),
            ('fold-constants{max-bytes="5"}', r"got '5'"),
            ("fold-constants{max-bytes=[5]}", r"got '\[5\]'"),
            ("fold-constants{max-bytes=none}", r"got 'none'"),
            ("fold-constants{max-bytes=1,max_bytes=2}", r"'max-bytes' of 'fold-constants' is given twice"),
            ("test-everything{flag=yes}", r"'flag' .* must be bool, got 'yes'"),
            ("test-everything{ratio-kept=inf}", r"got 'inf'"),
            ("test-everything{ratio-kept=1e999}", r"got '1e999'"),
            ("test-everything{sizes=3}", r"'sizes' .* must be \[int, …\], got '3'"),
            ("test-everything{choice=c}", r"must be one of a, b, got 'c'"),
            ("test-needy", r"'test-needy' needs option 'high' \(at column 1 "),
            (
                "remove-dead,test-needy{low=3,high=1}",
                r"'low' and 'high' must ascend, got 3 and 1 \(at column 13 ",
            ),
            ("repeat(remove-dead)", r"'repeat' needs option 'max'"),
            ("repeat{max=0}(remove-dead)", r"'max' of 'repeat' must be int ≥ 1 and ≤ 1000, got '0'"),
            ("repeat{max=2}()", r"'repeat' has nothing to repeat"),
            ("repeat{max=2}", r"'repeat' needs passes in parentheses"),
            ("remove-dead(fold-constants)", r"'remove-dead' takes no passes in parentheses"),
            ("remove-dead,", r"Expected the name of a pass, found the end\. \(at column 13 "),
            (
                "remove-dead fold-constants",
                r"Expected ',' or the end of the pipeline, found 'fold-constants'",
            ),
            ("fold-constants{max-bytes}", r"Expected '=' after option 'max-bytes' \(at column 16 "),
            ("fold-constants{max-bytes 1}", r"Expected '=' after option 'max-bytes', found '1'"),
            ("test-everything{flag,flag=true}", r"'flag' of 'test-everything' is given twice"),
            (
                "test-everything{flog}",
                r"'flog' may not stand alone .* 'a', 'b', 'flag'\. Did you mean 'flag'",
            ),
            ("remove-dead{int8}", r"'int8' may not stand alone in 'remove-dead'; words that may: none"),
            ("test-twins{a}", r"'a' may not stand alone in 'test-twins'; words that may: 'b', 'c', 'flag'"),
            ("fold-constants{max-bytes=", r"Expected a value, found the end"),
            ("fold-constants{max-bytes=1", r"Expected ',' or '}' after an option, found the end"),
            ("repeat{max=2}(remove-dead", r"Expected ',' or '\)' after a pass, found the end"),
            ('test-everything{word="a}', r"unterminated string"),
            (r'test-everything{word="\q"}', r"not valid JSON"),
            ("remove-dead;fold-constants", r"unexpected character ';'. \(at column 12 "),
            ("repeat{max=1}(" * 40, r"nest deeper than 16"),
        ],
    )
    def test_message_and_column(self, text, message):
        with pytest.raises(UsageError, match=message):
            Pipeline.parse(text)

    def test_the_text_is_shown_with_a_caret(self):
        with pytest.raises(UsageError) as caught:
            Pipeline.parse("remove-dead,oops")
        assert caught.value.__notes__[0] == "  remove-dead,oops\n              ^"

    def test_words_alone(self):
        assert Pipeline.parse("test-everything{flag,b}") == Pipeline([Everything(flag=True, choice="b")])
        assert str(Pipeline.parse("test-everything{ b , flag }")) == "test-everything{flag=true,choice=b}"
        text = "fold-batch-norm,quantize{int8, per-channel, calibration=entropy}"
        assert str(Pipeline.parse(text)) == "fold-batch-norm,quantize{calibration=entropy}"
        assert Pipeline.parse("quantize{int8,per_channel=false,percentile}") == Pipeline.parse(
            "quantize{bits=8,per-channel=false,calibration=percentile}"
        )
        assert Pipeline.parse("cast{fp16}") == Pipeline.parse("cast{to=fp16}")

    def test_only_passes(self):
        with pytest.raises(UsageError, match=r"made of passes, got 'remove-dead'; use Pipeline.parse"):
            Pipeline(["remove-dead"])


class TestRegistry:
    def test_builtins_are_listed_without_import(self):
        assert {"fold-batch-norm", "fold-constants", "prune-channels", "remove-blocks", "remove-dead"} <= set(
            REGISTRY.names()
        )

    @pytest.mark.parametrize(
        ("loaded", "problem"),
        [
            (dict, "is not a subclass"),
            (RemoveDead, "its own name is 'remove-dead'"),
            (type("Bare", (Halve,), {"name": "test-bare"}), "lacks the decorator"),
        ],
    )
    def test_wrong_registration(self, monkeypatch, loaded, problem):
        monkeypatch.setattr(registry.REGISTRY, "load", lambda name: loaded)
        with pytest.raises(UsageError, match=f"The pass 'test-bare', registered by 'unknown'.*{problem}"):
            pass_class("test-bare")


class Recorder(Instrument):
    def __init__(self):
        self.events = []

    def before_pass(self, step, program):
        self.events.append(("before", step.label, step.remaining))

    def after_pass(self, step, before, result):
        self.events.append(("after", step.label, result.modified))

    def on_failure(self, step, before, error):
        self.events.append(("failure", step.label, str(error)))


class TestRun:
    def test_order_is_kept_and_steps_are_numbered(self):
        recorder = Recorder()
        program = scaled()
        result = Pipeline.parse("test-halve,remove-dead,test-halve", [recorder]).run(program)
        assert [e.step.label for e in result.results] == ["test-halve #1", "remove-dead #1", "test-halve #2"]
        assert [e.step.index for e in result.results] == [1, 2, 3]
        assert result.program.initializer_array("w")[0] == 2 and program.initializer_array("w")[0] == 8
        assert recorder.events[0] == ("before", "test-halve #1", "test-halve,remove-dead,test-halve")
        assert recorder.events[4] == ("before", "test-halve #2", "test-halve")
        assert result.modified and result.program.applied == ("test-halve", "test-halve")

    def test_repeat_stops_when_a_round_changes_nothing(self):
        result = Pipeline.parse("repeat{max=10}(test-halve,remove-dead)", []).run(scaled())
        assert [e.result.modified for e in result.results] == [True, False] * 3 + [False, False]
        assert result.program.initializer_array("w")[0] == 1 and result.unconverged == ()

    def test_repeat_is_bounded_and_says_so(self):
        result = Pipeline.parse("repeat{max=2}(test-halve)", []).run(scaled())
        assert len(result.results) == 2 and result.unconverged == ("repeat{max=2}(test-halve)",)
        assert result.program.initializer_array("w")[0] == 2

    def test_remaining_text_inside_a_repeat(self):
        recorder = Recorder()
        Pipeline.parse("repeat{max=2}(test-halve,remove-dead),fold-constants", [recorder]).run(scaled())
        remaining = [text for kind, _, text in recorder.events if kind == "before"]
        assert remaining == [
            "test-halve,remove-dead,repeat{max=1}(test-halve,remove-dead),fold-constants",
            "remove-dead,repeat{max=1}(test-halve,remove-dead),fold-constants",
            "test-halve,remove-dead,fold-constants",
            "remove-dead,fold-constants",
            "fold-constants",
        ]

    def test_failure_reaches_instruments_and_names_the_step(self, monkeypatch):
        def fail(self, program, plan, rewriter):
            raise InternalError("planted")

        monkeypatch.setattr(Halve, "apply", fail)
        recorder = Recorder()
        with pytest.raises(InternalError, match="planted") as caught:
            Pipeline.parse("remove-dead,test-halve{limit=2}", [recorder]).run(scaled())
        assert recorder.events[-1] == ("failure", "test-halve #1", "planted")
        assert caught.value.__notes__ == [
            "In pass 'test-halve{limit=2.0}'.",
            "In step 2 (test-halve #1) of the pipeline.",
        ]

    def test_context_reaches_the_pass(self, monkeypatch):
        seen = []
        monkeypatch.setattr(Halve, "plan", lambda self, program, context: seen.append(context))
        context = Context(seed=7)
        Pipeline([Halve()], []).run(scaled(), context)
        Pipeline([Halve()], []).run(scaled())
        assert seen == [context, Context()]

    def test_empty_pipeline(self):
        program = scaled()
        result = Pipeline([]).run(program)
        assert result.program is program and not result.modified and isinstance(result.results, tuple)

    def test_results_are_pass_results(self):
        (entry,) = Pipeline([RemoveDead()], []).run(scaled()).results
        assert isinstance(entry.result, PassResult)


@pytest.mark.parametrize("name", sorted(ALL))
def test_deploy_passes_are_exact_on_captured_networks(name):
    program = captured(name)
    before = program.to_bytes()
    pipeline = Pipeline.parse("fold-batch-norm,repeat{max=3}(fold-constants,remove-dead)")
    result = pipeline.run(program)
    assert program.to_bytes() == before and not result.unconverged
    feeds = random_inputs(program, seed=1)
    expected, actual = run_twin(program, feeds), run_twin(result.program, feeds)
    assert relative_error(expected, actual) < 1e-6  # weights are float32; the arithmetic here is float64
    left = sum(item.op_type == "BatchNormalization" for item in result.program.nodes())
    refused = result.results[0].result.refusals
    assert left == len(refused)
    assert (left == 0) == (name != "densenet")  # its norms come before the convolutions
    if name in ("resnet", "mobilenet", "se", "unet"):
        wrong = result.program.clone()
        bias = next(n for n in wrong.initializers if n.endswith("bias"))
        array = wrong.initializer_array(bias)
        Rewriter(wrong, "planted").set_initializer(bias, np.roll(array, 1))
        assert relative_error(expected, run_twin(wrong, feeds)) > 1e-4
