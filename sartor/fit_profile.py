"""Whether a device profile is of what a fit measures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sartor.cost_models.profile import DeviceProfile
from sartor.errors import UsageError
from sartor.profiling.build import fusion_rules
from sartor.workbench import FitOptions

if TYPE_CHECKING:
    from sartor.backends.protocol import Backend
    from sartor.tasks import Runner


def require_of_this(profile: DeviceProfile, options: FitOptions) -> None:
    """Refuse a profile of another target, precision or number of threads: it was meant for another command.

    Raises:
        UsageError: it is.
    """
    here = {
        "target": options.target,
        "precision": sampled_precision(options.precision),
        "threads": options.threads,
    }
    then = {**profile.target, "target": profile.target.get("name")}
    for what, value in here.items():
        if then.get(what) != value:
            raise UsageError(
                f"The device profile is of {what} '{then.get(what)}', and this fit of '{value}'. Build one with "
                f"'sartor profile --target {options.target}', or leave --profile away: then kernels are timed first."
            )


def outdated(profile: DeviceProfile, backend: Backend, runner: Runner) -> str:
    """Why a profile no longer holds: of another machine, of another version of the runtime, or of other fusion rules.

    Returns:
        A part of a sentence; empty where it holds.
    """
    from sartor.backends import host

    if runner.device:
        return f"candidates are measured on '{runner.device}'"
    rules = profile.target.get("settings", {}).get("fusion_sha256")
    then_and_here = (
        ("processor", profile.device.get("cpu"), host.cpu_model()),
        ("version", profile.target.get("version"), backend.capabilities().version),
        ("fusion rules", rules, fusion_rules(backend).sha256 if rules else None),
    )
    for what, then, here in then_and_here:
        if then != here:
            return f"it is of {what} '{then}', and here it is '{here}'"
    return ""


def sampled_precision(precision: str) -> str:
    """What kernels are timed in for a fit in `precision`.

    Those of a precision that a pass makes need data, so float32 stands for them: what a step of pruning saves of each
    kernel carries over, and the baseline's own latency sets the scale.
    """
    return {"int8": "f32", "f16": "f32"}.get(precision, precision)
