"""What a runtime executes as one kernel, as data.

A table says, for an operator, what runs inside its kernel. `Capabilities.fuses` of a backend is such a table; its
vocabulary, beside operator types that follow:

    Bias               an Add of one number per channel
    Add                an Add of two activations of one shape
    BlockedAdd         an Add of two activations that are both in the runtime's own blocked layout, or of any two
                       behind a convolution in the plain layout
    InPlaceAdd         an Add whose other operand nobody reads afterwards
    Scale              a multiplication by one number, or by one per channel
    Silu, HardSwish    x * sigmoid(x), x * hard_sigmoid(x)
    Chain              all that is listed, in any order and more than once; a residual Add once
    Transpose before   a Transpose of the last two axes of an operand
    Scale before       a multiplication of an operand by one number
    Scale behind       a multiplication of the result by one number
    Add before         an Add of two activations in front of it
    Siblings           the same operator on other parts of the same value, if together they are all of it
    Views              of those siblings and of a Transpose from channels last to first: no kernel, where no data moves
    Attention          of a product of two activations: scale, mask, Softmax, a second product and its Transpose

The row `Image` with `Reorder` says that maps are copied where they enter and leave the network: an input for the
convolution or pooling that reads it, an output of one that makes it, also with elementwise operators between them. The
row `Elementwise` lists operators of which any chain is one kernel. A residual Add that two kernels could take goes to
the one that makes its first operand, as in ONNX Runtime's and OpenVINO's optimisers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence

CONTRACTIONS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
ACTIVATIONS = frozenset(
    {"Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Elu", "Selu", "Celu"}
    | {"Gelu", "Softplus", "Softsign", "Mish", "ThresholdedRelu"}
)
GATED = {"Sigmoid": "Silu", "HardSigmoid": "HardSwish"}
"""What a gate and a product with its own input make together."""
ELEMENTWISE = "Elementwise"
"""The row of chains."""
_SUMS = {"BlockedAdd", "InPlaceAdd"}
_IN_FRONT = {"Add before", "Scale before", "Transpose before"}
VOCABULARY = frozenset(
    {"Attention", "Bias", "Chain", "Reorder", "Scale", "Scale behind", "Siblings", "Silu", "Views"}
    | _IN_FRONT
    | _SUMS
)
"""Names in a table that are no operator types."""


@dataclasses.dataclass(frozen=True)
class FusionRules:
    """Which nodes run as one kernel.

    Attributes:
        fuses: what runs inside the kernel of an operator; see the module's docstring.
        first_operand: a residual Add goes to the kernel of its first operand if that can take it, even if the other
            operand is computed later; else to whichever of the two runs last.
        folds_constants: what depends on no input is computed once, when the model is loaded, and is no kernel.
    """

    fuses: Mapping[str, frozenset[str]]
    first_operand: bool = True
    folds_constants: bool = True

    @staticmethod
    def of(fuses: Mapping[str, Sequence[str]]) -> FusionRules:
        """The rules of a backend, from `Capabilities.fuses`."""
        return FusionRules({op: frozenset(names) for op, names in fuses.items()})

    def takes(self, op_type: str, name: str) -> bool:
        """Whether `name` runs inside the kernel of `op_type`."""
        return name in self.fuses.get(op_type, ())

    @property
    def has_layout(self) -> bool:
        """Whether the runtime keeps activations in a blocked layout that matters for what it fuses."""
        return any("BlockedAdd" in names for names in self.fuses.values())

    @property
    def copies_images(self) -> bool:
        """Whether maps are copied into another layout where they enter and leave the network."""
        return self.takes("Image", "Reorder")

    def to_dict(self) -> dict[str, object]:
        """JSON-ready form."""
        return {
            "fuses": {op: sorted(names) for op, names in sorted(self.fuses.items())},
            "first_operand": self.first_operand,
            "folds_constants": self.folds_constants,
        }

    @property
    def sha256(self) -> str:
        """Identity of the rules: what was measured under others does not fit a workload made with these."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


_ALL = ACTIVATIONS | frozenset(GATED.values())
GENERIC = FusionRules(
    {
        "Conv": _ALL | {"BatchNormalization", "Add"},
        "ConvTranspose": _ALL | {"BatchNormalization", "Add"},
        "Gemm": _ALL | {"BatchNormalization", "Add", "Bias"},
        "MatMul": _ALL | {"Add", "Bias"},
    },
    first_operand=False,
    folds_constants=False,
)
"""What runtimes on CPUs have in common, roughly; of no one in particular."""
