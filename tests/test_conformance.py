"""The conformance kit finds what each wrong backend does wrong, and nothing in a right one."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
import pytest
from conformance_site import ROOT, installed

from sartor import backends
from sartor.backends.legality import ModelRule, NodeRule, Rules, check_rules
from sartor.backends.protocol import TargetOptions
from sartor.conformance import docs
from sartor.conformance.check import Check, Failed, Skipped, perform, require_error
from sartor.conformance.compare import TOLERANCES, compare, compare_steps
from sartor.conformance.draft import Draft
from sartor.conformance.models import models, output_steps, sample_inputs
from sartor.conformance.run import run_suite
from sartor.conformance.subject import Subject
from sartor.conformance.suite import select, suite
from sartor.errors import BackendError, ModelError, UsageError
from sartor.ir.fx import run_twin

UNTIMED = ("contract", "numerics", "coverage", "precision", "batch", "errors", "legality", "determinism")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    with installed(tmp_path_factory.mktemp("conformance")) as folder:
        yield folder


def outcomes(name, tmp_path, *patterns):
    """Result and observation by check id, in this process."""
    subject = Subject(name, tmp_path)
    return {check.id: perform(check, subject) for check in select(patterns)}


WRONG = {
    "swappedchannels": ("numerics.conv.f32", "order along axis 1 is not"),
    "stalebuffer": ("determinism.outputs-are-owned", "was overwritten by a later run"),
    "onerunlate": ("determinism.own-inputs", "is off by"),
    "nondeterministic": ("determinism.runs", "differs from the first: output 'y' by up to"),
    "sessionsdiffer": ("determinism.sessions", "a second session on"),
    "wrongshapes": ("contract.outputs", "has shape [5, 9, 7]; the program has [1, 5, 9, 7]"),
    "wrongtype": ("contract.outputs", "is float64; declared float32"),
    "writesintoinputs": ("determinism.inputs-are-left-alone", "was overwritten"),
    "acceptsanyinput": ("errors.input-missing", "was accepted"),
    "trustsfiles": ("errors.damaged-file", "with one bit changed"),
    "anyprecision": ("errors.precision-not-claimed", "legality with 'bf16' was accepted"),
    "inname": ("precision.arithmetic.bf16", "errors are those of float32"),
    "dropsquantization": ("numerics.conv.int8", "is off by"),
    "refuseseverything": ("coverage.f32", "none of"),
    "acceptseverything": ("legality.agrees-with-lower", "Legality accepts model"),
    "silentrules": ("contract.rules", "rules without a sentence: ['quiet']"),
    "legalizesinplace": ("contract.legalize", "changed the program"),
    "randombytes": ("determinism.artifact", "stamp differ between two lowerings"),
    "litters": ("contract.lower", "beside the artifact lies"),
    "firstsampleonly": ("batch.any-size", "is off by"),
    "foreignnodes": ("profile.names-known-nodes", "node_of_another_model"),
    "constanttime": ("measurement.more-work-takes-longer", "layers 1, 4, 16"),
    "mixessamples": ("numerics.matmul.f32", "At a batch of 3"),
    "stalerows": ("batch.any-size", "is off by"),
    "fixedbatch": ("batch.fixed", "lowered at a batch of 3: Output 'y' is off by"),
    "ignoresstrides": ("contract.layouts", "that lie in Fortran order: Output 'y' is off by"),
    "idleprepare": ("contract.prepare", "gives a NoneType and no outputs"),
    "takesbyteorder": ("errors.input-byte-order", "was accepted"),
    "differslater": ("determinism.runs", "run 7 of"),
    "returnsviews": ("determinism.outputs-are-no-inputs", "output 'y' is memory of input 'x'"),
    "splitsbyenvironment": ("determinism.threads", "is off by"),
    "leavesthreads": ("leaks.handles", "threads before"),
    "leavesfilesopen": ("leaks.handles", "open files before"),
    "writeshome": ("leaks.files", "HOME: .mydevice/compiler.log"),
    "erraticspeed": ("measurement.repeatable", "in two processes"),
    "zeroprofile": ("profile.adds-up", "take 0 ms together"),
    "raisingrule": ("legality.computed-operands", "rule 'kernel-size' of 'conformance_wrong' raised"),
    "offbyonezero": ("numerics.conv.int8", "1.00 steps on average over 1890 values"),
    "roundsdown": ("numerics.gemm.int8", "steps on average over 36 values"),
    "mixesquantizedsamples": ("numerics.depthwise.int8", "At a batch of 3"),
    "coarsehalf": ("numerics.conv.f16", "allowed 0.002"),
    "wideweights": ("precision.bytes.f16", "bytes in f16"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_backend_fails_the_right_check(name, site, tmp_path):
    check, says = WRONG[name]
    outcome = outcomes(f"wrong-{name}", tmp_path, check)[check]
    assert outcome.result == "failed" and says in outcome.observed, outcome


def test_nothing_else_is_found_in_a_backend_that_only_hands_out_its_buffer(site, tmp_path):
    found = outcomes("wrong-stalebuffer", tmp_path, *UNTIMED)
    assert [o.id for o in found.values() if o.result == "failed"] == ["determinism.outputs-are-owned"]


def test_unknown_backends_and_checks_are_refused():
    with pytest.raises(UsageError, match="Unknown backend 'abacus'"):
        run_suite("abacus", ("contract",))
    with pytest.raises(UsageError, match="No check of the kit fits 'colour'; areas are 'contract'"):
        run_suite("onnxruntime", ("colour",))


def test_ids_are_unique_and_every_sentence_is_one():
    ids = [check.id for check in suite()]
    assert len(set(ids)) == len(ids) > 150
    for check in suite():
        assert re.fullmatch(r"[a-z]+(\.[a-z0-9-]+)+", check.id), check.id
        assert not check.sentence[0].islower() and check.sentence.endswith("."), check.sentence


def test_the_published_list_does_not_drift():
    assert (ROOT / "docs" / "conformance.md").read_text(encoding="utf-8") == docs.markdown(), (
        "docs/conformance.md differs from the suite; run: python -m sartor.conformance.docs docs/conformance.md"
    )


def test_every_family_that_is_promised_has_a_model():
    families = {model.family for model in models().values()}
    assert families >= {
        *("convolution", "depthwise", "transposed convolution", "matrix product", "normalization", "pooling"),
        *("activation", "elementwise", "movement", "resize", "block", "control flow", "network", "interface"),
    }


def test_models_are_the_same_every_time_and_their_inputs_have_no_symmetry():
    program = models()["conv"].program("f32")
    assert program.sha256() == models()["conv"].program("f32").sha256()
    array = sample_inputs(program, 0)["x"]
    assert not np.array_equal(array, sample_inputs(program, 1)["x"])
    for axis in range(1, array.ndim):
        assert np.abs(array - np.flip(array, axis)).mean() > 0.3


def is_seen(program, name, turned, precision):
    """Whether a comparison fails once initializer `name` is replaced by `turned`."""
    wrong = program.clone()
    wrong.initializers[name].const_value = ir.Tensor(turned, name=name)
    wrong.invalidate()
    for seed in (0, 1):
        inputs = sample_inputs(program, seed)
        try:
            compare(run_twin(program, inputs), run_twin(wrong, inputs), precision)
        except (Failed, ModelError):  # scales of Resize turned around fit no shape
            return True
    return False


@pytest.mark.parametrize("precision", ["f32", "int8"])
def test_every_weight_is_seen(precision):
    """Turned around along its first axis, any weight takes the outputs out of the tolerance."""
    missed = []
    for model in models().values():
        if precision not in model.precisions or model.family == "network":
            continue  # networks are made of the blocks, and in 8 bits too deep for a single scale to show
        program = model.program(precision)
        for name, value in program.initializers.items():
            array = value.const_value.numpy()
            if array.dtype == np.int64 or array.ndim == 0 or len(array) < 2 or not np.ptp(array, 0).any():
                continue  # shapes and axes; and what is the same both ways
            if not is_seen(program, name, np.ascontiguousarray(array[::-1]), precision):
                missed.append((model.name, name))
    assert missed == []


@pytest.mark.parametrize("precision", TOLERANCES)
def test_the_tolerance_fails_on_a_known_wrong_pair(precision):
    expected = {"y": np.random.default_rng(0).standard_normal((2, 5, 7))}
    assert "largest error 0" in compare(expected, expected, precision)
    wrong = {
        "off by": {"y": expected["y"] + 0.3},
        "order along axis 1": {"y": expected["y"][:, ::-1]},
        "has shape": {"y": expected["y"][0]},
        "not finite": {"y": np.where(expected["y"] > 1, np.nan, expected["y"])},
        "Outputs are": {"z": expected["y"]},
    }
    for says, outputs in wrong.items():
        with pytest.raises(Failed, match=says):
            compare(expected, outputs, precision)


def test_the_tolerance_of_a_few_layers_is_closer():
    expected = {"y": np.random.default_rng(0).standard_normal((2, 5, 7))}
    actual = {"y": expected["y"] * (1 + 4e-3)}
    compare(expected, actual, "f16")
    with pytest.raises(Failed, match=r"allowed 0\.002"):
        compare(expected, actual, "f16", shallow=True)


def test_quantized_outputs_are_compared_by_steps():
    step, generator = 0.02, np.random.default_rng(0)
    exact = generator.uniform(-100, 100, (3, 5, 7))
    expected = {"y": np.round(exact) * step}

    def rounded(values):
        return [(expected, {"y": (values * step).astype(np.float32)})]

    assert compare_steps(rounded(np.round(exact)), {"y": step}) == "at most 0 steps off, 0.00 on average"
    one_off = np.round(exact)
    one_off.flat[[3, 40]] += 1, -1
    assert compare_steps(rounded(one_off), {"y": step}) == "at most 1 steps off, 0.02 on average"
    one_off.flat[3] += 1
    with pytest.raises(Failed, match=r"up to 2 steps \(1 of 105 values"):
        compare_steps(rounded(one_off), {"y": step})
    for wrong in (
        np.floor(exact),
        np.trunc(exact),
        np.round(exact) + 1,
    ):
        with pytest.raises(Failed, match="Truncation, or another"):
            compare_steps(rounded(wrong), {"y": step})


def test_every_quantized_model_has_the_steps_of_its_outputs():
    for model in models().values():
        for precision in model.precisions:
            program = model.program(precision)
            steps = output_steps(program)
            assert set(steps) == ({v.name for v in program.graph.outputs} if precision == "int8" else set())
            assert all(0.01 < step < 0.03 for step in steps.values())


def test_a_rule_that_raises_is_an_error_that_names_it():
    program = models()["conv"].program("f32")
    node = next(n for n in program.nodes() if n.op_type == "Conv")

    def raises(program, subject):
        raise IndexError("planted")

    for rules, on in (
        (Rules(model=(ModelRule("lost", "It holds.", raises),)), "the model: planted"),
        (
            Rules(nodes=(NodeRule("lost", "It holds.", lambda p, n: None),)),
            r"node '.*' \(.*\): cannot unpack",
        ),
        (
            Rules(operators={"Conv": (NodeRule("lost", "It holds.", raises),)}),
            f"node '{node.name}' \\(Conv\\): pl",
        ),
    ):
        with pytest.raises(BackendError, match=f"rule 'lost' of 'test_conformance' raised .* on {on}"):
            check_rules(program, TargetOptions(), rules)


def test_the_rule_in_the_tutorial_answers_for_any_convolution():
    text = (ROOT / "docs" / "tutorial-backend.md").read_text(encoding="utf-8")
    names = {"NodeRule": NodeRule}
    exec(text.split("```python\n")[1].split("```")[0], names)
    rules = Rules(operators={"Conv": (NodeRule("kernel-size", "Small.", names["_small_kernel"]),)})
    draft = Draft("f32", 1)
    x = draft.conv(draft.input("x", "N", 3, 9, 9), 3, 4, (9, 1), pads=[4, 0, 4, 0])
    draft.output(draft.node("Conv", x, draft.input("w", 5, 4, 3, 3)), "y")
    found = check_rules(draft.program(), TargetOptions(), rules).violations
    assert [f.observed for f in found] == ["a 9x1 kernel", "a weight that is computed"]


def test_an_error_of_the_wrong_class_is_not_good_enough():
    def wrong():
        raise ValueError("planted")

    with pytest.raises(Failed, match="ended with ValueError: planted where a UsageError"):
        require_error(UsageError, "It", wrong)
    with pytest.raises(Failed, match="was accepted"):
        require_error(UsageError, "It", lambda: 1)
    with pytest.raises(Failed, match="does not name 'x'"):
        require_error(BackendError, "It", lambda: (_ for _ in ()).throw(BackendError("planted")), names="x")


def test_whatever_a_backend_raises_is_an_outcome(tmp_path):
    def observe(subject):
        raise KeyError("planted")

    outcome = perform(Check("a.b", "It holds.", observe), Subject("none", tmp_path))
    assert outcome.result == "failed" and "KeyError" in outcome.observed and "Traceback" in outcome.details

    def skip(subject):
        raise Skipped("planted reason")

    outcome = perform(Check("a.b", "It holds.", skip), Subject("none", tmp_path))
    assert (outcome.result, outcome.observed) == ("skipped", "planted reason")


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "reference"])
def test_built_in_backends_conform(name, tmp_path):
    """The whole suite, converters and clocks included, is `make conformance`."""
    few = ("numerics.conv", "numerics.resnet", "numerics.mobilenet-block", "numerics.attention-block")
    found = outcomes(name, tmp_path, *few, "contract", "batch", "errors", "determinism", "leaks", "precision")
    assert [o for o in found.values() if o.result == "failed"] == []
    assert found["numerics.resnet.f32"].result == "passed"


def test_continuous_integration_puts_every_built_in_backend_through_the_kit():
    text = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    given = {name: value.split() for name, value in re.findall(r"^(\w+) \?= (.*)$", text, re.MULTILINE)}
    assert set(given["BACKENDS"] + given["SLOW_BACKENDS"]) == {*backends.REGISTRY._builtin, "tape"}
    assert len(select(given["SLOW_CHECKS"])) < len(suite()) / 2
    assert "make conformance" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_a_backend_that_cannot_run_here_conforms_in_what_it_says_and_writes(tmp_path):
    found = outcomes("tensorrt", tmp_path, "contract", "errors", "legality.computed-operands", "leaks.files")
    assert [o for o in found.values() if o.result == "failed"] == []
    assert found["contract.lower"].result == found["leaks.files"].result == "passed"


@pytest.mark.slow  # converts two models
def test_the_conversion_to_tflite_conforms_on_the_simplest_model(tmp_path):
    few = ("contract.prepare", "contract.layouts", "determinism.outputs-are-owned", "errors.input-byte-order")
    found = outcomes("tflite", tmp_path, *few, "numerics.conv", "leaks")
    assert [o for o in found.values() if o.result == "failed"] == []
    assert found["numerics.conv.int8"].result == "passed"
