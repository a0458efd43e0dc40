"""`sartor inspect`: what halving a group saves, members by layer, blocked axes by reason; tree, JSON and page."""

from __future__ import annotations

import json
import re

import numpy as np
import onnx
import pytest
import torch
from builders import node, program_from_nodes
from hypothesis import given, settings
from models import captured
from random_graphs import programs
from test_report import Page

from sartor import capture
from sartor.cli import main
from sartor.cost_models.static import static_cost
from sartor.errors import UsageError
from sartor.inspection import inspect_program
from sartor.ir.channels import channel_groups
from sartor.ir.plan import GroupPlan, Plan
from sartor.passes.prune import apply_plan
from sartor.report import write_inspection
from sartor.report.prunability import render
from sartor.report.text import columns, visible
from sartor.report.tree import describe
from sartor.savings import half

DRAW = np.random.default_rng(0).standard_normal
EVIL = ("<script>alert(1)</script>", "two\nlines\x1b[31m", "Ünïcode\u202e中文")


def weight(*shape):
    return DRAW(shape).astype(np.float32)


def shuffled():
    """A channel shuffle over 2 × 3 channels between convolutions that see half of them: units of unequal size."""
    return program_from_nodes(
        [
            node("Conv", ["x", "w1"], ["a"]),
            node("Reshape", ["a", "split"], ["b"]),
            node("Transpose", ["b"], ["c"], perm=[0, 2, 1, 3, 4]),
            node("Reshape", ["c", "merge"], ["d"]),
            node("Split", ["d"], ["e", "f"], axis=1, num_outputs=2),
            node("Conv", ["e", "w2"], ["g"]),
            node("Concat", ["f", "g"], ["h"], axis=1),
            node("Conv", ["h", "w3"], ["y"]),
        ],
        {"x": [1, 3, 5, 5]},
        ["y"],
        {
            "w1": weight(6, 3, 1, 1), "w2": weight(3, 3, 1, 1), "w3": weight(2, 6, 1, 1),
            "split": np.array([1, 2, 3, 5, 5]), "merge": np.array([1, 6, 5, 5]),
        },
    )  # fmt: skip


def chain(names=("first", "second", "last"), output="y"):
    """Conv, Relu, Conv, Relu, Conv with the given names of nodes and weights."""
    a, b, c = names
    return program_from_nodes(
        [
            node("Conv", ["x", a + ".weight"], ["h1"], a),
            node("Relu", ["h1"], ["r1"]),
            node("Conv", ["r1", b + ".weight", b + ".bias"], ["h2"], b),
            node("Relu", ["h2"], ["r2"]),
            node("Conv", ["r2", c + ".weight"], [output], c),
        ],
        {"x": ["N", 3, 6, 6]},
        [output],
        {
            a + ".weight": weight(8, 3, 3, 3), b + ".weight": weight(6, 8, 3, 3), b + ".bias": weight(6),
            c + ".weight": weight(4, 6, 1, 1),
        },
    )  # fmt: skip


def many(number, operator="TopK"):
    """`number` linear layers, each ended by its own operator that blocks its features, for the same reason."""
    nodes, tensors = [], {"k": np.array([3])}
    for i in range(number):
        nodes += [
            node("MatMul", ["x", f"w{i}"], [f"h{i}"]),
            node(operator, [f"h{i}", "k"], [f"v{i}", f"i{i}"]),
        ]
        tensors[f"w{i}"] = weight(4, 5)
    return program_from_nodes(nodes, {"x": ["N", 4]}, [f"v{i}" for i in range(number)], tensors)


