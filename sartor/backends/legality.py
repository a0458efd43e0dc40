"""Legality as a table of rules: one rule is one small function that returns (ok, observed).

The report of a program and the support table of a backend are generated from the same table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from sartor.backends.protocol import Finding, LegalityReport, TargetOptions
from sartor.errors import BackendError, ModelError, SartorError

if TYPE_CHECKING:
    import onnx_ir as ir

    from sartor.ir.program import Program

Check = tuple[bool, str]


@dataclasses.dataclass(frozen=True)
class ModelRule:
    """A rule about the whole program.

    Attributes:
        id: kebab-case name in reports.
        text: the rule as a sentence.
        check: returns whether it holds, and what was observed.
    """

    id: str
    text: str
    check: Callable[[Program, TargetOptions], Check]


@dataclasses.dataclass(frozen=True)
class NodeRule:
    """A rule about every node of the main graph and of its subgraphs."""

    id: str
    text: str
    check: Callable[[Program, ir.Node], Check]


@dataclasses.dataclass(frozen=True)
class Rules:
    """Everything that a backend asks of a program.

    Attributes:
        model: rules about the whole program.
        nodes: rules about every node.
        operators: further rules by operator, `OpType` or `domain::OpType`, for its nodes alone.
    """

    model: tuple[ModelRule, ...] = ()
    nodes: tuple[NodeRule, ...] = ()
    operators: Mapping[str, tuple[NodeRule, ...]] = dataclasses.field(default_factory=dict)

    def of(self, node: ir.Node) -> tuple[NodeRule, ...]:
        """The rules that apply to one node."""
        name = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        return (*self.nodes, *self.operators.get(name, ()))


def check_rules(program: Program, options: TargetOptions, rules: Rules) -> LegalityReport:
    """Apply rule tables. A node rule that holds everywhere is one finding for the model.

    Raises:
        BackendError: a rule raised, which none may; names it and the node.
    """
    import onnx_ir as ir

    findings = []
    for rule in rules.model:
        ok, observed = _applied(rule, "the model", program, options)
        findings.append(Finding("", rule.id, observed, rule.text, ok))
    applied: dict[NodeRule, list[tuple[ir.Node, bool, str]]] = {rule: [] for rule in rules.nodes}
    for node in ir.traversal.RecursiveGraphIterator(program.graph):
        for node_rule in rules.of(node):
            found = _applied(node_rule, f"node '{node.name}' ({node.op_type})", program, node)
            applied.setdefault(node_rule, []).append((node, *found))
    for node_rule, results in applied.items():
        broken = [
            Finding(node.name or "", node_rule.id, seen, node_rule.text, False)
            for node, ok, seen in results
            if not ok
        ]
        findings.extend(broken or [Finding("", node_rule.id, f"{len(results)} nodes", node_rule.text, True)])
    return LegalityReport(tuple(findings))


def _applied(rule: ModelRule | NodeRule, subject: str, *arguments: Any) -> Check:
    try:
        ok, observed = rule.check(*arguments)
    except SartorError:
        raise
    except Exception as error:
        raise BackendError(
            f"Legality rule '{rule.id}' of '{getattr(rule.check, '__module__', '?')}' raised {type(error).__name__} "
            f"on {subject}: {error}. A rule answers for any program, also where an operand is computed or absent: "
            "report this to whoever maintains the backend."
        ) from error
    return ok, observed


def require_legal(name: str, report: LegalityReport) -> None:
    """Refuse an illegal program.

    Raises:
        BackendError: the first violation is the message, the others are notes. Those of single nodes come first:
            what is wrong with the model as a whole (shapes that are not known) often follows from them.
    """
    if report.ok:
        return
    first, *others = sorted(report.violations, key=lambda finding: not finding.node)
    error = BackendError(f"Backend '{name}' cannot run this program. {first}")
    for finding in others[:20]:
        error.add_note(str(finding))
    raise error


def opset_at_most(limit: int) -> ModelRule:
    """The default-domain opset is one that the runtime knows."""

    def check(program: Program, options: TargetOptions) -> Check:
        opset = program.model.opset_imports.get("", 0)
        return 0 < opset <= limit, f"opset {opset}"

    return ModelRule("opset-version", f"The opset is between 1 and {limit}.", check)


def ir_version_at_most(limit: int) -> ModelRule:
    """The ONNX IR version is one that the runtime reads."""

    def check(program: Program, options: TargetOptions) -> Check:
        version = program.model.ir_version
        return version <= limit, f"IR version {version}"

    return ModelRule("ir-version", f"The ONNX IR version is at most {limit}.", check)


def known_domains(*domains: str) -> NodeRule:
    """Operators come from domains that the runtime has kernels for, or are functions of the model."""

    def check(program: Program, node: ir.Node) -> Check:
        known = node.domain in domains or node.op_identifier() in program.model.functions
        return known, f"{node.domain or 'ai.onnx'}::{node.op_type}"

    names = ", ".join(f"'{d or 'ai.onnx'}'" for d in domains)
    return NodeRule("operator-domain", f"Operators are of domain {names} or functions of the model.", check)


def no_functions() -> NodeRule:
    """No calls of model functions are left; for runtimes that cannot convert them."""

    def check(program: Program, node: ir.Node) -> Check:
        return node.op_identifier() not in program.model.functions, f"{node.domain}::{node.op_type}"

    return NodeRule("no-functions", "Model functions are inlined before lowering.", check)


def no_control_flow() -> NodeRule:
    """There are no bodies that run by choice or again; for runtimes without them."""

    def check(program: Program, node: ir.Node) -> Check:
        bodies = sorted(n for n, a in node.attributes.items() if a.type.name in ("GRAPH", "GRAPHS"))
        return not bodies, f"{node.op_type} with {', '.join(bodies)}" if bodies else node.op_type

    return NodeRule("control-flow", "No node has a body of its own (If, Loop, Scan).", check)


def max_rank(limit: int) -> ModelRule:
    """No tensor has more axes than the runtime's kernels take."""

    def check(program: Program, options: TargetOptions) -> Check:
        try:
            shapes = program.shapes()
        except ModelError as error:
            return False, f"shapes are not known: {error}"
        name, shape = max(shapes.items(), key=lambda item: len(item[1]), default=("", ()))
        return len(shape) <= limit, f"value '{name}' of rank {len(shape)}"

    return ModelRule("tensor-rank", f"Tensors have at most {limit} axes.", check)


def fixed_shapes() -> ModelRule:
    """Every input has a concrete reference shape, at which the artifact is measured."""

    def check(program: Program, options: TargetOptions) -> Check:
        known = {**program.input_shapes, **options.shapes}
        missing = [v.name for v in program.graph.inputs if v.name not in known]
        return not missing, f"no shape for {', '.join(map(repr, missing))}" if missing else "all inputs"

    return ModelRule(
        "reference-shape", "Every input has a reference shape (--shape NAME=1,3,224,224).", check
    )


def boundary_types_without(*names: str) -> ModelRule:
    """Inputs and outputs are of types that arrays can be handed over in."""

    def check(program: Program, options: TargetOptions) -> Check:
        values = [*program.graph.inputs, *program.outputs]
        found = [v for v in values if v.dtype is not None and v.dtype.name in names]
        told = ", ".join(f"'{v.name}' is {v.dtype.name.lower()}" for v in found if v.dtype is not None)
        return not found, told or f"{len(values)} values"

    spoken = " or ".join(name.lower() for name in names)
    return ModelRule("boundary-types", f"No input or output of the model is of type {spoken}.", check)
