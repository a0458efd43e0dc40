"""Snapshot of the public Python interface: a change must be seen, meant and noted in the CHANGELOG.

After a deliberate change run `python tests/test_public_api.py`, which rewrites tests/public_api.txt.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
import inspect
from pathlib import Path

import pytest

import sartor
from sartor import errors

SNAPSHOT = Path(__file__).with_name("public_api.txt")
TOP = {
    "FitOptions",
    "Pipeline",
    "Plan",
    "Program",
    "__version__",
    "apply_plan",
    "apply_to_module",
    "backends",
    "capture",
    "fit",
    "load",
    "to_fx",
}
DESCRIBED = (
    "sartor.backends.get",
    "sartor.ir.capture.capture",
    "sartor.ir.fx.to_fx",
    "sartor.ir.load.load",
    "sartor.ir.plan.GroupPlan",
    "sartor.ir.plan.Plan",
    "sartor.ir.program.Batch",
    "sartor.ir.program.Program",
    "sartor.ir.program.Source",
    "sartor.passes.base.Context",
    "sartor.passes.base.Pass",
    "sartor.passes.base.PassResult",
    "sartor.passes.base.Planned",
    "sartor.passes.base.Refusal",
    "sartor.passes.base.Semantics",
    "sartor.passes.fold_batch_norm.FoldBatchNorm",
    "sartor.passes.fold_constants.FoldConstants",
    "sartor.passes.instruments.DumpOnChange",
    "sartor.passes.instruments.Instrument",
    "sartor.passes.instruments.ReproducerOnFailure",
    "sartor.passes.instruments.Step",
    "sartor.passes.instruments.Timing",
    "sartor.passes.instruments.VerifyAfterEach",
    "sartor.passes.instruments.replay",
    "sartor.passes.options.option",
    "sartor.passes.pipeline.Pipeline",
    "sartor.passes.pipeline.PipelineResult",
    "sartor.passes.pipeline.Repeat",
    "sartor.passes.pipeline.StepResult",
    "sartor.passes.remove_dead.RemoveDead",
    "sartor.passes.rewriter.Rewriter",
    "sartor.writeback.apply_to_module",
)


def describe(path: str) -> list[str]:
    """One line per public name below `path`: signatures of functions, fields of dataclasses, enum values."""
    module, _, name = path.rpartition(".")
    found = getattr(importlib.import_module(module), name)
    if not inspect.isclass(found):
        return [f"{path}{inspect.signature(found)}"]
    if issubclass(found, enum.Enum):
        return [f"{path}: {', '.join(f'{m.name}={m.value}' for m in found)}"]
    init = "" if dataclasses.is_dataclass(found) else str(inspect.signature(found.__init__))
    lines = [f"{path}{init}"]
    if dataclasses.is_dataclass(found):
        lines += [f"{path}.{f.name}: {f.type}" for f in dataclasses.fields(found)]
    fields = {f.name for f in dataclasses.fields(found)} if dataclasses.is_dataclass(found) else set()
    members = {
        k: v
        for base in reversed(found.__mro__)
        if base.__module__.startswith("sartor")
        for k, v in vars(base).items()
    }
    for member, value in sorted(members.items()):
        if member.startswith("_") or member in fields:
            continue
        target = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
        signature = str(inspect.signature(target)) if inspect.isfunction(target) else ""
        lines.append(f"{path}.{member}{signature}")
    return lines


def snapshot() -> str:
    return "\n".join(line for path in DESCRIBED for line in describe(path)) + "\n"


def test_top_level_names():
    assert set(sartor.__all__) == TOP
    assert set(sartor.__all__) <= set(dir(sartor))


@pytest.mark.parametrize("name", sorted(TOP))
def test_every_top_level_name_resolves(name):
    assert getattr(sartor, name) is not None


def test_an_unknown_name_is_refused():
    with pytest.raises(AttributeError, match="'sartor' has no attribute 'nope'"):
        _ = sartor.nope


def test_signatures():
    expected = SNAPSHOT.read_text(encoding="utf-8").splitlines()
    actual = snapshot().splitlines()
    removed, added = sorted(set(expected) - set(actual)), sorted(set(actual) - set(expected))
    assert not removed and not added, (
        "the public interface changed; if that is meant, run python tests/test_public_api.py "
        f"and note it in CHANGELOG.md\nremoved: {removed}\nadded: {added}"
    )


def test_every_error_is_a_sartor_error_with_an_exit_code():
    classes = [c for c in vars(errors).values() if inspect.isclass(c) and issubclass(c, Exception)]
    assert len(classes) >= 10
    for cls in classes:
        assert issubclass(cls, errors.SartorError) and cls.exit_code in (2, 5, 70)


if __name__ == "__main__":
    SNAPSHOT.write_text(snapshot(), encoding="utf-8")