class Mine(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(6, 10)
        self.norm = torch.nn.LayerNorm(6)
        self.down = torch.nn.Linear(10, 6)

    def forward(self, x):
        return self.norm(self.down(torch.relu(self.up(x))))


@pytest.fixture(scope="module")
def mine():
    return inspect_program(capture(Mine().eval(), (torch.zeros(1, 4, 6),)))


# ---- what half of a group saves ------------------------------------------------------------------
def saved(program, groups, approximate=False):
    """What static costs lose under a plan."""
    plan = Plan(program.source.sha256, groups, approximate=approximate)
    before, after = static_cost(program), static_cost(apply_plan(program, plan))
    return {
        name: getattr(before, name) - getattr(after, name) for name in ("macs", "parameters", "weight_bytes")
    }


@pytest.mark.parametrize("family", ["resnet", "densenet", "unet", "vit_manual"])
def test_a_saving_is_what_apply_saves_whichever_half_goes(family):
    program = captured(family)
    groups = channel_groups(program).groups
    for group, entry in zip(groups, inspect_program(program)["groups"], strict=True):
        saving = entry["saving"]
        assert saving["even"] and 0 < saving["units"] <= group.size // 2
        assert saving["units"] == group.size // 2 or group.floors
        keep = group.keep_best(np.random.default_rng(3).random(group.size), group.size - saving["units"])
        real = saved(program, {group.name: GroupPlan(group.size, keep)})
        assert {name: saving[name] for name in real} == real, group.name
        assert saving["macs_share"] == pytest.approx(real["macs"] / static_cost(program).macs, abs=1e-6)


def test_where_units_differ_the_smallest_go_and_the_figures_are_theirs():
    program = shuffled()
    uneven = 0
    for group, entry in zip(channel_groups(program).groups, inspect_program(program)["groups"], strict=True):
        saving = entry["saving"]
        real = saved(program, {group.name: GroupPlan(group.size, half(group))})
        assert (saving["macs"], saving["parameters"]) == (real["macs"], real["parameters"]), group.name
        if not saving["even"]:
            uneven += 1
            sizes = sum(
                np.bincount(m.index_map[m.index_map >= 0], minlength=group.size) for m in group.members
            )
            gone = np.setdiff1d(np.arange(group.size), half(group))
            assert sizes[gone].max() <= sizes[list(half(group))].min()
    assert uneven, "the network must have units of unequal size"
    assert "* Units differ" in describe(inspect_program(program))
    assert "* Units differ" in render(inspect_program(program))


@pytest.mark.parametrize("make", [shuffled, lambda: captured("densenet"), lambda: captured("vit")])
def test_half_of_everything_is_priced_as_applied(make):
    program = make()
    groups = channel_groups(program).groups
    plan = Plan(program.source.sha256, {g.name: GroupPlan(g.size, half(g)) for g in groups})
    after = static_cost(apply_plan(program, plan))
    halved = inspect_program(program)["prunable"]["halved"]
    assert halved == {"macs": after.macs, "parameters": after.parameters}


def test_approximate_groups_have_savings_and_members_too():
    program = captured("vit")
    (group,) = [g for g in channel_groups(program, approximate=True).groups if g.mixed]
    (entry,) = inspect_program(program)["approximate"]
    real = saved(program, {group.name: GroupPlan(group.size, half(group))}, approximate=True)
    assert {name: entry["saving"][name] for name in real} == real
    assert entry["reason"] == group.mixed and len(entry["members"]) == len(group.members)
    roles = [layer["role"] for layer in entry["layers"]]
    assert roles == sorted(roles, key=["producer", "affine", "consumer"].index)


def test_a_program_without_groups_or_work():
    program = program_from_nodes([node("Relu", ["x"], ["y"])], {"x": ["N", 4]}, ["y"])
    document = inspect_program(program)
    assert document["prunable"] == {"macs_share": 0.0, "halved": {"macs": 0, "parameters": 0}}
    assert "no channel group can be pruned" in describe(document) and Page(render(document)).open == []


@settings(max_examples=10, deadline=None, derandomize=True)
@given(programs(max_steps=5))
def test_savings_of_random_networks(program):
    document = inspect_program(program)
    for group, entry in zip(channel_groups(program).groups, document["groups"], strict=True):
        keep = half(group)
        real = saved(program, {group.name: GroupPlan(group.size, keep)}) if len(keep) < group.size else None
        found = entry["saving"]["macs"], entry["saving"]["parameters"]
        assert found == ((real["macs"], real["parameters"]) if real else (0, 0)), group.name
    assert max(map(len, describe(document).split("\n"))) <= 100 and Page(render(document)).open == []


# ---- layers --------------------------------------------------------------------------------------
def test_members_are_layers_with_class_and_source_line(mine):
    (group,) = mine["groups"]
    made, read = group["layers"]
    assert (made["role"], made["name"], made["module_class"]) == ("producer", "up", "Linear")
    assert made["op"] == "MatMul", "the weight's Transpose and the bias's Add belong to the product"
    assert made["parameters"] == [
        {"initializer": "up.weight", "axis": 0},
        {"initializer": "up.bias", "axis": 0},
    ]
    assert (read["role"], read["name"]) == ("consumer", "down")
    assert read["parameters"] == [{"initializer": "down.weight", "axis": 1}]
    line = re.fullmatch(r"test_inspect\.py:(\d+)", made["location"])
    source = open(__file__, encoding="utf-8").readlines()  # noqa: SIM115
    assert line and "self.up(x)" in source[int(line[1]) - 1]


def test_a_layer_says_what_becomes_of_each_of_its_axes(mine):
    layers = {layer["name"]: layer for layer in mine["layers"]}
    assert list(layers) == ["up", "down", "norm"]
    axes = {(a["parameter"], a["axis"]): a for a in layers["down"]["axes"]}
    assert axes["down.weight", 1]["groups"] == ["up"] and not axes["down.weight", 1]["reason"]
    stuck = axes["down.weight", 0]
    assert stuck["groups"] == [] and stuck["reason"] and "test_inspect.py" in stuck["source"]
    assert axes["down.bias", 0]["reason"] == stuck["reason"]
    assert "graph input" in next(a for a in layers["up"]["axes"] if a["axis"] == 1)["reason"]
    assert sum(layer["macs_share"] for layer in layers.values()) == pytest.approx(1.0, abs=1e-5)


def test_a_shared_parameter_is_a_member_through_both_layers():
    program = program_from_nodes(
        [
            node("Conv", ["x", "w"], ["a"], "one"),
            node("Conv", ["x", "w"], ["b"], "two"),
            node("Add", ["a", "b"], ["s"]),
            node("Conv", ["s", "v"], ["y"], "out"),
        ],
        {"x": ["N", 3, 4, 4]},
        ["y"],
        {"w": weight(6, 3, 1, 1), "v": weight(2, 6, 1, 1)},
    )
    (group,) = inspect_program(program)["groups"]
    assert [(layer["role"], layer["name"]) for layer in group["layers"]] == [
        ("producer", "one"), ("producer", "two"), ("consumer", "out"),
    ]  # fmt: skip
    assert group["saving"]["parameters"] == 3 * 3 + 2 * 3


# ---- blocked -------------------------------------------------------------------------------------
def test_equal_reasons_become_one_with_all_their_values():
    document = inspect_program(many(40))
    assert len(document["blocked"]) == 40
    (reason,) = document["reasons"]
    assert reason["op"] == "TopK" and "TopK" in reason["reason"]
    assert len(reason["nodes"]) == 40 and [v["value"] for v in reason["values"]] == [
        f"w{i}" for i in range(40)
    ]
    assert {(v["axis"], v["channels"]) for v in reason["values"]} == {(1, 5)}
    text = describe(document)
    assert "40 blocked values, 1 reason" in text and "and 39 more nodes" in text
    assert "w5 axis 1, 5 channels" in text and "w6" not in text and "… and 34 more (--all shows them)" in text
    assert "w39 axis 1" in describe(document, everything=True)


def test_every_blocked_axis_is_under_a_reason_with_operator_and_line(mine):
    for document in (mine, inspect_program(captured("vit")), inspect_program(chain())):
        listed = [(v["value"], v["axis"]) for r in document["reasons"] for v in r["values"]]
        assert sorted(listed) == sorted((b["value"], b["axis"]) for b in document["blocked"])
        assert all(set(b) == {"value", "axis", "reason", "source"} for b in document["blocked"])
    (reason,) = mine["reasons"]
    assert (reason["op"], reason["module"], reason["module_class"]) == (
        "LayerNormalization",
        "norm",
        "LayerNorm",
    )
    assert reason["location"].startswith("test_inspect.py:") and reason["approximate"] == []
    vit = inspect_program(captured("vit"))
    assert vit["reasons"][0]["approximate"] == [vit["approximate"][0]["name"]]
    assert [len(r["values"]) for r in vit["reasons"]] == sorted(len(r["values"]) for r in vit["reasons"])[
        ::-1
    ]


def test_an_operator_without_a_rule_blocks_what_it_touches_and_nothing_else():
    program = program_from_nodes(
        [
            node("MatMul", ["x", "w0"], ["h0"], "free"),
            node("Relu", ["h0"], ["r0"]),
            node("MatMul", ["r0", "w1"], ["h"], "before"),
            node("ReverseSequence", ["h", "lengths"], ["s"], "back", time_axis=0, batch_axis=1),
            node("MatMul", ["s", "w2"], ["y"], "after"),
        ],
        {"x": [3, 2, 4]},
        ["y"],
        {
            "w0": weight(4, 8), "w1": weight(8, 6), "w2": weight(6, 2), "lengths": np.array([3, 2]),
        },
    )  # fmt: skip
    document = inspect_program(program)
    assert [group["name"] for group in document["groups"]] == ["w0"]
    reason = next(r for r in document["reasons"] if r["op"] == "ReverseSequence")
    assert reason["values"] == [{"value": "w1", "axis": 1, "channels": 6}] and reason["nodes"] == ["back"]
    text = describe(inspect_program(program, layers=["before"]))
    assert "before (MatMul)" in text and "stays: operator 'ReverseSequence' has no" in text


def test_keep_is_a_reason_without_an_operator():
    document = inspect_program(chain(), keep=["first.weight"])
    reason = next(r for r in document["reasons"] if "--keep" in r["reason"])
    assert (reason["op"], reason["nodes"]) == ("", [])
    assert "protected by --keep 'first.weight'\n└─ first.weight axis 0, 8 channels" in describe(document)


# ---- one layer -----------------------------------------------------------------------------------
def test_a_layer_is_found_by_name_beginning_glob_or_group():
    program = captured("resnet")
    whole = inspect_program(program)
    one = inspect_program(program, layers=["layer1.0.conv1"])
    assert [layer["name"] for layer in one["layers"]] == ["layer1.0.conv1"]
    assert 0 < len(one["groups"]) < len(whole["groups"]) and one["macs"] == whole["macs"]
    assert all(any(m["initializer"] == "layer1.0.conv1.weight" for m in g["members"]) for g in one["groups"])
    assert one["blocked"] == [] and len(one["blocks"]) == 1
    below = inspect_program(program, layers=["layer1.0"])
    assert {layer["name"].rpartition(".")[0] for layer in below["layers"]} >= {"layer1.0"}
    near = inspect_program(chain(("first", "firstly", "last")), layers=["first"])
    assert [layer["name"] for layer in near["layers"]] == ["first"]
    globbed = inspect_program(program, layers=["layer?.0.conv1"])
    assert len(globbed["layers"]) > 1
    assert inspect_program(program, layers=[whole["groups"][0]["name"]])["groups"]
    with pytest.raises(UsageError, match="'nosuch' matches no layer"):
        inspect_program(program, layers=["layer1.0", "nosuch"])


def test_why_can_this_layer_not_be_pruned():
    text = describe(inspect_program(chain(), layers=["last"]))
    assert "axis 0 of weight: stays: reaches the graph output 'y', found at 'last' (Conv)" in text
    assert "axis 1 of weight: reads group second" in text
    assert "first" not in text.split("1 layer")[1].split("1 channel group")[0]


# ---- the tree ------------------------------------------------------------------------------------
def test_the_tree_shows_members_and_savings_in_order():
    text = describe(inspect_program(chain()))
    assert text.index("  first\n├─ made by    first (Conv): axis 0 of weight") < text.index("  second\n")
    assert "└─ read by    last (Conv): axis 1 of weight" in text
    assert "made by    second (Conv): axis 0 of weight, bias" in text
    document = inspect_program(captured("densenet"))
    order = sorted(document["groups"], key=lambda group: -group["saving"]["macs"])
    assert [g["name"] for g in document["groups"]] != [g["name"] for g in order], (
        "else the order shows nothing"
    )
    page, tree = render(document), describe(document, everything=True)
    for listing, mark in ((tree, "  {}\n├─ made by"), (page, "<span><code>{}</code><svg")):
        places = [listing.index(mark.format(group["name"])) for group in order]
        assert places == sorted(places)
    document = inspect_program(chain())
    savings = [group["saving"]["macs_share"] for group in document["groups"]]
    assert f"{100 * max(savings):.1f} %" in text and "half of a group's units" in text


@pytest.mark.parametrize("width", [80, 100, 120])
@pytest.mark.parametrize("family", ["resnet", "densenet", "vit"])
def test_lines_fit_the_width(family, width):
    text = describe(inspect_program(captured(family)), width)
    assert max(columns(line) for line in text.split("\n")) <= width
    assert all(line == line.rstrip() for line in text.split("\n"))


def test_what_is_left_out_is_counted_and_shown_by_all():
    document = inspect_program(chain())
    group = document["groups"][0]
    document["groups"] = [{**group, "name": f"g{i}"} for i in range(45)]
    document["blocks"] = [
        {"name": f"b{i}", "macs_share": 0.1, "removable": True, "reason": "", "nodes": []} for i in range(50)
    ]
    short, long = describe(document), describe(document, everything=True)
    assert "g27" in short and "g28" not in short and "… and 17 more (--all shows them)" in short
    assert "b19" in short and "b20" not in short and "… and 30 more (--all shows them)" in short
    assert "g44" in long and "b49" in long and "--all" not in long
    assert long.count("made by") == 45 > short.count("made by") == 8


def test_names_cannot_steer_the_terminal(tmp_path):
    text = describe(inspect_program(chain(EVIL, output="y\x07")), everything=True)
    assert all(c == "\n" or c.isprintable() for c in text)
    assert r"two\nlines\x1b[31m" in text and r"Ünïcode\u202e中文" in text and r"y\x07" in text
    assert visible("a\tb") == r"a\tb" and columns("中é") == 4 - 1


# ---- the page ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "make",
    [lambda: chain(EVIL), lambda: captured("vit"), lambda: many(40), shuffled],
    ids=["evil", "vit", "many", "shuffled"],
)
def test_the_page_is_well_formed_self_contained_and_escaped(make, tmp_path):
    document = inspect_program(make())
    document["source"]["name"] = "<b>&\"'</b>.onnx"
    page = Page(write_inspection(document, tmp_path / "page.html").read_text(encoding="utf-8"))
    assert page.open == []
    assert not {"script", "link", "img", "iframe", "form", "base"} & set(page.tags)
    names = {name for name, _ in page.attributes}
    assert not {"src", "onload", "onclick", "action"} & names and not any(n.startswith("on") for n in names)
    links = [value for name, value in page.attributes if name == "href"]
    anchors = [value for name, value in page.attributes if name == "id"]
    assert (
        bool(links) == bool(document["groups"])
        and len(anchors) == len(set(anchors))
        and {link[1:] for link in links} <= set(anchors)
    )
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes
    assert "url(" not in "".join(page.texts) and "@import" not in "".join(page.texts)
    assert "<b>&\"'</b>.onnx" in page.texts
    assert all(c == "\n" or c.isprintable() for c in "".join(page.texts))


