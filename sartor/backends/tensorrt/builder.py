"""The vendor's parser and builder: an ONNX file to a network, a record of its layers, and engines.

Found out with `tensorrt_rtx` 1.7.1: building again gives the same bytes, in the same process and in another one,
unless a build of the process has failed before; so a failure ends the lowering, and every engine of an artifact is
built in a process where none has failed. Other compute capabilities, built before, change nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx

from sartor.backends import telemetry
from sartor.backends.tensorrt.settings import Flavour
from sartor.errors import BackendError
from sartor.ir import protos

SCHEMA = "sartor.tensorrt.layers/1"
_LOG_LINES = 20
_LAYER = "[ONNX Layer: "
_WHOLE = "ForeignNode "  # how the log calls a part of the network that is compiled as one layer


@dataclasses.dataclass(frozen=True)
class ParsedNode:
    """What became of one node.

    Attributes:
        node: its name.
        op_type: its operator.
        accepted: the parser took it.
        layers: names of the layers it became; empty where it was computed beforehand, or refused.
        reasons: why it was refused, in the parser's words.
    """

    node: str
    op_type: str
    accepted: bool
    layers: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class LayerRecord:
    """Every node of a model as the parser saw it.

    Attributes:
        parser: name and version of the vendor's package.
        nodes: in execution order, those of branches after their `If`.
        inserted: layers that the parser added of its own, with their type.
        warnings: of the parser.
    """

    parser: str
    nodes: tuple[ParsedNode, ...]
    inserted: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]

    @property
    def rejected(self) -> tuple[ParsedNode, ...]:
        """The nodes that the parser refused."""
        return tuple(node for node in self.nodes if not node.accepted)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, schema `sartor.tensorrt.layers/1`."""
        return {
            "schema": SCHEMA,
            "parser": self.parser,
            "accepted": sum(node.accepted for node in self.nodes),
            "rejected": len(self.rejected),
            "nodes": [dataclasses.asdict(node) for node in self.nodes],
            "inserted": [list(layer) for layer in self.inserted],
            "warnings": list(self.warnings),
        }


class Vendor:
    """One imported flavour with a log of its own."""

    def __init__(self, flavour: Flavour):
        self.module = telemetry.import_vendor(flavour.module, flavour.requirement)
        self.flavour = flavour
        self.version = f"{flavour.module} {self.module.__version__}"
        self.log: list[tuple[str, str]] = []
        self.logger = _logger(self.module, self.log)
        self.module.init_libnvinfer_plugins(
            self.logger, ""
        )  # else the parser finds none of the vendor's plugins
        self.log.clear()

    def warnings(self) -> tuple[str, ...]:
        """Warnings and errors in the log, each once."""
        return tuple(
            dict.fromkeys(text for severity, text in self.log if severity not in ("INFO", "VERBOSE"))
        )

    def failed(self, what: str) -> BackendError:
        """An error with the last lines of the log."""
        said = next(
            (text for severity, text in reversed(self.log) if "ERROR" in severity), "it does not say why"
        )
        error = BackendError(f"TensorRT ({self.version}) could not {what}: {' '.join(said.split())[:500]}")
        lines = [f"[{severity}] {text}" for severity, text in self.log[-_LOG_LINES:]]
        error.add_note("Last lines of its log:\n" + "\n".join(lines))
        return error


