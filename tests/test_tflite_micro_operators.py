"""Rules of TensorFlow Lite Micro against its interpreter: what is refused does not run, and the rest computes."""

from __future__ import annotations

import dataclasses

import backend_node_cases as node_cases
import pytest

from sartor import backends
from sartor.backends.tflite_micro import legality
from sartor.errors import UsageError

EVERY = 193
RULED = (
    *(
        "test_acos_example",
        "test_sign",
        "test_onehot_without_axis",
        "test_pow_example",
        "test_gelu_default_1",
    ),
    *("test_gelu_tanh_1", "test_depthtospace_example", "test_depthtospace_crd_mode_example", "test_tile"),
    *(
        "test_tile_precomputed",
        "test_gather_0",
        "test_gather_elements_0",
        "test_scatternd",
        "test_where_example",
    ),
    *("test_where_long_example", "test_triu", "test_reflect_pad", "test_col2im", "test_col2im_strides"),
    *("test_averagepool_2d_pads", "test_averagepool_3d_default", "test_spacetodepth", "test_elu_default"),
)
"""Cases that show a rule, or the border of one."""


@pytest.fixture
def backend(monkeypatch):
    """Takes any batch here: the suite has batches of three, and what is asked about is operators."""
    found = backends.get("tflite-micro")
    try:
        found.capabilities()
    except UsageError as error:
        pytest.skip(str(error))
    rules = legality.rules()
    several = dataclasses.replace(rules, model=tuple(r for r in rules.model if r.id != "one-sample"))
    monkeypatch.setattr(legality, "rules", lambda: several)
    return found


def chosen():
    """Every 193rd case and those of `RULED`; float16 is another precision, which the target lacks."""
    known = node_cases.cases()
    assert set(RULED) <= {case.name for case in known}, set(RULED) - {case.name for case in known}
    for position, case in enumerate(known):
        if case.name in RULED or (position % EVERY == 0 and "float16" not in case.name.lower()):
            yield from node_cases.prepared(case)


@pytest.mark.slow  # a conversion for each
def test_rules_say_what_the_interpreter_does(backend, monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("SARTOR_CACHE", str(tmp_path))
    refused, wrong = 0, []
    for item in chosen():
        said = node_cases.refusals(item, backend)
        if any(finding.rule == "element-types" for finding in said):
            continue
        refused += bool(said)
        with monkeypatch.context() as patch:
            if said:  # past its own rules, with those of `tflite`
                patch.setattr(legality, "rules", everything)
            seen = node_cases.observed(item, backend)
        if bool(said) != bool(seen):
            wrong.append(
                f"{item}: {' '.join(map(str, said)) or 'no rule'}; observed: {seen or 'all is well'}"
            )
    assert not wrong, "\n".join(wrong)
    assert refused >= 10


def everything():
    from sartor.backends.legality import Rules

    return Rules()
