"""The conformance kit finds what each wrong backend does wrong, and nothing in a right one."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
import pytest
from conformance_site import ROOT, installed

from sartor.conformance import docs
from sartor.conformance.check import Check, Failed, Skipped, perform, require_error
from sartor.conformance.compare import TOLERANCES, compare
from sartor.conformance.models import models, sample_inputs
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
    found = outcomes(name, tmp_path, *few, "contract", "batch", "errors", "determinism")
    assert [o for o in found.values() if o.result == "failed"] == []
    assert found["numerics.resnet.f32"].result == "passed"
