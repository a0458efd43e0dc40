"""Tiles compute what the whole computes, on random regions, and need the memory that is said."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from models import captured
from tile_regions import programs

from sartor.cost_models.static import static_cost
from sartor.errors import PlanError, UsageError
from sartor.ir.fx import run_twin
from sartor.ir.memory import MICROCONTROLLER, peak, program_buffers
from sartor.ir.tiles.region import regions
from sartor.ir.tiles.spans import Untileable
from sartor.ir.workload import build_workload
from sartor.passes.base import Context
from sartor.passes.pipeline import Pipeline
from sartor.passes.quantize import Quantize
from sartor.passes.rewriter import Rewriter
from sartor.passes.split_tiles import SplitTiles
from sartor.passes.tile_search import overhead
from sartor.passes.tiled import split


def error(program, region, counts, seed=0):
    """Largest difference that a split makes, in float64, over the largest number."""
    ((name, shape),) = program.input_shapes.items()
    inputs = {name: np.random.default_rng(seed).standard_normal((2, *shape[1:]))}
    before = run_twin(program, inputs)
    clone = program.clone()
    split(clone, region, counts, Rewriter(clone, "split-tiles"))
    clone.invalidate()
    after = run_twin(clone, inputs)
    for value in program.outputs:
        assert clone.shapes()[value.name] == program.shapes()[value.name]
    return max(np.abs(before[k] - after[k]).max() / max(np.abs(before[k]).max(), 1e-9) for k in before)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)
@given(programs(), st.data())
def test_tiles_are_exact_on_random_regions(program, data):
    found, _ = regions(program, program.graph.inputs[0], (2, 3))
    assume(found)
    region = data.draw(st.sampled_from(found))
    shape = program.shapes()[region.exit]
    lengths = [shape[axis] for axis in region.axes[region.exit]]
    counts = tuple(data.draw(st.integers(1, min(4, length))) for length in lengths)
    try:
        assert error(program, region, counts) <= 1e-12
    except Untileable as reason:
        assert "padding alone" in str(reason)


# ---- what is split -------------------------------------------------------------------------------
def context_of(program):
    ((name, shape),) = program.input_shapes.items()
    batch = np.random.default_rng(3).standard_normal((8, *shape[1:])).astype(np.float32)
    return Context(data={"calibration": [({name: batch}, None)]})


def peak_of(program, rules=MICROCONTROLLER):
    return peak(program_buffers(program, rules).graph()).bytes


@pytest.fixture(scope="module")
def network():
    return captured("mobilenet")


def test_the_memory_model_chooses(network):
    result = SplitTiles(overhead=0.3).run(network)
    assert result.counts["tiles"] == np.prod(result.plan["counts"]) > 1
    assert peak_of(result.program) < 0.9 * peak_of(network)
    assert 1.0 < static_cost(result.program).macs / static_cost(network).macs <= 1.3
    for rows, cols, depth in itertools.product((1, 2, 3, 4), (1, 2, 3, 4), (3, 6, 8)):
        other = SplitTiles(rows=rows, cols=cols, depth=depth).run(network).program
        if static_cost(other).macs <= 1.3 * static_cost(network).macs:
            assert peak_of(result.program) <= peak_of(other), (rows, cols, depth)
    again = SplitTiles().replay(network, json.loads(json.dumps(result.plan)))
    assert again.program.sha256() == result.program.sha256()


def test_overhead_is_what_the_tiles_cost(network):
    found, _ = regions(network, network.graph.inputs[0], (2, 3))
    for region, counts in ((found[3], (2, 3)), (found[-1], (3, 2))):
        clone = network.clone()
        split(clone, region, counts, Rewriter(clone, "split-tiles"))
        clone.invalidate()
        told = overhead(network, build_workload(network), region, counts)
        assert static_cost(clone).macs / static_cost(network).macs - 1 == pytest.approx(told, abs=1e-9)


def test_weights_are_shared_and_tiles_run_one_after_the_other(network):
    result = SplitTiles(rows=2, cols=2, depth=6).run(network).program
    sizes = [sum(p.initializer_array(n).nbytes for n in p.initializers) for p in (network, result)]
    assert sizes[1] < sizes[0] + 2000, "only bounds of tiles are new"
    tiles = [name.rpartition("/tile")[2] for name in (n.name for n in result.nodes()) if "/tile" in name]
    numbers = [int(tile.partition("/")[0].partition("_")[0]) for tile in tiles]
    assert numbers == sorted(numbers) and set(numbers) == {0, 1, 2, 3}


def test_quantized_networks_are_split_bit_by_bit(network):
    folded = Pipeline.parse("fold-batch-norm").run(network).program
    quantized = Quantize().run(folded, context_of(folded)).program
    result = SplitTiles(rows=2, cols=3, depth=7).run(quantized)
    assert result.modified and result.plan["entry"] != "x", "what is cut are integers"
    inputs = {
        "x": np.random.default_rng(5).standard_normal((3, *network.input_shapes["x"][1:])).astype(np.float32)
    }
    outputs = [run_twin(program, inputs) for program in (quantized, result.program)]
    assert all(np.array_equal(outputs[0][name], outputs[1][name]) for name in outputs[0])
    made = {node.name: node for node in result.program.nodes()}
    moved = [
        node for node in made.values() if node.op_type in ("Slice", "Concat") and "tile" in str(node.name)
    ]
    for node in moved:
        users = [user.op_type for user, _ in node.outputs[0].uses()]
        assert users == ["QuantizeLinear"], f"{node.name} leaves the integers for {users}"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"rows": 2, "cols": 2, "depth": 99}, "takes all of the map together, and only"),
        ({"rows": 50, "cols": 2, "depth": 6}, "too few for 50 tiles"),
        ({"overhead": 0.0}, "needs less memory"),
        ({"entry": "linear", "rows": 2, "cols": 2, "depth": 1}, "without a map"),
        ({"rows": 2, "cols": 2, "depth": 2}, "no single value"),
    ],
)
def test_what_cannot_be_split_is_refused(network, options, reason):
    result = SplitTiles(**options).run(network)
    assert not result.modified and reason in result.refusals[0].reason


def test_an_unknown_entry_is_an_error(network):
    with pytest.raises(UsageError, match="There is no value 'nowhere'"):
        SplitTiles(entry="nowhere").run(network)


def test_a_plan_for_another_program_is_an_error(network):
    with pytest.raises(PlanError, match="no region of this"):
        SplitTiles().replay(network, {"entry": "x", "exit": "gone", "counts": [2, 2]})


def test_the_pipeline_reads_auto_and_numbers():
    text = "split-tiles{rows=2,cols=auto,overhead=0.2}"
    (one,) = Pipeline.parse(text).passes
    assert (one.rows, one.cols, one.depth) == (2, None, None)
    assert str(one) == "split-tiles{rows=2,overhead=0.2}" and "cols=auto" in one.spec(defaults=True)
