"""The nine "light" real models of ONNX's own test suite: import, round trip, groups, pruning.

The files hold real networks whose weights are ConstantOfShape nodes, which canonicalize turns into
parameters. Per model: load; ONNX Runtime on the file and on the canonical program, random input, once with
the file's own weights (all 0.02) and once with random ones in their place and before the final Softmax;
channel groups; a random 50 % plan over all groups, applied and checked by the oracle in float64.
Exit code 1 unless all nine are equal and all verdicts are `passed`.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

FOLDER = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
NAMES = tuple(sorted(path.stem.removeprefix("light_") for path in FOLDER.glob("light_*.onnx")))
EQUAL = 1e-5
"""Largest difference, relative to the largest output, that counts as equal in float32."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of one model; errors are relative to the largest value.

    Attributes:
        model: name without prefix and suffix.
        roundtrip_error: ONNX Runtime, file against canonical program.
        roundtrip_error_random: the same with random weights.
        groups: number of channel groups.
        blocked: number of blocked axes by reason.
        verdict: of the oracle.
        oracle_error: float64, pruned against masked.
        load_s: seconds to load.
        total_s: seconds for everything.
    """

    model: str
    roundtrip_error: float
    roundtrip_error_random: float
    groups: int
    blocked: dict[str, int]
    verdict: str
    oracle_error: float
    load_s: float
    total_s: float


def light_model(name: str) -> onnx.ModelProto:
    """The file as it lies in the onnx package."""
    return onnx.load(str(FOLDER / f"light_{name}.onnx"))


def narrow(model: onnx.ModelProto, by: int) -> onnx.ModelProto:
    """The same network with every width divided by `by`; its image and its kernels stay."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    tensors = {t.name: t for t in result.graph.initializer}
    for node in result.graph.node:
        if node.op_type in ("ConstantOfShape", "Reshape"):
            tensor = tensors[node.input[0 if node.op_type == "ConstantOfShape" else 1]]
            dims = [int(d) for d in numpy_helper.to_array(tensor)]
            dims[:2] = [d // by if d % by == 0 else d for d in dims[:2]]
            tensor.CopyFrom(numpy_helper.from_array(np.asarray(dims, np.int64), tensor.name))
    for tensor in tensors.values():
        if tensor.data_type == onnx.TensorProto.FLOAT and tensor.dims and tensor.dims[0] % by == 0:
            array = numpy_helper.to_array(tensor)[: tensor.dims[0] // by]
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    for info in [*result.graph.input, *result.graph.output]:
        if info.name in tensors:
            info.type.CopyFrom(
                onnx.helper.make_tensor_type_proto(tensors[info.name].data_type, tensors[info.name].dims)
            )
    for info in result.graph.output:
        info.type.tensor_type.ClearField("shape")
    return result


def random_weights(model: onnx.ModelProto, seed: int = 0) -> onnx.ModelProto:
    """The same file with a random initializer in place of every ConstantOfShape."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    generator = np.random.default_rng(seed)
    tensors = {t.name: numpy_helper.to_array(t) for t in result.graph.initializer}
    statistics = {
        i for n in result.graph.node if n.op_type == "BatchNormalization" for i in (n.input[1], n.input[4])
    }
    kept = []
    for node in result.graph.node:
        if node.op_type != "ConstantOfShape":
            kept.append(node)
            continue
        shape = [int(d) for d in tensors[node.input[0]]]
        fan = max(float(np.prod(shape[1:])), 1.0)
        array = generator.standard_normal(shape) * np.sqrt(2.0 / fan)
        if node.output[0] in statistics:
            array = generator.random(shape) + 0.5
        result.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), node.output[0]))
    del result.graph.node[:]
    result.graph.node.extend(kept)
    return result


def before_softmax(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same file without a final Softmax, which would hide every difference."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    last = next((n for n in result.graph.node if n.output[0] == result.graph.output[0].name), None)
    if last is not None and last.op_type == "Softmax":
        result.graph.output[0].name = last.input[0]
        result.graph.output[0].type.tensor_type.ClearField("shape")
        result.graph.node.remove(last)
    return result


def run(model: bytes, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    """ONNX Runtime without optimizations, one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return list(session.run(None, inputs))


def roundtrip_error(data: bytes, program: Any, seed: int = 0) -> float:
    """Largest relative difference of the outputs of the file and of the canonical program."""
    from sartor.ir.batch import random_inputs, relative_error

    inputs = random_inputs(program, seed=seed)
    pairs = zip(run(data, inputs), run(program.to_bytes(), inputs), strict=True)
    return max(relative_error(a, b) for a, b in pairs)


def loaded(model: onnx.ModelProto, folder: Path) -> tuple[bytes, Any]:
    """The bytes of the model's file and the program that they load as."""
    from sartor.ir.load import load

    data = model.SerializeToString()
    path = folder / "model.onnx"
    path.write_bytes(data)
    return data, load(path)


def random_plan(analysis: Any, seed: int = 0) -> Any:
    """Half of the units of every group, at random, and at least one of every floor."""
    from sartor.ir.plan import GroupPlan, Plan

    generator = np.random.default_rng(seed)
    groups = {}
    for group in analysis.groups:
        keep = generator.permutation(group.size) < (group.size + 1) // 2
        for floor in group.floors:
            if not keep[floor].any():
                keep[generator.choice(floor)] = True
        if not keep.all():
            groups[group.name] = GroupPlan(group.size, tuple(int(i) for i in np.flatnonzero(keep)))
    return Plan(analysis.program.source.sha256, groups)


def examine(name: str, model: onnx.ModelProto, folder: Path) -> Result:
    """Everything of the module docstring for one model."""
    from sartor import oracle
    from sartor.ir.channels import channel_groups

    begin = time.perf_counter()
    data, program = loaded(model, folder)
    load_s = time.perf_counter() - begin
    own = roundtrip_error(data, program)
    drawn = roundtrip_error(*loaded(before_softmax(random_weights(model)), folder))
    analysis = channel_groups(program)
    verdict = oracle.check(program, random_plan(analysis), analysis=analysis)
    return Result(
        model=name,
        roundtrip_error=own,
        roundtrip_error_random=drawn,
        groups=len(analysis.groups),
        blocked=dict(collections.Counter(blocked.reason for blocked in analysis.blocked)),
        verdict=verdict.verdict,
        oracle_error=verdict.max_rel_error,
        load_s=round(load_s, 2),
        total_s=round(time.perf_counter() - begin, 2),
    )


def main() -> int:
    import record

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--models", default=",".join(NAMES), help="comma-separated, of: " + " ".join(NAMES))
    options = parser.parse_args()

    results = []
    for name in options.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            results.append(examine(name, light_model(name), Path(folder)))
        print(json.dumps(dataclasses.asdict(results[-1])), flush=True)
    equal = [r for r in results if r.roundtrip_error <= EQUAL and r.roundtrip_error_random <= EQUAL]
    summary = {
        "models": len(results),
        "equal": len(equal),
        "passed": sum(r.verdict == "passed" for r in results),
        "with_groups": sum(r.groups > 0 for r in results),
        "blocked_by_lrn": sum(n for r in results for reason, n in r.blocked.items() if "LRN" in reason),
        "worst_oracle_error": max(r.oracle_error for r in results),
        "worst_s": max(r.total_s for r in results),
    }
    record.write(options.json, "light-models", [dataclasses.asdict(r) for r in results], summary)
    print(json.dumps(summary, indent=1))
    return 0 if summary["equal"] == summary["passed"] == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
