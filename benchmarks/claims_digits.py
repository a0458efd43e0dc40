"""The digits of `examples/digits`, for claims about searches and training: network, data, and training on them."""

from __future__ import annotations

import importlib.util
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

DIGITS = Path(__file__).parents[1] / "examples/digits"
_SCRATCH_RATE = 3e-3  # fresh weights take larger steps than weights that are repaired


def example(name: str) -> Any:
    """`model.py` or `data.py` of the example."""
    spec = importlib.util.spec_from_file_location(f"claims_digits_{name}", DIGITS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    source = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(source)
    return source


def few_digits() -> dict[str, Any]:
    """A batch of each split, as a data source."""
    return {name: list(itertools.islice(batches, 1)) for name, batches in example("data").digits().items()}


class Digits:
    """The example: its network, and what training on its data makes of others.

    Args:
        few: only a batch of each split.
    """

    def __init__(self, few: bool = False):
        self.source = f"{__file__}:few_digits" if few else f"{DIGITS / 'data.py'}:digits"

    def trained_one(self) -> Any:
        """The program of the trained network, which is trained if that was not done."""
        import sartor

        if not (DIGITS / "model.onnx").exists():
            subprocess.run([sys.executable, str(DIGITS / "train.py")], check=True)
        return sartor.load(DIGITS / "model.onnx")

    def fresh(self, depth: int, seed: int = 0) -> Any:
        """A program of fresh weights, with so many blocks per stage."""
        import torch

        import sartor

        torch.manual_seed(seed)
        network = example("model").DigitsNet(depth=depth).eval()
        return sartor.capture(network, (torch.zeros(1, 1, 32, 32),), name="digits")

    def data(self, program: Any) -> Any:
        """The splits, from their beginning: passes over the training split differ, reproducibly."""
        from sartor.data import load_data

        return load_data(self.source, list(program.input_shapes), 0, program=program)

    def train(
        self,
        program: Any,
        original: Any,
        steps: int,
        samples: int | None = None,
        *,
        seed: int,
        scratch: bool = False,
        judge: bool = True,
        **more: Any,
    ) -> Any:
        """What recovery makes of a program.

        Args:
            program: what is trained.
            original: its teacher, and what the data are for.
            steps: of 64 samples.
            samples: of the training split; None for all.
            seed: of their order.
            scratch: learn by labels alone, and in larger steps: weights are fresh.
            judge: keep what is best on the split `evaluate`, rather than what is nearest to the original.
            more: options of recovery.
        """
        from sartor.recovery import RecoveryOptions, distill
        from sartor.scoring import score
        from sartor.unit_scores import Limited

        data = self.data(original)
        chosen = {"teacher": "never", "learning_rate": _SCRATCH_RATE} if scratch else {}
        return distill(
            program,
            original,
            data.train if samples is None else Limited(data.train, samples),
            minutes=600.0,  # steps end it
            seed=seed,
            evaluate=(lambda predict: score(predict, data.evaluate)[0]) if judge else None,
            options=RecoveryOptions(max_steps=steps, **chosen, **more),
        )

    def score(self, program: Any, original: Any) -> float:
        """Accuracy on the test split, which comes at the original's size."""
        from sartor.recovery import predictor
        from sartor.scoring import score

        shapes = {k: v for k, v in program.input_shapes.items() if v != original.input_shapes[k]}
        return float(score(predictor(program), self.data(original).at(shapes).test)[0])
