"""Adapters for code that works on ONNX graphs: ONNX GraphSurgeon, onnx_ir passes, onnxscript rules."""

from __future__ import annotations

import abc
import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from sartor.errors import PassError, UsageError
from sartor.interop.foreign import ForeignPass, Transformed, wrap
from sartor.interop.shapes import with_shapes
from sartor.ir.program import Program
from sartor.passes.base import Semantics

if TYPE_CHECKING:
    import onnx_graphsurgeon
    from onnxscript.rewriter import RewriteRule, RewriteRuleSet

_PROTOBUF_LIMIT_BYTES = 2**31 - 1
_REWRITES_PER_NODE = 10


@dataclasses.dataclass(frozen=True)
class GraphSurgeonPass(ForeignPass):
    """A pass written on `onnx_graphsurgeon.Graph`; needs the extra `sartor[interop]`."""

    @abc.abstractmethod
    def transform(self, graph: onnx_graphsurgeon.Graph) -> onnx_graphsurgeon.Graph | None:
        """Change `graph` in place, or return another one. Shapes are inferred; the batch axis is 'N'."""

    def _foreign(self, program: Program) -> Transformed:
        surgeon = import_graphsurgeon()
        model = with_shapes(program)
        size = sum(
            v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None
        )
        if size > _PROTOBUF_LIMIT_BYTES:
            raise PassError(
                f"Pass '{self.name}' works on a protobuf, which holds 2 GiB; the model has {size} bytes of weights. "
                "Write it on onnx_ir instead."
            )
        graph = surgeon.import_onnx(ir.to_proto(model))
        returned = self.transform(graph)
        graph = graph if returned is None else returned
        if not isinstance(graph, surgeon.Graph):
            raise PassError(
                f"Pass '{self.name}' returned '{type(graph).__name__}'; expected an onnx_graphsurgeon.Graph or None."
            )
        return Transformed(ir.from_proto(surgeon.export_onnx(graph)))


@dataclasses.dataclass(frozen=True)
class OnnxIrPass(ForeignPass):
    """A pass written on `onnx_ir.Model`."""

    @abc.abstractmethod
    def transform(self, model: ir.Model) -> ir.Model | ir.passes.PassResult | None:
        """Change `model` in place, or return another one. Tensors are read-only: replace them."""

    def _foreign(self, program: Program) -> Transformed:
        model = with_shapes(program)
        returned = self.transform(model)
        if isinstance(returned, ir.passes.PassResult):
            returned = returned.model
        model = model if returned is None else returned
        if not isinstance(model, ir.Model):
            raise PassError(
                f"Pass '{self.name}' returned '{type(model).__name__}'; expected an onnx_ir.Model, PassResult or None."
            )
        return Transformed(model)


@dataclasses.dataclass(frozen=True)
class RewriteRulePass(ForeignPass):
    """A pass made of onnxscript rewrite rules, applied once to every node in order."""

    @abc.abstractmethod
    def rules(self) -> RewriteRuleSet:
        """The rules."""

    def _foreign(self, program: Program) -> Transformed:
        model = with_shapes(program)
        nodes = sum(1 for _ in model.graph.all_nodes())
        _bounded(self.name, self.rules(), _REWRITES_PER_NODE * max(nodes, 10)).apply_to_model(model)
        return Transformed(model)


def _bounded(name: str, rules: RewriteRuleSet, limit: int) -> RewriteRuleSet:
    """The same rules, which stop with an error: onnxscript goes on for ever where a rule matches its own result."""
    count = 0

    def counted(rule: RewriteRule, *arguments: Any, **options: Any) -> Any:
        nonlocal count
        found = type(rule).try_rewrite(rule, *arguments, **options)
        count += found is not None
        if count > limit:
            raise PassError(
                f"Pass '{name}' does not come to an end: its rules were applied {limit} times, and a rule that matches "
                "its own result is applied for ever. Let its condition refuse what it has rewritten."
            )
        return found

    result = copy.copy(rules)
    result.rules = [copy.copy(rule) for rule in rules.rules]
    for rule in result.rules:
        rule.try_rewrite = functools.partial(counted, rule)  # type: ignore[method-assign]
    return result


