"""The proof of a write-back: the cut module computes what the narrowed program computes, or it is refused.

Module and program get the same random weights (`sartor.random_weights`), a copy of the module is cut like
the one that is returned, and both run in float64. The original module runs first, against the original
program, and sets the tolerance: a program holds the constants of the code (attention scales, for one) in
float32, and a module may call `.float()` in its forward; what they differ by before the cut they may
differ by after it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from sartor.errors import PlanError, UsageError
from sartor.ir.batch import random_inputs
from sartor.ir.channels import ChannelAnalysis
from sartor.ir.fx import run_twin, to_array, to_tensor
from sartor.ir.plan import Plan
from sartor.ir.program import Program
from sartor.passes.prune import apply_plan
from sartor.passes.rewriter import Rewriter
from sartor.random_weights import randomise
from sartor.writeback.blocks import Removed
from sartor.writeback.culprit import Culprit, find, line_of
from sartor.writeback.tensors import by_name, places

TOLERANCE = 1e-9
LOOSEST = 1e-4
"""Beyond this the original does not compute what its program computes."""
ALLOWANCE = 10.0
"""How much more than the original the cut module may differ."""
_COUNTER = "num_batches_tracked"
WAY_OUT = "Use sartor.to_fx(sartor.apply_plan(program, plan)) in place of the module: it has no such numbers."


class Proof:
    """The original module beside its program, with random weights, and what a cut module must compute.

    Args:
        module: the original; not changed.
        program: its program.
        plan: what is to be removed.
        analysis: channel groups of `program`.
        seed: of weights and inputs.

    Attributes:
        culprit: what `require_equal` found last.

    Raises:
        UsageError: the module does not compute what its program computes.
    """

    culprit: Culprit | None = None

    def __init__(self, module: nn.Module, program: Program, plan: Plan, analysis: ChannelAnalysis, seed: int):
        self.program = _randomised(program, analysis, module, seed)
        self.narrowed = apply_plan(self.program, plan, analysis)
        inputs = random_inputs(program, seed=seed)
        self.control = _Control(module, self.program, inputs)
        self.expected = run_twin(self.narrowed, inputs, self.control.dtype)

    def trial(self) -> nn.Module:
        """A copy of the original with the random weights, to be cut like the one that is returned."""
        return copy.deepcopy(self.control.module)

    def require_equal(self, cut: nn.Module, gone: Removed) -> None:
        """Compare a cut `trial` with the narrowed program.

        Args:
            cut: the trial; not changed.
            gone: modules that blocks took with them.

        Raises:
            PlanError: it fails or differs; names the line that stands in the way. A failure is the cause.
        """
        control = self.control
        try:
            outputs = run(cut, control.given)
        except Exception as error:
            raise _refusal(self._find(cut, error), f"{type(error).__name__}: {_first_line(error)}") from error
        difference = worst(self.expected, outputs)
        if not difference <= control.tolerance:
            what = (
                f"the result differs by {difference:.3g} from the narrowed program's ({control.tolerance:.0e} in "
                f"{control.dtype})"
            )
            raise _refusal(self._find(cut, None), what)
        _require_training(cut, control.module, self.program, gone, control.given)

    def _find(self, cut: nn.Module, error: Exception | None) -> Culprit:
        control = self.control
        self.culprit = find(control.module, cut, control.given, self.program, self.narrowed, error)
        return self.culprit


def _randomised(program: Program, analysis: ChannelAnalysis, module: nn.Module, seed: int) -> Program:
    """Random weights for what the module holds; constants that its code computes stay as they are."""
    drawn = randomise(program, analysis, seed)
    own = by_name(module)
    rewriter = Rewriter(drawn, "write-back")
    for name in drawn.initializers:
        if name not in own and name in program.initializers:
            rewriter.set_initializer(name, program.initializer_array(name))
    drawn.invalidate()
    return drawn


class _Control:
    """The original module beside its program: in which type they agree, and how closely.

    Attributes:
        module: a copy with the program's weights.
        given: the inputs as tensors.
        dtype: `float64`, or `float32` where the module does not run otherwise.
        tolerance: for the cut module.

    Raises:
        UsageError: they do not agree.
    """

    def __init__(self, module: nn.Module, program: Program, inputs: Mapping[str, np.ndarray]):
        problem = ""
        for self.dtype, least in (("float64", TOLERANCE), ("float32", LOOSEST)):
            self.module = _loaded(module, program, self.dtype)
            self.given = [
                to_tensor(inputs[v.name or ""], getattr(torch, self.dtype)) for v in program.graph.inputs
            ]
            try:
                outputs = run(self.module, self.given)
            except Exception as error:
                problem = f"it fails with {type(error).__name__}: {_first_line(error)}{_at(line_of(error))}"
                continue
            difference = worst(run_twin(program, inputs, self.dtype), outputs)
            if difference <= LOOSEST:
                self.tolerance = min(max(least, ALLOWANCE * difference), LOOSEST)
                return
            problem = f"it differs by {difference:.3g} (tolerance {LOOSEST:.0e})"
            break
        raise UsageError(
            f"The module '{type(module).__name__}' itself does not compute what its program computes: {problem}. "
            "Only a module that computes the same for the same inputs and weights can be compared; capture it again."
        )


def run(module: nn.Module, given: list[torch.Tensor]) -> list[np.ndarray]:
    """All tensors of a module's result, in order, at inference."""
    with torch.no_grad():
        leaves = pytree.tree_leaves(module(*given))
    return [to_array(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)]


