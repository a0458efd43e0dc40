"""Finds the line of the author's code whose number stands in the way of a cut module.

The original and the cut module run side by side, call by call. At every line of which the program knows
the shapes, the first call whose result has a shape that the narrowed program does not have there is the
one that kept an old width: `x.view(b, 12, 64)`, `x[:, :32]`, `torch.split(x, 48)`. Where the call itself
fails, its traceback says so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import linecache
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from sartor.ir.fx import run_twin, to_array
from sartor.ir.program import Program
from sartor.writeback.blocks import under

_TORCH = os.path.dirname(os.path.abspath(torch.__file__))
_SARTOR = str(Path(__file__).resolve().parents[1])
_LIBRARY_PARTS = ("site-packages", "dist-packages")  # as in sartor.ir.provenance

_ATTENTION = "scaled_dot_product_attention"
_NUMBER = "has a number written into it that the plan changes"
_LAYER = "calls a layer with a tensor that still has an old width"
_SCALE = "derives the scale of attention from a width that the plan changes"

Shape = tuple[int, ...]
Fact = Shape | tuple[Shape, ...]
"""A shape that occurs at a line, or all shapes that one operator returns there, in order."""
Key = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Culprit:
    """What stands in the way.

    Attributes:
        line: `file.py:line`, or empty where only the module is known.
        code: the text of that line.
        module: path and class of the module that was running.
        fails_at: another `file.py:line`, where the wrong width made a call fail.
        why: what the line does.
    """

    line: str
    code: str
    module: str
    fails_at: str = ""
    why: str = _NUMBER

    def __str__(self) -> str:
        if not self.line:
            return f"{self.module or 'its forward method'} depends on a width that the plan changes"
        shown = f" (`{self.code}`)" if self.code else ""
        inside = f" in {self.module}" if self.module else ""
        later = f", and fails at {self.fails_at}" if self.fails_at and self.fails_at != self.line else ""
        return f"the line {self.line}{shown}{inside} {self.why}{later}"


@dataclasses.dataclass(frozen=True)
class _Call:
    """One call of a torch function by the author's code.

    Attributes:
        path: file that makes the call.
        line: its line.
        key: module path and `file.py:line` by which the program's provenance knows the call.
        function: name of the function.
        module: path and class of the module that was running.
        shapes: of the tensors that it returned.
        scaled_by: features that an attention derives its scale from, 0 for every other call.
    """

    path: str
    line: int
    key: Key
    function: str
    module: str
    shapes: tuple[Shape, ...]
    scaled_by: int


def find(
    original: nn.Module,
    cut: nn.Module,
    given: list[torch.Tensor],
    program: Program,
    narrowed: Program,
    error: BaseException | None,
) -> Culprit:
    """The line that keeps an old width, as far as it can be told.

    Args:
        original: the module before, with the weights of `program`.
        cut: the module after, with the weights of `narrowed`.
        given: inputs.
        program: of the original.
        narrowed: what `cut` should compute.
        error: what `cut` failed with, or None when it ran and its result differs.
    """
    before, _ = _trace(original, given)
    after, running = _trace(cut, given)
    old, new = _facts_by_line(program), _facts_by_line(narrowed)
    failing = line_of(error) if error is not None else ""
    reference = {}
    for call, count in _counted(before):
        reference[call.path, call.line, call.function, count] = call
    for call, count in _counted(after):
        was = reference.get((call.path, call.line, call.function, count))
        if was is not None and error is None and call.scaled_by != was.scaled_by:
            return Culprit(_at(call.path, call.line), _code(call.path, call.line), call.module, why=_SCALE)
        expected = (_known(old, call.key), _known(new, call.key))
        if was is None or not all(expected):
            continue  # a call that the program does not show one by one
        facts = zip(_facts(was.shapes), _facts(call.shapes), strict=False)
        if any(a in expected[0] and b not in expected[1] for a, b in facts):
            return Culprit(_at(call.path, call.line), _code(call.path, call.line), call.module, failing)
    if error is not None and failing:
        path, line = _place(error)
        return Culprit(failing, _code(path, line), running, why=_LAYER if _in_layer(error) else _NUMBER)
    return Culprit("", "", _first_different(cut, given, narrowed) if error is None else running)


def line_of(error: BaseException) -> str:
    """`file.py:line` of the innermost frame of an exception that is neither torch's nor ours, or empty."""
    path, line = _place(error)
    return _at(path, line) if path else ""


def _place(error: BaseException) -> tuple[str, int]:
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not _library(frame.filename) and frame.lineno is not None:
            return frame.filename, frame.lineno
    return "", 0


def _in_layer(error: BaseException) -> bool:
    """Whether one of torch's own layers failed, rather than a function that the author's line calls."""
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    return last.startswith(os.path.join(_TORCH, "nn", "modules") + os.sep)


def _at(path: str, line: int) -> str:
    return f"{os.path.basename(path)}:{line}"


def _code(path: str, line: int) -> str:
    return linecache.getline(path, line).strip()[:120]


def _library(path: str) -> bool:
    """Whether a file is torch's, ours or generated."""
    return path.startswith((_TORCH + os.sep, _SARTOR + os.sep, "<"))


