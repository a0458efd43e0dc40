"""Write-back: apply a plan to the author's own `nn.Module` instead of the program captured from it.

`apply_to_module` returns a narrowed copy; the module it was given is never changed. Parameters keep
their names in a program, so that each tensor of the module is cut by the same indices (`tensors`), the
attributes of torch's own layers follow (`layers`, `attention`), removed blocks become a `Shortcut`
(`blocks`), and the result is run against the narrowed program in float64 (`proof`). Where the forward
method has a width written into it, that run fails, and the error names the line (`culprit`).
"""

from sartor.writeback.apply import apply_to_module
from sartor.writeback.attention import NarrowMultiheadAttention
from sartor.writeback.blocks import Nothing, Shortcut

__all__ = ["NarrowMultiheadAttention", "Nothing", "Shortcut", "apply_to_module"]
