"""Engines on a GPU: the session's own steps on a stand-in driver and runtime, and the whole of it on hardware.

The tests marked `gpu` need an NVIDIA GPU that the installed flavour supports; elsewhere they are skipped with the
reason. They had never been run when they were written: there was no GPU.
"""

from __future__ import annotations

import ctypes
import enum
import importlib.machinery
import importlib.util
import sys
import types

import numpy as np
import pytest
from backend_programs import small_cnn
from builders import node, program_from_nodes, random_inputs, relative_error, run_reference

from sartor.backends import measure as measuring
from sartor.backends.artifact import write_artifact
from sartor.backends.protocol import TargetOptions
from sartor.backends.tensorrt import Settings, TensorRTBackend, builder, cuda
from sartor.backends.tensorrt.measure import Layers
from sartor.backends.tensorrt.settings import TimingCache
from sartor.errors import BackendError, UsageError

CAPABILITY = "8.6"


# ---- a driver whose GPU memory is this process's -----------------------------------------------------
class Driver:
    """What `cuda` calls of the driver library, with one GPU of a given compute capability."""

    def __init__(self, capability=CAPABILITY, fail=""):
        self.capability = tuple(int(part) for part in capability.split("."))
        self.fail = fail
        self.memory = {}
        self.depth = 0
        self.calls = []

    def __getattr__(self, name):
        step = getattr(type(self), f"do_{name}", lambda *_: 0)

        def call(*arguments):
            self.calls.append(name)
            return 2 if name == self.fail else step(self, *arguments) or 0

        return call

    def do_cuGetErrorString(self, code, out):
        out._obj.value = b"out of memory"

    def do_cuDeviceGetCount(self, out):
        out._obj.value = 1

    def do_cuDeviceGetName(self, buffer, size, device):
        buffer.value = b"Stand-in"

    def do_cuDeviceGetAttribute(self, out, attribute, device):
        out._obj.value = self.capability[{75: 0, 76: 1}[attribute]]

    def do_cuDevicePrimaryCtxRetain(self, out, device):
        out._obj.value = 7

    def do_cuCtxPushCurrent_v2(self, context):
        assert context.value == 7
        self.depth += 1

    def do_cuCtxPopCurrent_v2(self, out):
        self.depth -= 1

    def do_cuMemAlloc_v2(self, out, size):
        assert self.depth == 1  # a context is current
        buffer = ctypes.create_string_buffer(size.value)
        self.memory[ctypes.addressof(buffer)] = buffer
        out._obj.value = ctypes.addressof(buffer)

    def do_cuMemFree_v2(self, address):
        del self.memory[address.value]

    def do_cuMemcpyHtoD_v2(self, address, source, size):
        assert size.value <= len(self.memory[address.value])
        ctypes.memmove(address.value, source.value, size.value)

    def do_cuMemcpyDtoH_v2(self, target, address, size):
        assert size.value <= len(self.memory[address.value])
        ctypes.memmove(target.value, address.value, size.value)


class Mode(enum.Enum):
    INPUT = 0
    OUTPUT = 1


class Engine:
    """y = 2 x, float32 [2, 3]; also its own execution context."""

    num_io_tensors = 2
    profiler = None

    def __init__(self):
        self.address = {}
        self.runs = 0

    def create_execution_context(self):
        return self

    def get_tensor_name(self, index):
        return "xy"[index]

    def get_tensor_dtype(self, name):
        return "float32"

    def get_tensor_shape(self, name):
        return (2, 3)

    def get_tensor_mode(self, name):
        return Mode.INPUT if name == "x" else Mode.OUTPUT

    def set_tensor_address(self, name, address):
        self.address[name] = address
        return True

    def execute_async_v3(self, stream):
        x, y = (
            np.ctypeslib.as_array((ctypes.c_float * 6).from_address(self.address[name]))
            for name in ("x", "y")
        )
        y[:] = 2 * x
        self.runs += 1
        if self.profiler is not None:
            self.profiler.report_layer_time("double + half", 0.25)
        return True