def import_graphsurgeon() -> Any:
    """The package `onnx_graphsurgeon`.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import onnx_graphsurgeon
    except ImportError as error:
        raise UsageError(
            "ONNX GraphSurgeon is not installed, and this pass is written for it; run pip install 'sartor[interop]'."
        ) from error
    return onnx_graphsurgeon


def graphsurgeon(
    function: Callable[[Any], Any], *, name: str | None = None, semantics: Semantics = Semantics.EXACT
) -> GraphSurgeonPass:
    """A pass from a function on `onnx_graphsurgeon.Graph`.

    Args:
        function: changes the graph in place, or returns another.
        name: of the pass; by default the function's.
        semantics: what the function promises; EXACT is checked.

    Raises:
        UsageError: no function, or a name that is taken.
    """
    require_callable(function)
    made: GraphSurgeonPass = wrap(
        GraphSurgeonPass,
        "transform",
        lambda self, graph: function(graph),
        name or name_of(function),
        semantics,
        function.__doc__,
    )
    return made


def onnx_ir_pass(
    foreign: Any, *, name: str | None = None, semantics: Semantics = Semantics.EXACT
) -> OnnxIrPass:
    """A pass from an `onnx_ir.passes` pass (or pass manager), or from a function on `onnx_ir.Model`.

    Args:
        foreign: in place or functional.
        name: of the pass; by default the function's, or the class's without a final `Pass`.
        semantics: what it promises; EXACT is checked.

    Raises:
        UsageError: neither, or a name that is taken.
    """
    require_callable(foreign)
    if isinstance(foreign, type):
        raise UsageError(f"'{foreign.__name__}' is a class; give an instance, {foreign.__name__}().")
    made: OnnxIrPass = wrap(
        OnnxIrPass,
        "transform",
        lambda self, model: foreign(model),
        name or name_of(foreign),
        semantics,
        foreign.__doc__,
    )
    return made


def rewrite_rule(
    rules: RewriteRule | RewriteRuleSet | Sequence[RewriteRule],
    *,
    name: str | None = None,
    semantics: Semantics = Semantics.EXACT,
) -> RewriteRulePass:
    """A pass from an onnxscript rewrite rule, several, or a `RewriteRuleSet`.

    Args:
        rules: tried in order at every node.
        name: of the pass; by default the rule's own, where there is one rule with a name.
        semantics: what the rules promise; EXACT is checked.

    Raises:
        UsageError: not rules, or a name that is missing or taken.
    """
    from onnxscript.rewriter import RewriteRule, RewriteRuleSet

    if isinstance(rules, RewriteRuleSet):
        chosen = rules
    else:
        listed = (
            [rules] if isinstance(rules, RewriteRule) else list(rules) if isinstance(rules, Sequence) else []
        )
        if not listed or not all(isinstance(rule, RewriteRule) for rule in listed):
            raise UsageError(
                f"Expected an onnxscript RewriteRule, several, or a RewriteRuleSet, got '{type(rules).__name__}'. A "
                "RewriteRuleClassBase gives one by its method rule()."
            )
        chosen = RewriteRuleSet(listed)
    own = [rule.name for rule in chosen.rules if rule.name]
    if name is None and (len(chosen.rules) != 1 or not own):
        raise UsageError("Several rules, or one without a name, need a name for the pass: name='fuse-bias'.")
    made: RewriteRulePass = wrap(
        RewriteRulePass, "rules", lambda self: chosen, name or own[0], semantics, None
    )
    return made


def require_callable(function: Any) -> None:
    """Refuse what cannot be called.

    Raises:
        UsageError: it cannot.
    """
    if not callable(function):
        raise UsageError(f"Expected a function or pass, got '{type(function).__name__}'.")


def name_of(function: Any) -> str:
    """What a pass made of `function` is called: the function's name, or its class's in kebab-case."""
    own = getattr(function, "__name__", "")
    if own:
        return "foreign" if own == "<lambda>" else str(own)
    camel = type(function).__name__.removesuffix("Pass") or type(function).__name__
    return "".join(f"-{c.lower()}" if c.isupper() else c for c in camel).lstrip("-")
