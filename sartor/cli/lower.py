"""Lower MODEL to the artifact of a target, for example OpenVINO IR, and compare it with MODEL there.

The folder appears when the artifact, as its target runs it, agrees with MODEL in float64 within the tolerance of
the precision; otherwise nothing is written, and the first node that differs is named.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from sartor.cli import arguments
from sartor.cli.output import Result, count
from sartor.errors import BackendError, UsageError

if TYPE_CHECKING:
    from sartor.backends.protocol import Artifact
    from sartor.ir.program import Program

EXAMPLE = "sartor lower model.onnx --target openvino --data calibration.npz -o artifact"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    arguments.add_model(parser)
    arguments.add_target(parser)
    parser.add_argument("-o", "--output", required=True, metavar="FOLDER", help="folder to write")
    parser.add_argument(
        "--data",
        help="FILE.py:function or FILE.npz, to compare on its split 'calibration'; random samples without. "
        "--precision int8 needs it, to find ranges on",
    )
    parser.add_argument(
        "--max-drop",
        type=arguments.not_negative,
        metavar="POINTS",
        help="with --precision int8: largest loss of score on split 'evaluate', 1 point = 0.01; layers that cost "
        "more stay in float",
    )
    parser.add_argument(
        "--integer-only",
        action="store_true",
        help="with --precision int8: refuse unless every node computes in integers, for targets without a "
        "floating-point unit",
    )
    arguments.add_keep(parser, "stay in float32 when the program is quantized or cast")
    parser.add_argument(
        "--samples", type=arguments.positive, default=4, metavar="N", help="samples to compare on (4)"
    )
    parser.add_argument(
        "--seed", type=arguments.seed, default=0, help="of random samples and data splits (0)"
    )
    parser.add_argument("--no-verify", action="store_true", help="compare nothing, and say so")
    parser.add_argument(
        "--time-limit",
        type=arguments.positive_number,
        metavar="S",
        help="of the target's compiler, which is ended after it (1800)",
    )
    parser.add_argument(
        "--memory-limit",
        type=arguments.positive_number,
        metavar="GIB",
        help="of the address space of the target's compiler (the memory that is there, and 8)",
    )


def run(options: argparse.Namespace) -> Result:
    """Check legality, lower and verify; the folder appears at once or not at all."""
    from sartor import backends, lowered
    from sartor.backends import isolation
    from sartor.data import load_data
    from sartor.precision import in_precision, require_legal

    for given, what in (
        (options.max_drop is not None, "--max-drop says what quantization may cost"),
        (options.integer_only, "--integer-only asks for integers"),
    ):
        if given and options.precision != "int8":
            raise UsageError(
                f"{what}, and --precision is '{options.precision}'; use --precision int8, or leave it away."
            )
    backend = backends.get(options.target)
    folder = arguments.output_folder(options.output)
    program = arguments.open_program(options)
    target = arguments.target_options(options, program)
    require_legal(options.target, program, target)
    data = None
    if options.data is not None:
        data = load_data(options.data, list(program.input_shapes), options.seed, program=program)
    written, left = in_precision(
        program,
        options.precision,
        data,
        keep=tuple(options.keep),
        seed=options.seed,
        max_drop=options.max_drop,
    )
    floating = _in_float(written) if options.precision == "int8" else []
    if options.integer_only:
        _require_integers(floating)
    unable = backend.capabilities().not_run_here
    why = "--no-verify was given" if options.no_verify else unable
    verification: dict[str, Any] = {"verified": False, "reason": why}

    def check(artifact: Artifact) -> None:
        if not why:
            found = lowered.verify(
                written, artifact, target, data=data, samples=options.samples, seed=options.seed
            )
            lowered.require(found)
            verification.clear()
            verification.update(verified=True, summary=found.summary(), **found.to_dict())

    artifact = isolation.lower(
        options.target,
        written,
        folder,
        target,
        time_limit_s=options.time_limit or isolation.TIME_LIMIT_S,
        memory_limit_bytes=int(options.memory_limit * 2**30) if options.memory_limit else None,
        check=check,
    )
    sizes = {name: (folder / name).stat().st_size for name in artifact.files}
    lines = [f"wrote {folder / name} ({count(size, 'B')})" for name, size in sizes.items()]
    lines += [f"in float32: '{r.node}': {r.reason}" for r in left]
    lines.append(
        f"verified: {verification['summary']}" if verification["verified"] else f"NOT verified: {why}"
    )
    document = {
        **artifact.to_dict(),
        "verification": verification,
        "in_float32": [{"node": r.node, "reason": r.reason} for r in left],
    }
    if options.precision == "int8":
        document["computes_in_float"] = floating
        lines.append(
            f"nodes that compute in float: {len(floating)}" + (" (--json lists them)" if floating else "")
        )
    return Result(document, "\n".join(lines))


def _in_float(program: Program) -> list[dict[str, str]]:
    """The nodes of a quantized program that need floating point, with the line of the author's code."""
    from sartor.quantization import integer_only

    where = {node.name or "": program.where(node) for node in program.graph.all_nodes()}
    return [
        {"node": n.node, "op_type": n.op_type, "where": where[n.node], "reason": n.reason}
        for n in integer_only(program)
    ]


def _require_integers(floating: list[dict[str, str]]) -> None:
    if not floating:
        return
    lines = [f"Node {found['where']}: {found['reason']}." for found in floating]
    error = BackendError(
        f"--integer-only: {len(lines)} node{'s compute' if len(lines) > 1 else ' computes'} in float. {lines[0]} "
        "Replace what cannot be quantized, or lower for a target with a floating-point unit."
    )
    for line in lines[1:]:
        error.add_note(line)
    raise error
