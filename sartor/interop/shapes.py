"""A private copy of a program's model for foreign code: shapes filled in, tensors safe from writing."""

from __future__ import annotations

import onnx_ir as ir

from sartor.ir.program import BATCH_SYMBOL, Program, infer_shapes


def with_shapes(program: Program) -> ir.Model:
    """A copy of the model whose values carry type and shape, the batch axis as 'N'.

    Programs carry no trusted shapes, but rules and surgery commonly ask for them. An axis that depends on
    the batch in another way than being it stays unknown. Initializers share memory with the program and
    cannot be written to.
    """
    model = program.model.clone()
    shapes, types = program.shapes(), program.types()
    other = dict(shapes)
    size = next((s[0] for n, s in program.input_shapes.items() if n in program.batch.inputs and s), 0)
    if program.batch.symbolic:
        at = {
            n: (size + 1, *s[1:]) if n in program.batch.inputs else s for n, s in program.input_shapes.items()
        }
        other, _ = infer_shapes(program.model, at)
    for node in model.graph:
        for output in node.outputs:
            name = output.name or ""
            if name not in shapes or output.is_graph_output():
                continue
            dims: list[int | str | None] = list(shapes[name])
            if len(other.get(name, ())) == len(dims):
                for axis, (a, b) in enumerate(zip(shapes[name], other[name], strict=True)):
                    if a != b:
                        dims[axis] = BATCH_SYMBOL if (a, b) == (size, size + 1) else None
            output.shape = ir.Shape(dims)
            output.type = ir.TensorType(types[name])
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None:
            continue
        array = tensor.numpy().view()
        array.setflags(write=False)
        # A tensor object of its own: renaming an initializer renames its tensor, too.
        value.const_value = ir.Tensor(array, dtype=tensor.dtype, name=value.name)
        value.shape, value.type = ir.Shape(array.shape), ir.TensorType(tensor.dtype)
    return model
