"""What a backend is: the methods of `Backend` and the plain data that crosses them.

All arguments and results except `Program` and `Session` are plain data with `to_dict`/`from_dict`, so
that any call can run in a subprocess with its own time and memory limits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

from sartor.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from sartor.backends.legality import Rules
    from sartor.ir.program import Program

PRECISIONS = ("f32", "bf16", "f16", "int8")
ARTIFACT_SCHEMA = "sartor.artifact/1"


@dataclasses.dataclass(frozen=True)
class TargetOptions:
    """How a model is to run.

    Attributes:
        threads: compute threads, at least 1.
        precision: one of `PRECISIONS`; always explicit, never the vendor's default.
        shapes: concrete shape per input. Empty: whatever the artifact's contract allows.
        flush_denormals: treat subnormal floats as zero. Only the measuring subprocess sets it: ONNX
            Runtime changes the calling thread's mode for good, which breaks numpy in that process.
    """

    threads: int = 1
    precision: str = "f32"
    shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    flush_denormals: bool = False

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise UsageError(f"'threads' is {self.threads}; it must be at least 1.")
        if self.precision not in PRECISIONS:
            raise UsageError(
                f"Unknown precision '{self.precision}'; choose one of {', '.join(map(repr, PRECISIONS))}."
            )
        shapes = {name: tuple(int(d) for d in shape) for name, shape in self.shapes.items()}
        object.__setattr__(self, "shapes", shapes)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {
            "threads": self.threads,
            "precision": self.precision,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "flush_denormals": self.flush_denormals,
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> TargetOptions:
        """Inverse of `to_dict`."""
        return TargetOptions(**data)


@dataclasses.dataclass(frozen=True)
class Capabilities:
    """What a backend can do on this machine.

    Attributes:
        name: registered name.
        version: version of the vendor runtime.
        precisions: precisions that `TargetOptions` may ask for.
        channel_grid: `(op_type, precision)` → the channel count step that costs time: widths between
            two multiples run (nearly) as long as the upper one. Absent: 1.
        control_flow: `If`, `Loop`, `Scan` run natively.
        max_rank: largest tensor rank.
        notes: what a reader of a measurement should know.
        fuses: operator type → what runs inside its kernel when it follows: operator types, `Bias` for an Add of
            one number per channel, `Add` for one of two activations, `Silu` for x * sigmoid(x), and the rest of
            the vocabulary of `sartor.ir.fusion_rules`.
        not_run_here: why this machine lowers for the target and cannot run it; empty where it can.
    """

    name: str
    version: str
    precisions: tuple[str, ...]
    channel_grid: Mapping[tuple[str, str], int]
    control_flow: bool
    max_rank: int
    notes: tuple[str, ...] = ()
    not_run_here: str = ""
    fuses: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; `channel_grid` becomes `{op_type: {precision: step}}`."""
        grid: dict[str, dict[str, int]] = {}
        for (op_type, precision), step in sorted(self.channel_grid.items()):
            grid.setdefault(op_type, {})[precision] = step
        return {
            "name": self.name,
            "version": self.version,
            "precisions": list(self.precisions),
            "channel_grid": grid,
            "control_flow": self.control_flow,
            "max_rank": self.max_rank,
            "notes": list(self.notes),
            "not_run_here": self.not_run_here,
            "fuses": {op_type: list(names) for op_type, names in sorted(self.fuses.items())},
        }


@dataclasses.dataclass(frozen=True)
class Finding:
    """One legality rule applied to one node (or to the whole model when `node` is empty).

    Attributes:
        node: node name.
        rule: rule id, such as `opset-version`.
        observed: what was found, quoted in messages.
        text: the rule, as a sentence.
        ok: the rule holds.
    """

    node: str
    rule: str
    observed: str
    text: str
    ok: bool

    def __str__(self) -> str:
        subject = f"Node '{self.node}'" if self.node else "The model"
        return f"{subject}: {self.text} Observed: {self.observed}. [{self.rule}]"


@dataclasses.dataclass(frozen=True)
class LegalityReport:
    """Findings of all rules of one backend on one program."""

    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Every rule holds."""
        return all(finding.ok for finding in self.findings)

    @property
    def violations(self) -> tuple[Finding, ...]:
        """The findings that do not hold."""
        return tuple(finding for finding in self.findings if not finding.ok)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {"ok": self.ok, "findings": [dataclasses.asdict(f) for f in self.findings]}


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """Name, numpy dtype name and shape of an input or output; symbolic dimensions are strings."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A lowered model: files in one folder, and what is in them.

    Attributes:
        target: name of the backend that wrote it.
        folder: where the files are; not part of `to_dict`, so that no shipped file names a path.
        files: file names relative to `folder`, the main one first.
        sha256: per file.
        precision: precision the artifact was lowered for.
        inputs: input contract; symbolic dimensions may take any size.
        outputs: output contract.
        shapes: reference shape per input, all concrete.
        metadata: backend's own plain data (versions, settings). Two keys have a meaning: `reproducible: False` where
            equal programs give other bytes, and `not_needed_to_run`, names of files that are there to be looked at.
    """

    target: str
    folder: Path
    files: tuple[str, ...]
    sha256: Mapping[str, str]
    precision: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def main_file(self) -> Path:
        """Full path of the first file."""
        return self.folder / self.files[0]

    @property
    def size_bytes(self) -> int:
        """Bytes of the files, without those that the metadata list under `not_needed_to_run`."""
        beside = self.metadata.get("not_needed_to_run", ())
        return sum((self.folder / name).stat().st_size for name in self.files if name not in beside)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, schema `ARTIFACT_SCHEMA`, without the folder."""
        return {
            "schema": ARTIFACT_SCHEMA,
            "target": self.target,
            "files": list(self.files),
            "sha256": dict(self.sha256),
            "precision": self.precision,
            "inputs": [_spec_to_dict(spec) for spec in self.inputs],
            "outputs": [_spec_to_dict(spec) for spec in self.outputs],
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "metadata": dict(self.metadata),
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any], folder: Path) -> Artifact:
        """Inverse of `to_dict`, for files that lie in `folder`; what comes from a file is for `manifest.read`."""
        return Artifact(
            target=data["target"],
            folder=Path(folder),
            files=tuple(data["files"]),
            sha256=dict(data["sha256"]),
            precision=data["precision"],
            inputs=tuple(_spec_from_dict(spec) for spec in data["inputs"]),
            outputs=tuple(_spec_from_dict(spec) for spec in data["outputs"]),
            shapes={name: tuple(shape) for name, shape in data["shapes"].items()},
            metadata=dict(data["metadata"]),
        )


