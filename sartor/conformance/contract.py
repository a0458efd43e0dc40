"""Checks of the protocol: what a backend says of itself, of programs, and of what it wrote."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from sartor.backends.artifact import MANIFEST, open_artifact
from sartor.backends.legality import ModelRule, NodeRule, Rules
from sartor.backends.protocol import PRECISIONS, Capabilities, Session, TargetOptions
from sartor.conformance.check import Check, Failed, Skipped, describe, require, require_error
from sartor.conformance.compare import compare
from sartor.conformance.models import Model, models, sample_inputs
from sartor.conformance.subject import Subject
from sartor.errors import SartorError

_SIMPLE = ("conv", "gemm", "activation-relu")
_REWRITTEN = ("batch-norm", "residual-block", "group-norm", "resnet")


def checks() -> Iterator[Check]:
    """Those of this module."""
    yield Check(
        "contract.capabilities",
        "Capabilities are complete, agree with the registered name, and are plain data.",
        _capabilities,
    )
    yield Check("contract.rules", "Every rule has an id and a sentence, and no two have the same.", _rules)
    yield Check(
        "contract.channel-grid",
        "Method channel_grid gives a step of at least 1 and agrees with the capabilities.",
        _channel_grid,
    )
    yield Check(
        "contract.legalize",
        "Method legalize leaves its argument alone, and what it returns computes the same.",
        _legalize,
    )
    yield Check("contract.lower", "Method lower leaves the program alone and returns what it wrote.", _lower)
    yield Check(
        "contract.interface",
        "The artifact has the program's inputs and outputs, by name, type and rank.",
        _interface,
    )
    yield Check(
        "contract.outputs",
        "A run returns exactly the outputs of the artifact, with their types and shapes.",
        _outputs,
    )
    yield Check("contract.no-paths", "The manifest names no folder of the machine that wrote it.", _no_paths)
    yield Check(
        "contract.not-run-here",
        "A backend that says that this machine cannot run its artifacts refuses to load one, and says why.",
        _not_run_here,
    )
    yield Check("contract.settings", "A session's settings are plain data that a report can hold.", _settings)
    yield Check(
        "contract.compile", "Method compile of a legal model computes what lower and load compute.", _compile
    )
    yield Check(
        "contract.prepare",
        "What prepare returns can be called again and again, and computes what run does: it is what is timed.",
        _prepare,
    )
    yield Check(
        "contract.layouts",
        "Methods run and prepare take arrays as they lie in memory: in Fortran order, reversed, spaced, read-only.",
        _layouts,
    )


def _capabilities(subject: Subject) -> str:
    found = subject.capabilities
    require(isinstance(found, Capabilities), f"capabilities() returned a {type(found).__name__}")
    named = {subject.name, subject.backend.name, found.name}
    require(len(named) == 1, f"registered, own and reported name are {sorted(named)}")
    require(bool(found.version), "the version is empty")
    unknown = sorted(set(found.precisions) - set(PRECISIONS))
    require(
        bool(found.precisions) and not unknown,
        f"precisions are {list(found.precisions)}; known: {PRECISIONS}",
    )
    require(found.max_rank >= 1, f"max_rank is {found.max_rank}")
    json.dumps(found.to_dict(), allow_nan=False)
    return f"version {found.version}, precisions {', '.join(found.precisions)}"


def _rules(subject: Subject) -> str:
    rules = subject.backend.rules()
    require(isinstance(rules, Rules), f"rules() returned a {type(rules).__name__}")
    general: tuple[ModelRule | NodeRule, ...] = (*rules.model, *rules.nodes)
    for found in (general, *rules.operators.values()):
        told = [(rule.id, rule.text) for rule in found]
        require(len(told) == len(set(told)), f"two rules share id and sentence: {sorted(told)}")
        silent = [rule.id for rule in found if not rule.id or not rule.text]
        require(not silent, f"rules without a sentence: {silent}")
    return f"{len(general)} rules, and {sum(map(len, rules.operators.values()))} for single operators"


def _channel_grid(subject: Subject) -> str:
    grid = subject.capabilities.channel_grid
    for (op_type, precision), step in grid.items():
        found = subject.backend.channel_grid(op_type, precision)
        require(
            found == step,
            f"channel_grid('{op_type}', '{precision}') is {found}; the capabilities say {step}",
        )
    steps = {op: subject.backend.channel_grid(op) for op in ("Conv", "Gemm", "MatMul", "Relu")}
    require(all(isinstance(s, int) and s >= 1 for s in steps.values()), f"steps are {steps}")
    return ", ".join(f"{op} {step}" for op, step in steps.items())


def _legalize(subject: Subject) -> str:
    from sartor.ir.fx import run_twin

    seen = []
    for name in _REWRITTEN:
        program = models()[name].program("f32")
        if not subject.backend.legality(program, subject.options(program)).ok:
            continue
        before = program.sha256()
        legal = subject.backend.legalize(program)
        require(program.sha256() == before, f"legalize changed the program '{name}' that it was given")
        observed = compare(subject.reference(name), run_twin(legal, subject.inputs(name)), "f32")
        seen.append(f"{name}: {'as it is' if legal.sha256() == before else 'rewritten'}, {observed}")
    return "; ".join(seen) or "no model that usually needs rewriting is legal here"


def _lower(subject: Subject) -> str:
    model, program = subject.any_program(*_SIMPLE)
    before = program.sha256()
    folder = subject.folder()
    artifact = subject.backend.lower(program, folder, subject.options(program))
    require(program.sha256() == before, "lower changed the program")
    require(artifact.target == subject.name, f"artifact.target is '{artifact.target}'")
    require(artifact.folder == folder, "artifact.folder is not the folder that was asked for")
    require(open_artifact(folder) == artifact, f"{MANIFEST} does not describe the artifact that was returned")
    written = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    require(
        written == {*artifact.files, MANIFEST},
        f"files are {sorted(written)}; the artifact lists {sorted(artifact.files)}",
    )
    beside = sorted(p.name for p in folder.parent.iterdir())
    require(beside == [folder.name], f"beside the artifact lies {beside}")
    return f"'{model.name}' became {', '.join(artifact.files)}"


def _interface(subject: Subject) -> str:
    checked = []
    for name in ("two-inputs", "two-outputs", "conv", "gemm"):
        program = models()[name].program("f32")
        if not subject.backend.legality(program, subject.options(program)).ok:
            continue
        artifact = subject.artifact(name)
        for kind, specs, values in (
            ("inputs", artifact.inputs, program.graph.inputs),
            ("outputs", artifact.outputs, program.outputs),
        ):
            found = [(s.name, s.dtype, len(s.shape)) for s in specs]
            wanted = [
                (v.name, v.dtype.numpy().name if v.dtype else "", len(v.shape) if v.shape is not None else 0)
                for v in values
            ]
            require(found == wanted, f"'{name}': {kind} are {found}; the program has {wanted}")
        checked.append(name)
    return f"models {', '.join(checked) or 'none'}"


def _outputs(subject: Subject) -> str:
    checked = []
    for name in ("two-outputs", *_SIMPLE):
        program = models()[name].program("f32")
        if not subject.backend.legality(program, subject.options(program)).ok:
            continue
        session = subject.session(name)
        outputs = session.run(subject.inputs(name))
        wanted = {s.name: s for s in subject.artifact(name).outputs}
        shapes = program.shapes()
        require(
            set(outputs) == set(wanted), f"'{name}': outputs {sorted(outputs)}; declared {sorted(wanted)}"
        )
        for key, array in outputs.items():
            require(isinstance(array, np.ndarray), f"'{name}': output '{key}' is a {type(array).__name__}")
            require(
                array.dtype.name == wanted[key].dtype,
                f"'{name}': output '{key}' is {array.dtype.name}; declared {wanted[key].dtype}",
            )
            require(
                array.shape == shapes[key],
                f"'{name}': output '{key}' has shape {list(array.shape)}; the program has {list(shapes[key])}",
            )
        checked.append(name)
    require(bool(checked), "none of the simple models is legal")
    return f"models {', '.join(checked)}"


def _no_paths(subject: Subject) -> str:
    model, _ = subject.any_program(*_SIMPLE)
    folder = subject.artifact(model.name).folder
    text = (folder / MANIFEST).read_text(encoding="utf-8")
    require(str(subject.scratch) not in text, "the manifest names the folder that it was written to")
    return f"{len(text)} characters without a path of this machine"


def _not_run_here(subject: Subject) -> str:
    if not subject.capabilities.not_run_here:
        raise Skipped("The backend does not say that.")
    model, program = subject.any_program(*_SIMPLE)
    artifact = subject.artifact(model.name)
    return describe(
        require_error(
            SartorError, "Loading", lambda: subject.backend.load(artifact, subject.options(program))
        )
    )


def _settings(subject: Subject) -> str:
    model, _ = subject.any_program(*_SIMPLE)
    settings = dict(subject.session(model.name).settings)
    json.dumps(settings, allow_nan=False)
    return f"{len(settings)} entries: {', '.join(sorted(map(str, settings)))[:200]}"


def _compile(subject: Subject) -> str:
    model, program = subject.any_program("conv", "batch-norm", "gemm")
    subject.require_runs_here()
    legal = subject.backend.legalize(program)
    session = subject.backend.compile(legal.to_bytes(), subject.options(program))
    return compare(subject.reference(model.name), session.run(subject.inputs(model.name)), "f32")


def _prepare(subject: Subject) -> str:
    model, program = subject.any_program(*_SIMPLE)
    artifact = subject.artifact(model.name)
    subject.require_runs_here()
    session = subject.backend.load(artifact, TargetOptions(shapes=program.input_shapes))
    given = sample_inputs(program, 0)
    once = session.prepare(given)
    given.clear()  # whoever prepares keeps what it needs
    for _ in range(3):
        once()
    prepared = _compare_prepared(subject, model, session, once)
    observed = compare(subject.reference(model.name, seed=1), session.run(sample_inputs(program, 1)), "f32")
    return f"prepared: {prepared}; in a run after that: {observed}"


_LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "in Fortran order": np.asfortranarray,
    "reversed": lambda array: np.ascontiguousarray(array[..., ::-1])[..., ::-1],
    "spaced": lambda array: np.repeat(array, 2, axis=-1)[..., ::2],
    "read-only": lambda array: np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape),
}


def _layouts(subject: Subject) -> str:
    model, program = subject.any_program(*_SIMPLE)
    artifact = subject.artifact(model.name)
    subject.require_runs_here()
    session = subject.backend.load(artifact, TargetOptions(shapes=program.input_shapes))
    for layout, lay in _LAYOUTS.items():
        inputs = {name: lay(array) for name, array in sample_inputs(program, 0).items()}
        try:
            compare(subject.reference(model.name), session.run(inputs), "f32")
            observed = _compare_prepared(subject, model, session, session.prepare(inputs))
        except Exception as error:
            told = str(error) if isinstance(error, Failed) else describe(error)
            raise Failed(f"Inputs of '{model.name}' that lie {layout}: {told}") from error
    return f"'{model.name}', {', '.join(_LAYOUTS)}: {observed}"


def _compare_prepared(subject: Subject, model: Model, session: Session, once: Callable[[], object]) -> str:
    """Compare what a prepared inference of the inputs of seed 0 computes."""
    outputs = session.computed(once)
    require(
        isinstance(outputs, Mapping),
        f"what prepare returned gives a {type(outputs).__name__} and no outputs; override Session.computed, which "
        "fetches them",
    )
    return compare(subject.reference(model.name), outputs, "f32")
