"""The FX twin on ONNX's own backend node tests: every case of the suite, function expansions included.

Each case is taken as a user's file would be: written to disk, loaded with `sartor.load` (which raises or
lowers its opset, expands functions, canonicalizes and verifies), turned into the FX twin, run at the stored
element types, and compared with the suite's outputs at the suite's tolerance (shapes and types exactly).

*Operands.* In the suite every operand is a graph input. Where an operator needs one as a number (shapes,
axes, counts), the case's own array becomes an initializer, as it is in a real model: these are the `static`
operands of the FX twin's table and those in `CONSTANT` below; a function expansion takes those of its
original. All others stay inputs. A case that has no input left gets an unused one.

*Routes.* A row's `route` is `loaded`, or `twin` where the loader's rules exclude the case although its
operators are supported (an empty tensor, a training graph, signed BitShift, which opset 21 does not have):
then the opset is raised, functions are expanded, and the twin is built from that, without canonicalization;
`detail` is what the loader said. Where canonicalize folds the operator under test away, both must pass.

*Tolerance.* The suite's: 1e-3 relative, 1e-7 absolute, integers exact, two units in the last place of a
bfloat16. The expected values of two cases (`test_dft_inverse*`) hold more rounding noise than that and are
replaced by the same numpy transform in float64.

*Outcome.* `passed`; `unsupported`, with the loader's reason, only where an operator is outside the canonical
table or an element type is a float8, 4-bit, 2-bit or string one, or a value is a sequence or an optional;
everything else that does not pass is `failed`. Exit code 1 when anything failed.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent / "tests"))

import onnx_node_cases as suite  # noqa: E402

CONSTANT: dict[str, tuple[int, ...]] = {
    "AffineGrid": (1,),
    "BlackmanWindow": (0,),
    "CenterCropPad": (1,),
    "Compress": (1,),
    "Dropout": (1, 2),
    "HammingWindow": (0,),
    "HannWindow": (0,),
    "MelWeightMatrix": (0, 1, 2, 3, 4),
    "Upsample": (1,),
}
"""Operands that must be constants in operators which canonicalize replaces, so that the twin lacks them."""
OUTSIDE_TYPES = re.compile(r"^(FLOAT8|FLOAT4|U?INT4|U?INT2|STRING|sequence|optional)")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one case.

    Attributes:
        status: `passed`, `unsupported` or `failed`.
        kind: why it is unsupported (`operator X` or `type X`), or what failed; empty when passed.
        detail: the message; with route `twin`, what the loader said.
        route: `loaded` or `twin`; empty when unsupported.
    """

    status: str
    kind: str = ""
    detail: str = ""
    route: str = ""


def constant_positions() -> dict[str, tuple[int, ...]]:
    """Input numbers that must be constants, by operator type."""
    from sartor.ir.torch_ops import OPERATORS

    return {name: tuple(spec.static) for name, spec in OPERATORS.items()} | CONSTANT


def examine(case: suite.NodeCase, folder: Path) -> Outcome:
    """Run one case; `folder` is for its model file."""
    from sartor.errors import SartorError

    try:
        results, route, refusal = _run(case, folder)
    except SartorError as error:
        kind = outside(case)
        if kind:
            return Outcome("unsupported", kind, str(error))
        return Outcome("failed", "refused", f"{type(error).__name__}: {error}")
    except Exception as error:
        return Outcome("failed", "crashed", f"{type(error).__name__}: {error}")
    try:
        suite.compare(case, results)
    except AssertionError as error:
        return Outcome("failed", "differs", " ".join(str(error).split())[:300], route)
    return Outcome("passed", route=route, detail=refusal)


def outside(case: suite.NodeCase) -> str:
    """Why the case may be refused: an operator or type that Sartor does not claim; empty if none."""
    from sartor.ir.canonicalize import CANONICAL_OPS, STRUCTURAL_OPS

    types = sorted(t for t in suite.value_types(case) if OUTSIDE_TYPES.match(t))
    if types:
        return f"type {types[0]}"
    known = CANONICAL_OPS | STRUCTURAL_OPS | {"Constant"}
    for node in suite.nodes_of(case.model.graph):
        if node.domain not in ("", "ai.onnx"):
            return f"operator {node.domain}.{node.op_type}"
        if node.op_type not in known:
            return f"operator {node.op_type}"
    return ""


