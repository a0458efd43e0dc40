"""How far predictions of a device profile are from measured networks that no profile has seen.

Published architectures at several resolutions, each with random prunings on the target's channel grid, next to it,
and with blocks removed. The truth of a network is its latency over that of reference networks measured in the same
visits, so that drift of the machine cancels. But not all of it: another tenant's use of the memory slows large networks
and not small ones, for minutes. So all networks are measured in turns, half an hour apart. What the references take is
known from many networks of the profile that are measured over them likewise. Repetitions go on until the 95 % interval
is narrow or the time is over, and the interval that was reached is printed. Measuring is journalled in `--work`: a run
that was killed goes on, one that was finished goes on with the networks whose interval is wide. Predictions of another
profile can be compared with the same truth (`--predict-only`, or `--turns 0` if what generates the networks of profiles
has changed, and with them what says how long the references take) if it was built on the same machine.

Beside the profile stand two baselines, each scaled to the profile's own networks: time proportional to MACs, and the
roofline alone, one per way of computing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import record
import zoo_models
from error_statistics import summarise, table
from interleaved import enough, ratio_of, references_of, repeated, scale_of

NETWORKS = """
torchvision/alexnet@224 torchvision/vgg11_bn@128 torchvision/resnet18@160 torchvision/resnet34@224
torchvision/resnet50@192 torchvision/resnext50_32x4d@160 torchvision/wide_resnet50_2@128
torchvision/densenet121@160 torchvision/googlenet@224 torchvision/inception_v3@160
torchvision/squeezenet1_1@224 torchvision/mobilenet_v2@224 torchvision/mobilenet_v3_small@192
torchvision/mobilenet_v3_large@160 torchvision/mnasnet0_5@256 torchvision/efficientnet_b0@192
torchvision/regnet_y_400mf@224 torchvision/shufflenet_v2_x1_0@224 torchvision/convnext_tiny@96
torchvision/vit_b_32@224 timm/ghostnet_050@192 timm/repvit_m1@160 timm/regnetx_002@256
timm/hrnet_w18_small@128 timm/rexnet_100@160 timm/edgenext_xx_small@192 timm/vit_tiny_patch16_224@224
""".split()
FEWEST_A_TURN = 2  # repetitions


# ---- networks and plans --------------------------------------------------------------------------
def program_of(name: str, work: Path) -> Any:
    """The canonical program with random parameters, captured once and kept as a file.

    A runtime folds scales of 1 and biases of 0 away, as fresh networks have them and trained ones do not.
    """
    import torch
    from zoo_masked import randomise

    from sartor.ir.capture import capture
    from sartor.ir.load import load

    path = work / "programs" / f"{name.replace('/', '-').replace('@', '-')}.onnx"
    model_name, _, side = name.partition("@")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        if model_name == "timm/vit_tiny_patch16_224":
            import timm

            model: Any = timm.create_model("vit_tiny_patch16_224", pretrained=False).eval()
        else:
            model, _ = zoo_models.build(model_name)
        randomise(model, (torch.randn(1, 3, int(side), int(side)),), 0)
        capture(model, torch.zeros(1, 3, int(side), int(side)), name=model_name).save(path)
    return load(path, shapes=_image_shape(path, int(side)))


def _image_shape(path: Path, side: int) -> dict[str, tuple[int, ...]]:
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    stored = {w.name for w in graph.initializer}
    return {i.name: (1, 3, side, side) for i in graph.input if i.name not in stored}


def random_plans(
    program: Any, analysis: Any, blocks: Sequence[Any], grid: int, count: int, seed: str
) -> list[Any]:
    """`count` plans: even ones on the channel grid, odd ones anywhere; every third removes blocks, too."""
    from sartor.ir.plan import GroupPlan, Plan

    plans = []
    for number in range(count):
        rng = np.random.default_rng(list(hashlib.sha256(f"{seed}/{number}".encode()).digest()[:8]))
        mean = rng.uniform(0.35, 0.95)
        groups = {}
        for group in analysis.groups:
            if rng.random() < 0.15:
                continue
            kept = group.size * float(np.clip(rng.normal(mean, 0.2), 0.1, 1.0))
            step = grid if number % 2 == 0 and group.size >= 2 * grid else 1
            kept = int(min(group.size, max(step, round(kept / step) * step)))
            keep = set(rng.permutation(group.size)[:kept].tolist())
            for floor in group.floors:
                if not keep & set(map(int, floor)):
                    keep.add(int(floor[0]))
            if len(keep) < group.size:
                groups[group.name] = GroupPlan(group.size, tuple(sorted(keep)))
        removed = tuple(b.name for b in blocks if number % 3 == 2 and rng.random() < 0.25)
        plans.append(Plan(program.source.sha256, groups, removed))
    return plans


def prepared(name: str, work: Path, target: str, count: int) -> tuple[Any, Any, list[Any], list[Any]]:
    """Program, analysis, removable blocks, and plans of which the first does nothing."""
    from sartor import backends
    from sartor.ir.blocks import residual_blocks
    from sartor.ir.channels import channel_groups
    from sartor.ir.plan import Plan

    program = program_of(name, work)
    analysis = channel_groups(program)
    blocks = [b for b in residual_blocks(program) if b.removable]
    grid = backends.get(target).channel_grid("Conv", "f32")
    plans = random_plans(program, analysis, blocks, grid, count, name)
    return program, analysis, blocks, [Plan(program.source.sha256), *plans]


# ---- truth ---------------------------------------------------------------------------------------
def truth(
    name: str,
    options: argparse.Namespace,
    references: Mapping[str, bytes],
    known: Sequence[Sequence[float]],
    fewest: int,
) -> dict[str, Any]:
    """Latencies of the network and its prunings over the geometric mean of the references, with intervals.

    Repetitions that are `known` are gone on with, to `fewest` of them or more.
    """
    from sartor.passes.prune import apply_plan

    program, analysis, _, plans = prepared(name, options.work, options.target, options.prunings)
    programs = [
        apply_plan(program, plan, analysis) if number else program for number, plan in enumerate(plans)
    ]
    logs = repeated([at_batch_1(p) for p in programs], options, references, known, fewest)
    return {"plans": [ratio_of(series) for series in logs], "rounds": len(logs[0]), "logs": logs}


def at_batch_1(program: Any) -> bytes:
    """Serialized, with the batch axis fixed."""
    proto = program.to_proto()
    for value in proto.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if not dim.dim_value:
                dim.dim_value = 1
    return bytes(proto.SerializeToString())


# ---- predictions ---------------------------------------------------------------------------------
class Baselines:
    """MACs times a constant, and the roofline alone; both scaled to the networks that the profile was fitted to."""

    def __init__(self, profile: Any):
        from sartor.cost_models import rates
        from sartor.cost_models.profile import of_role

        self.call_s = profile.call_s
        self.rates = rates.fitted(of_role(profile.samples, "fit"), periods=(0.0, 0.0))
        fitted = [(n.kernels, n.latency_s) for n in of_role(profile.networks, "fit")]
        self.scales = {"flops": 1.0, "roofline": 1.0}
        logs: dict[str, list[float]] = {name: [] for name in self.scales}
        for kernels, latency in fitted:
            for which, seconds in self.predict(kernels).items():
                logs[which].append(math.log(latency / seconds))
        self.scales = {name: math.exp(statistics.median(found)) for name, found in logs.items()}

    def predict(self, kernels: Sequence[Any]) -> dict[str, float]:
        """Seconds by baseline; `kernels` are `(spec, sizes, how often)`."""
        from sartor.cost_models.features import family_of
        from sartor.cost_models.learned import signature_at
        from sartor.cost_models.work import work_of_spec

        macs, seconds = 0.0, self.call_s
        for spec, sizes, count in kernels:
            macs += count * float(work_of_spec(spec, sizes).macs)
            signature = signature_at(spec, family_of(spec), sizes)
            seconds += count * float(
                np.ravel(self.rates.predict(signature, [np.asarray([s]) for s in sizes])[0])[0]
            )
        return {"flops": self.scales["flops"] * max(macs, 1.0), "roofline": self.scales["roofline"] * seconds}


def predictions(
    name: str, options: argparse.Namespace, ladder: Any, baselines: Baselines
) -> list[dict[str, Any]]:
    from sartor import backends
    from sartor.cost_models.samples import kernels_of
    from sartor.ir.workload import build_workload
    from sartor.profiling.build import fusion_rules

    program, analysis, blocks, plans = prepared(name, options.work, options.target, options.prunings)
    rules = fusion_rules(backends.get(options.target))
    workload = build_workload(program, analysis.extents, blocks, rules=rules)
    rows = []
    for number, plan in enumerate(plans):
        removed = {block: True for block in plan.blocks}
        fractions = analysis.fractions(plan)
        estimate = ladder.estimate(workload, fractions, removed)
        kernels = [(s.spec, sizes, count) for s, sizes, count in kernels_of(workload, fractions, removed)[0]]
        kind = "whole" if not number else ("grid" if number % 2 else "off-grid")
        rows.append(
            {
                "network": name,
                "plan": number,
                "kind": kind + (" blocks" if plan.blocks else ""),
                "predicted_s": estimate.latency_s,
                "interval": list(estimate.interval) if "latency_s" in estimate.intervals else None,
                "unmodelled": len(estimate.unmodelled),
                **{f"{which}_s": seconds for which, seconds in baselines.predict(kernels).items()},
            }
        )
    return rows


def line(name: str, rows: Sequence[dict[str, Any]], rounds: int) -> str:
    errors = [100 * (row["predicted_s"] / row["measured_s"] - 1) for row in rows]
    half = statistics.median((r["ci95"][1] - r["ci95"][0]) / 2 / r["measured_s"] for r in rows)
    measured, predicted = (1e3 * rows[0][key] for key in ("measured_s", "predicted_s"))
    return (
        f"{name}: {measured:.2f} ms, predicted {predicted:.2f}; plans {min(errors):+.1f} to {max(errors):+.1f} %, "
        f"truth +- {half:.2%}, {rounds} repetitions"
    )


# ---- main ----------------------------------------------------------------------------------------
def complaint(name: str, error: Exception) -> str:
    """Why a network has no row; printed at once, because the end may be an hour away."""
    text = f"{type(error).__name__}: {str(error)[:300]}"
    print(f"{name}: {text}", flush=True)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", type=Path, required=True)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--work", type=Path, default=Path(__file__).parents[1] / "out" / "cost_error")
    parser.add_argument("--only", action="append", help="names of networks, NAME@SIDE; all by default")
    parser.add_argument("--prunings", type=int, default=8)
    parser.add_argument(
        "--seconds", type=float, default=75.0, help="of repetitions, per architecture, in all turns"
    )
    parser.add_argument(
        "--turns",
        type=int,
        default=2,
        help="in which all networks are measured; with 0, only what the references take is, where it is not known",
    )
    parser.add_argument(
        "--half-width",
        type=float,
        default=0.02,
        help="of 95 %% intervals of ratios; wider ones are gone on with",
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="no architecture is begun after them")
    parser.add_argument("--predict-only", action="store_true", help="measure nothing; use what is journalled")
    options = parser.parse_args()

    from sartor.cost_models.ladder import Ladder
    from sartor.cost_models.profile import DeviceProfile
    from sartor.journal import Journal, parse

    profile = DeviceProfile.load(options.profile)
    options.target, options.threads = profile.target["name"], int(profile.target["threads"])
    references = references_of(options.work)
    names = options.only or NETWORKS
    begun = time.monotonic()
    key = {
        "target": {k: profile.target[k] for k in ("name", "version", "threads", "precision")},
        "cpu": profile.device["cpu"],
        "references": {name: hashlib.sha256(model).hexdigest() for name, model in references.items()},
        "prunings": options.prunings,
        "protocol": 7,
    }
    ladder, baselines = Ladder(profile), Baselines(profile)
    rows: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    path = options.work / f"truth-{options.target}.jsonl"
    header = parse(path.read_bytes(), path.name)[0] if path.exists() else None
    if (
        header is not None and header["key"] != key
    ):  # an hour of measuring, which the journal would begin anew
        raise SystemExit(
            f"'{path.name}' in --work is the truth of another machine, version, protocol or set of reference networks; "
            "give another folder, or remove it."
        )
    with Journal(path, key) as journal:
        known_s = scale_of(profile, journal, options, references)
        options.seconds /= max(options.turns, 1)
        for turn in range(1, 1 + (0 if options.predict_only else options.turns)):
            for name in names:
                found = journal.find("truth", network=name)
                logs = found["logs"] if found is not None else ()
                late = time.monotonic() - begun > 60 * options.minutes
                done = bool(logs) and len(logs[0]) >= turn * FEWEST_A_TURN
                if done and turn == options.turns:
                    done = enough(logs, options.half_width)
                if name in failed or late or done:
                    continue
                try:
                    new = truth(name, options, references, logs, turn * FEWEST_A_TURN)
                except Exception as error:  # one architecture that cannot be captured is a row, not the end
                    failed[name] = complaint(name, error)
                else:
                    journal.append("truth", network=name, **new)
                    print(f"turn {turn}: {name}, {new['rounds']} repetitions", flush=True)
        for name in names:
            found = journal.find("truth", network=name)
            if found is None or name in failed:
                continue
            try:
                predicted = predictions(name, options, ladder, baselines)
            except Exception as error:
                failed[name] = complaint(name, error)
                continue
            for row, measured in zip(predicted, found["plans"], strict=True):
                row["measured_s"] = measured["ratio"] * known_s
                row["ci95"] = [bound * known_s for bound in measured["ci95"]]
            rows += predicted
            print(line(name, predicted, found["rounds"]), flush=True)
    if not rows:
        raise SystemExit("Nothing has been measured.")
    summary = {**summarise(rows), "failed": failed}
    record.write(
        options.json,
        "cost_error",
        rows,
        summary,
        target=dict(profile.target),
        profile_errors=dict(profile.errors),
    )
    print(table(summary))
    print(json.dumps(summary, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
