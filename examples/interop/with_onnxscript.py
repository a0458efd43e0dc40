"""An onnxscript rewrite rule as a Sartor pass: of two Relus in a row one is enough.

Run it with `python examples/interop/with_onnxscript.py`.
"""

import torch
from onnxscript.rewriter import RewriteRule
from torch import nn

import sartor
from sartor.interop import rewrite_rule


def two_relus(op, x):
    return op.Relu(op.Relu(x))


def one_relu(op, x):
    return op.Relu(x)


merge = rewrite_rule(RewriteRule(two_relus, one_relu, name="merge-relus"))
net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.ReLU(), nn.Linear(32, 4)).eval()
program = sartor.capture(net, torch.randn(1, 16))
result = sartor.Pipeline([merge]).run(program).program
print([node.op_type for node in program.nodes()], "became", [node.op_type for node in result.nodes()])
