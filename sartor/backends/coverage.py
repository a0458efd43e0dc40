"""What becomes of each node of a program on a target: taken as it is, rewritten by a legalisation, or a stop.

Computed from the target's rule table and its legalisation alone, so that no vendor package is needed.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from sartor.backends.legality import check_rules
from sartor.backends.protocol import Backend, Finding, TargetOptions
from sartor.errors import SartorError

if TYPE_CHECKING:
    import onnx_ir as ir

    from sartor.ir.program import Program

TAKEN, REWRITTEN, STOPS, UNKNOWN = STATUSES = ("taken", "rewritten", "stops", "unknown")


@dataclasses.dataclass(frozen=True)
class NodeCoverage:
    """What becomes of one node.

    Attributes:
        node: its name.
        op_type: its operator, `domain::OpType` outside the default domain.
        status: `taken`, `rewritten`, `stops`, or `unknown` for a node that is left as it is.
        where: `'name' (OpType) at module, file:line`.
        module: dotted module path in the author's code, or empty.
        location: `file.py:line` in the author's code, or empty.
        findings: the rules that stop it, or that it broke before it was rewritten.
        reason: why, as one sentence; empty for a taken node.
    """

    node: str
    op_type: str
    status: str
    where: str
    module: str = ""
    location: str = ""
    findings: tuple[Finding, ...] = ()
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        rules = [{"rule": f.rule, "text": f.text, "observed": f.observed} for f in self.findings]
        return dataclasses.asdict(self) | {"findings": rules}


@dataclasses.dataclass(frozen=True)
class Coverage:
    """What becomes of a program on one target.

    Attributes:
        target: name of the backend.
        precision: that the artifact would compute in.
        nodes: every node, those of branches included, in execution order; then those left as they are.
        model: rules about the whole program that do not hold.
    """

    target: str
    precision: str
    nodes: tuple[NodeCoverage, ...]
    model: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Nothing stops the program. Nodes that are left as they are may still."""
        return not self.model and all(node.status != STOPS for node in self.nodes)

    @property
    def counts(self) -> dict[str, int]:
        """Number of nodes by status."""
        found = collections.Counter(node.status for node in self.nodes)
        return {status: found[status] for status in STATUSES}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; `nodes` are those that are not simply taken."""
        return {
            "name": self.target,
            "precision": self.precision,
            "ok": self.ok,
            "counts": self.counts,
            "model": [{"rule": f.rule, "text": f.text, "observed": f.observed} for f in self.model],
            "nodes": [node.to_dict() for node in self.nodes if node.status != TAKEN],
        }


def coverage(program: Program, backend: Backend, options: TargetOptions | None = None) -> Coverage:
    """Ask a backend's rules about every node, before and after its legalisation.

    Args:
        program: canonical; not changed.
        backend: its `rules` and `legalize` are called, and nothing else.
        options: precision and shapes; by default f32 at the program's reference shapes.
    """
    options = options or TargetOptions(shapes=program.input_shapes)
    rules = backend.rules()
    refused: tuple[Finding, ...] = ()
    try:
        legal = backend.legalize(program)
    except SartorError as error:  # what it cannot rewrite stops it; the rules say what else does
        legal = program
        text = "The target's legalisation takes the program."
        refused = (Finding("", "legalisation", str(error), text, False),)
    before = _broken(check_rules(program, options, rules).violations)
    after = before if legal is program else _broken(check_rules(legal, options, rules).violations)
    nodes = list(_nodes(program, legal, before, after))
    nodes.extend(_left(program))
    return Coverage(backend.name, options.precision, tuple(nodes), (*refused, *after.get("", ())))


def _broken(violations: tuple[Finding, ...]) -> dict[str, tuple[Finding, ...]]:
    """Findings by node; those about the whole model under the empty name."""
    found: dict[str, list[Finding]] = {}
    for finding in violations:
        found.setdefault(finding.node, []).append(finding)
    return {name: tuple(findings) for name, findings in found.items()}


def _nodes(
    program: Program,
    legal: Program,
    before: Mapping[str, tuple[Finding, ...]],
    after: Mapping[str, tuple[Finding, ...]],
) -> Iterator[NodeCoverage]:
    import onnx_ir as ir

    own = {node.name or "": node for node in ir.traversal.RecursiveGraphIterator(program.graph)}
    left = {node.name or "": node for node in ir.traversal.RecursiveGraphIterator(legal.graph)}
    for name, node in own.items():
        if name in after:
            yield _entry(program, node, STOPS, after[name])
        elif legal is program or (name in left and _written(node) == _written(left[name])):
            yield _entry(program, node, TAKEN)
        else:
            gone = "Replaced" if name not in left or left[name].op_type != node.op_type else "Changed"
            yield _entry(program, node, REWRITTEN, before.get(name, ()), f"{gone} by the legalisation.")
    for name, node in left.items():
        if name not in own and name in after:  # what the legalisation made is no better
            yield _entry(legal, node, STOPS, after[name], "Made by the legalisation. ")


def _entry(
    program: Program, node: ir.Node, status: str, findings: tuple[Finding, ...] = (), reason: str = ""
) -> NodeCoverage:
    origin = program.provenance.get(node.name or "")
    told = " ".join(f"{f.text} Observed: {f.observed}." for f in findings)
    return NodeCoverage(
        node=node.name or "",
        op_type=f"{node.domain}::{node.op_type}" if node.domain else node.op_type,
        status=status,
        where=program.where(node),
        module=origin.module if origin else "",
        location=origin.location if origin else "",
        findings=findings,
        reason=" ".join(part for part in (reason.strip(), told) if part),
    )


def _written(node: ir.Node) -> bytes:
    """All that a node says, for comparing it with what became of it."""
    import onnx_ir as ir

    proto = ir.to_proto(node)
    proto.ClearField("metadata_props")
    proto.ClearField("doc_string")
    attributes = sorted(proto.attribute, key=lambda attribute: attribute.name)
    del proto.attribute[:]
    proto.attribute.extend(attributes)
    data: bytes = proto.SerializeToString(deterministic=True)
    return data


def _left(program: Program) -> Iterator[NodeCoverage]:
    if program.tail is None:
        return
    for node in program.tail.nodes:
        origin = program.provenance.get(node.name)
        place = str(origin) if origin else ""
        yield NodeCoverage(
            node=node.name,
            op_type=f"{node.domain}::{node.op_type}" if node.domain else node.op_type,
            status=UNKNOWN,
            where=f"'{node.name}' ({node.op_type}){f' at {place}' if place else ''}",
            module=origin.module if origin else "",
            location=origin.location if origin else "",
            reason=program.tail.reasons.get(node.name, "it follows a node that is left as it is"),
        )
