"""Build the profile of this machine as a target uses it, for predictions; or check whether one still holds.

Generated networks and the kernels inside them are timed for --minutes, by the target's own profiler; a fifth of both is
held out, and models are fitted to the rest. The file has the errors on what was held out. A run that is interrupted
goes on where it was when the same command is given again. With --check, a few networks of FILE are timed again.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sartor.cli import arguments
from sartor.cli.output import Result, seconds, table
from sartor.cli.progress import Progress
from sartor.errors import EXIT_VERIFICATION_FAILED, UsageError

if TYPE_CHECKING:
    from sartor.cost_models.profile import DeviceProfile

EXAMPLE = "sartor profile --target onnxruntime --out device.json --minutes 10"
SCHEMA, CHECK_SCHEMA = "sartor.profile/1", "sartor.profile-check/1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    arguments.add_target(parser, required=False)
    parser.add_argument("--out", type=Path, metavar="FILE", help="the profile to write, a JSON file")
    parser.add_argument(
        "--minutes",
        type=arguments.positive_number,
        default=10.0,
        metavar="N",
        help="for measuring and fitting (10)",
    )
    parser.add_argument("--seed", type=arguments.seed, default=0, help="seed of what is sampled (0)")
    parser.add_argument(
        "--no-pin", action="store_true", help="do not keep the measuring process on a processor"
    )
    parser.add_argument(
        "--check", type=Path, metavar="FILE", help="say whether this profile still holds here"
    )


def run(options: argparse.Namespace) -> Result:
    """Build, or check.

    Raises:
        UsageError: neither or both of `--check` and `--target` with `--out`.
    """
    if options.check is not None:
        if options.target is not None or options.out is not None:
            raise UsageError(
                "'--check' takes target, threads and precision from the profile; leave out the others."
            )
        return _check(options)
    if options.target is None or options.out is None:
        raise UsageError("'sartor profile' needs '--target' and '--out FILE', or '--check FILE'.")
    from sartor.backends.protocol import TargetOptions
    from sartor.profiling.build import build_profile, learned_uncertainty

    target = TargetOptions(threads=options.threads, precision=options.precision)
    with Progress.on_stderr() as progress:
        profile = build_profile(
            options.target,
            target,
            options.out,
            minutes=options.minutes,
            progress=progress,
            seed=options.seed,
            pin=not options.no_pin,
            uncertainty_of=learned_uncertainty,
        )
    document = {"schema": SCHEMA, "out": str(options.out), **_summary(profile)}
    return Result(document, _text(document))


def _summary(profile: DeviceProfile) -> dict[str, Any]:
    """What a reader wants to know of a profile before its thousands of numbers."""
    return {
        "target": dict(profile.target),
        "device": dict(profile.device),
        "kernels": len(profile.samples),
        "networks": len(profile.networks),
        "failures": len(profile.failures),
        "call_s": profile.call_s,
        "errors": {key: value for key, value in profile.errors.items()},
        "spent_s": profile.protocol.get("spent_s"),
    }


def _text(document: Mapping[str, Any]) -> str:
    target = document["target"]
    lines = [
        f"{document['out']}: {target['name']} {target['version']}, {target['threads']} thread(s), "
        f"{target['precision']}, on {document['device']['cpu']}",
        f"{document['kernels']} kernels and {document['networks']} networks timed, {document['failures']} failed; "
        f"an empty call takes {seconds(document['call_s'])}",
    ]
    for what, errors in document["errors"].items():
        plain = (
            {k: v for k, v in errors.items() if isinstance(v, (int, float))}
            if isinstance(errors, Mapping)
            else {}
        )
        if plain:
            lines.append(f"held-out {what}: " + ", ".join(f"{k} {v:.3g}" for k, v in plain.items()))
    if not document["errors"]:
        lines.append("no models are fitted to it: the file has what was measured only")
    return "\n".join(lines)


def _check(options: argparse.Namespace) -> Result:
    from sartor.cost_models.profile import DeviceProfile
    from sartor.profiling.check import check_profile

    profile = DeviceProfile.load(options.check)
    with Progress.on_stderr() as progress:
        progress.stage("timing a few networks again")
        found = check_profile(profile)
    rows = [
        (family, str(count), f"{ratio:.3f}", f"[{low:.3f}, {high:.3f}]")
        for family, (ratio, low, high, count) in found.families.items()
    ]
    verdict = "The profile holds." if found.holds else "The profile no longer holds:"
    lines = [
        verdict,
        *(f"- {change}" for change in found.changes),
        *(f"note: {note}" for note in found.notes),
    ]
    if rows:
        lines.append(table(rows, ("family", "networks", "now / then", "95 %")))
    if not found.holds:
        lines.append("Build it again with 'sartor profile'.")
    document = {"schema": CHECK_SCHEMA, "profile": str(options.check), **found.to_dict()}
    return Result(document, "\n".join(lines), 0 if found.holds else EXIT_VERIFICATION_FAILED)