class Parsed:
    """A network in the vendor's builder, and its record."""

    def __init__(self, vendor: Vendor, path: Path):
        trt = vendor.module
        vendor.log.clear()
        self.vendor = vendor
        self.builder = trt.Builder(vendor.logger)
        self.network = self.builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        self.parser = trt.OnnxParser(self.network, vendor.logger)  # kept: the network refers to its weights
        taken = self.parser.parse_from_file(str(path))
        errors = [self.parser.get_error(i) for i in range(self.parser.num_errors)]
        graph = onnx.load(str(path), load_external_data=False).graph
        self.record = _record(vendor, graph, self.network, [(e.node_name(), e.desc()) for e in errors])
        if not taken:
            raise self._refused([e.desc() for e in errors if not e.node_name()])

    def _refused(self, general: Sequence[str]) -> BackendError:
        rejected = self.record.rejected
        lines = [f"Node '{n.node}' ({n.op_type}): {'; '.join(n.reasons)}" for n in rejected]
        lines += [f"The model: {' '.join(text.split())}" for text in general]
        error = (
            self.vendor.failed("parse the model")
            if not lines
            else BackendError(
                f"TensorRT ({self.vendor.version}) does not take {len(rejected)} of {len(self.record.nodes)} nodes. "
                f"{lines[0][:500]}. Replace them, or give a surgery that does."
            )
        )
        for line in lines[1:]:
            error.add_note(line)
        return error

    def fused(self) -> dict[str, tuple[str, ...]]:
        """Nodes by layer of the engine that was built last, of layers that are a whole part of the network."""
        found = {}
        for _, text in self.vendor.log:
            name, divider, metadata = text.partition(" metadata: ")
            if divider and name.startswith(_WHOLE):
                found[name.removeprefix(_WHOLE)] = tuple(dict.fromkeys(_origins(metadata)))
        return found

    def build(self, compute_capability: str | None, timing_cache: bytes | None = None) -> tuple[bytes, bytes]:
        """One engine, and the timing cache after it (empty where the flavour has none).

        Args:
            compute_capability: such as `8.6`; None for the GPU of this machine.
            timing_cache: of the standard flavour, to begin with.

        Raises:
            BackendError: the builder refuses; its last log lines are a note.
        """
        trt = self.vendor.module
        config = self.builder.create_builder_config()
        config.clear_flag(trt.BuilderFlag.TF32)  # f32 means f32; it is on by default
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # names of layers, for the profile
        where = "this machine's GPU"
        if compute_capability is not None:
            where = f"compute capability {compute_capability}"
            config.num_compute_capabilities = 1
            wanted = getattr(trt.ComputeCapability, f"SM{compute_capability.replace('.', '')}", None)
            if wanted is None or not config.set_compute_capability(wanted, 0):
                raise self.vendor.failed(f"build for {where}, which this version does not know")
        cache = None
        if not self.vendor.flavour.ahead_of_time:
            cache = config.create_timing_cache(timing_cache or b"")
            config.set_timing_cache(cache, ignore_mismatch=False)
        engine = self.builder.build_serialized_network(self.network, config)
        if engine is None:
            raise self.vendor.failed(f"build an engine for {where}")
        return bytes(engine), bytes(cache.serialize()) if cache is not None else b""


def _record(
    vendor: Vendor, graph: onnx.GraphProto, network: Any, errors: Sequence[tuple[str, str]]
) -> LayerRecord:
    layers: dict[str, list[str]] = {}
    inserted = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        names = list(_origins(layer.metadata))
        for name in names:
            layers.setdefault(name, []).append(layer.name)
        if not names:
            inserted.append((layer.name, layer.type.name))
    reasons: dict[str, list[str]] = {}
    for name, text in errors:
        told = " ".join(text.split())
        # What the parser says of an operator that it has no importer for is the word `false`.
        reasons.setdefault(name, []).append("the operator is not supported" if told == "false" else told)
    nodes = [inner for node in graph.node for inner in protos.with_inner_nodes(node)]
    parsed = tuple(
        ParsedNode(
            node.name,
            node.op_type,
            node.name not in reasons,
            tuple(dict.fromkeys(layers.get(node.name, ()))) if node.name not in reasons else (),
            tuple(dict.fromkeys(reasons.get(node.name, ()))),
        )
        for node in nodes
    )
    return LayerRecord(vendor.version, parsed, tuple(inserted), vendor.warnings())


def _origins(metadata: str) -> Iterator[str]:
    """Names of nodes in a layer's metadata, `[ONNX Layer: conv0]`, one bracket each."""
    for part in metadata.split(_LAYER)[1:]:
        yield part.rsplit("]", 1)[0]


def _logger(module: Any, log: list[tuple[str, str]]) -> Any:
    class Log(module.ILogger):  # type: ignore[name-defined,misc]  # the vendor is imported here only
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            log.append((severity.name, text))

    return Log()
