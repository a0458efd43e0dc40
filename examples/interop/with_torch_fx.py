"""A `torch.fx` pass as a Sartor pass: the exact Gelu gives way to its cheaper tanh form.

Run it with `python examples/interop/with_torch_fx.py`. The pass changes the function, and says so: it is
APPROXIMATE, so that Sartor verifies the structure and the signature, and does not ask for equal outputs.
"""

import torch
from torch import nn

import sartor
from sartor.interop import torch_fx
from sartor.passes.base import Semantics


def use_tanh_gelu(module):
    """Gelu(x) → 0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³)))."""
    for node in module.graph.nodes:
        if node.meta.get("onnx_node") and "gelu" in str(node.target):
            node.update_kwarg("approximate", "tanh")


net = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 4)).eval()
program = sartor.capture(net, torch.randn(1, 16))
cheaper = torch_fx(use_tanh_gelu, semantics=Semantics.APPROXIMATE)
result = sartor.Pipeline([cheaper]).run(program).program
print([node.attributes["approximate"].value for node in result.nodes() if node.op_type == "Gelu"])
