"""A function on `onnx_graphsurgeon.Graph` as a Sartor pass: fold a constant Add into the bias of a Conv.

Run it with `python examples/interop/with_graphsurgeon.py`; it needs `pip install 'sartor[interop]'`.
"""

import torch
from torch import nn

import sartor
from sartor.interop import graphsurgeon


class Net(nn.Module):
    """A convolution whose bias is a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.offset = nn.Parameter(torch.randn(8, 1, 1))

    def forward(self, x):
        return torch.relu(self.conv(x) + self.offset)


def fold_add_into_conv(graph):
    """Conv(x, w) + c → Conv(x, w, c)."""
    for add in [node for node in graph.nodes if node.op == "Add"]:
        conv = add.inputs[0].inputs[0]
        if conv.op == "Conv" and len(conv.inputs) == 2:
            add.inputs[1].values = add.inputs[1].values.reshape(-1)
            conv.inputs.append(add.inputs[1])
            conv.outputs = list(add.outputs)
            add.outputs.clear()
    graph.cleanup()


program = sartor.capture(Net().eval(), torch.randn(1, 3, 16, 16))
result = sartor.Pipeline([graphsurgeon(fold_add_into_conv)]).run(program).program
print([node.op_type for node in program.nodes()], "became", [node.op_type for node in result.nodes()])
