"""Quantization: ranges and placement by ONNX Runtime's quantizer, what each layer costs, what is left in float.

The graph is changed by the pass `quantize` (`sartor.passes.quantize`), from the scheme that `supply` makes.
"""

from sartor.quantization.integer_only import FloatNode, integer_only

__all__ = ["FloatNode", "integer_only"]
