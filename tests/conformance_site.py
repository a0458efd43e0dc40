"""The sample package, installed by pip into a folder of its own, with the wrong backends beside it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import null_backend

from sartor import backends

ROOT = Path(__file__).parents[1]


@contextlib.contextmanager
def installed(root: Path) -> Iterator[Path]:
    """Install below `root`; inside the block the backends are registered in this process."""
    source = shutil.copytree(ROOT / "examples" / "backend_plugin", root / "source")
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    command = [sys.executable, "-m", "pip", "install", *options, "--target", root / "site", source]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    sys.path.insert(0, str(root / "site"))
    import conformance_wrong
    import conformance_wrong_narrow
    from conformance_disguise import ENTRIES

    assert conformance_wrong and conformance_wrong_narrow  # each enters what it defines
    entries = {name: f"{found.__module__}:{found.__name__}" for name, found in ENTRIES.items()}
    null_backend.install(root / "site", entries, "wrongvendor")
    backends.REGISTRY.refresh()
    yield root / "site"
    sys.path.remove(str(root / "site"))
    backends.REGISTRY.refresh()


def environment(site: Path) -> dict[str, str]:
    """For a process that is to find them, too."""
    places = (site, ROOT, ROOT / "tests")
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, places)), "CI": "1", "OMP_NUM_THREADS": "1"}
