"""What a vendor's engineer reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

CALIBRATION_FORMAT = (
    "NumPy .npz without pickles: one array per model input, named as the input, of the input's type; axis 0 counts "
    "samples, the other axes are those of the input; values are as the model takes them, with nothing left to be "
    "preprocessed. In a test file, 'labels' beside them, axis 0 in the same order."
)


def readme(config: Mapping[str, Any], conditions: Sequence[str]) -> str:
    """The instructions beside a configuration."""
    shapes = [
        f"| {model['name']} | `{model['file']}` | "
        + ", ".join(f"{name} {shape}" for name, shape in model["input_shapes"].items())
        + f" | {'any' if model['any_batch'] else 'fixed'} | {model['operations_flop']:,} |"
        for model in config["models"]
    ]
    protocol = [f"- **{name}**: {text}" for name, text in config["protocol"].items() if name != "roofline"]
    return "\n".join(
        [
            f"# Benchmark of {config['target']}",
            "",
            "Convert every model below with your own tools, measure it on your device, write the numbers into a copy",
            "of `results.template.json`, and send that file back.",
            "",
            "| model | ONNX file | inputs at batch 1 | batch | FLOP per sample |",
            "|---|---|---|---|---|",
            *shapes,
            "",
            f"Precisions: {', '.join(config['precisions'])}. `f32`, `f16` and `bf16` are what the artifact computes",
            "in; `int8` is quantized after training with the calibration data, accumulators may be wider. Leave the",
            "result of a precision that the device does not have away. Where no calibration file is given, use",
            "standard normal random inputs and report no accuracy.",
            "",
            f"Calibration and test data: {CALIBRATION_FORMAT}",
            "",
            "## What to measure",
            *protocol,
            "",
            "Do not skip, fuse away or precompute any part of the model; the time is from inputs in the memory that",
            "the application writes to outputs in the memory that it reads.",
            "",
            "## What to write",
            "- Seconds, watts, samples per second, shares from 0 to 1: the unit is part of every key, and no other",
            "  key is taken.",
            f"- `conditions`, as text: {', '.join(conditions)}; others are welcome.",
            "- `sha256` of each model as it stands in the template: it says which file was measured.",
            "- Leave a metric away that you cannot measure. Do not estimate it.",
            "- `runs` and `warm_up_runs` as they were. Fewer than above are shown as a departure from the protocol.",
            "",
            "`sartor bench --import results.json --out FOLDER` checks the file and adds it to the report there.",
            "",
        ]
    )
