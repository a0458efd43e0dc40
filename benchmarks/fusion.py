"""How many of our kernels are kernels that a runtime executes, on networks of the zoo.

Per network and target: capture, lower, profile, and compare the workload's kernels under the target's fusion table
with the executed ones; beside it the same workload under the generic table. Nothing is timed. Summary: the smallest
and the mean agreement per target, and over all kernels of all networks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import record
import zoo_models

NAMES = (
    *("torchvision/resnet18", "torchvision/mobilenet_v2", "torchvision/mobilenet_v3_small"),
    *("torchvision/efficientnet_b0", "torchvision/densenet121", "torchvision/shufflenet_v2_x1_0"),
    *("torchvision/googlenet", "torchvision/squeezenet1_1", "timm/regnetx_002", "timm/ghostnet_050"),
    *("timm/repvit_m1", "timm/rexnet_100", "timm/test_nfnet", "timm/test_vit", "timm/pit_ti_224"),
    *("timm/test_convnext", "timm/test_coatnet", "timm/edgenext_xx_small", "torchvision/swin_t"),
)
TARGETS = ("onnxruntime", "openvino", "tflite")


def compare(program: Any, target: str) -> dict[str, Any]:
    """One network on one target."""
    from sartor import backends
    from sartor.backends.protocol import TargetOptions
    from sartor.ir.fusion_rules import FusionRules
    from sartor.ir.workload import build_workload
    from sartor.profiling.fusion_check import check_fusion

    backend = backends.get(target)
    options = TargetOptions(shapes=dict(program.input_shapes))
    with tempfile.TemporaryDirectory(prefix="sartor-fusion-") as folder:
        artifact = backend.lower(program, Path(folder) / "a", options)
        executed = backend.profile(artifact, options, 2)
    rules = FusionRules.of(backend.capabilities().fuses)
    own = check_fusion(program, build_workload(program, rules=rules), executed)
    generic = check_fusion(program, build_workload(program), executed)
    return {**own.to_dict(), "executed": len(executed), "generic_agreement": generic.agreement}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json")
    parser.add_argument("--models", default=",".join(NAMES), help="comma-separated, see zoo_models")
    parser.add_argument("--targets", default=",".join(TARGETS))
    arguments = parser.parse_args(argv)
    import sartor
    from sartor.errors import SartorError

    zoo_models.import_torchvision()
    rows: list[dict[str, Any]] = []
    print(f"{'model':32} {'target':12} {'kernels':>7} {'agree':>7} {'generic':>7} {'apart':>5}  inserted")
    for name in arguments.models.split(","):
        module, examples = zoo_models.build(name)
        program = sartor.capture(module, examples, name=name)
        for target in arguments.targets.split(","):
            row: dict[str, Any] = {"model": name, "target": target}
            try:
                row |= compare(program, target)
            except SartorError as error:
                rows.append({**row, "refused": str(error)})
                print(f"{name:32} {target:12} refused: {str(error)[:80]}", flush=True)
                continue
            rows.append(row)
            inserted = ", ".join(f"{count} {kind}" for kind, count in row["inserted"].items())
            print(
                f"{name:32} {target:12} {row['kernels']:7} {row['agreement']:7.3f} "
                f"{row['generic_agreement']:7.3f} {row['apart']:5}  {inserted}",
                flush=True,
            )
    found = summary(rows)
    print(json.dumps(found, indent=1))
    record.write(arguments.json, "fusion", rows, found)
    return 0


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Agreement per target."""
    result: dict[str, Any] = {}
    for target in dict.fromkeys(row["target"] for row in rows):
        mine = [row for row in rows if row["target"] == target and "refused" not in row]
        if mine:
            result[target] = {
                "networks": len(mine),
                "agreement_min": min(row["agreement"] for row in mine),
                "agreement_mean": statistics.fmean(row["agreement"] for row in mine),
                "agreement_kernels": sum(r["agreed"] for r in mine) / sum(r["kernels"] for r in mine),
                "generic_mean": statistics.fmean(row["generic_agreement"] for row in mine),
                "at_least_95_percent": sum(row["agreement"] >= 0.95 for row in mine),
                "layout_changes_expected": sum(sum(row["layout"].values()) for row in mine),
                "layout_changes_executed": sum(
                    count for r in mine for kind, count in r["inserted"].items() if kind.startswith("Reorder")
                ),
            }
    return result


if __name__ == "__main__":
    sys.exit(main())
