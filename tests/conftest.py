"""Fixtures that several files share."""

import functools
import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before anything starts a pool of threads: pools of several processes on the same cores wait for each other, and
    # a training of 0.4 s takes 17.
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, "1")


@pytest.fixture(scope="session", autouse=True)
def sources_of_translations_are_read_once():
    """Every `torch.onnx.export` parses the sources of 500 functions anew, which takes as long as the rest of it."""
    from onnxscript._internal.values import TracedOnnxFunction

    with pytest.MonkeyPatch.context() as patch:
        once = functools.cache(TracedOnnxFunction.function_ir.fget)
        patch.setattr(TracedOnnxFunction, "function_ir", property(once))
        yield


@pytest.fixture(scope="module")
def cache_of_its_own(tmp_path_factory):
    """A cache of conversions for one module, warm between its tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SARTOR_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
