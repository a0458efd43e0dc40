"""The program in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from sartor.ir.program import Program
from sartor.recovery import losses
from sartor.recovery.options import RecoveryOptions
from sartor.recovery.resolutions import Resolutions
from sartor.recovery.twins import Predict, predictor
from sartor.recovery.view import View, share_weights


class Student:
    """The program in training.

    Args:
        program: what is trained.
        original: what the samples are for.
        options: at which sizes and in which precision it learns.
        points: channel axis by value whose attention map is learned.

    Attributes:
        view: what is judged and delivered: the twin as it is.
        gm: that twin; its parameters are those of all views.
        resolutions: at which it learns, where these change.
        mixed: whether it learns in bfloat16, where torch deems that safe; its weights stay float32.
        notes: what was done otherwise than asked, and why.

    Raises:
        UsageError: samples for the original cannot be resized for the program.
    """

    def __init__(
        self,
        program: Program,
        original: Program,
        options: RecoveryOptions,
        points: Mapping[str, int] | None = None,
    ):
        self.view = View(program, original)
        self.gm = self.view.gm
        self._full = self.view
        self.notes: list[str] = []
        self.mixed = options.precision == "bf16"
        if points:
            self._full = View(program, original, points)
            share_weights(self.gm, self._full.gm)
        self.resolutions: Resolutions | None = None
        if options.rat is not None and options.rat < 1:
            found = Resolutions(program, original, self.gm, self._full, options.rat)
            if found.reason:
                reason = found.reason.rstrip(".")
                self.notes.append(f"resolution-adaptive training does not apply: {reason}")
            else:
                self.resolutions = found

    def learn(self, inputs: Sequence[Tensor], fraction: float, *, frozen: bool) -> dict[str, Tensor]:
        """What a training step compares; see `View`.

        Args:
            inputs: as the original takes them.
            fraction: of training that is done.
            frozen: normalise by running statistics.
        """
        view = self._full if self.resolutions is None else self.resolutions.view(fraction)
        view.gm.train(not frozen)
        return view(inputs, mixed=self.mixed)

    def try_precision(self, inputs: Sequence[Tensor]) -> None:
        """Learn in float32, with a note, where a layer cannot compute in bfloat16.

        Args:
            inputs: a few samples, as the original takes them.
        """
        if not self.mixed:
            return
        self.gm.eval()
        try:
            losses.output_energy(self.view(inputs, mixed=True)).backward()
        except RuntimeError as error:
            self.mixed = False
            reason = str(error).strip().partition("\n")[0]
            self.notes.append(f"bfloat16 was not used, the network does not compute in it: {reason}")
        self.gm.zero_grad(set_to_none=True)

    def predictor(self) -> Predict:
        """From arrays at the original's size to arrays at the original's size, in eval mode."""
        return predictor(self.gm, self.view.sizes)
