"""Rules about single nodes that several targets use, and tables of them by operator.

A rule that cannot see what it asks about (a type or shape that is not known) holds: the runtime has the last word.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sartor.backends.legality import Check, NodeRule
from sartor.errors import ModelError

if TYPE_CHECKING:
    import onnx_ir as ir

    from sartor.ir.program import Program

Table = dict[str, tuple[NodeRule, ...]]
_OPSET = 21  # of the canonical dialect: the schemas that say which operands share a type


def merged(*tables: Mapping[str, Sequence[NodeRule]]) -> Table:
    """One table of all rules, operators in alphabetical order."""
    found: dict[str, list[NodeRule]] = {}
    for table in tables:
        for operator, rules in table.items():
            found.setdefault(operator, []).extend(rules)
    return {operator: tuple(found[operator]) for operator in sorted(found)}


# ---- rules ---------------------------------------------------------------------------------------
def not_converted(text: str) -> NodeRule:
    """The target has nothing for the operator."""
    return NodeRule("not-converted", text, lambda program, node: (False, f"{node.op_type}"))


def attribute(name: str, allowed: Iterable[Any], default: Any, text: str) -> NodeRule:
    """An attribute has one of a few values.

    Args:
        name: of the attribute.
        allowed: its values.
        default: what ONNX takes where it is absent.
        text: the rule as a sentence.
    """
    values = tuple(allowed)

    def check(program: Program, node: ir.Node) -> Check:
        value = attribute_of(node, name, default)
        return value in values, f"{name}={value}"

    return NodeRule(name.replace("_", "-"), text, check)


def absent(index: int, name: str, text: str) -> NodeRule:
    """An optional input is not used."""

    def check(program: Program, node: ir.Node) -> Check:
        value = operand(node, index)
        return value is None, f"'{value.name}' is given" if value is not None else "not given"

    return NodeRule(f"no-{name}".replace("_", "-"), text, check)


def constant(index: int, name: str, text: str) -> NodeRule:
    """An input, where it is given, is an initializer."""

    def check(program: Program, node: ir.Node) -> Check:
        value = operand(node, index)
        stored = value is None or numbers(value) is not None
        return stored, "a constant or not given" if stored else f"'{getattr(value, 'name', '')}' is computed"

    return NodeRule(f"constant-{name}".replace("_", "-"), text, check)


def rank_at_most(limit: int, text: str, index: int = 0) -> NodeRule:
    """An input has at most so many axes."""

    def check(program: Program, node: ir.Node) -> Check:
        shape = shape_of(program, operand(node, index))
        return shape is None or len(
            shape
        ) <= limit, f"shape {list(shape)}" if shape is not None else "unknown"

    return NodeRule("rank", text, check)


def missing_types(table: Mapping[str, str]) -> Table:
    """Element types that an operator is not taken in.

    Args:
        table: operators by ONNX element type, separated by spaces; `Op.T1` means the operands of that
            type parameter, `Op` those of the parameter of its first input.
    """
    types: dict[tuple[str, str], list[str]] = {}
    for kind, operators in table.items():
        for entry in operators.split():
            operator, _, parameter = entry.partition(".")
            types.setdefault((operator, parameter or _parameter(operator, 0)), []).append(kind)
    return merged(*({key[0]: (_without(*key, kinds),)} for key, kinds in types.items()))


def type_combinations(operator: str, parameters: Sequence[str], allowed: Sequence[str]) -> Table:
    """Operands have one of a few combinations of element types.

    Args:
        operator: its operator type.
        parameters: type parameters of its schema.
        allowed: for each combination the types of these parameters, separated by spaces. A float16 counts
            as a float: targets of which this is said convert it themselves.
    """
    known = {tuple(entry.split()) for entry in allowed}
    spoken = "; ".join(", ".join(kind.lower() for kind in entry.split()) for entry in allowed)
    text = f"The element types ({', '.join(parameters)}) are one of: {spoken}."

    def check(program: Program, node: ir.Node) -> Check:
        found = []
        for parameter in parameters:
            kinds = {type_of(program, v) for v in _operands(node, parameter)} - {None}
            found.append("/".join(sorted(str(kind) for kind in kinds)) or "unknown")
        like = tuple(kind.replace("FLOAT16", "FLOAT") if kind != "BFLOAT16" else kind for kind in found)
        return "unknown" in like or like in known, ", ".join(kind.lower() for kind in found)

    return {operator: (NodeRule("type-combination", text, check),)}


def whole_sizes() -> NodeRule:
    """Runtimes round the sizes that scales make before they align the corners; ONNX aligns them first."""

    def check(program: Program, node: ir.Node) -> Check:
        scales, shape = numbers(operand(node, 2)), shape_of(program, operand(node, 0))
        mode = attribute_of(node, "coordinate_transformation_mode", "half_pixel")
        if mode != "align_corners" or not scales or shape is None:
            return True, "does not apply"
        axes = attribute_of(node, "axes", None) or range(len(scales))
        sizes = [shape[axis] * scale for axis, scale in zip(axes, scales, strict=True)]
        return all(math.isclose(size, round(size), rel_tol=1e-6) for size in sizes), f"sizes {sizes}"

    text = "With 'align_corners', scales make sizes that are whole numbers: others are rounded too early."
    return NodeRule("whole-sizes", text, check)


def sign_of_dividend() -> NodeRule:
    """`Mod` of floats is C's `fmod`."""

    def is_float(program: Program, node: ir.Node) -> bool:
        return (type_of(program, operand(node, 0)) or "").endswith(("FLOAT", "FLOAT16", "DOUBLE"))

    return when(attribute("fmod", (1,), 0, "With operands of a float type, 'fmod' is 1."), is_float)