class Vendor:
    """A flavour without a vendor."""

    version = "stand-in 1"

    def __init__(self, flavour):
        self.flavour = flavour
        self.logger = None
        self.module = types.SimpleNamespace(
            TensorIOMode=Mode,
            nptype=lambda dtype: dtype,
            IProfiler=object,
            Runtime=lambda logger: types.SimpleNamespace(
                deserialize_cuda_engine=lambda data: Engine() if data == b"engine" else None
            ),
        )

    def failed(self, what):
        return BackendError(f"could not {what}")


@pytest.fixture
def driver(monkeypatch):
    made = Driver()
    monkeypatch.setattr(cuda.ctypes, "CDLL", lambda name: made)
    monkeypatch.setattr(builder, "Vendor", Vendor)
    return made


def artifact(folder, capabilities=(CAPABILITY,), runtime="stand-in 1", content=b"engine"):
    nodes = [node("Identity", ["x"], ["h"], "half"), node("Add", ["h", "h"], ["y"], "double")]
    program = program_from_nodes(nodes, {"x": (2, 3)}, ["y"])
    record = '{"nodes": [{"node": "half", "op_type": "Identity", "layers": ["half"]}, '
    record += '{"node": "double", "op_type": "Add", "layers": ["double"]}], "fused": {}}'

    def write(temporary):
        engines = [{"compute_capability": c, "file": f"{c}.engine"} for c in capabilities]
        for engine in engines:
            (temporary / engine["file"]).write_bytes(content)
        (temporary / "layers.json").write_text(record)
        files = (*(engine["file"] for engine in engines), "layers.json")
        return files, {"engines": engines, "flavour": "tensorrt_rtx", "runtime": runtime}

    return write_artifact(program, folder, TargetOptions(), target="tensorrt", write=write)


X = np.arange(6, dtype=np.float32).reshape(2, 3)


def test_a_session_copies_runs_and_copies_back(driver, tmp_path):
    session = TensorRTBackend().load(artifact(tmp_path / "a"), TargetOptions())
    first = session.run({"x": np.asfortranarray(X)})
    second = session.run({"x": -X})
    assert first["y"].tolist() == (2 * X).tolist() and second["y"].tolist() == (-2 * X).tolist()
    assert session.settings["compute_capability"] == CAPABILITY and session.settings["device"] == "Stand-in"
    assert "cuStreamSynchronize" in driver.calls and driver.depth == 0


def test_a_prepared_run_is_inference_alone(driver, tmp_path):
    session = TensorRTBackend().load(artifact(tmp_path / "a"), TargetOptions())
    once = session.prepare({"x": X})
    driver.calls.clear()
    once()
    assert not [name for name in driver.calls if "Memcpy" in name]
    assert driver.calls.count("cuStreamSynchronize") == 1 and session.engine.runs == 1


def test_memory_is_given_back(driver, tmp_path):
    session = TensorRTBackend().load(artifact(tmp_path / "a"), TargetOptions())
    assert len(driver.memory) == 2
    del session
    assert not driver.memory and driver.calls[-1] == "cuDevicePrimaryCtxRelease_v2"


@pytest.mark.parametrize(
    "feeds", [{}, {"z": X}, {"x": X.astype(np.float64)}, {"x": X[:1]}], ids=["none", "name", "type", "shape"]
)
def test_wrong_inputs_are_refused(driver, tmp_path, feeds):
    session = TensorRTBackend().load(artifact(tmp_path / "a"), TargetOptions())
    for call in (session.run, session.prepare):
        with pytest.raises(UsageError):
            call(feeds)
    with pytest.raises(UsageError, match="cannot have shape"):
        TensorRTBackend().load(artifact(tmp_path / "a"), TargetOptions(shapes={"x": (1, 3)}))


