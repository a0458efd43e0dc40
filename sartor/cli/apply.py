"""Replay PLAN on the model it was made for. Byte-identical on every run; another model is refused."""

from __future__ import annotations

import argparse

from sartor.cli import arguments
from sartor.cli.output import Result, count

EXAMPLE = "sartor apply model.onnx plan.json -o small.onnx --masked masked.onnx"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    arguments.add_model(parser)
    parser.add_argument("plan", metavar="PLAN.json", help="a plan written by 'sartor fit' or 'sartor run'")
    parser.add_argument("-o", "--output", required=True, metavar="OUT.onnx", help="file to write")
    parser.add_argument(
        "--masked",
        metavar="MASKED.onnx",
        help="write the original with zeros where the plan cuts; it computes the same function as OUT",
    )


def run(options: argparse.Namespace) -> Result:
    """Apply, verify and write."""
    from sartor.ir.files import write_all
    from sartor.ir.plan import Plan
    from sartor.ir.verify import verify_program
    from sartor.passes.masked import masked
    from sartor.passes.prune import apply_plan

    output = arguments.output_file(options.output)
    masked_output = arguments.output_file(options.masked) if options.masked else None
    arguments.require_distinct(output, masked_output)
    plan = Plan.load(options.plan)
    program = arguments.open_program(options)
    pruned = apply_plan(program, plan)
    verify_program(pruned)
    # masked() says why there is none, where one is asked for
    exact = masked_output is not None or not (plan.approximate or plan.replaces_layers)
    masked_program, zeroed = masked(program, plan) if exact else (None, ())
    files = pruned.files(output)
    if masked_output is not None and masked_program is not None:
        files |= masked_program.files(masked_output)
    paths = write_all(files)
    entries = [arguments.plain(entry) for entry in zeroed]
    document = {
        "schema": "sartor.apply/1",
        "source": arguments.source_document(program),
        "groups": len(plan.groups),
        "blocks": list(plan.blocks),
        "layers": dict(plan.layers),
        "factors": len(plan.factors),
        "fused": list(plan.fused),
        "grouped": dict(plan.grouped),
        "widened": len(plan.widened),
        "deepened": dict(plan.deepened),
        "inputs": {name: list(shape) for name, shape in pruned.input_shapes.items()},
        "zeroed": entries,
        "files": arguments.Written(tuple(paths)).to_list(),
    }
    before, after = program.serialised_bytes(), pruned.serialised_bytes()
    said = [
        f"{number} {what}"
        for number, what in (
            (len(plan.groups), "groups narrowed"),
            (len(plan.widened), "groups widened"),
            (len(plan.blocks), "blocks removed"),
            (sum(plan.deepened.values()), "blocks added"),
            (len(plan.layers), "layers removed"),
            (len(plan.factors), "layers factorized"),
            (len(plan.fused), "pairs of layers fused"),
            (len(plan.grouped), "layers cut into groups"),
        )
        if number
    ]
    said += [f"input '{name}' is {' x '.join(map(str, shape))}" for name, shape in sorted(plan.sizes.items())]
    text = [f"{', '.join(said) or 'nothing changed'}: {count(before, 'B')} became {count(after, 'B')}"]
    text += [f"wrote {path}" for path in paths]
    return Result(document, "\n".join(text))
