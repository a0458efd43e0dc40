"""Resolution-adaptive training: small images first, and larger ones as training goes on.

The size follows `sartor.cost_models.training.resolution_at` (5.15, 5.16), rounded to the nearest size that the network
takes: the last one less a multiple of its total stride. A step on images of r_i x r_i costs (r_i / r)² of one at full
size, so that training costs 3 x inference x mean(r_i²) / r² multiplications.

Each size has a twin of its own, and all of them the same parameters and running statistics.

Reference: H. Kong, "Adaptive Neural Networks for Edge Intelligence", PhD thesis, NTU, 2023, section 5.2.4.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping

from torch import fx

from sartor.cost_models.static import static_cost
from sartor.cost_models.training import PASSES, resolution_at
from sartor.errors import ModelError, PlanError, UsageError
from sartor.ir.program import Program
from sartor.passes.rescale import spatial_axes
from sartor.passes.resolution import resize_inputs
from sartor.passes.rewriter import Rewriter
from sartor.recovery.view import View, share_weights

Shape = tuple[int, ...]


class Resolutions:
    """Views of a program at several input sizes, named by the height of its first image.

    Args:
        program: at its own size.
        original: whose samples they take.
        gm: whose parameters they share.
        full: the view at the program's own size.
        start: share of the size that training begins with.

    Attributes:
        views: by size, smallest first.
        reason: why there is no other size; empty where there is.
        steps: taken at each size.
    """

    def __init__(self, program: Program, original: Program, gm: fx.GraphModule, full: View, start: float):
        self._program, self._start = program, start
        self.reason = ""
        self.steps: collections.Counter[int] = collections.Counter()
        images = [value for value in program.graph.inputs if spatial_axes(program, value)]
        if not images:
            self.views, self._last = {0: full}, 0
            self.reason = "no input is an image"
            return
        first = images[0].name or ""
        self._axes = {value.name or "": tuple(spatial_axes(program, value)) for value in images}
        self._last = program.input_shapes[first][self._axes[first][0]]
        self._grid = total_stride(program)
        self.views = {self._last: full}
        self._image = first
        try:
            for size in self._candidates():
                self._add(size, original, gm)
        except UsageError as error:
            self.reason, self.views = str(error), {self._last: full}
        self.views = dict(sorted(self.views.items()))
        if len(self.views) > 1:
            self.reason = ""

    def view(self, fraction: float) -> View:
        """The view for a step after `fraction` of training, which it counts."""
        wanted = float(resolution_at(fraction, self._last, self._start))
        size = min(self.views, key=lambda size: (abs(size - wanted), -size))
        self.steps[size] += 1
        return self.views[size]

    def share(self) -> float:
        """Multiplications of the steps so far, as a share of those at full size: mean(r_i²) / r²."""
        steps = sum(self.steps.values())
        return sum(self._area(size) * count for size, count in self.steps.items()) / steps if steps else 1.0

    def training_macs(self) -> int:
        """Of a sample in a step, forward and backward, the mean over the steps so far."""
        return round(PASSES * static_cost(self._program).macs * self.share())

    def describe(self) -> str:
        """One line for people, after training."""
        sizes = ", ".join(f"{size} ({self.steps[size]} steps)" for size in self.views if self.steps[size])
        return f"images of size {sizes}: {self.share():.0%} of the multiplications at full size"

    # ---- sizes -----------------------------------------------------------------------------
    def _candidates(self) -> list[int]:
        """Sizes below the last, the nearest to the first one included."""
        least = self._start * self._last
        count = max(math.floor((self._last - least) / self._grid + 0.5), 0)
        return [self._last - i * self._grid for i in range(1, count + 1) if self._last > i * self._grid]

    def _add(self, size: int, original: Program, gm: fx.GraphModule) -> None:
        clone = self._program.clone()
        try:
            resize_inputs(clone, self._shapes(size), Rewriter(clone, "recovery"))
            clone.shapes()
        except (PlanError, ModelError) as error:
            self.reason = self.reason or str(error)
            return
        view = View(clone, original, self.views[self._last].points)
        share_weights(gm, view.gm)
        self.views[size] = view

    def _shapes(self, size: int) -> Mapping[str, Shape]:
        """Shapes of all images when the first has this height; each keeps its remainder by the stride."""
        shapes = {}
        for name, axes in self._axes.items():
            shape = list(self._program.input_shapes[name])
            for axis in axes:
                less = round(shape[axis] * (1 - size / self._last) / self._grid) * self._grid
                shape[axis] = max(shape[axis] - less, 1)
            shapes[name] = tuple(shape)
        return shapes

    def _area(self, size: int) -> float:
        then, now = self._shapes(size)[self._image], self._program.input_shapes[self._image]
        return math.prod(then[axis] / now[axis] for axis in self._axes[self._image])


def total_stride(program: Program) -> int:
    """How many positions of the first image one position of the smallest map covers, in each direction.

    Maps of a single position say nothing: they are means over what is there. Where the smallest map does not divide the
    image, which edges decide, the nearest power of two.
    """
    images = [value for value in program.graph.inputs if spatial_axes(program, value)]
    height = program.input_shapes[images[0].name or ""][spatial_axes(program, images[0])[0]]
    shapes = program.shapes()
    computed = [shapes[value.name or ""] for node in program.nodes() for value in node.outputs if value.name]
    least = min((s[2] for s in computed if len(s) == 4 and 1 < s[2] <= height and s[3] > 1), default=height)
    return height // least if height % least == 0 else 2 ** round(math.log2(height / least))
