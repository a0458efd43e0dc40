"""What ships: one folder with `bundle.json`, the artifacts that it names, and nothing that it does not.

`bundle.json` (schema `sartor.bundle/1`) says what goes in and comes out, which stages there are, in order, and on
which condition each of them runs. A stage is one artifact of one target; the values that it reads are inputs of
the bundle or outputs of earlier stages. A stage runs for those samples that have all it reads and fulfil its
condition. An output has the value of the last stage that computed it for a sample.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from sartor.backends.artifact import MANIFEST, mismatch, open_artifact
from sartor.backends.protocol import Artifact, TensorSpec
from sartor.errors import ModelError, UsageError
from sartor.ir.files import file_sha256, write_atomic
from sartor.runtime.contract import per_sample

SCHEMA = "sartor.bundle/1"
FILE = "bundle.json"
METRICS = ("probability-difference", "max-probability", "entropy", "value")
"""Of the logits of one sample: largest minus second largest probability, largest probability, entropy in nats; or
the one number itself."""
COMPARISONS = ("below", "at-least", "equals")


@dataclasses.dataclass(frozen=True)
class Condition:
    """When a stage runs: `metric` of a value of an earlier stage, compared with a threshold, sample by sample.

    Attributes:
        value: name of the value: logits `[N, C]`, or one number per sample for the metric `value`.
        metric: one of `METRICS`.
        comparison: one of `COMPARISONS`.
        threshold: what the metric is compared with.
    """

    value: str
    metric: str
    comparison: str
    threshold: float


@dataclasses.dataclass(frozen=True)
class Stage:
    """One artifact and its place.

    Attributes:
        name: unique in the bundle.
        artifact: folder of the artifact, relative to the bundle; `.` for the bundle's own folder.
        inputs: value of the bundle by input of the artifact.
        outputs: value of the bundle by output of the artifact.
        when: condition; None for always.
    """

    name: str
    artifact: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    when: Condition | None = None

    @staticmethod
    def of(artifact: Artifact, name: str, folder: str) -> Stage:
        """A stage whose values have the names of its artifact's own inputs and outputs."""
        inputs = {spec.name: spec.name for spec in artifact.inputs}
        return Stage(name, folder, inputs, {spec.name: spec.name for spec in artifact.outputs})


