"""`apply_to_module`: a plan, carried out on a copy of the author's module."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from sartor.errors import PlanError, UsageError
from sartor.ir.capture import capture, captured_at
from sartor.ir.channels import channel_groups
from sartor.ir.plan import Plan
from sartor.ir.program import Program
from sartor.passes.prune import apply_plan
from sartor.writeback import blocks, layers, numbers, tensors
from sartor.writeback.proof import Proof

_COMPUTED_BY_HOOK = ("WeightNorm", "SpectralNorm", "BasePruningMethod")


def apply_to_module(
    module: nn.Module,
    plan: Plan,
    example_inputs: Any = None,
    *,
    program: Program | None = None,
    seed: int = 0,
) -> nn.Module:
    """A copy of `module` with the plan's channels and blocks removed; `module` itself stays as it is.

    Parameters and buffers keep their names, element type, device, `requires_grad` and sharing, modules
    their training flags. Attributes of torch's layers (`in_channels`, `groups`, `num_features`,
    `normalized_shape`, …) follow the new shapes; an `nn.MultiheadAttention` whose heads no longer add up
    to the embedding becomes a `NarrowMultiheadAttention`; a removed residual block becomes a `Shortcut`.
    Where that is not enough, integer attributes of the author's modules that repeat a changed number
    (`self.num_heads`) follow, too; numbers that are kept for information only are left alone. Optimizer
    state, gradients and hooks on tensors are not carried over.

    The copy is compared with the narrowed program on randomised weights, in float64 at 1e-9. Where the
    original itself differs more from its program (constants of attention are captured in float32), the
    tolerance is ten times that; where it cannot run in float64, float32 at 1e-4. Nothing is returned that
    differs.

    Args:
        module: the module that the plan's program was captured from, with the same weights.
        plan: groups to narrow and blocks to remove.
        example_inputs: a tensor or a tuple of tensors, as for `sartor.capture`. Not needed with `program`, nor
            where `module` was captured in this process: then at the same shapes.
        program: the program captured from `module`, if it is at hand; the weights may have changed since.
        seed: of the weights and inputs of the comparison.

    Raises:
        PlanError: the plan belongs to another model, is not legal, or a number in the module's forward
            stands in the way; the message names the line, and the FX twin as the way out.
        UsageError: nothing says at which inputs to capture the module, the program is of another module,
            or a tensor of the module is computed from others (parametrizations, weight norm).
        ModelError: the module cannot be captured.
    """
    _require_plain(module)
    if not isinstance(plan, Plan):
        raise UsageError(f"Expected a sartor.Plan, got '{type(plan).__name__}'; read one with Plan.load.")
    if plan.replaces_layers:
        raise UsageError(
            f"The plan replaces layers of '{type(module).__name__}', for which the module has no places. Apply it to "
            f"the captured program, or leave its section '{plan.replacements[0]}' away."
        )
    if plan.sizes:
        raise UsageError(
            f"The plan gives '{type(module).__name__}' another input size {dict(plan.sizes)}, which a module takes "
            "with its inputs; tables of positions in it would not follow. Apply the plan to the captured program, or "
            "leave its section 'scale' away."
        )
    if plan.widened or plan.deepened:
        raise UsageError(
            f"The plan adds units or blocks to '{type(module).__name__}', for which the module has no places. Apply it "
            "to the captured program, or leave its section 'scale' away."
        )
    if program is None:
        if example_inputs is None:
            example_inputs = captured_at(module)
        if example_inputs is None:
            raise UsageError(
                "apply_to_module needs to know the module's graph; give example_inputs, or program=, which "
                "sartor.capture returned for this module."
            )
        program = capture(module, example_inputs)
    if program.tail is not None:
        raise UsageError(
            f"'{type(module).__name__}' cannot be written back, because the result could not be proven: "
            f"{program.tail.reason()}. Cut it as a program, and save that."
        )
    analysis = channel_groups(program, approximate=plan.approximate)
    try:
        narrowed = apply_plan(program, plan, analysis)
    except PlanError as error:
        error.add_note("A module's program depends on its weights and on the shapes of the example inputs.")
        raise
    result = _copied(module)
    tensors.require_same(result, program)
    surgery = _Surgery(program, narrowed, plan, tensors.kept_indices(program, plan, analysis))
    proof = Proof(module, program, plan, analysis, seed)
    changes = _proven(proof, surgery)
    surgery.perform(result)
    numbers.follow(result, changes)
    return result


def _proven(proof: Proof, surgery: _Surgery) -> numbers.Changes:
    """Which attributes of the author's modules have to follow so that the cut module is right; none, mostly.

    Raises:
        PlanError: it is not right in any way.
    """
    tried: list[numbers.Changes] = []
    refused: list[PlanError] = []
    culprits = []
    for changes in numbers.proposals(proof.control.module, surgery.program, surgery.narrowed):
        if changes in tried:
            continue
        tried.append(changes)
        trial = proof.trial()
        gone = surgery.perform(trial)
        numbers.follow(trial, changes)
        try:
            proof.require_equal(trial, gone)
            return changes
        except PlanError as refusal:
            refused.append(refusal)
            culprits.append(proof.culprit)
    # Where attributes mended the first place, the next one is what stands in the way.
    further = [refusal for refusal, culprit in zip(refused, culprits, strict=True) if culprit != culprits[0]]
    raise (further or refused)[0]


@dataclasses.dataclass(frozen=True)
class _Surgery:
    """What is done to a copy of the module; first to the one that is proven, then to the one that is returned.

    Attributes:
        program: the program before.
        narrowed: the program after.
        plan: what is removed.
        kept: kept positions by tensor name and axis.
    """

    program: Program
    narrowed: Program
    plan: Plan
    kept: tensors.Kept

    def perform(self, module: nn.Module) -> blocks.Removed:
        """Change `module`, a private copy, in place."""
        gone = blocks.replace(module, self.program, self.narrowed, self.plan)
        old_shapes = tensors.narrow(module, self.kept, self.narrowed)
        layers.update(module, self.kept, old_shapes, self.program, self.narrowed)
        return gone


def _copied(module: nn.Module) -> nn.Module:
    try:
        result = copy.deepcopy(module)
    except Exception as error:
        raise UsageError(
            f"Module '{type(module).__name__}' cannot be copied: {type(error).__name__}: {error}. Detach the "
            "tensors it keeps as attributes, so that copy.deepcopy accepts it."
        ) from error
    for mine, theirs in zip(result.parameters(), module.parameters(), strict=True):
        mine.__dict__.update(theirs.__dict__)  # marks such as "no weight decay", which deepcopy leaves out
    return result


def _require_plain(module: Any) -> None:
    """Refuse what has no tensors of its own to cut.

    Raises:
        UsageError: not a module, scripted, uninitialised, or a parameter that is computed from others.
    """
    if not isinstance(module, nn.Module):
        raise UsageError(f"Expected a torch.nn.Module, got '{type(module).__name__}'.")
    for name, child in module.named_modules():
        where = (
            f"Module '{name}' ({type(child).__name__})" if name else f"The module '{type(child).__name__}'"
        )
        if isinstance(child, torch.jit.ScriptModule):
            raise UsageError(f"{where} is TorchScript, whose code cannot change; give the original module.")
        if parametrize.is_parametrized(child):
            names = ", ".join(f"'{n}'" for n in child.parametrizations)  # type: ignore[union-attr]
            raise UsageError(
                f"{where} computes {names} from other tensors; only plain parameters can be cut. Call "
                "torch.nn.utils.parametrize.remove_parametrizations first."
            )
        for hook in child._forward_pre_hooks.values():
            kind = next((c.__name__ for c in type(hook).__mro__ if c.__name__ in _COMPUTED_BY_HOOK), "")
            if kind:
                raise UsageError(
                    f"{where} computes a parameter before every call ({type(hook).__name__}); only plain "
                    "parameters can be cut. Remove it first, with the 'remove' function of torch.nn.utils."
                )
        if any(isinstance(p, nn.UninitializedParameter) for p in child.parameters(recurse=False)):
            raise UsageError(f"{where} has parameters without shape; run it once before.")