def worst(expected: Mapping[str, np.ndarray], outputs: list[np.ndarray]) -> float:
    """Largest max|a − b| / max|a| over the outputs in order; infinite where they are not comparable."""
    from sartor.comparison import relative_error

    if len(outputs) != len(expected):
        return math.inf
    return relative_error(expected, dict(zip(expected, outputs, strict=True)))


def _loaded(module: nn.Module, program: Program, dtype: str) -> nn.Module:
    """A copy in eval mode, on the CPU, with the program's weights."""
    trial = copy.deepcopy(module).cpu().to(getattr(torch, dtype)).eval()
    with torch.no_grad():
        for shared in places(trial).values():
            for place in shared:
                if place.name in program.initializers:
                    source = to_tensor(program.initializer_array(place.name)).to(place.tensor.dtype)
                    if source.shape != place.tensor.shape:
                        raise UsageError(
                            f"Parameter '{place.name}' has shape {list(place.tensor.shape)}; expected "
                            f"{list(source.shape)}. Capture this module again."
                        )
                    place.tensor.copy_(source)
                    break
    return trial


def _require_training(
    cut: nn.Module, module: nn.Module, program: Program, gone: Removed, given: list[torch.Tensor]
) -> None:
    """Parts that only training runs (auxiliary heads) are not in the program; they must still fit.

    Raises:
        PlanError: training runs on the original and not on the cut module.
    """
    read = {
        i
        for name, i in ((p.name, i) for i, s in places(module).items() for p in s)
        if name in program.initializers
    }
    unread = [
        place.name
        for i, shared in places(module).items()
        for place in shared
        if i not in read and not place.name.endswith(_COUNTER) and not gone.covers(place.name)
    ]
    if not unread:
        return
    batch = [
        torch.cat([t, t]) if v.name in program.batch.inputs else t
        for t, v in zip(given, program.graph.inputs, strict=True)
    ]
    before, after = (copy.deepcopy(m).train() for m in (module, cut))
    try:
        with torch.no_grad():
            before(*batch)
    except Exception:
        return  # it does not train on such inputs anyway
    try:
        with torch.no_grad():
            after(*batch)
    except Exception as error:
        raise PlanError(
            f"The plan cannot be written back: '{unread[0]}' is not read at inference, so that it stayed whole, and "
            f"in training the module fails{_at(line_of(error))} with {type(error).__name__}: {_first_line(error)}. "
            f"Remove what only training uses, or {WAY_OUT[0].lower()}{WAY_OUT[1:]}"
        ) from error


def _refusal(culprit: Culprit, what: str) -> PlanError:
    return PlanError(f"The plan cannot be written back into this module: {culprit}; {what}. {WAY_OUT}")


def _at(line: str) -> str:
    return f" at {line}" if line else ""


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else "no message")[:200].rstrip(".")
