"""`repair`: layers behind a cut make again what they made, as nearly as their weights can."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sartor.errors import PlanError, UsageError
from sartor.ir.program import Program
from sartor.passes.base import Context, Pass, Planned, Refusal, Semantics, option
from sartor.passes.reconstruction import Moments, entering_at
from sartor.passes.repair_targets import Target, Targets
from sartor.passes.repaired_layers import Layer, affected, layer_of, sums_over_weights
from sartor.passes.rewriter import Rewriter

if TYPE_CHECKING:
    from torch import Tensor

_BATCH = 16
"""Samples that are run together: what is held is that of all samples in any case."""


@dataclasses.dataclass(frozen=True, eq=False)
class Repaired:
    """New weights.

    Attributes:
        weights: by initializer.
        errors: by node, root of the squared error over that of the original's results, before and after, on the
            calibration data.
    """

    weights: Mapping[str, np.ndarray]
    errors: Mapping[str, tuple[float, float]]

    def to_json(self) -> str:
        """Deterministic JSON text; as large as the weights."""
        document = {
            "weights": {
                name: array.astype(np.float64).tolist() for name, array in sorted(self.weights.items())
            },
            "errors": {name: list(pair) for name, pair in sorted(self.errors.items())},
        }
        return json.dumps(document, indent=1, sort_keys=True) + "\n"

    @staticmethod
    def from_json(text: str) -> Repaired:
        """Read what `to_json` wrote.

        Raises:
            PlanError: it is something else.
        """
        try:
            document = json.loads(text)
            weights = {str(k): np.asarray(v, np.float64) for k, v in document["weights"].items()}
            errors = {str(k): (float(a), float(b)) for k, (a, b) in document["errors"].items()}
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise PlanError(f"The plan of 'repair' is malformed: {type(error).__name__}: {error}.") from error
        return Repaired(weights, errors)


@dataclasses.dataclass(frozen=True)
class Repair(Pass):
    """Give layers whose inputs are fewer, or made otherwise, the weights that make what the original's layer made.

    Becomes:
        y = W[kept] x[kept] + b   →   y = W′ x[kept] + b′      with W′, b′ = argmin Σ |(W x + b) − (W′ x[kept] + b′)|²

    The sum is over samples and positions of the calibration data, and x is what the repaired layers before make. The
    bias that is there takes the constant part: the layer's own, that of an Add behind it, or the running mean of a
    BatchNormalization that alone reads it, which was fitted with the weights then: statistics that are taken anew
    behind this pass undo a part of it. In memory is what later layers read, of all samples and both networks.

    A layer of more features (inputs times taps) than samples times positions is fitted to these samples: give more
    then, or more `ridge`.

    These are all layers behind a narrowed one, or behind a removed block: each makes up for a part of the error that
    those before it leave.

    Requires: data, and the program before pruning, which a pipeline knows. Right behind the pass that prunes: weights
    that were trained or folded since are not compared with the original's. `extras["targets"]` may have what the
    original makes, for repairs of many programs; see `targets`.

    Ensures: nothing changes but weights, biases and running means. The error of no repaired layer grows on what was
    sampled.

    Refuses when: inputs have other shapes than the original's. A layer stays as it is, with the reason, when it is
    grouped (its outputs go with its inputs), a ConvTranspose, a recurrent layer, of three spatial axes, or in a body
    of `If`; its weight is computed, shared, kept, or no part of the original's; its results lie at other places.

    Reference: He et al., "Channel pruning for accelerating very deep neural networks", ICCV 2017, section 3.2; Luo et
    al., "ThiNet: a filter level pruning method for deep neural network compression", ICCV 2017, section 3.2.
    """

    name: ClassVar[str] = "repair"
    semantics: ClassVar[Semantics] = Semantics.APPROXIMATE
    needs_data: ClassVar[bool] = True

    samples: int = option(256, help="most samples of `calibration` that are looked at", minimum=1)
    positions: int = option(64, help="most positions of a sample that are looked at in a layer", minimum=1)
    ridge: float = option(
        1e-3, help="penalty on the change of weights, in mean variances of inputs", minimum=0.0
    )
    seed: int = option(0, help="of the choice of positions", minimum=0)

    def targets(self, original: Program, context: Context) -> Targets:
        """What the original makes, kept: as `extras["targets"]` of a context it serves any number of cut programs.

        Args:
            original: the program before it was cut.
            context: whose data are looked at.
        """
        kinds = ("Conv", "Gemm", "MatMul")
        layers = [n for n in original.graph if n.op_type in kinds and sums_over_weights(n)]
        convolutions = [node.name or "" for node in layers if node.op_type == "Conv"]
        names = [node.name or "" for node in layers]
        batches = self._batches(original, context)
        return Targets(original, batches, names, convolutions, self.positions, self.seed, keep=True)

    def _batches(self, program: Program, context: Context) -> list[Any]:
        return list(context.supplied("batches")(program, context, samples=self.samples, batch=_BATCH))

    def plan(self, program: Program, context: Context) -> Any:
        """Solve layer after layer. See `Pass.plan`.

        Raises:
            UsageError: the context does not have the program before pruning, or data do not fit.
        """
        original = context.original
        if original is None:
            raise UsageError(
                "Pass 'repair' compares with the program before pruning, which the context does not have. Run it in a "
                "pipeline behind the pass that prunes, or give Context(original=program)."
            )
        if original.input_shapes != program.input_shapes:
            shapes = f"{dict(program.input_shapes)} instead of {dict(original.input_shapes)}"
            return Planned(None, (Refusal(program.source.name, f"its inputs have other shapes: {shapes}"),))
        layers, refusals = [], []
        for node, before in affected(program, original):
            found = layer_of(program, original, node, before, context)
            if isinstance(found, str):
                refusals.append(Refusal(node.name or "", found))
            else:
                layers.append(found)
        if not layers:
            return Planned(None, tuple(refusals))
        return Planned(self._solved(program, original, layers, context), tuple(refusals))

    def apply(self, program: Program, plan: Any, rewriter: Rewriter) -> None:
        """Write the weights. See `Pass.apply`."""
        for name, array in plan.weights.items():
            rewriter.set_initializer(name, array.astype(program.initializer_array(name).dtype))
        rewriter.count("layers_repaired", len(plan.errors))

    def _solved(self, program: Program, original: Program, layers: list[Layer], context: Context) -> Repaired:
        from sartor.ir.fx_lockstep import Lockstep

        clone = program.clone()
        rewriter = Rewriter(clone, self.name)
        batches = self._batches(program, context)
        targets = context.extras.get("targets")
        if targets is None:
            names = [layer.name for layer in layers]
            windows = [layer.name for layer in layers if layer.window is not None]
            targets = Targets(original, batches, names, windows, self.positions, self.seed)
        new = Lockstep(clone, batches)
        weights: dict[str, np.ndarray] = {}
        errors: dict[str, tuple[float, float]] = {}
        for layer in layers:
            moments = self._moments(layer, new.entering(layer.name), targets.of(layer.name))
            change, shift = moments.solve(self.ridge, bool(layer.constant))
            changed = {layer.weight: layer.stored(layer.matrix + change)}
            if layer.constant:
                constant = program.initializer_array(layer.constant)
                changed[layer.constant] = constant + (layer.sign * shift).reshape(constant.shape)
            for name, array in changed.items():
                array = array.astype(program.initializer_array(name).dtype)
                if not np.isfinite(array).all():
                    raise UsageError(
                        f"Repairing layer '{layer.name}' gives weights that are not finite; look for samples that make "
                        "the network overflow, or raise 'ridge'."
                    )
                weights[name] = array
                rewriter.set_initializer(name, array)
                new.set_initializer(name, array)
            errors[layer.name] = moments.errors(change, shift)
        return Repaired(weights, errors)

    def _moments(self, layer: Layer, entering: list[Tensor], made: list[Target]) -> Moments:
        moments = Moments(layer.matrix.shape[1], len(layer.rows))
        for x, target in zip(entering, made, strict=True):
            inputs = entering_at(x, layer.window, target.places)
            results = target.made[:, layer.rows].astype(np.float64)
            moments.add(inputs, results, results - inputs @ layer.matrix.T - layer.bias)
        return moments