def sequence_first() -> NodeRule:
    """Recurrent layers have the sequence as first axis."""
    text = "'layout' is 0: the sequence is the first axis of 'X', the batch the second."
    return attribute("layout", (0,), 0, text)


def when(rule: NodeRule, condition: Callable[[Program, ir.Node], bool]) -> NodeRule:
    """The rule, for nodes of which a condition holds; its text has to say so."""

    def check(program: Program, node: ir.Node) -> Check:
        return rule.check(program, node) if condition(program, node) else (True, "does not apply")

    return NodeRule(rule.id, rule.text, check)


# ---- what rules look at --------------------------------------------------------------------------
def attribute_of(node: ir.Node, name: str, default: Any) -> Any:
    """The value of an attribute, or `default` where it is absent."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def operand(node: ir.Node, index: int) -> ir.Value | None:
    """An input, or None where it is not given."""
    value = node.inputs[index] if index < len(node.inputs) else None
    return value if value is not None and value.name else None


def numbers(value: ir.Value | None) -> list[Any] | None:
    """What a constant holds, flat; None for everything computed."""
    import onnx_ir as ir

    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    if tensor is None:
        return None
    flat: list[Any] = tensor.numpy().reshape(-1).tolist()
    return flat


def shape_of(program: Program, value: ir.Value | None) -> tuple[int, ...] | None:
    """The shape at the reference shapes, or None where it is not known."""
    if value is None:
        return None
    try:
        return program.shapes().get(value.name or "")
    except ModelError:
        return None


def type_of(program: Program, value: ir.Value | None) -> str | None:
    """The name of the element type, or None where it is not known."""
    if value is None:
        return None
    try:
        found = program.types().get(value.name or "") or value.dtype
    except ModelError:
        found = value.dtype
    return found.name if found is not None else None


def _without(operator: str, parameter: str, kinds: Sequence[str]) -> NodeRule:
    refused = frozenset(kinds)
    spoken = " or ".join([", ".join(k.lower() for k in kinds[:-1])] * (len(kinds) > 1) + [kinds[-1].lower()])
    names = _names(operator, parameter)
    text = f"{names} {'are' if ' ' in names else 'is'} not of type {spoken}."

    def check(program: Program, node: ir.Node) -> Check:
        for value in _operands(node, parameter):
            kind = type_of(program, value)
            if kind in refused:
                return False, f"'{value.name}' is {kind.lower()}"
        return True, "another type"

    return NodeRule("element-type", text, check)


def _operands(node: ir.Node, parameter: str) -> list[ir.Value]:
    """Inputs and outputs of one type parameter of the schema."""
    from onnx import defs

    schema = defs.get_schema(node.op_type, _OPSET)
    found = []
    for values, formal in ((node.inputs, schema.inputs), (node.outputs, schema.outputs)):
        for index, value in enumerate(values):
            if value is not None and value.name and formal[min(index, len(formal) - 1)].type_str == parameter:
                found.append(value)
    return found


@functools.cache
def _parameter(operator: str, index: int) -> str:
    from onnx import defs

    kind: str = defs.get_schema(operator, _OPSET).inputs[index].type_str
    return kind


def _names(operator: str, parameter: str) -> str:
    from onnx import defs

    schema = defs.get_schema(operator, _OPSET)
    names = [formal.name for formal in [*schema.inputs, *schema.outputs] if formal.type_str == parameter]
    return " and ".join(f"'{name}'" for name in dict.fromkeys(names))
