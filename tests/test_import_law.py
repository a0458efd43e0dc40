"""Who may import whom, read from the source text; and what `import sartor` must not pull in."""

from __future__ import annotations

import ast
import dataclasses
import fnmatch
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sartor"

# Internal modules that each layer sees; a prefix covers what lies below it.
SEES = {
    "sartor.errors": (),
    "sartor.plugins": ("sartor.errors",),
    "sartor.ir": ("sartor.ir", "sartor.errors"),
    "sartor.passes": (
        "sartor.passes",
        "sartor.ir",
        "sartor.errors",
        "sartor.plugins",
        "sartor.cost_models.protocol",
        "sartor.versions",
    ),
    "sartor.cost_models": ("sartor.cost_models", "sartor.ir", "sartor.errors", "sartor.plugins"),
    "sartor.backends": ("sartor.backends", "sartor.ir", "sartor.errors", "sartor.plugins"),
}
HEAVY = (
    "torch",
    "torchvision",
    "onnxruntime",
    "openvino",
    "sklearn",
    "tensorrt_rtx",
    "ai_edge_litert",
    "nncf",
    "lightgbm",
    "tensorly",
)
# Modules that exist to hold torch code, and are themselves imported inside functions only.
HEAVY_AT_TOP = (
    *("sartor.ir.fx*", "sartor.ir.capture*", "sartor.ir.torch_ops*", "sartor.recovery*"),
    *("sartor.writeback*", "sartor.backends.tflite.modules"),
)
NEVER_TORCH = ("sartor.runtime*",)  # ships to the target


@dataclasses.dataclass(frozen=True)
class Import:
    """One import statement: the module that has it, what it imports, and where it stands."""

    module: str
    target: str
    line: int
    at_top: bool
    typing_only: bool

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.target}"


def imports_of(source: str, module: str, is_package: bool = False) -> Iterator[Import]:
    """Every import of one module's source, relative ones resolved."""

    def visit(nodes: list[ast.stmt], at_top: bool, typing_only: bool) -> Iterator[Import]:
        for item in nodes:
            if isinstance(item, ast.Import):
                for alias in item.names:
                    yield Import(module, alias.name, item.lineno, at_top, typing_only)
            elif isinstance(item, ast.ImportFrom):
                base = item.module or ""
                if item.level:
                    parts = module.split(".") if is_package else module.split(".")[:-1]
                    parts = parts[: len(parts) - item.level + 1]
                    base = ".".join([*parts, *([item.module] if item.module else [])])
                for alias in item.names:
                    yield Import(module, f"{base}.{alias.name}", item.lineno, at_top, typing_only)
            inside = at_top and not isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef))
            guard = isinstance(item, ast.If) and "TYPE_CHECKING" in ast.dump(item.test)
            for field in ("body", "orelse", "finalbody", "handlers", "cases"):
                children = getattr(item, field, [])
                if isinstance(children, list):
                    statements = [
                        c for c in children if isinstance(c, (ast.stmt, ast.excepthandler, ast.match_case))
                    ]
                    yield from visit(statements, inside, typing_only or (guard and field == "body"))  # type: ignore[arg-type]

    yield from visit(ast.parse(source).body, True, False)


def all_imports() -> list[Import]:
    found: list[Import] = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ["sartor", *path.relative_to(PACKAGE).with_suffix("").parts]
        is_package = parts[-1] == "__init__"
        module = ".".join(parts[:-1] if is_package else parts)
        found.extend(imports_of(path.read_text(encoding="utf-8"), module, is_package))
    return found


def under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def layer_violations(imports: list[Import]) -> list[str]:
    """Imports of sartor's own modules that the importing layer must not see."""
    broken = []
    for item in imports:
        layer = next((layer for layer in SEES if under(item.module, layer)), None)
        if layer is None or not under(item.target, "sartor"):
            continue
        if not any(under(item.target, allowed) for allowed in SEES[layer]):
            broken.append(f"{item}; {layer} sees only {', '.join(SEES[layer]) or 'nothing of ours'}")
    return broken


