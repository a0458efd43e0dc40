"""Description files: what is shipped is complete and has sources; every broken file is one clear error."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sartor.cli.main import main
from sartor.cost_models.constants import CERTAINTIES
from sartor.cost_models.descriptions import (
    describe_target,
    described_devices,
    described_targets,
    load_description,
    parse_description,
)
from sartor.cost_models.roofline import Roofline
from sartor.errors import UsageError

GOOD = """
name = "board"
title = "A board"
kind = "device"
precisions = ["int8"]
notes = []
source = "nobody"
[sources]
sheet = { text = "Data sheet", date = "2020-05" }
[compute]
macs_per_s.int8 = { value = 1e9, source = "sheet", certainty = "datasheet" }
units = { value = 4, source = "sheet", certainty = "datasheet" }
[grid]
out.int8 = { value = 8, source = "sheet", certainty = "uncertain" }
[memory]
bandwidth_bytes_per_s = { value = 1e8, source = "sheet", certainty = "derived" }
[[cache]]
name = "SRAM"
holds = "activations"
bytes = { value = 65536, source = "sheet", certainty = "datasheet" }
bandwidth_bytes_per_s = { value = 1e9, source = "sheet", certainty = "fitted" }
[launch]
seconds_per_kernel = { value = 1e-6, source = "sheet", certainty = "uncertain" }
[limits]
sram_bytes = { value = 65536, source = "sheet", certainty = "datasheet" }
[energy]
static_w = { value = 0.5, source = "sheet", certainty = "uncertain" }
pj_per_byte = { value = 10, source = "sheet", certainty = "uncertain" }
pj_per_mac.int8 = { value = 2, source = "sheet", certainty = "uncertain" }
"""


def test_published_devices_are_described_with_sources():
    wanted = {"jetson-nano", "jetson-tx2", "jetson-agx-xavier", "raspberry-pi-4", "edge-tpu", "ncs2"}
    wanted |= {"ethos-u55-128", "ethos-u65-256", "stm32f746", "stm32h743", "i7-9750h", "h200"}
    assert set(described_devices()) == wanted
    assert described_targets() == ("onnxruntime", "openvino")
    for name in described_devices():
        description = describe_target(name)
        assert description.name == name and description.constants is not None
        numbers = description.constants.numbers()
        assert len(numbers) >= 7
        assert all(n.value > 0 and n.source and n.date[:2] == "20" for n in numbers.values())
        assert all(n.certainty in CERTAINTIES for n in numbers.values())
        json.dumps(description.to_dict())


def test_units_are_multiply_accumulates_and_bytes():
    """Peaks against what the data sheets say in operations: 2 to a MAC, without sparsity."""
    peaks = {
        ("jetson-nano", "f16"): 472e9,
        ("jetson-tx2", "f16"): 1.33e12,
        ("edge-tpu", "int8"): 4e12,
        ("ncs2", "f16"): 1e12,
        ("jetson-agx-xavier", "int8"): 22e12,
        ("h200", "f16"): 989e12,
        ("i7-9750h", "f32"): 499e9,
    }
    for (name, precision), operations in peaks.items():
        constants = describe_target(name).constants
        assert 2 * constants.macs_per_s[precision].value == pytest.approx(operations, rel=2e-3)
    assert describe_target("jetson-nano").constants.bandwidth_bytes_per_s.value == 25.6e9
    assert describe_target("h200").constants.bandwidth_bytes_per_s.value == 4.8e12


def test_every_table_of_a_file_is_read(tmp_path):
    path = tmp_path / "board.toml"
    path.write_text(GOOD)
    constants = load_description(path).constants
    assert describe_target(str(path)) == load_description(path)
    assert {place: number.value for place, number in constants.numbers().items()} == {
        "macs_per_s.int8": 1e9,
        "units": 4,
        "grid_out.int8": 8,
        "bandwidth_bytes_per_s": 1e8,
        "caches[0].bytes": 65536,
        "caches[0].bandwidth_bytes_per_s": 1e9,
        "launch_s": 1e-6,
        "limits.sram_bytes": 65536,
        "energy.static_w": 0.5,
        "energy.pj_per_byte": 10,
        "energy.pj_per_mac.int8": 2,
    }
    assert constants.caches[0].holds == "activations"
    assert constants.units.source == "Data sheet" and constants.units.date == "2020-05"


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("[launch]", "[launch", "is not TOML"),
        ('title = "A board"', "", r"'title' is None"),
        ("notes = []", 'notes = "none"', r"'notes' is 'none'"),
        (
            "value = 1e9, source",
            "value = -1e9, source",
            r"'compute.macs_per_s.int8' has the value -1000000000.0",
        ),
        ("value = 1e9, source", 'value = "fast", source', r"'compute.macs_per_s.int8' has the value 'fast'"),
        ("value = 4,", "value = true,", r"'compute.units' has the value True"),
        ("value = 4,", "value = inf,", r"'compute.units' has the value inf"),
        ("value = 1e8, source", "source", r"'memory.bandwidth_bytes_per_s.value' is missing"),
        ('certainty = "derived"', 'certainty = "sure"', r"certainty 'sure'; use one of \['datasheet'"),
        ('value = 4, source = "sheet"', 'value = 4, source = "web"', r"cites the source 'web'.*\['sheet'\]"),
        (', date = "2020-05"', "", r"'sources.sheet.date' is missing"),
        ("seconds_per_kernel", "seconds", r"'launch.seconds' is not known; use one of"),
        ("macs_per_s.int8", "macs_per_s.int4", r"'compute.macs_per_s.int4' is not known.*'bf16'"),
        ('precisions = ["int8"]', 'precisions = ["int8", "f16"]', r"'precisions' are \['int8', 'f16'\]"),
        ('holds = "activations"', 'holds = "code"', r"'cache\[0\].holds' is 'code'"),
        ("pj_per_byte = { value = 10,", "pj_per_bit = { value = 10,", r"'energy.pj_per_bit' is not known"),
        ('kind = "device"', 'kind = "cpu"', r"'artifact' is None"),
    ],
)
def test_a_broken_file_is_one_error(old, new, problem):
    assert old in GOOD
    with pytest.raises(UsageError, match=problem) as caught:
        parse_description(GOOD.replace(old, new, 1), "board.toml")
    assert "board.toml" in str(caught.value)


def test_missing_energy_and_missing_tables():
    without = GOOD.split("[energy]")[0]
    assert parse_description(without, "b").constants.energy is None
    with pytest.raises(UsageError, match="'launch' is missing"):
        parse_description(without.split("[launch]")[0], "b")


def test_unreadable_files_and_unknown_names(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        load_description(tmp_path / "none.toml")
    with pytest.raises(UsageError, match=r"'abacus'.*jetson-nano"):
        describe_target("abacus")


def test_the_example_of_the_documentation_is_read():
    text = (Path(__file__).parents[1] / "docs" / "devices.md").read_text()
    (example,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    description = parse_description(example, "board.toml")
    assert description.constants.energy is not None and description.constants.caches[0].holds == "activations"
    assert Roofline(description, "int8").constants.units == 4


def test_command_lists_devices(capsys):
    assert main(["targets", "--devices"]) == 0
    text = capsys.readouterr().out
    assert "jetson-agx-xavier" in text and "int8 11,000" in text and "openvino" not in text
    assert main(["targets", "--devices", "edge-tpu", "--json"]) == 0
    (device,) = json.loads(capsys.readouterr().out)["devices"]
    assert device["constants"]["macs_per_s.int8"]["certainty"] == "datasheet"
    assert main(["targets", "--devices", "abacus"]) == 2
    assert "No published device 'abacus'" in capsys.readouterr().err
