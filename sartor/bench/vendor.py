"""Targets that only a vendor's own tools reach: a configuration goes out, results come back.

`emit_config` writes a folder with the models, the data and what to measure; `read_results` and `merge` check what was
measured elsewhere and put it beside the rows that were measured here, marked as imported.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sartor import __version__
from sartor.bench.document import finish, read_json
from sartor.bench.fields import METRICS, quoted, require_entry, require_metrics, require_value, shown
from sartor.bench.preparation import describe, distinct
from sartor.bench.protocol import PROTOCOL, RUNS, WARM_UP_RUNS, Settings
from sartor.bench.vendor_texts import CALIBRATION_FORMAT, readme
from sartor.errors import UsageError

if TYPE_CHECKING:
    from sartor.ir.program import Program

CONFIG_SCHEMA = "sartor.bench-config/1"
RESULTS_SCHEMA = "sartor.bench-results/1"
CONDITIONS = ("device", "toolchain", "toolchain_version", "power_mode", "measured_on")
"""What the conditions of imported results must say, each as text."""
_HINT = "see the results template of the configuration"
_SAMPLES = 64  # of calibration data; a test split goes out whole


# ---- out -----------------------------------------------------------------------------------------
def emit_config(
    programs: Sequence[Program], target: str, settings: Settings, folder: Path, *, data: str | None = None
) -> list[Path]:
    """Write everything that a measurement elsewhere needs to `folder`; `config.json` comes last.

    Args:
        programs: models.
        target: name under which the results will come back.
        settings: precisions, threads and limits.
        folder: to write to.
        data: data source; its splits `calibration` and `test` are written as `.npz` files.

    Raises:
        UsageError: no model, a name that is no name, data that do not fit, or the file system refuses.
    """
    from sartor.ir.files import write_all

    distinct(programs)
    if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", target):
        raise UsageError(f"'{target}' is no name for a target; use letters, digits and . _ + -.")
    files: dict[Path, bytes | Iterable[bytes | memoryview]] = {}
    models = []
    for program in programs:
        name = re.sub(r"[^\w.-]+", "_", program.source.name).removesuffix(".onnx")
        path = folder / "models" / f"{name}.onnx"
        if path in files:
            raise UsageError(f"Two models would be written to '{path.name}'; rename one.")
        files |= program.files(path)
        entry = describe(program) | {"file": f"models/{path.name}", "file_sha256": program.sha256()}
        entry["any_batch"] = program.batch.symbolic
        for split, content in _splits(program, data, settings.seed):
            entry[f"{split}_file"] = f"data/{name}-{split}.npz"
            files[folder / entry[f"{split}_file"]] = content
        models.append(entry)
    config = {
        "schema": CONFIG_SCHEMA,
        "sartor_version": __version__,
        "target": target,
        "models": models,
        "precisions": list(settings.precisions),
        "parameters": settings.to_dict(),
        "measure": {
            "latency": {
                "batch_samples": 1,
                "warm_up_runs": WARM_UP_RUNS,
                "runs": RUNS,
                "statistic": "mean_s",
            },
            "throughput": {"first_batch_samples": 1, "factor": 2, "warm_up_runs": WARM_UP_RUNS, "runs": RUNS},
            "accuracy": {"batch_samples": 1, "split": "test"},
            "power": {"statistic": "highest_w", "during": "the best batch of the throughput"},
        },
        "protocol": dict(PROTOCOL),
        "calibration_format": CALIBRATION_FORMAT,
        "results": {"schema": RESULTS_SCHEMA, "template": "results.template.json"},
    }
    files[folder / "results.template.json"] = _json(_template(config))
    files[folder / "README.md"] = readme(config, CONDITIONS).encode()
    files[folder / "config.json"] = _json(config)
    return write_all(files)


def _splits(program: Program, data: str | None, seed: int) -> Iterable[tuple[str, bytes]]:
    if data is None:
        return
    import io

    import numpy as np

    from sartor.data import load_data
    from sartor.data_sources import sample_count

    found = load_data(data, list(program.input_shapes), seed, program=program)
    for name, split, most in (("calibration", found.calibration, _SAMPLES), ("test", found.test, None)):
        arrays: dict[str, list[Any]] = {}
        count = 0
        for inputs, labels in split:
            for key, array in inputs.items():
                arrays.setdefault(key, []).append(array)
            if labels is not None and name == "test":
                arrays.setdefault("labels", []).append(labels)
            count += sample_count(inputs, program.batch.inputs)
            if most is not None and count >= most:
                break
        stream = io.BytesIO()
        np.savez(stream, **{key: _joined(program, key, parts, most) for key, parts in arrays.items()})  # type: ignore[arg-type]
        yield name, stream.getvalue()


def _joined(program: Program, name: str, parts: Sequence[Any], most: int | None) -> Any:
    """The batches of an input (or of the labels) as one array; an input without samples is one already."""
    import numpy as np

    shared = program.batch.symbolic and name in program.input_shapes and name not in program.batch.inputs
    if not shared:
        return np.concatenate(parts)[:most]
    if any(not np.array_equal(part, parts[0]) for part in parts):
        raise UsageError(
            f"Input '{name}' of '{program.source.name}' has no samples and differs between batches; a file for a "
            "vendor's tools holds one value of it. Give data in which it stays the same."
        )
    return parts[0]


def _template(config: Mapping[str, Any]) -> dict[str, Any]:
    """A document to fill in: as it stands it is refused, because its numbers are missing."""
    empty = {metric: dict.fromkeys(keys) for metric, keys in METRICS.items()}
    return {
        "schema": RESULTS_SCHEMA,
        "target": config["target"],
        "conditions": dict.fromkeys(CONDITIONS, ""),
        "results": [
            {
                "model": model["name"],
                "sha256": model["sha256"],
                "precision": precision,
                "conversion_s": None,
                **empty,
            }
            for model, precision in itertools.product(config["models"], config["precisions"])
        ],
    }


def _json(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode()


# ---- back ----------------------------------------------------------------------------------------
def read_results(path: Path) -> dict[str, Any]:
    """Results measured elsewhere, checked for everything that needs no report to compare with.

    Raises:
        UsageError: the file is not of the schema; names the place, what is there, and what belongs there.
    """
    document = read_json(path)
    where = f"'{path.name}'"
    if not isinstance(document, dict) or document.get("schema") != RESULTS_SCHEMA:
        observed = document.get("schema") if isinstance(document, dict) else document
        raise UsageError(f"{where} has the schema {shown(observed)}; results have '{RESULTS_SCHEMA}'.")
    kinds = {"schema": "text", "target": "text", "conditions": "object", "results": "list"}
    require_entry(where, document, kinds, _HINT)
    missing = [key for key in CONDITIONS if key not in document["conditions"]]
    if missing:
        raise UsageError(
            f"{where}: 'conditions' lacks {quoted(missing)}; a number without its conditions is not taken."
        )
    for key, value in document["conditions"].items():
        require_value(f"{where}: conditions '{key}'", value, "text")
    if not document["results"]:
        raise UsageError(f"{where}: 'results' must be a list of at least one result.")
    seen = set()
    for index, result in enumerate(document["results"]):
        place = f"{where}: results[{index}]"
        _result(place, result)
        pair = (result["model"], result["precision"])
        if pair in seen:
            raise UsageError(f"{place} is a second result of model '{pair[0]}' in {pair[1]}; give one.")
        seen.add(pair)
    document["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return document


def _result(place: str, result: dict[str, Any]) -> None:
    kinds = {"model": "text", "sha256": "text", "precision": "precision", "conversion_s": "positive?"}
    require_entry(place, result, kinds | dict.fromkeys(METRICS, "object?"), _HINT)
    if not any(key in result for key in ("latency", "throughput", "accuracy", "conversion_s")):
        raise UsageError(f"{place} has no metric; give one, or leave the result away.")
    require_metrics(place, result, _HINT)
    if "power" in result and "throughput" not in result:
        raise UsageError(
            f"{place} has a power and no throughput, in whose configuration it is drawn; give both."
        )


def merge(document: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, Any]:
    """A report with imported rows, in place of earlier ones of the same target.

    Raises:
        UsageError: a model is not in the report or is another file, or the target was measured here.
    """
    merged: dict[str, Any] = copy.deepcopy(dict(document))
    target = results["target"]
    models = {model["name"]: model for model in merged["models"]}
    if any(row["target"] == target and row["state"] != "imported" for row in merged["rows"]):
        raise UsageError(
            f"Target '{target}' was measured here; give imported results a target name of their own."
        )
    rows = []
    for index, result in enumerate(results["results"]):
        model = models.get(result["model"])
        if model is None:
            raise UsageError(
                f"Imported results[{index}] is of model '{result['model']}', which the report does not have; "
                f"its models are {quoted(models)}."
            )
        if result["sha256"] != model["sha256"]:
            raise UsageError(
                f"Imported results[{index}] is of a '{result['model']}' with SHA-256 {result['sha256']}, and the "
                f"report's has {model['sha256']}; measure the file that 'sartor bench --emit-config' writes."
            )
        rows.append(_row(result, target))
    merged["rows"] = [row for row in merged["rows"] if row["target"] != target] + rows
    merged["imports"] = [entry for entry in merged["imports"] if entry["target"] != target]
    merged["imports"].append(
        {"target": target, "conditions": dict(results["conditions"]), "sha256": results.get("sha256", "")}
    )
    return finish(merged)


def _row(result: Mapping[str, Any], target: str) -> dict[str, Any]:
    row = {k: copy.deepcopy(v) for k, v in result.items() if k not in ("sha256",)}
    row |= {"target": target, "state": "imported"}
    row["absent"] = {metric: "not among the imported results" for metric in METRICS if metric not in result}
    departures = []
    for metric in ("latency", "throughput"):
        entry = result.get(metric, {})
        for key, wanted in (("runs", RUNS), ("warm_up_runs", WARM_UP_RUNS)):
            if entry and entry[key] < wanted:
                departures.append(f"{metric}: {entry[key]} {key.replace('_', ' ')} instead of {wanted}")
    if result.get("latency", {}).get("batch_samples", 1) != 1:
        departures.append(f"latency: batch {result['latency']['batch_samples']} instead of 1")
    if departures:
        row["departures"] = departures
    return row