def test_the_engine_that_fits_the_gpu_is_taken(driver, tmp_path):
    driver.capability = (8, 9)
    found = TensorRTBackend().load(artifact(tmp_path / "a", ("8.6", "8.9")), TargetOptions())
    assert found.settings["compute_capability"] == "8.9"
    with pytest.raises(BackendError, match=r"compute capability 8\.6; the GPUs .* 'Stand-in' \(8\.9\)"):
        TensorRTBackend().load(artifact(tmp_path / "b"), TargetOptions())


def test_an_engine_of_another_version_or_broken_is_refused(driver, tmp_path):
    with pytest.raises(BackendError, match="The engines are of 'older 1', and 'stand-in 1' is installed"):
        TensorRTBackend().load(artifact(tmp_path / "a", runtime="older 1"), TargetOptions())
    with pytest.raises(BackendError, match="could not load the engine on 'Stand-in'"):
        TensorRTBackend().load(artifact(tmp_path / "b", content=b"damaged"), TargetOptions())


def test_errors_of_the_driver_are_named(driver, tmp_path):
    driver.fail = "cuMemAlloc_v2"
    with pytest.raises(BackendError, match="failed in 'cuMemAlloc_v2' with code 2: out of memory"):
        TensorRTBackend().load(artifact(tmp_path / "a"), TargetOptions())
    assert driver.depth == 0