def heavy_violations(imports: list[Import]) -> list[str]:
    """Vendor packages imported when a module loads, where they must wait for a call."""
    broken = []
    for item in imports:
        root = item.target.split(".")[0]
        if root not in HEAVY or item.typing_only:
            continue
        if root == "torch" and any(fnmatch.fnmatch(item.module, p) for p in NEVER_TORCH):
            broken.append(f"{item}; what ships never needs torch")
        elif item.at_top and not (
            root == "torch" and any(fnmatch.fnmatch(item.module, p) for p in HEAVY_AT_TOP)
        ):
            broken.append(f"{item} at module top; import it inside the function that needs it")
    return broken


def test_layers():
    assert layer_violations(all_imports()) == []


def test_heavy_imports():
    assert heavy_violations(all_imports()) == []


def test_the_checker_reads_the_whole_package():
    modules = {item.module for item in all_imports()}
    assert {"sartor.ir.program", "sartor.passes.base", "sartor.plugins"} <= modules and len(modules) > 20


class TestPlanted:
    """A law that nothing can break is not a law."""

    def check(self, source, module, is_package=False):
        found = list(imports_of(source, module, is_package))
        return layer_violations(found) + heavy_violations(found)

    @pytest.mark.parametrize(
        ("module", "source", "message"),
        [
            ("sartor.ir.x", "from sartor.passes import base", "sartor.ir sees only"),
            ("sartor.ir.x", "def f():\n    import sartor.backends.openvino", "x:2 imports sartor.backends"),
            ("sartor.ir.x", "import sartor.plugins", "sartor.ir sees only sartor.ir, sartor.errors"),
            ("sartor.ir.x", "from ..passes.base import Pass", "imports sartor.passes.base.Pass"),
            (
                "sartor.ir.x",
                "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import sartor.fit",
                "sartor.fit",
            ),
            ("sartor.ir.x", "from sartor import backends", "imports sartor.backends"),
            ("sartor.passes.x", "from sartor.cost_models.static import static_cost", "sartor.passes sees"),
            ("sartor.cost_models.x", "from sartor.backends import get", "sartor.cost_models sees"),
            ("sartor.backends.x.y", "import sartor.cost_models.protocol", "sartor.backends sees"),
            ("sartor.backends.x", "import sartor", "sartor.backends sees"),
            ("sartor.plugins", "import sartor.ir", "sartor.plugins sees only sartor.errors"),
            ("sartor.errors", "import sartor.plugins", "nothing of ours"),
            ("sartor.fit", "import torch", "at module top"),
            ("sartor.fit", "from torch import nn", "at module top"),
            (
                "sartor.fit",
                "try:\n    import openvino as ov\nexcept ImportError:\n    ov = None",
                "at module top",
            ),
            ("sartor.fit", "class A:\n    import sklearn", "at module top"),
            ("sartor.fit", "if True:\n    pass\nelse:\n    import onnxruntime", "at module top"),
            ("sartor.ir.program", "import torch", "at module top"),
            ("sartor.ir.fx", "import onnxruntime", "at module top"),
            ("sartor.runtime.x", "def f():\n    import torch", "what ships never needs torch"),
        ],
    )
    def test_broken(self, module, source, message):
        violations = self.check(source, module)
        assert len(violations) == 1 and message in violations[0]

    @pytest.mark.parametrize(
        ("module", "source"),
        [
            ("sartor.passes.x", "from sartor.cost_models.protocol import CostModel"),
            ("sartor.passes.x", "from . import base\nfrom .base import Pass"),
            ("sartor.ir.channels", "from .. import program"),
            ("sartor.fit", "import sartor.backends\nimport sartor.passes.pipeline"),
            ("sartor.fit", "def f():\n    import torch"),
            ("sartor.fit", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
            ("sartor.ir.torch_ops.x", "import torch"),
            ("sartor.ir.fx_build", "from torch import fx"),
            ("sartor.fit", "import torchmetrics"),  # a prefix of a name is not the name
        ],
    )
    def test_allowed(self, module, source):
        assert self.check(source, module, is_package=module == "sartor.ir.channels") == []


@pytest.mark.parametrize(
    "statement",
    [
        "import sartor",
        "import sartor.cli",
        "import sartor.passes.pipeline; sartor.passes.pipeline.REGISTRY.names()",
        "import sartor; sartor.Pipeline.parse('fold-batch-norm,remove-dead')",
        "import sartor.ir.program, sartor.ir.plan, sartor.ir.verify, sartor.ir.text",
    ],
)
def test_light_imports(statement):
    code = f"{statement}\nimport sys\nprint(sorted(set(sys.modules) & {set(HEAVY)!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