@dataclasses.dataclass(frozen=True)
class KernelTime:
    """Time of one kernel that the backend executed.

    Attributes:
        name: the backend's name of the kernel.
        op_type: the backend's type name.
        nodes: names of the program's nodes that it computes, as far as the backend tells.
        median_s: median over `runs` inferences, or the fastest of them, seconds. Vendors report whole microseconds, and
            OpenVINO only their average so far, so that it is the median over stretches of inferences there.
        runs: inferences that were profiled.
        implementation: the backend's kernel choice, such as `brgconv_avx512_f32`, or empty.
        written: shape of its first output; empty where the backend does not say.
    """

    name: str
    op_type: str
    nodes: tuple[str, ...]
    median_s: float
    runs: int
    implementation: str = ""
    written: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return dataclasses.asdict(self) | {"nodes": list(self.nodes), "written": list(self.written)}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> KernelTime:
        """Inverse of `to_dict`."""
        shape = tuple(data.get("written", ()))
        return KernelTime(**{**data, "nodes": tuple(data["nodes"]), "written": shape})


class Session(Protocol):
    """A model that is loaded and ready to run. Subclass it to inherit `prepare` and `computed`."""

    inputs: tuple[TensorSpec, ...]
    """Input contract, for making inputs."""
    settings: Mapping[str, Any]
    """Every runtime option that was set, for the record of a measurement."""

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name, in memory of the caller's own. Arrays come with any strides.

        Raises:
            UsageError: an input is missing, unknown, or of the wrong type, byte order or shape.
            BackendError: the runtime failed.
        """
        ...

    def prepare(self, inputs: Mapping[str, np.ndarray]) -> Callable[[], object]:
        """A function that runs once on these inputs: what is timed. Bind memory here, outside it."""
        held = dict(inputs)
        return lambda: self.run(held)

    def computed(self, once: Callable[[], object]) -> dict[str, np.ndarray]:
        """What one call of `once` computes, by name; `once` is what `prepare` returned last.

        So that what is timed can be compared with what `run` answers. To be overridden together with `prepare`
        by a runtime that leaves its results in memory of its own, where fetching them would be timed, too.
        """
        return cast("dict[str, np.ndarray]", once())


@runtime_checkable
class Backend(Protocol):
    """One target. Constructed without arguments; holds no state; vendor imports happen in methods.

    Where the vendor's runtime reserves far more address space than it uses, as CUDA's driver does, the class says
    `reserves_address_space = True`; the default limit of a subprocess's address space is not set then.
    """

    name: str

    def capabilities(self) -> Capabilities:
        """What this backend can do here. Raises UsageError if the vendor package is not installed."""
        ...

    def channel_grid(
        self, op_type: str, precision: str = "f32", attributes: Mapping[str, Any] | None = None
    ) -> int:
        """Step of the channel count of `op_type` that costs time; 1 when widths are free."""
        ...

    def rules(self) -> Rules:
        """What this target asks of a legalized program; its support table is generated from them."""
        ...

    def legality(self, program: Program, options: TargetOptions) -> LegalityReport:
        """Which rules of this target the legalized program keeps or breaks."""
        ...

    def legalize(self, program: Program) -> Program:
        """An equal program that this target can run; `program` itself is not changed."""
        ...

    def lower(self, program: Program, folder: Path, options: TargetOptions) -> Artifact:
        """Legalize, check and write the artifact to `folder`, atomically."""
        ...

    def load(self, artifact: Artifact, options: TargetOptions) -> Session:
        """A session on the artifact's files."""
        ...

    def compile(self, model: bytes, options: TargetOptions) -> Session:
        """A session on a serialized ONNX model, without an artifact."""
        ...

    def profile(self, artifact: Artifact, options: TargetOptions, runs: int = 20) -> list[KernelTime]:
        """Time per kernel, in execution order. Profiling slows a run down; never sum it as latency."""
        ...


def require_precision(name: str, supported: tuple[str, ...], options: TargetOptions) -> None:
    """Refuse a precision that the backend does not have.

    Raises:
        UsageError: names the precision, the backend and what it has.
    """
    if options.precision not in supported:
        have = ", ".join(f"'{p}'" for p in supported)
        raise UsageError(
            f"Precision '{options.precision}' is not supported by backend '{name}' in this version; "
            f"it has {have}. Choose one of these with --precision."
        )


def _spec_to_dict(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape)}


def _spec_from_dict(data: Mapping[str, Any]) -> TensorSpec:
    return TensorSpec(data["name"], data["dtype"], tuple(data["shape"]))