@dataclasses.dataclass(frozen=True)
class BundleDocument:
    """The contents of `bundle.json`.

    Attributes:
        inputs: what goes in.
        outputs: what comes out.
        stages: in order.
        files: SHA-256 of every file of the artifacts, manifests included, by path relative to the bundle.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    stages: tuple[Stage, ...]
    files: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {"schema": SCHEMA, **dataclasses.asdict(self)}


def write_bundle(
    folder: Path, inputs: Iterable[TensorSpec], outputs: Iterable[TensorSpec], stages: Sequence[Stage]
) -> BundleDocument:
    """Write `bundle.json` to a folder that has the artifacts already.

    Raises:
        ModelError: stages contradict each other, or their artifacts; an artifact is damaged or not there.
        UsageError: the file system refuses to write.
    """
    document = BundleDocument(tuple(inputs), tuple(outputs), tuple(stages), {})
    _check(document)
    artifacts = _artifacts(folder, document)
    per_sample(document, artifacts)
    files: dict[str, str] = {}
    for stage in document.stages:
        artifact = artifacts[stage.name]
        wrong = mismatch(artifact)
        if wrong:
            raise ModelError(f"Stage '{stage.name}': {wrong} Lower the model again.")
        files[_path(stage, MANIFEST)] = file_sha256(folder / stage.artifact / MANIFEST)
        files.update({_path(stage, name): artifact.sha256[name] for name in artifact.files})
    document = dataclasses.replace(document, files=dict(sorted(files.items())))
    text = json.dumps(document.to_dict(), indent=1, sort_keys=True) + "\n"
    write_atomic(folder / FILE, text.encode())
    return document


@dataclasses.dataclass(frozen=True)
class OpenedBundle:
    """A bundle whose parts are whole and fit together.

    Attributes:
        document: `bundle.json`.
        artifacts: by stage.
        per_sample: the values whose first axis is that of samples.
    """

    document: BundleDocument
    artifacts: Mapping[str, Artifact]
    per_sample: frozenset[str]


def read_bundle(folder: Path) -> BundleDocument:
    """Read `bundle.json`, and check every file that it names against its hash.

    Raises:
        ModelError: it cannot be read, contradicts itself or its artifacts, names a file outside the folder, or a file
            is missing or changed.
    """
    return open_bundle(folder).document


def open_bundle(folder: Path) -> OpenedBundle:
    """As `read_bundle`, with what the manifests of the artifacts say."""
    path = Path(folder) / FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"'{folder}' is not a bundle: '{FILE}' cannot be read ({type(error).__name__}: {error}). 'sartor fit' "
            "writes one."
        ) from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise ModelError(f"'{path}' has the schema '{found}'; this version of Sartor reads '{SCHEMA}'.")
    try:
        document = _parsed(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(
            f"'{path}' is damaged: {type(error).__name__}: {error}. Write the bundle again."
        ) from error
    _check(document)
    root = Path(folder).resolve()
    for name, digest in document.files.items():
        file = root / name
        if not file.resolve().is_relative_to(root):
            raise ModelError(
                f"'{path}' names the file '{name}', which lies outside the bundle; it is refused."
            )
        observed = file_sha256(file) if file.is_file() else "missing"
        if observed != digest:
            raise ModelError(
                f"Bundle file '{name}' does not match '{FILE}': SHA-256 is {observed}, expected {digest}. Copy "
                "or write the bundle again."
            )
    for stage in document.stages:
        if _path(stage, MANIFEST) not in document.files:
            raise ModelError(
                f"'{path}' has no hash of '{_path(stage, MANIFEST)}', the manifest of stage '{stage.name}'. Write the "
                "bundle again."
            )
    artifacts = _artifacts(Path(folder), document)
    return OpenedBundle(document, artifacts, per_sample(document, artifacts))


def _artifacts(folder: Path, document: BundleDocument) -> dict[str, Artifact]:
    found = {}
    for stage in document.stages:
        try:
            found[stage.name] = open_artifact(folder / stage.artifact)
        except UsageError as error:
            raise ModelError(
                f"Stage '{stage.name}' has no artifact at '{stage.artifact}': {error}"
            ) from error
    return found


def _path(stage: Stage, name: str) -> str:
    return (PurePosixPath(stage.artifact) / name).as_posix()


def _parsed(data: Mapping[str, Any]) -> BundleDocument:
    def tensor(item: Mapping[str, Any]) -> TensorSpec:
        dims = tuple(d if isinstance(d, int) else str(d) for d in item["shape"])
        return TensorSpec(str(item["name"]), str(item["dtype"]), dims)

    def stage(item: Mapping[str, Any]) -> Stage:
        when = None
        if item["when"] is not None:
            when = Condition(**item["when"])
            when = dataclasses.replace(when, threshold=float(when.threshold))
        named = {key: {str(k): str(v) for k, v in item[key].items()} for key in ("inputs", "outputs")}
        return Stage(str(item["name"]), str(item["artifact"]), when=when, **named)

    return BundleDocument(
        inputs=tuple(tensor(item) for item in data["inputs"]),
        outputs=tuple(tensor(item) for item in data["outputs"]),
        stages=tuple(stage(item) for item in data["stages"]),
        files={str(name): str(digest) for name, digest in data["files"].items()},
    )


def _check(document: BundleDocument) -> None:
    """Stages fit together: every value that one reads is there before it."""
    known = {tensor.name for tensor in document.inputs}
    always = set(known)  # for every sample
    names: set[str] = set()
    if not document.stages:
        raise ModelError("The bundle has no stage; it needs at least one.")
    for stage in document.stages:
        if stage.name in names:
            raise ModelError(f"Two stages of the bundle are named '{stage.name}'.")
        names.add(stage.name)
        place = Path(stage.artifact)
        if place.is_absolute() or ".." in place.parts:
            raise ModelError(
                f"Stage '{stage.name}' has its artifact at '{stage.artifact}', outside the bundle."
            )
        read = [*stage.inputs.values(), *([stage.when.value] if stage.when is not None else ())]
        missing = [value for value in read if value not in known]
        if missing:
            raise ModelError(f"Stage '{stage.name}' reads '{missing[0]}', which no earlier stage makes.")
        if stage.when is not None and (
            stage.when.metric not in METRICS or stage.when.comparison not in COMPARISONS
        ):
            raise ModelError(
                f"Stage '{stage.name}' has the condition '{stage.when.metric} {stage.when.comparison}'; metrics are "
                f"{', '.join(METRICS)}, comparisons {', '.join(COMPARISONS)}."
            )
        known.update(stage.outputs.values())
        if stage.when is None and always.issuperset(read):
            always.update(stage.outputs.values())
    absent = [tensor.name for tensor in document.outputs if tensor.name not in always]
    if absent:
        raise ModelError(f"Output '{absent[0]}' of the bundle is not made for every sample by any stage.")