def test_no_driver_is_a_reason(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: no such file")

    monkeypatch.setattr(cuda.ctypes, "CDLL", missing)
    assert "no such file. Run the artifact on a machine with such a GPU." in cuda.why_not(())


def test_a_profile_names_the_nodes(driver, tmp_path):
    kernels = TensorRTBackend().profile(artifact(tmp_path / "a"), TargetOptions(), 5)
    assert [(k.name, k.nodes, k.op_type, k.runs) for k in kernels] == [
        ("double + half", ("half", "double"), "Identity+Add", 5)
    ]
    assert kernels[0].median_s == pytest.approx(0.25e-3)


def test_nodes_behind_fused_layers():
    names = ["conv0", "relu0", "conv1", "add"]
    entries = [{"node": n, "op_type": n[:-1], "layers": [n, f"{n}_1"]} for n in names]
    whole = {"{ForeignNode[relu0...tmp]}": ["conv1", "relu0", "gone"]}
    layers = Layers({"nodes": entries, "fused": whole})
    assert layers.nodes("conv0 + relu0") == ("conv0", "relu0")
    assert layers.nodes("relu0_1 + conv0") == ("conv0", "relu0")
    assert layers.nodes("{ForeignNode[relu0...tmp]} + add") == ("relu0", "conv1", "add")
    assert layers.op_type("conv0 + relu0") == "conv+relu"
    assert layers.nodes("Reformatting CopyNode for Input Tensor 0") == ()


# ---- the standard flavour ----------------------------------------------------------------------------
class Cache:
    def __init__(self, content):
        self.content = content or b"empty"

    def serialize(self):
        return self.content + b"+timed"


class Config:
    """A builder's settings; those that nobody asks about are taken as they are."""

    def clear_flag(self, flag):
        self.cleared = flag

    def create_timing_cache(self, content):
        return Cache(content)

    def set_timing_cache(self, cache, ignore_mismatch):
        assert not ignore_mismatch
        self.cache = cache


@pytest.fixture
def standard(monkeypatch):
    """A module `tensorrt` that parses everything and builds the text `engine`."""
    network = types.SimpleNamespace(num_layers=0)
    made = types.ModuleType("tensorrt")
    made.__version__ = "11.0"
    made.ILogger = object
    made.init_libnvinfer_plugins = lambda logger, namespace: True
    made.BuilderFlag = types.SimpleNamespace(TF32="tf32")
    made.ProfilingVerbosity = types.SimpleNamespace(DETAILED="detailed")
    made.NetworkDefinitionCreationFlag = types.SimpleNamespace(STRONGLY_TYPED=1)
    made.OnnxParser = lambda network, logger: types.SimpleNamespace(
        parse_from_file=lambda path: True, num_errors=0
    )
    made.configs = []

    def create():
        made.configs.append(Config())
        return made.configs[-1]

    made.Builder = lambda logger: types.SimpleNamespace(
        create_network=lambda flags: network,
        create_builder_config=create,
        build_serialized_network=lambda network, config: b"engine",
    )
    monkeypatch.setitem(sys.modules, "tensorrt", made)
    monkeypatch.setattr(cuda.ctypes, "CDLL", lambda name: Driver())
    return made


def test_the_standard_flavour_builds_for_the_gpu_and_pins_its_timing_cache(standard, tmp_path):
    first = TensorRTBackend(Settings(flavour="tensorrt")).lower(small_cnn(8), tmp_path / "a", TargetOptions())
    assert first.files == ("model.sm86.engine", "model.onnx", "layers.json", "timing.cache")
    assert first.metadata["timing_cache"] == {"started_from": "", "sha256": first.sha256["timing.cache"]}
    assert first.metadata["runtime"] == "tensorrt 11.0" and first.metadata["executed"] is False
    assert standard.configs[-1].cleared == "tf32"
    pinned = TimingCache(tmp_path / "a" / "timing.cache", first.sha256["timing.cache"])
    again = TensorRTBackend(Settings(flavour="tensorrt", timing_cache=pinned))
    second = again.lower(small_cnn(8), tmp_path / "b", TargetOptions())
    assert second.metadata["timing_cache"]["started_from"] == first.sha256["timing.cache"]
    assert (tmp_path / "b" / "timing.cache").read_bytes() == b"empty+timed+timed"
    pinned.path.write_bytes(b"another")
    with pytest.raises(UsageError, match="is not the pinned one"):
        again.lower(small_cnn(8), tmp_path / "c", TargetOptions())
    assert not (tmp_path / "c").exists()


def test_the_standard_flavour_is_used_where_it_is_installed(standard, monkeypatch):
    standard.__spec__ = importlib.machinery.ModuleSpec("tensorrt", None)
    assert Settings().chosen().module == "tensorrt"
    monkeypatch.delitem(sys.modules, "tensorrt")
    if importlib.util.find_spec("tensorrt") is None:
        assert Settings().chosen().module == "tensorrt_rtx"


# ---- hardware ----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory):
    """Backend, program and artifact for the GPU of this machine."""
    pytest.importorskip(Settings().chosen().module)
    try:
        gpu = cuda.fitting(Settings().chosen().compute_capabilities)
    except BackendError as reason:
        pytest.skip(str(reason))
    ahead = Settings().chosen().ahead_of_time
    chosen = Settings(compute_capabilities=(gpu.compute_capability,)) if ahead else Settings()
    backend, program = TensorRTBackend(chosen), small_cnn()
    folder = tmp_path_factory.mktemp("gpu") / "artifact"
    return backend, program, backend.lower(program, folder, TargetOptions())


@pytest.mark.gpu
def test_on_hardware_the_engine_computes_what_the_reference_computes(on_gpu):
    backend, program, artifact = on_gpu
    session = backend.load(artifact, TargetOptions())
    for seed in range(3):
        feeds = random_inputs(program, seed)
        assert relative_error(run_reference(program, feeds), session.run(feeds)) < 1e-5
    compiled = backend.compile(program.to_bytes(), TargetOptions(shapes={"x": (1, 3, 16, 16)}))
    assert relative_error(run_reference(program, feeds), compiled.run(feeds)) < 1e-5


@pytest.mark.gpu
def test_on_hardware_a_profile_covers_the_convolutions(on_gpu):
    backend, _, artifact = on_gpu
    named = {name for kernel in backend.profile(artifact, TargetOptions(), 5) for name in kernel.nodes}
    assert {"conv0", "conv1", "linear"} <= named


@pytest.mark.gpu
def test_on_hardware_it_is_measured(on_gpu):
    _, _, artifact = on_gpu
    found = measuring.measure("tensorrt", [artifact], min_rounds=6, max_rounds=6, visit_s=0.01)
    assert found.latencies[0].median > 0
