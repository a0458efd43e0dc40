"""The table from ONNX operators to torch functions, and what each expects of its operands."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True)
class Operator:
    """One ONNX operator as a torch function.

    The function takes the operator's inputs in ONNX order (`None` for an omitted one) and its attributes
    as keyword arguments of the same names. It returns a tensor, or a tuple where `several` is set.

    Attributes:
        op_type: ONNX operator type.
        function: the torch implementation.
        static: inputs that arrive as a tuple of Python numbers: shapes, axes, counts.
        scalars: inputs that arrive as a Python number when they are one-element constants.
        types: attributes that hold an ONNX element type; they arrive as `torch.dtype`.
        several: the function takes `outputs`, the number of outputs in use, and returns a tuple.
        arithmetic: a one-element float constant of such a node is code, not a trained weight.
        unsigned: the function takes uint16, uint32 and uint64 tensors, for which torch has no arithmetic,
            as they are; others get int64 in their place.
    """

    op_type: str
    function: Callable[..., Any]
    static: frozenset[int] = frozenset()
    scalars: frozenset[int] = frozenset()
    types: frozenset[str] = frozenset()
    several: bool = False
    arithmetic: bool = False
    unsigned: bool = False

    @property
    def attributes(self) -> frozenset[str]:
        """Names of the ONNX attributes that the function understands."""
        try:
            parameters = inspect.signature(self.function).parameters.values()
        except ValueError:  # torch's own built-in functions: elementwise, without attributes
            return frozenset()
        return frozenset(p.name for p in parameters if p.kind is p.KEYWORD_ONLY) - {"outputs"}


OPERATORS: dict[str, Operator] = {}
"""Every supported operator of the default ONNX domain, by type."""


def operator(
    op_type: str,
    *,
    static: tuple[int, ...] = (),
    scalars: tuple[int, ...] = (),
    types: tuple[str, ...] = (),
    several: bool = False,
    arithmetic: bool = False,
    unsigned: bool = False,
) -> Callable[[_Function], _Function]:
    """Register the decorated function as the implementation of `op_type`; see `Operator`."""

    def register(function: _Function) -> _Function:
        OPERATORS[op_type] = Operator(
            op_type,
            function,
            frozenset(static),
            frozenset(scalars),
            frozenset(types),
            several,
            arithmetic,
            unsigned,
        )
        return function

    return register