def _counted(calls: list[_Call]) -> Iterator[tuple[_Call, int]]:
    """Each call, and how many calls of that function at that line came before it."""
    seen: dict[tuple[str, int, str], int] = {}
    for call in calls:
        key = (call.path, call.line, call.function)
        seen[key] = seen.get(key, -1) + 1
        yield call, seen[key]


def _facts_by_line(program: Program) -> dict[Key, set[Fact]]:
    shapes = program.shapes()
    found: dict[Key, set[Fact]] = {}
    for node in program.nodes():
        record = program.provenance.get(node.name or "")
        if record is not None and record.location:
            known = found.setdefault((record.module, record.location), set())
            known.update(_facts(tuple(shapes[v.name or ""] for v in node.outputs if v.name in shapes)))
    return found


def _known(facts: Mapping[Key, set[Fact]], key: Key) -> set[Fact]:
    """What a program knows of a line in a module; exporters note some calls under a module inside it."""
    module, line = key
    if key in facts:
        return facts[key]
    return {f for (path, at), found in facts.items() if at == line and under(path, module) for f in found}


def _facts(shapes: tuple[Shape, ...]) -> tuple[Fact, ...]:
    return (*shapes, shapes) if len(shapes) > 1 else shapes


def _trace(module: nn.Module, given: list[torch.Tensor]) -> tuple[list[_Call], str]:
    """Every call by the author's code until the end or the failure, and the module that was running then."""
    stack: list[str] = []
    paths = {id(child): path for path, child in module.named_modules()}
    calls: list[_Call] = []

    class Recorder(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            parts = result if isinstance(result, (tuple, list)) else (result,)
            shapes = tuple(tuple(p.shape) for p in parts if isinstance(p, torch.Tensor))
            place = _caller(sys._getframe(1)) if shapes else None
            if place is not None:
                running = stack[-1] if stack else ""
                name = getattr(func, "__name__", "")
                scaled_by = args[0].shape[-1] if name == _ATTENTION and not (kwargs or {}).get("scale") else 0
                key, title = (running, place[2]), _title(module, running)
                calls.append(_Call(*place[:2], key, name, title, shapes, scaled_by))
            return result

    with contextlib.ExitStack() as cleanup:
        for child in module.modules():
            enter = child.register_forward_pre_hook(lambda m, _: stack.append(paths[id(m)]))
            leave = child.register_forward_hook(lambda *_: stack.pop() and None)
            cleanup.callback(enter.remove)
            cleanup.callback(leave.remove)
        with torch.no_grad(), contextlib.suppress(Exception), Recorder():
            module(*given)
        return calls, _title(module, stack[-1] if stack else "")


def _title(module: nn.Module, path: str) -> str:
    return f"'{path}' ({type(module.get_submodule(path)).__name__})" if path else ""


def _caller(frame: FrameType | None) -> tuple[str, int, str] | None:
    """Where the author's code makes a call, or None when a library makes it."""
    while frame is not None and _forwards(frame.f_code.co_filename):
        frame = frame.f_back
    if frame is None or _library(frame.f_code.co_filename):
        return None
    path, line = frame.f_code.co_filename, frame.f_lineno
    own, at = frame, line
    walk: FrameType | None = frame
    while walk is not None and not walk.f_code.co_filename.startswith(_SARTOR + os.sep):
        inside = walk.f_code.co_filename
        if not _library(inside) and not any(part in inside for part in _LIBRARY_PARTS):
            own, at = walk, walk.f_lineno
            break
        walk = walk.f_back
    return path, line, _at(own.f_code.co_filename, at)


def _forwards(path: str) -> bool:
    """Whether a file of torch only passes a call on: `functional.relu` is the author's call."""
    names = ("overrides.py", os.path.join("nn", "functional.py"), "functional.py", "_tensor.py")
    return path in {os.path.join(_TORCH, name) for name in names}


def _first_different(module: nn.Module, given: list[torch.Tensor], narrowed: Program) -> str:
    """The first module to finish whose result is not the narrowed program's."""
    last: dict[str, str] = {}
    for node in narrowed.nodes():
        record = narrowed.provenance.get(node.name or "")
        if record is not None and record.module:
            last[record.module] = node.outputs[0].name or ""
    inputs = {v.name or "": to_array(t) for v, t in zip(narrowed.graph.inputs, given, strict=True)}
    dtype = next((t.dtype for t in given if t.is_floating_point()), torch.float64)
    expected = run_twin(narrowed, inputs, dtype, taps=tuple(dict.fromkeys(last.values())))
    found: list[str] = []

    def check(path: str, result: Any) -> None:
        reference = expected[last[path]]
        if found or not isinstance(result, torch.Tensor) or tuple(result.shape) != reference.shape:
            return
        if float((result - torch.from_numpy(reference)).abs().max()) > 1e-6 * float(abs(reference).max()):
            found.append(_title(module, path))

    with contextlib.ExitStack() as cleanup:
        for path, child in module.named_modules():
            if path in last:
                hook = child.register_forward_hook(lambda _m, _i, r, path=path: check(path, r))
                cleanup.callback(hook.remove)
        with torch.no_grad():
            module(*given)
    return found[0] if found else ""
