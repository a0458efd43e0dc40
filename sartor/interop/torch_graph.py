"""Adapter for `torch.fx` passes: they work on the FX twin, and what they change comes back.

A pass that changes tensors only is brought back by `pull_weights`, and nothing is lost. One that changes
the graph is captured again through torch.export: parameters keep their names, inputs and outputs theirs;
names of nodes are new, operators come back as torch decomposes them, and the source line survives only
for nodes that read a parameter.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from sartor.errors import PassError, UsageError
from sartor.interop.adapters import name_of, require_callable
from sartor.interop.foreign import ForeignPass, Transformed, wrap
from sartor.ir.program import NodeProvenance, Program
from sartor.passes.base import Semantics

if TYPE_CHECKING:
    from torch import fx


@dataclasses.dataclass(frozen=True)
class TorchFxPass(ForeignPass):
    """A pass written on `torch.fx.GraphModule`.

    It sees the FX twin (`sartor.to_fx`): placeholders and a tuple of outputs in the order of the program's
    inputs and outputs, parameters as `get_attr` nodes under their own names, and one call per operator,
    from torch and from `sartor.ir.torch_ops`. `node.meta["onnx_node"]` names the node of the program.
    """

    @abc.abstractmethod
    def transform(self, module: fx.GraphModule) -> fx.GraphModule | None:
        """Change `module` in place, or return another one. Inputs and outputs stay as they are."""

    def _foreign(self, program: Program) -> Transformed:
        from torch import fx

        from sartor.ir.fx import pull_weights, to_fx, twin_info
        from sartor.ir.fx_build import INFO

        module = to_fx(program)
        info, before = twin_info(module), _structure(module)
        returned = self.transform(module)
        module = module if returned is None else returned
        if not isinstance(module, fx.GraphModule):
            raise PassError(
                f"Pass '{self.name}' returned '{type(module).__name__}'; expected a torch.fx.GraphModule or None."
            )
        module.graph.lint()
        module.recompile()
        if _structure(module) == before:
            module.meta[INFO] = info
            return Transformed(pull_weights(program, module).model)
        return self._captured(program, module, info.names)

    def _captured(self, program: Program, module: fx.GraphModule, names: Mapping[str, str]) -> Transformed:
        import torch

        from sartor.ir.batch import random_inputs
        from sartor.ir.capture import capture
        from sartor.ir.fx import to_tensor

        inputs, outputs = program.graph.inputs, program.graph.outputs
        given = random_inputs(program)
        examples = tuple(to_tensor(given[value.name or ""]) for value in inputs)
        with torch.no_grad():
            result = module.eval()(*examples)
        count = len(result) if isinstance(result, (tuple, list)) else 1
        if count != len(outputs):
            raise PassError(
                f"Pass '{self.name}' returns a module with {count} outputs; expected {len(outputs)}, in the order of "
                "the program's."
            )
        model = capture(module, examples, name=program.source.name).model
        if len(model.graph.inputs) != len(inputs):
            raise PassError(f"Pass '{self.name}' returns a module that does not read all of its inputs.")
        wanted = {model.graph.initializers[k]: n for k, n in names.items() if k in model.graph.initializers}
        wanted.update({v: old.name or "" for v, old in zip(model.graph.inputs, inputs, strict=True)})
        wanted.update({v: old.name or "" for v, old in zip(model.graph.outputs, outputs, strict=True)})
        _rename(model, wanted)
        return Transformed(model, _provenance(program, model))


def torch_fx(
    function: Callable[[Any], Any], *, name: str | None = None, semantics: Semantics = Semantics.EXACT
) -> TorchFxPass:
    """A pass from a function on `torch.fx.GraphModule`; see `TorchFxPass` for what it is given.

    Args:
        function: changes the module in place, or returns another.
        name: of the pass; by default the function's.
        semantics: what the function promises; EXACT is checked.

    Raises:
        UsageError: no function, or a name that is taken.
    """
    require_callable(function)
    if isinstance(function, type):
        raise UsageError(f"'{function.__name__}' is a class; give a function or an instance.")
    made: TorchFxPass = wrap(
        TorchFxPass,
        "transform",
        lambda self, module: function(module),
        name or name_of(function),
        semantics,
        function.__doc__,
    )
    return made


def _structure(module: fx.GraphModule) -> list[Any]:
    """Nodes and tensors without contents, in a form that compares with `==`."""
    nodes = [(n.op, n.name, n.target, str(n.args), str(n.kwargs)) for n in module.graph.nodes]
    tensors = [(k, tuple(t.shape), t.dtype) for k, t in module.state_dict().items()]
    return [nodes, tensors]


def _rename(model: ir.Model, wanted: Mapping[ir.Value, str]) -> None:
    """Give values their names; what else has one of these gets another."""
    graph = model.graph
    values = [*graph.inputs, *graph.initializers.values(), *(o for n in graph.all_nodes() for o in n.outputs)]
    taken = {v.name for v in values} | set(wanted.values())
    for value in values:
        if value not in wanted and value.name in set(wanted.values()):
            number = 0
            while f"{value.name}_{number}" in taken:
                number += 1
            value.name = f"{value.name}_{number}"
            taken.add(value.name)
    for number, value in enumerate(wanted):  # two may have to swap their names
        value.name = f".renamed.{number}"
    for value, name in wanted.items():
        value.name = name  # onnx_ir keeps the table of initializers in step


def _provenance(program: Program, model: ir.Model) -> dict[str, NodeProvenance]:
    """A node that reads a parameter comes from where that parameter was read first."""
    origin: dict[str, NodeProvenance] = {}
    for node in program.nodes():
        for value in node.inputs:
            if value is not None and value.is_initializer() and node.name in program.provenance:
                origin.setdefault(value.name or "", program.provenance[node.name])
    found: dict[str, NodeProvenance] = {}
    for node in model.graph:
        names = [value.name for value in node.inputs if value is not None and value.is_initializer()]
        record = next((origin[n] for n in names if n in origin), None)
        if record is not None:
            found[node.name or ""] = record
    return found
