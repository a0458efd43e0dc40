"""Interop: transformations written for other tools, run as Sartor passes under the same verifier.

`graphsurgeon`, `onnx_ir_pass`, `rewrite_rule` and `torch_fx` each wrap a function, pass or rule into a
`Pass` for `sartor.Pipeline`; the classes behind them serve packages that register a pass of their own.
After the foreign code the canonical form is re-established, structure and signature are verified, and
what claims to be exact is compared with its input. See docs/adr/0004.
"""

from sartor.interop.adapters import (
    GraphSurgeonPass,
    OnnxIrPass,
    RewriteRulePass,
    graphsurgeon,
    onnx_ir_pass,
    rewrite_rule,
)
from sartor.interop.foreign import ForeignPass
from sartor.interop.torch_graph import TorchFxPass, torch_fx

__all__ = [
    "ForeignPass",
    "GraphSurgeonPass",
    "OnnxIrPass",
    "RewriteRulePass",
    "TorchFxPass",
    "graphsurgeon",
    "onnx_ir_pass",
    "rewrite_rule",
    "torch_fx",
]