def test_the_page_has_every_group_reason_block_and_layer():
    document = inspect_program(captured("vit"))
    texts = Page(render(document)).texts
    for item in (*document["groups"], *document["approximate"], *document["layers"], *document["blocks"]):
        assert item["name"] in texts
    for reason in document["reasons"]:
        assert reason["reason"] in texts and all(value["value"] in texts for value in reason["values"])
    evil = Page(render(inspect_program(chain(EVIL)))).texts
    assert "<script>alert(1)</script>" in evil and r"two\nlines\x1b[31m" in evil


# ---- the command ---------------------------------------------------------------------------------
@pytest.fixture
def model(tmp_path):
    path = tmp_path / "net.onnx"
    onnx.save(chain(EVIL).to_proto(), path)
    return path


def run(capsys, *arguments):
    code = main(["inspect", *map(str, arguments)])
    captured_output = capsys.readouterr()
    return code, captured_output.out, captured_output.err


def test_command_writes_the_page_and_says_so(model, tmp_path, capsys):
    page = tmp_path / "new" / "page.html"
    code, out, _ = run(capsys, model, "--html", page)
    assert code == 0 and out.rstrip().endswith(f"wrote {page}")
    first = page.read_bytes()
    code, out, _ = run(capsys, model, "--html", page, "--json")
    document = json.loads(out)
    assert code == 0 and document["source"]["name"] == "net.onnx" and page.read_bytes() == first
    assert [(f["file"], f["bytes"]) for f in document["files"]] == [("page.html", len(first))]
    assert [p.name for p in page.parent.iterdir()] == ["page.html"], "nothing temporary stays"
    assert b"net.onnx" in first and str(tmp_path).encode() not in first, "no folder of this machine"
    code, out, _ = run(capsys, model, "--layer", EVIL[2], "--json")
    assert [layer["name"] for layer in json.loads(out)["layers"]] == [EVIL[2]]


def test_command_does_not_replace_the_model_or_a_folder(model, tmp_path, capsys):
    before = model.read_bytes()
    other = tmp_path / "link.onnx"
    other.symlink_to(model)
    for path in (model, other):
        code, _, err = run(capsys, model, "--html", path)
        assert code == 2 and "the file of the model" in err
    code, _, err = run(capsys, model, "--html", tmp_path)
    assert code == 2 and "is a folder" in err and model.read_bytes() == before
    code, _, err = run(capsys, model, "--layer", "nosuch", "--html", tmp_path / "page.html")
    assert code == 2 and "'nosuch'" in err and not (tmp_path / "page.html").exists()
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    code, _, err = run(capsys, tmp_path / "bad.onnx", "--html", tmp_path / "page.html")
    assert code == 2 and not (tmp_path / "page.html").exists()
    module = tmp_path / "net.py"
    module.write_text("import torch\ndef make():\n    return torch.nn.Linear(3, 4), torch.zeros(1, 3)\n")
    code, _, err = run(capsys, f"{module}:make", "--html", module)
    assert code == 2 and "the file of the model" in err and "torch" in module.read_text()
