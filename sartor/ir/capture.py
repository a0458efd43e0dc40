"""Capture a `torch.nn.Module` as a canonical Program, with its training structure and names.

The route is torch.export → ONNX without the exporter's optimiser → canonicalize, at a batch size that
is prime and occurs in no tensor of the model, so that the batch axis is unmistakable; `sartor.ir.batch`
then makes it symbolic. If the module cannot be exported or generalised at that size, it is captured at
the batch of the example inputs, and `Program.batch.reason` says why.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import inspect
import io
import logging
import os
import sys
import traceback
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from sartor.errors import ModelError, SartorError, UnsupportedOperatorError, UsageError, VerificationError
from sartor.ir import batch as batching
from sartor.ir import canonicalize as canonical
from sartor.ir import provenance, tail
from sartor.ir.load import inline_functions, load
from sartor.ir.program import CANONICAL_OPSET, Batch, Program, Source
from sartor.ir.verify import verify_program

if TYPE_CHECKING:
    import torch

_EXAMPLES: weakref.WeakKeyDictionary[torch.nn.Module, tuple[tuple[tuple[int, ...], torch.dtype], ...]] = (
    weakref.WeakKeyDictionary()
)
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_QUIET_LOGGERS = (
    *(
        "torch.onnx",
        "torch.export",
        "torch._dynamo",
        "torch._subclasses",
        "torch.fx",
        "onnxscript",
        "onnx_ir",
    ),
)


def capture(
    module: torch.nn.Module,
    example_inputs: Any,
    *,
    shapes: Mapping[str, Sequence[int]] | None = None,
    name: str = "module",
) -> Program:
    """Capture `module` in inference mode; its training flags are left as they were.

    Args:
        module: any module that torch.export accepts; parameters and buffers keep their state_dict names.
        example_inputs: a tensor or a tuple of tensors; axis 0 of the first one is the batch axis.
        shapes: reference shapes by input name, in place of those of the example inputs.
        name: recorded as `Program.source.name`.

    Raises:
        ModelError: the module cannot be exported; names the first useful line and the source line.
        UnsupportedOperatorError: it uses an operator outside the canonical table.
        UsageError: `shapes` does not fit.
    """
    import torch

    examples = (example_inputs,) if isinstance(example_inputs, torch.Tensor) else tuple(example_inputs)
    if not isinstance(module, torch.nn.Module):
        raise UsageError(f"Expected a torch.nn.Module, got '{type(module).__name__}'.")
    if not examples or not all(isinstance(e, torch.Tensor) for e in examples):
        kinds = [type(e).__name__ for e in examples]
        raise UsageError(f"Example inputs must be a tensor or a tuple of tensors, got {kinds}.")
    examples = _resized(module, examples, shapes or {})
    _EXAMPLES[module] = tuple((tuple(e.shape), e.dtype) for e in examples)
    modes = {child: child.training for child in module.modules()}
    module.eval()
    try:
        program = _capture(module, examples, name)
    finally:
        for child, mode in modes.items():
            child.training = mode
    if shapes:
        program = batching.with_shapes(program, shapes)
    try:
        verify_program(program)
    except VerificationError as error:
        raise ModelError(f"'{name}' cannot be captured: {error}") from error
    program.source = dataclasses.replace(program.source, sha256=program.sha256())
    return program


def captured_at(module: torch.nn.Module) -> tuple[torch.Tensor, ...] | None:
    """Zeros of the shapes and types that `module` was last captured at in this process, or None."""
    import torch

    known = _EXAMPLES.get(module)
    return None if known is None else tuple(torch.zeros(shape, dtype=dtype) for shape, dtype in known)


def open_model(spec: str, shapes: Mapping[str, Sequence[int]] | None = None) -> Program:
    """Open `MODEL` of the command line: an `.onnx` file, or `FILE.py:function`.

    The function returns `(module, example_inputs)`.

    Raises:
        ModelError: the file does not exist, is not a model, or its code fails; names file and line.
    """
    path, separator, function = spec.rpartition(":")
    if separator and path.endswith(".py"):
        module, examples = _call(Path(path), function)
        return capture(module, examples, shapes=shapes, name=f"{Path(path).name}:{function}")
    if spec.endswith(".py"):
        raise UsageError(f"'{spec}' names no function. Give it as '{spec}:function'.")
    return load(spec, shapes=shapes)


def call_function(path: Path, function: str) -> Any:
    """Execute `path` as a module and return `function()`.

    Raises:
        ModelError: the file does not exist or fails, or has no such function; names file and line.
    """
    if not path.is_file():
        raise ModelError(f"The Python file '{path}' does not exist.")
    module_name = f"_sartor_user_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    specification = importlib.util.spec_from_file_location(module_name, path)
    if specification is None or specification.loader is None:
        raise ModelError(f"'{path}' is not a Python file.")
    user_module = importlib.util.module_from_spec(specification)
    sys.modules[module_name] = user_module  # dataclasses and torch.export look the module up by name
    sys.path.insert(0, str(path.resolve().parent))
    try:
        specification.loader.exec_module(user_module)
        target = getattr(user_module, function, None)
        if not callable(target):
            raise ModelError(f"'{path.name}' has no function '{function}'.")
        return target()
    except SartorError:
        raise
    except (Exception, SystemExit) as error:  # the author's sys.exit is not ours to follow
        line = next(
            (
                f.lineno
                for f in reversed(traceback.extract_tb(error.__traceback__))
                if Path(f.filename).resolve() == path.resolve()
            ),
            None,
        )
        if line is None and isinstance(error, SyntaxError):
            line = error.lineno
        where = f"{path.name}:{line}" if line else path.name
        what = f"{type(error).__name__}: {error}"
        if isinstance(error, SystemExit):
            what = f"it called sys.exit({error.code!r})"
        raise ModelError(f"'{where}' failed while making the model: {what}") from error
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(path.resolve().parent))


def _call(path: Path, function: str) -> tuple[Any, Any]:
    result = call_function(path, function)
    if not isinstance(result, tuple) or len(result) != 2:
        raise ModelError(
            f"'{path.name}:{function}' must return (module, example_inputs), got '{type(result).__name__}'."
        )
    return result


def _resized(
    module: torch.nn.Module, examples: tuple[torch.Tensor, ...], shapes: Mapping[str, Sequence[int]]
) -> tuple[torch.Tensor, ...]:
    """Example inputs at the shapes asked for, where they differ in more than the batch."""
    import torch

    if not shapes:
        return examples
    names = [n for n, p in inspect.signature(module.forward).parameters.items() if p.kind in _POSITIONAL]
    generator = torch.Generator().manual_seed(0)
    result = []
    for position, example in enumerate(examples):
        wanted = tuple(int(d) for d in shapes.get(names[position] if position < len(names) else "", ()))
        if not wanted or wanted[1:] == tuple(example.shape[1:]) or min(wanted) < 1:
            result.append(example)
        elif example.is_floating_point():
            result.append(torch.randn(wanted, generator=generator, dtype=torch.float64).to(example.dtype))
        else:  # an index that the example contains is the only one known to be legal
            result.append(example.reshape(-1)[:1].expand(wanted).contiguous())
    return tuple(result)


def _capture(module: torch.nn.Module, examples: tuple[torch.Tensor, ...], name: str) -> Program:
    shapes = [tuple(e.shape) for e in examples]
    first = shapes[0][0] if shapes[0] else 0
    carries = [bool(s) and s[0] == first and first > 0 for s in shapes]
    reason = "the first input has no axis to serve as the batch axis"
    if carries[0]:
        size = batching.unusual_batch([*shapes, *(tuple(p.shape) for p in module.parameters())])
        tiled = tuple(_tile(e, size) if c else e for e, c in zip(examples, carries, strict=True))
        try:
            program = _export(module, tiled, name)
        except UnsupportedOperatorError:
            raise
        except ModelError as error:
            reason = f"export at batch {size} failed: {error}"
        else:
            names = [v.name or "" for v in program.graph.inputs]
            batch_inputs = tuple(n for n, c in zip(names, carries, strict=True) if c)
            reference = dict(zip(names, shapes, strict=True))
            if program.tail is not None:
                reason = program.tail.reason()
            else:
                general = batching.generalise(program, batch_inputs, size, reference, unmistakable=True)
                reason = general.batch.reason or batching.check_batch(general)
                if not reason:
                    return general
    program = _export(module, examples, name)
    program.batch = Batch(symbolic=False, reason=reason)
    return program if program.tail is None else batching.fix_signature(program)


def _tile(tensor: torch.Tensor, size: int) -> torch.Tensor:
    import torch

    return tensor.detach()[torch.arange(size) % tensor.shape[0]].contiguous()


def _export(module: torch.nn.Module, examples: tuple[torch.Tensor, ...], name: str) -> Program:
    """Export at exactly these inputs; static canonical program, batch not analysed."""
    import torch

    from sartor.ir.capture_attention import decompose_attention

    log = io.StringIO()
    try:
        with _quiet(log), torch.no_grad():
            exported = decompose_attention(torch.export.export(module, examples))
            onnx_program = torch.onnx.export(
                exported, dynamo=True, optimize=False, opset_version=CANONICAL_OPSET, verbose=False
            )
    except Exception as error:
        raise ModelError(_explain(module, error)) from error
    if onnx_program is None:
        raise ModelError(f"Module '{type(module).__name__}' could not be exported to ONNX.")
    model = onnx_program.model
    _own_tensors(model)
    inline_functions(model)
    canonical.cleanup.fix_names(model)
    origin = provenance.extract(model)
    names = [v.name or "" for v in model.graph.inputs]
    if len(names) != len(examples):
        raise ModelError(
            f"The exported graph has inputs {names} for {len(examples)} example inputs; an input that the "
            "module "
            "does not read cannot be captured. Remove it."
        )
    input_shapes = dict(zip(names, (tuple(e.shape) for e in examples), strict=True))
    kept = {*exported.state_dict, *(str(b) for b in exported.graph_signature.buffers)}

    def program_of(core: ir.Model, left: tail.Tail | None) -> Program:
        canonical.canonicalize(core, input_shapes, parameters=kept, provenance=origin)
        present = {n.name for n in core.graph.all_nodes()}
        return Program(
            core,
            source=Source("module", name, ""),
            input_shapes=input_shapes,
            provenance={k: v for k, v in origin.items() if k in present},
            tail=left,
        )

    canonical.cleanup.sort(model.graph)
    return tail.understood(model, program_of)


def _own_tensors(model: ir.Model) -> None:
    """Copy parameters out of torch: the program must not change when the module trains on."""
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            array = np.array(value.const_value.numpy(), copy=True)
            value.const_value = ir.Tensor(array, dtype=value.const_value.dtype, name=value.name)


@contextlib.contextmanager
def _quiet(log: io.StringIO) -> Iterator[None]:
    """Silence the exporter's progress lines, logs and warnings; exceptions pass."""
    levels = {n: logging.getLogger(n).level for n in _QUIET_LOGGERS}
    previous = os.environ.get("TORCH_LOGS")
    with warnings.catch_warnings(), contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        warnings.simplefilter("ignore")
        for logger in levels:
            logging.getLogger(logger).setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in levels.items():
                logging.getLogger(logger).setLevel(level)
            if previous is not None:
                os.environ["TORCH_LOGS"] = previous


def _explain(module: torch.nn.Module, error: Exception) -> str:
    """The first useful line of an exporter's error, and the author's source line."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    root = chain[-1]
    lines = [line.strip() for line in str(root).splitlines() if line.strip()]
    useful = next(
        (line for line in lines if not line.startswith(("(", "Set ", "For more"))), type(root).__name__
    )
    where = ""
    for item in chain:
        where = where or provenance.location(str(item))
    if not where:
        frames = [f for f in traceback.extract_tb(root.__traceback__) if "site-packages" not in f.filename]
        frames = [f for f in frames if not f.filename.startswith("<") and f.filename != __file__]
        where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    suffix = f" (at {where})" if where else ""
    return (
        f"Module '{type(module).__name__}' cannot be exported: {type(root).__name__}: {useful[:300]}{suffix}"
    )
