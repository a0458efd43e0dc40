"""What a user gets: versions, exports, import time, and a wheel that works outside the checkout."""

import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import sartor

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def run_python(code, **kwargs):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120, **kwargs
    )


def constraints():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_version_has_one_source():
    assert metadata.version("sartor") == sartor.__version__
    assert f"## {sartor.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_public_api_is_this():
    assert sartor.__all__ == [
        "FitOptions", "Pipeline", "Plan", "Program", "apply_plan", "apply_to_module", "backends", "capture", "fit",
        "load", "to_fx", "__version__",
    ]  # fmt: skip
    with pytest.raises(AttributeError, match="'nothing'"):
        _ = sartor.nothing
    assert sartor.Plan is sartor.ir.plan.Plan and set(sartor.__all__) <= set(dir(sartor))


def test_fit_stays_the_function_when_its_module_is_imported():
    code = (
        "import sartor, sartor.fit, sys\n"
        "print(type(sartor.fit).__name__, type(sys.modules['sartor.fit']).__name__)"
    )
    assert run_python(code).stdout.split() == ["function", "module"]


def test_import_is_lazy():
    code = (
        "import sys, sartor, sartor.cli\n"
        "heavy = {'torch', 'onnx', 'onnx_ir', 'numpy', 'onnxruntime', 'openvino', 'networkx', 'onnxscript'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert run_python(code).stdout.strip() == "[]"


def test_every_pin_matches_what_the_project_asks_for():
    from packaging.requirements import Requirement

    pins = {name.lower().replace("_", "-"): version for name, version in constraints().items()}
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *(r for group in extras.values() for r in group)]
    for requirement in map(Requirement, wanted):
        if requirement.name == "sartor":
            continue
        pin = pins.get(requirement.name.lower().replace("_", "-"))
        assert pin is not None, f"'{requirement.name}' has no pin in constraints.txt"
        assert requirement.specifier.contains(pin), f"'{requirement}' does not allow the pin {pin}"


def test_entry_points_name_what_exists():
    found = {e.name: e.value for e in metadata.entry_points(group="sartor.backends")}
    assert found == PROJECT["project"]["entry-points"]["sartor.backends"]
    assert metadata.entry_points(group="console_scripts")["sartor"].value == "sartor.cli:main"


def test_wheel_holds_the_package_and_works_outside_the_checkout(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for path in (ROOT / "sartor").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            copy = source / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    setuptools = pytest.importorskip("setuptools", reason="setuptools builds the wheel")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip(f"setuptools {setuptools.__version__} is older than the build needs (77)")
    code = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    built = run_python(code, cwd=source)
    assert built.returncode == 0, built.stderr[-2000:]
    wheel = next(source.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    expected = {p.relative_to(ROOT).as_posix() for p in (ROOT / "sartor").rglob("*.py")}
    expected |= {"sartor/py.typed", "sartor/report/page.css"}
    expected |= {p.relative_to(ROOT).as_posix() for p in (ROOT / "sartor").rglob("*.toml")}
    assert expected <= names
    assert not [n for n in names if n.startswith(("tests/", "examples/", "benchmarks/"))]
    code = (
        "import sys; sys.path.insert(0, 'installed')\n"
        "import sartor, sartor.report.page\n"
        "from sartor.cli import main\n"
        "print(sartor.__file__)\n"
        "raise SystemExit(main(['targets', '--json']))"
    )
    used = run_python(code, cwd=tmp_path)
    assert used.returncode == 0, used.stderr[-2000:]
    assert "installed/sartor" in used.stdout and "onnxruntime" in used.stdout
