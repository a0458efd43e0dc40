"""Instruments: verify, time, dump, reproduce."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from builders import node, program_from_nodes

from sartor.errors import UsageError, VerificationError
from sartor.passes.base import Context, Pass, Semantics, option
from sartor.passes.instruments import (
    DumpOnChange,
    Instrument,
    ReproducerOnFailure,
    Timing,
    VerifyAfterEach,
    read_reproducer,
    replay,
)
from sartor.passes.pipeline import Pipeline
from sartor.passes.registry import REGISTRY


@dataclasses.dataclass(frozen=True)
class Cut(Pass):
    """Cut the first Conv to some output channels and leave the second Conv as it is: a malformed program."""

    name: ClassVar[str] = "test-cut"
    semantics: ClassVar[Semantics] = Semantics.NEEDS_TRAINING
    channels: int = option(3, help="Channels left.")

    def plan(self, program, context):
        return {"channels": self.channels}

    def apply(self, program, plan, rewriter):
        rewriter.set_initializer("w1", program.initializer_array("w1")[: plan["channels"]])


@pytest.fixture(autouse=True, scope="module")
def registered():
    REGISTRY._builtin[Cut.name] = f"{__name__}:Cut"
    REGISTRY.refresh()
    REGISTRY._loaded[Cut.name] = Cut
    yield
    del REGISTRY._builtin[Cut.name]
    REGISTRY.refresh()


def two_convs(**more):
    generator = np.random.default_rng(0)
    constants = {
        "w1": generator.standard_normal((4, 3, 1, 1)).astype(np.float32),
        "w2": generator.standard_normal((2, 4, 1, 1)).astype(np.float32),
        **more,
    }
    nodes = [node("Conv", ["x", "w1"], ["a"], name="c1"), node("Conv", ["a", "w2"], ["y"], name="c2")]
    return program_from_nodes(nodes, {"x": ("N", 3, 4, 4)}, ["y"], constants, reference={"N": 2})


def with_orphan():
    return two_convs(orphan=np.ones(3, np.float32))


class TestVerify:
    def test_a_malformed_program_is_caught_by_default(self):
        with pytest.raises(VerificationError, match="c2") as caught:
            Pipeline([Cut()]).run(two_convs())
        assert "In step 1 (test-cut #1) of the pipeline." in caught.value.__notes__

    def test_it_passes_unnoticed_when_switched_off(self):
        assert Pipeline([Cut()], instruments=()).run(two_convs()).modified

    def test_a_good_program_passes(self):
        result = Pipeline.parse("remove-dead,fold-constants", [VerifyAfterEach()]).run(with_orphan())
        assert result.modified

    def test_signature(self, monkeypatch):
        from sartor.passes import base

        def apply(self, program, plan, rewriter):
            program.graph.outputs[0].name = "other"

        monkeypatch.setattr(Cut, "apply", apply)
        monkeypatch.setattr(base, "signature_of", lambda program: ())  # the protocol's own check
        with pytest.raises(VerificationError, match=r"other"):
            Pipeline([Cut()]).run(two_convs())

    def test_an_unchanged_program_is_not_verified_again(self, monkeypatch):
        from sartor.ir import verify

        calls = []
        monkeypatch.setattr(verify, "verify_program", lambda *args: calls.append(args))
        Pipeline.parse("remove-dead,remove-dead").run(with_orphan())
        assert len(calls) == 1


def test_timing():
    timing = Timing()
    Pipeline.parse("remove-dead,fold-constants,remove-dead", [timing]).run(with_orphan())
    assert [label for label, _ in timing.rows] == ["remove-dead #1", "fold-constants #1", "remove-dead #2"]
    assert all(0 < seconds < 60 for _, seconds in timing.rows)


def test_dump_on_change(tmp_path):
    Pipeline.parse("fold-constants,remove-dead,remove-dead", [DumpOnChange(tmp_path / "dumps")]).run(
        with_orphan()
    )
    names = sorted(path.name for path in (tmp_path / "dumps").iterdir())
    assert names == ["000-input.txt", "002-remove-dead.txt"]
    before, after = ((tmp_path / "dumps" / name).read_text() for name in names)
    assert "orphan" in before and "orphan" not in after


class TestReproducer:
    def fail(
        self, folder, program=None, text="remove-dead,test-cut{channels=2},fold-batch-norm", context=None
    ):
        reproducer = ReproducerOnFailure(folder)
        with pytest.raises(VerificationError) as caught:
            Pipeline.parse(text, [VerifyAfterEach(), reproducer]).run(program or with_orphan(), context)
        return reproducer, caught.value

    def test_contents(self, tmp_path):
        reproducer, error = self.fail(tmp_path, context=Context(seed=5, keep=("head*",)))
        (folder,) = reproducer.written
        assert sorted(p.name for p in folder.iterdir()) == ["error.json", "input.onnx", "pipeline.txt"]
        assert folder.name.startswith("reproducer-test-cut-")
        assert any(str(folder) in note for note in error.__notes__)
        assert (folder / "pipeline.txt").read_text() == "test-cut{channels=2},fold-batch-norm\n"
        document = json.loads((folder / "error.json").read_text())
        assert document["schema"] == "sartor.reproducer/1" and document["pass"] == "test-cut{channels=2}"
        assert document["error"]["type"] == "VerificationError" and document["error"]["message"] == str(error)
        assert any(f.startswith("sartor.ir.verify:") for f in document["error"]["frames"])
        assert {"sartor", "numpy", "onnx"} <= set(document["versions"])

    def test_input_is_that_of_the_failing_pass(self, tmp_path):
        reproducer, _ = self.fail(tmp_path, context=Context(seed=5, keep=("head*",)))
        program, text, context = read_reproducer(reproducer.written[0])
        clean = Pipeline.parse("remove-dead").run(with_orphan()).program
        assert program.to_bytes() == clean.to_bytes()  # the orphan is gone, the cut has not happened
        assert program.input_shapes == clean.input_shapes == {"x": (2, 3, 4, 4)}
        assert program.source == clean.source and program.batch == clean.batch
        assert program.applied == ("remove-dead",) and text == "test-cut{channels=2},fold-batch-norm"
        assert context == Context(seed=5, keep=("head*",))

    def test_replay_fails_alike_until_repaired(self, tmp_path, monkeypatch):
        reproducer, error = self.fail(tmp_path)
        with pytest.raises(VerificationError) as caught:
            replay(reproducer.written[0])
        assert str(caught.value) == str(error)

        def repaired(self, program, plan, rewriter):
            rewriter.set_initializer("w1", program.initializer_array("w1")[: plan["channels"]])
            rewriter.set_initializer("w2", program.initializer_array("w2")[:, : plan["channels"]])

        monkeypatch.setattr(Cut, "apply", repaired)
        assert replay(reproducer.written[0]).modified

    def test_same_failure_same_folder_and_nothing_left_over(self, tmp_path):
        first, _ = self.fail(tmp_path)
        second, _ = self.fail(tmp_path)
        third, _ = self.fail(tmp_path, text="test-cut{channels=1}")
        assert first.written == second.written != third.written
        assert sorted(tmp_path.iterdir()) == sorted([first.written[0], third.written[0]])

    def test_no_path_of_this_machine(self, tmp_path):
        reproducer, _ = self.fail(tmp_path)
        for path in reproducer.written[0].iterdir():
            data = path.read_bytes()
            assert str(Path.home()).encode() not in data and str(Path.cwd()).encode() not in data

    def test_the_first_error_survives_an_unwritable_folder(self, tmp_path):
        blocked = tmp_path / "file"
        blocked.write_text("")
        reproducer, error = self.fail(blocked / "inside")
        assert reproducer.written == []
        assert any("could not be written: " in note for note in error.__notes__)

    def test_a_failed_write_leaves_nothing(self, tmp_path, monkeypatch):
        from sartor.passes import instruments

        def planted(files):
            raise OSError("disk full")

        monkeypatch.setattr(instruments, "write_all", planted)
        _, error = self.fail(tmp_path)
        assert list(tmp_path.iterdir()) == [] and any("disk full" in note for note in error.__notes__)

    def test_a_failing_plan_is_reproduced_too(self, tmp_path, monkeypatch):
        def plan(self, program, context):
            raise ValueError("planted")

        monkeypatch.setattr(Cut, "plan", plan)
        reproducer = ReproducerOnFailure(tmp_path)
        with pytest.raises(ValueError, match="planted"):
            Pipeline([Cut()], [reproducer]).run(two_convs())
        assert len(reproducer.written) == 1

    @pytest.mark.parametrize("damage", ["missing", "not json", "schema", "model"])
    def test_damaged_reproducer(self, tmp_path, damage):
        reproducer, _ = self.fail(tmp_path)
        folder = reproducer.written[0]
        if damage == "missing":
            (folder / "pipeline.txt").unlink()
        elif damage == "not json":
            (folder / "error.json").write_text("{")
        elif damage == "schema":
            (folder / "error.json").write_text('{"schema": "other/1"}')
        else:
            (folder / "input.onnx").write_bytes(b"\xff\xff")
        with pytest.raises(UsageError, match="is not a complete reproducer of schema"):
            replay(folder)


def test_base_instrument_does_nothing():
    program = two_convs()
    assert Pipeline.parse("remove-dead", [Instrument()]).run(program).program is program
