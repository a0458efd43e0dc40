"""Passes of `onnx_ir` as Sartor passes, in one pipeline with Sartor's own.

Run it with `python examples/interop/with_onnx_ir.py`.
"""

import onnx_ir.passes.common as common
import torch
from torch import nn

import sartor
from sartor.interop import onnx_ir_pass
from sartor.passes.prune_channels import PruneChannels


class Net(nn.Module):
    """A network that computes the same activation twice."""

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.left(torch.sigmoid(x)) + self.right(torch.sigmoid(x))


program = sartor.capture(Net().eval(), torch.randn(1, 3, 16, 16))
merge = onnx_ir_pass(common.CommonSubexpressionEliminationPass())
result = sartor.Pipeline([merge, PruneChannels(ratio=0.5)]).run(program)
for step in result.results:
    print(f"{step.step.label}: {dict(step.result.counts)}")
print(" ".join(node.op_type for node in result.program.nodes()))
