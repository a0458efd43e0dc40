"""The options `--profile` and `--target`, and what programs are priced with by them."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sartor.cli import arguments
from sartor.errors import UsageError

if TYPE_CHECKING:
    from sartor.cost_models.profile import DeviceProfile
    from sartor.cost_models.protocol import CostModel
    from sartor.ir.channels import ChannelAnalysis
    from sartor.ir.fusion_rules import FusionRules
    from sartor.ir.plan import Plan
    from sartor.ir.program import Program
    from sartor.ir.workload import Workload


@dataclasses.dataclass(frozen=True)
class Pricer:
    """A cost model and what it belongs to.

    Attributes:
        model: the cost model.
        facts: target, device and errors, for documents.
        rules: what the target fuses.
        notes: what differs here from where the model is from, in sentences.
    """

    model: CostModel
    facts: dict[str, Any]
    rules: FusionRules
    notes: list[str]

    def workload(self, program: Program, plan: Plan | None = None) -> tuple[ChannelAnalysis, Workload]:
        """Channel groups of a program, with those that a plan may name, and its workload."""
        from sartor.ir.blocks import residual_blocks
        from sartor.ir.channels import channel_groups
        from sartor.ir.workload import build_workload

        analysis = channel_groups(program, approximate=plan is not None and plan.approximate)
        blocks = [block for block in residual_blocks(program) if block.removable]
        return analysis, build_workload(program, analysis.extents, blocks, self.rules)

    def latency(self, program: Program) -> float:
        """Seconds of one inference of a program as it is."""
        return float(self.model.estimate(self.workload(program)[1]).latency_s)


def add_pricing(parser: argparse.ArgumentParser) -> None:
    """Declare what to price with."""
    parser.add_argument("--profile", type=Path, metavar="FILE", help="a profile written by 'sartor profile'")
    parser.add_argument("--target", metavar="NAME", help="a device from 'sartor targets --devices' instead")
    parser.add_argument("--precision", choices=arguments.PRECISIONS, help="of --target (its first one)")


def pricer_of(options: argparse.Namespace) -> Pricer:
    """What the options say.

    Raises:
        UsageError: neither or both of `--profile` and `--target`; `--precision` with a profile.
    """
    from sartor.ir.fusion_rules import GENERIC

    if (options.profile is None) == (options.target is None):
        raise UsageError("Give '--profile FILE' or '--target NAME', and not both.")
    if options.profile is not None and options.precision is not None:
        raise UsageError(
            "'--precision' belongs to '--target'; a profile is of one precision, which it names."
        )
    if options.profile is None:
        from sartor.cost_models.descriptions import describe_target
        from sartor.cost_models.roofline import Roofline

        precision = options.precision or describe_target(options.target).precisions[0]
        target = {"name": options.target, "precision": precision}
        note = "Published constants, nothing measured: good for ranking; the error in seconds is not known."
        return Pricer(Roofline(options.target, precision), {"target": target}, GENERIC, [note])
    from sartor.cost_models.ladder import Ladder
    from sartor.cost_models.profile import DeviceProfile

    profile = DeviceProfile.load(options.profile)
    rules, notes = _of_this_machine(profile)
    facts = {
        "target": dict(profile.target),
        "device": dict(profile.device),
        "profile": str(options.profile),
        "errors": dict(profile.errors),
    }
    return Pricer(Ladder(profile), facts, rules, notes)


def _of_this_machine(profile: DeviceProfile) -> tuple[FusionRules, list[str]]:
    """What the profile's target fuses, and what differs between its machine and this one, in words."""
    from sartor import backends
    from sartor.backends import host
    from sartor.errors import SartorError
    from sartor.ir.fusion_rules import GENERIC
    from sartor.profiling.build import fusion_rules

    notes = []
    cpu = profile.device.get("cpu")
    if cpu is not None and cpu != host.cpu_model():
        notes.append(
            f"The profile is of another machine ({cpu}); the prediction is for that one, not for this."
        )
    name, rules = str(profile.target.get("name", "")), GENERIC
    try:
        backend = backends.get(name)
        rules, installed = fusion_rules(backend), backend.capabilities().version
        version = profile.target.get("version")
        if version != installed:
            notes.append(f"The profile is of '{name}' {version}; installed here is {installed}.")
    except SartorError:
        notes.append(f"'{name}' is not installed here; kernels are grouped by generic fusion rules.")
    then = profile.target.get("settings", {}).get("fusion_sha256")
    if then is not None and then != rules.sha256:
        notes.append(
            "Kernels are fused by other rules here than when the profile was built; build it again with 'sartor "
            "profile'."
        )
    return rules, notes
