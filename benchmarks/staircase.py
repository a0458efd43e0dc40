"""The channel staircase: measured and predicted time of one convolution over 1 … 256 channels, and each of its steps.

Measured is every width inside a model of 32 kernels side by side, as in a profile (`sartor.profiling.inside`): what
the target's own profiler says of the kernel, in units of a reference kernel, less what the profiler adds to it.
Predicted is what a device profile says of the same kernel, run as often as in that model. Samples of the very kernel
that the profile may have are taken out of it first, so that nothing is predicted which was looked up.
Without --profile, the times at multiples of --stride, and those next to every second of them, are the profile.

Every width is measured in two passes; a pass is the median of three rounds of different order, and its half width is
half of their range. A step is a pair of neighbouring widths whose times differ
by more than their own 95 % intervals explain, and by 4 %, in the same direction in both passes.
The prediction has it if its times differ in the same direction, by a third of that (of the logarithm) or more. A
width that is no multiple of the grid can be slower than the next one; such steps go down.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import record

_LEAST = 0.04
_SHARE = 1 / 3
_CARRIED, _ROUNDS = 32, 3  # kernels of one model; rounds of one pass
_EFFORT = {"visits": 2, "visit_s": 0.03, "profile_s": 0.25}


def specs(size: int) -> dict[str, tuple[dict[str, Any], tuple[float, ...]]]:
    """Kernels whose last size is the width that is varied, and their sizes before it."""

    def spec(kernel: int, **more: Any) -> dict[str, Any]:
        return {
            "op": "Conv",
            "dtype": "FLOAT",
            "batch": 1,
            "spatial": [size, size],
            "out": [size, size],
            "attributes": {
                "strides": [1, 1],
                "dilations": [1, 1],
                "pads": [kernel // 2] * 4,
                "kernel_shape": [kernel, kernel],
            },
            "epilogue": [["Relu", {}]],
            **more,
        }

    return {
        "3x3, 64 to C": (spec(3, group=1), (64.0,)),
        "1x1, 128 to C": (spec(1, group=1), (128.0,)),
        "depthwise 3x3, C": (spec(3, multiplier=1), ()),
    }


def measured(
    spec: dict[str, Any], before: Sequence[float], widths: Sequence[int], timer: Any, seed: int
) -> tuple[list[tuple[float, float]], float]:
    """Time of the kernel in units of the reference and its half width, per width, NaN if it failed; and the period.

    The period is what one inference of a carrier takes, in units of the reference.
    """
    rounds = [
        one_round(spec, before, widths, timer, np.random.default_rng([seed, number]))
        for number in range(_ROUNDS)
    ]
    times = [found for found, _ in rounds]
    middle = np.median(times, 0)  # NaN where a round failed
    halves = np.ptp(times, 0) / 2 / middle
    return list(zip(middle.tolist(), halves.tolist(), strict=True)), float(np.median([p for _, p in rounds]))


def one_round(
    spec: dict[str, Any], before: Sequence[float], widths: Sequence[int], timer: Any, rng: Any
) -> tuple[np.ndarray, float]:
    from sartor.cost_models.features import family_of
    from sartor.cost_models.samples import empty_model
    from sartor.profiling.design import Point
    from sartor.profiling.inside import InsideEffort
    from sartor.profiling.inside_samples import carrier_model, of_carrier

    shuffled = rng.permutation(len(widths))  # drift does not look like a staircase
    chunks = [shuffled[start : start + _CARRIED] for start in range(0, len(widths), _CARRIED)]
    points = [[Point(spec, (*before, float(widths[i])), family_of(spec)) for i in chunk] for chunk in chunks]
    call, *timed = timer([empty_model(), *(carrier_model(one) for one in points)], InsideEffort(**_EFFORT))
    known = [one for one in timed if one.latency is not None]
    added = profilers_own(known, call)
    found = np.full(len(widths), math.nan)
    for chunk, carried, inside in zip(chunks, points, timed, strict=True):
        for i, told in zip(chunk, of_carrier(carried, inside.kernels), strict=True):
            if told is not None and told[0] > told[1] * added:
                found[i] = told[0] - told[1] * added
    print(f"{np.isfinite(found).sum()} of {len(widths)} widths", file=sys.stderr, flush=True)
    return found, float(np.median([one.latency.ratio for one in known])) if known else 0.0


def profilers_own(timed: Sequence[Any], call: Any) -> float:
    """What the profiler adds to a kernel, in units of the reference: kernels and call take that much more than all."""
    empty = 0.0 if call.latency is None else call.latency.ratio
    beyond = [
        (sum(k.median_s for k in one.kernels) + empty - one.latency.ratio) / max(len(one.kernels), 1)
        for one in timed
    ]
    return max(0.0, float(np.median(beyond))) if beyond else 0.0


def predicted(
    spec: dict[str, Any], before: Sequence[float], widths: Sequence[int], profile: Any, period_s: float
) -> tuple[np.ndarray, np.ndarray]:
    """Seconds, and standard deviation in seconds, from a profile without samples of this kernel."""
    from sartor.cost_models.features import family_of
    from sartor.cost_models.items import shares_at
    from sartor.cost_models.ladder import Ladder
    from sartor.cost_models.profile import Company
    from sartor.cost_models.signatures import Signature, key_of
    from sartor.ir.extents import Extent
    from sartor.ir.quantities import Quantity

    width = Quantity.product(1, (Extent(((float(max(widths)), ("width",)),)),))
    variables = (*(Quantity.product(b, ()) for b in before), width)
    signature = Signature(key_of(spec), family_of(spec), "contraction", spec, variables)
    ladder = Ladder(profile)
    surface = ladder.tiers.surface(
        signature, [False] * len(before) + [True], Company(min(len(widths), _CARRIED))
    )
    sizes = [*(np.full(len(widths), b) for b in before), np.asarray(widths, float)]
    shares = shares_at(period_s, ladder.tiers.periods)
    seconds, sd = surface.interpolate(sizes)
    return seconds @ shares, sd @ shares


def own_profile(
    spec: dict[str, Any], before: Sequence[float], seconds: Sequence[float], backend: Any, stride: int
) -> Any:
    """A profile of some of the measured widths."""
    from sartor.cost_models.features import family_of
    from sartor.cost_models.profile import DeviceProfile, Sample

    wide = range(stride, len(seconds) + 1, stride)
    near = {w - k for w in list(wide)[::2] for k in (1, 2, 4, 8) if w > k}
    chosen = sorted({1, 2, 4, 8, len(seconds), *wide, *near})
    samples = tuple(
        Sample(spec, (*before, float(w)), family_of(spec), seconds[w - 1])
        for w in chosen
        if math.isfinite(seconds[w - 1])
    )
    target = {"name": backend.name, "channel_grid": {"Conv": backend.channel_grid("Conv", "f32")}}
    return DeviceProfile(target, {}, {}, 0.0, samples)


def steps(
    widths: Sequence[int], passes: Sequence[Sequence[tuple[float, float]]], said: np.ndarray
) -> list[dict[str, Any]]:
    """Measured steps, and whether the prediction has them."""
    found = []
    for i in range(1, len(widths)):
        jumps = [math.log(one[i][0] / one[i - 1][0]) for one in passes]  # NaN where a width failed
        noise = [math.hypot(one[i - 1][1], one[i][1]) for one in passes]
        if not all(abs(jump) > max(_LEAST, n) for jump, n in zip(jumps, noise, strict=True)):
            continue
        if min(jumps) < 0 < max(jumps):
            continue
        jump = float(np.mean(jumps))
        foreseen = math.log(said[i] / said[i - 1])
        seen = foreseen * jump > 0 and abs(foreseen) >= _SHARE * abs(jump)
        found.append(
            {
                "from": widths[i - 1],
                "to": widths[i],
                "measured": math.exp(jump) - 1,
                "predicted": math.exp(foreseen) - 1,
                "is_predicted": seen,
            }
        )
    return found


def sentence(step: dict[str, Any]) -> str:
    verdict = "predicted" if step["is_predicted"] else "NOT predicted"
    return (
        f"{step['from']} -> {step['to']} channels: {100 * step['measured']:+.1f} % measured, "
        f"{100 * step['predicted']:+.1f} % predicted: {verdict}"
    )


def page(rows: Sequence[dict[str, Any]], conditions: str) -> str:
    from sartor.report import charts, markup
    from sartor.report.text import seconds

    sections = []
    for row in rows:
        points = [
            charts.Point(w, t, title=f"{w} channels: {seconds(t)}", kind="measured")
            for w, t in zip(row["widths"], row["measured_s"], strict=True)
            if t is not None
        ]
        chart = charts.scatter(
            points,
            x_title="channels",
            y_title="time of the kernel",
            x_format=lambda v: f"{v:.0f}",
            y_format=seconds,
            lines=[("", list(zip(row["widths"], row["predicted_s"], strict=True)))],
            include=((), (0.0,)),
            bounds=((0.0, math.inf), (0.0, math.inf)),
        )
        said = "".join(f"<li>{markup.escape(sentence(s))}</li>" for s in row["steps"])
        note = (
            f"Dots: measured. Line: predicted. {row['steps_predicted']} of {len(row['steps'])} steps are predicted; "
            f"mean error {100 * row['mape']:.1f} %."
        )
        body = f"{chart}<details><summary>Every step</summary><ul>{said}</ul></details>"
        sections.append(markup.section(f"Convolution {row['kernel']}, {row['size']} px", note, body))
    return markup.page(
        "Channel staircase", "staircase", conditions, sections, "One convolution inside a model, batch 1."
    )


def examine(name: str, options: argparse.Namespace, timer: Any, profile: Any, backend: Any) -> dict[str, Any]:
    from sartor.cost_models.signatures import key_of

    spec, before = specs(options.size)[name]
    widths = list(range(1, options.channels + 1))
    (*passes,), periods = zip(*(measured(spec, before, widths, timer, seed) for seed in (0, 1)), strict=True)
    truth = [(math.sqrt(a * b), math.hypot(p, q) / 2) for (a, p), (b, q) in zip(*passes, strict=True)]
    scale = 1e-3 if profile is None else float(profile.protocol["reference_s"])
    seconds = [own * scale for own, _ in truth]
    basis = profile
    if profile is None:
        basis = own_profile(spec, before, seconds, backend, options.stride)
    else:
        rest = tuple(s for s in profile.samples if key_of(s.spec) != key_of(spec))
        basis = dataclasses.replace(profile, samples=rest)
    said, sd = predicted(spec, before, widths, basis, scale * float(np.mean(periods)))
    usable = np.isfinite(seconds)
    errors = np.abs(said[usable] / np.asarray(seconds)[usable] - 1)
    found = steps(widths, passes, said)
    return {
        "kernel": name,
        "size": options.size,
        "widths": widths,
        "measured_s": [s if math.isfinite(s) else None for s in seconds],
        "measured_half_width": [h if math.isfinite(h) else None for _, h in truth],
        "predicted_s": said.tolist(),
        "predicted_sd_s": sd.tolist(),
        "mape": float(errors.mean()),
        "steps": found,
        "steps_predicted": sum(step["is_predicted"] for step in found),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--html", metavar="FILE", help="the plots, as one page")
    parser.add_argument(
        "--profile", metavar="FILE", help="of the target; otherwise some of the widths are one"
    )
    parser.add_argument("--target", default="onnxruntime")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--size", type=int, default=28, help="edge of the feature map (28)")
    parser.add_argument(
        "--stride", type=int, default=32, help="of the widths that are used without a profile"
    )
    parser.add_argument("--kernel", action="append", choices=list(specs(28)), help="only this; repeatable")
    options = parser.parse_args()

    from sartor import backends
    from sartor.backends.protocol import TargetOptions
    from sartor.cost_models.profile import DeviceProfile
    from sartor.profiling.inside import ModelTimer

    profile = DeviceProfile.load(options.profile) if options.profile else None
    target = profile.target if profile is not None else {"name": options.target, "threads": options.threads}
    backend = backends.get(str(target["name"]))
    rows = []
    with ModelTimer(backend.name, TargetOptions(threads=int(target["threads"]))) as timer:
        for name in options.kernel or specs(options.size):
            row = examine(name, options, timer, profile, backend)
            rows.append(row)
            print(f"{name}: {row['steps_predicted']} of {len(row['steps'])} steps, mape {row['mape']:.3f}")
            for step in row["steps"]:
                print("  " + sentence(step), flush=True)
    all_steps = [step for row in rows for step in row["steps"]]
    summary = {
        "steps": len(all_steps),
        "steps_predicted": sum(step["is_predicted"] for step in all_steps),
        "mape": float(np.mean([row["mape"] for row in rows])),
    }
    document = record.write(
        options.json, "staircase", rows, summary, target=dict(target),
        profile=os.path.basename(options.profile or "own widths"), effort=_EFFORT, least_step=_LEAST, share=_SHARE,
    )  # fmt: skip
    if options.html:
        from sartor.ir.files import write_atomic

        place = f"{target['name']}, {target['threads']} thread(s); {document['conditions'].get('cpu', '')}"
        write_atomic(Path(options.html), page(rows, place).encode())
    print(json.dumps(summary, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