def _run(case: suite.NodeCase, folder: Path) -> tuple[list[np.ndarray], str, str]:
    """Results, route, and the loader's refusal where there was one."""
    import sartor
    from sartor.errors import SartorError, UnsupportedOperatorError
    from sartor.ir.fx import run_twin
    from sartor.ir.torch_ops import OPERATORS

    names = suite.static_operands(case, constant_positions()) if case.dense else []
    model = suite.bake(case, names)
    inputs = dict(case.inputs)
    if not model.graph.input:  # a program has at least one
        model.graph.input.append(onnx.helper.make_tensor_value_info("unused", onnx.TensorProto.FLOAT, [1]))
        inputs["unused"] = np.zeros(1, np.float32)
    path = folder / "case.onnx"
    path.write_bytes(model.SerializeToString())
    shapes = {
        v.name: inputs[v.name].shape for v in model.graph.input if isinstance(inputs.get(v.name), np.ndarray)
    }
    wanted = [value.name for value in case.model.graph.output]

    def on_twin() -> list[np.ndarray]:
        results = run_twin(_bare(model, shapes), inputs, dtype=None)
        return [results[name] for name in wanted]

    try:
        program = sartor.load(path, shapes={n: s for n, s in shapes.items() if 0 not in s and s})
    except SartorError as refusal:
        if not case.dense:
            raise
        try:
            return on_twin(), "twin", str(refusal)
        except Exception:
            raise refusal from None
    if program.tail is not None:
        raise UnsupportedOperatorError(program.tail.reason())
    found = run_twin(program, inputs, dtype=None)
    results = [found[name] for name in wanted]
    folded = case.op_type not in {node.op_type for node in program.nodes()}
    if (
        folded and not case.expanded and case.op_type in OPERATORS
    ):  # canonicalize did its work: prove the twin too
        suite.compare(case, on_twin())
    return results, "loaded", ""


def _bare(model: onnx.ModelProto, shapes: dict[str, tuple[int, ...]]) -> Any:
    """The model at the canonical opset, without functions, and otherwise as it stands."""
    from sartor.ir import opset
    from sartor.ir.cleanup import fix_names
    from sartor.ir.load import inline_functions
    from sartor.ir.program import Program, Source

    converted = ir.from_proto(model)
    fix_names(converted)
    converted = opset.raise_opset(converted)
    inline_functions(converted)
    fix_names(converted)
    return Program(converted, source=Source("onnx", "case.onnx", ""), input_shapes=shapes)


def main() -> int:
    import record

    from sartor.ir.canonicalize import CANONICAL_OPS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--only", metavar="REGEX", default="", help="cases whose name matches")
    options = parser.parse_args()

    start = time.perf_counter()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for case in suite.all_cases():
            if not re.search(options.only, case.name):
                continue
            outcome = examine(case, Path(folder))
            rows.append({"case": case.name, "operator": case.op_type, **dataclasses.asdict(outcome)})
            if outcome.status == "failed":
                print(f"failed  {case.name}: {outcome.kind}: {outcome.detail}", flush=True)
    reasons = collections.Counter(row["kind"] for row in rows if row["status"] == "unsupported")
    for kind, count in sorted(reasons.items(), key=lambda item: (-item[1], item[0])):
        print(f"unsupported {count:4}  {kind}")
    counts = collections.Counter(row["status"] for row in rows)
    summary = {
        **{status: counts[status] for status in ("passed", "unsupported", "failed")},
        "table_ops": len(CANONICAL_OPS),
        "cases": len(rows),
        "passed_loaded": sum(row["route"] == "loaded" and row["status"] == "passed" for row in rows),
        "passed_twin_only": sum(row["route"] == "twin" and row["status"] == "passed" for row in rows),
        "unsupported_reasons": dict(sorted(reasons.items())),
        "seconds": round(time.perf_counter() - start, 1),
    }
    record.write(options.json, "onnx-node-tests", rows, summary, suite=f"onnx {onnx.__version__}")
    print(json.dumps({k: v for k, v in summary.items() if k != "unsupported_reasons"}, indent=1))
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
