"""How well rooflines from data sheets rank the networks of the thesis' tables (`tests/fixtures/thesis_tables.json`).

For every (table, device, precision): Spearman's rank correlation of measured and predicted latency, for the
roofline priced layer by layer (networks that can be rebuilt), for one from MACs and parameters alone, and for
time proportional to FLOPs. Numbers of networks are small, 3 to 13, so a correlation says little; `n` stands beside
it. Constants come from data sheets and estimates, none is tuned to these rows. Milliseconds of different tables
were taken under different protocols and are never compared.

Prints also: measured over predicted time (how far from their peak devices run), the power that the tables give as
energy of an image, and training steps (table 5.11).
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import record
from thesis_networks import CIFAR, IMAGENET, RECONSTRUCTED, TRAINED, ZOO, workload

FIXTURE = Path(__file__).parents[1] / "tests" / "fixtures" / "thesis_tables.json"
UNSTATED = "f32"  # what PyTorch computes in by default
PJ_PER_BYTE = 40.0  # LPDDR4: about 5 pJ a bit
XAVIER, NANO, TX2 = "jetson-agx-xavier", "jetson-nano", "jetson-tx2"


def tables() -> dict[str, list[dict[str, Any]]]:
    """Rows of each table, as dictionaries."""
    document = json.loads(FIXTURE.read_text())
    return {
        t["table"]: [dict(zip(t["columns"], row, strict=True)) for row in t["rows"]]
        for t in document["tables"]
    }


def spearman(first: list[float], second: list[float]) -> float | None:
    """Rank correlation with ties at their mean rank; None for fewer than three pairs or constant values."""
    if len(first) < 3:
        return None
    ranks = [_ranks(np.asarray(values)) for values in (first, second)]
    spread = [float(np.std(r)) for r in ranks]
    if min(spread) == 0:
        return None
    return float(
        np.mean((ranks[0] - ranks[0].mean()) * (ranks[1] - ranks[1].mean())) / (spread[0] * spread[1])
    )


def _ranks(values: np.ndarray) -> np.ndarray:
    return np.array([np.sum(values < v) + 0.5 * (np.sum(values == v) - 1) for v in values])


def groups() -> list[dict[str, Any]]:
    """Rows that were measured alike: table, device, precision, and (network, ms, MACs, parameters)."""
    found = tables()
    static = {row["model"]: row for row in found["3.2"]}
    result = []
    keys = dict.fromkeys((r["device"], r["precision"]) for r in found["3.4"])
    for device, precision in keys:
        rows = [r for r in found["3.4"] if (r["device"], r["precision"]) == (device, precision)]
        # The MACs of the detector are not given, only those of its backbone.
        rows = [r for r in rows if r["model"] != "SSD-MobileNetV2"]
        entries = [
            (
                r["model"],
                r["latency_ms"],
                1e9 * static[r["model"]]["macs_g"],
                1e6 * static[r["model"]]["params_m"],
            )
            for r in rows
        ]
        result.append(_group("3.4", device, precision, entries))
    for base, device in (("ResNet18", XAVIER), ("VGG11", TX2)):
        rows = [r for r in found["4.1"] if r["base"] == base]
        entries = [(_name41(r), r["latency_ms"], 1e6 * r["macs_m"], 1e6 * r["params_m"]) for r in rows]
        result.append(_group("4.1", device, "f32", entries))
    entries = [(r["method"], r["latency_ms"], 1e9 * r["macs_g"], None) for r in found["5.3"]]
    result.append(_group("5.3", XAVIER, UNSTATED, entries))
    subs = [(f"#{r['id']}", 1e9 * r["macs_g"], 1e6 * r["params_m"]) for r in found["6.3"]]
    entries = [(n, r["latency_ms"], m, p) for (n, m, p), r in zip(subs, found["6.3"], strict=True)]
    result.append(_group("6.3", NANO, UNSTATED, entries))
    fixed = [r for r in found["6.11"] if r["method"] == "EC-Static"]
    for column, device, precision in (
        ("xavier_ms", XAVIER, UNSTATED),
        ("nano_ms", NANO, UNSTATED),
        ("cpu_ms", "i7-9750h", UNSTATED),
    ):
        entries = [(n, r[column], m, p) for (n, m, p), r in zip(subs[2:], fixed, strict=True)]
        result.append(_group("6.11", device, precision, entries))
    rows = [r for r in found["6.16"] if r["method"] != "EC-Dynamic"]
    entries = [(r["method"], r["latency_ms"], 1e9 * r["macs_g"], None) for r in rows]
    result.append(_group("6.16", XAVIER, UNSTATED, entries))
    return result


def _group(table: str, device: str, precision: str, entries: list[tuple]) -> dict[str, Any]:
    return {"table": table, "device": device, "precision": precision, "entries": entries}


def _name41(row: dict[str, Any]) -> str:
    if row["method"] == "Baseline":
        return row["base"]
    if row["method"] == "Szegedy":  # only its resolution grows: 224 · sqrt(3253.31 / 1735.22)
        return "ResNet18@307"
    return row["method"]


def rebuildable(name: str) -> bool:
    return name.partition("@")[0] in {*ZOO, *IMAGENET, *CIFAR, *RECONSTRUCTED}


class Predictions:
    """Rooflines of devices, and workloads that are captured once."""

    def __init__(self) -> None:
        self._workloads: dict[str, Any] = {}

    def workload(self, name: str) -> Any:
        if name not in self._workloads:
            self._workloads[name] = workload(name)
        return self._workloads[name]

    def layerwise(self, device: str, precision: str, name: str) -> float:
        from sartor.cost_models.roofline import Roofline

        model = Roofline(device, precision.split()[0])
        return model.estimate(self.workload(name)).latency_s

    @staticmethod
    def aggregate(device: str, precision: str, macs: float, parameters: float | None) -> float:
        """The slower of computing everything and reading every weight once."""
        from sartor.cost_models.roofline import Roofline
        from sartor.cost_models.roofline_law import PRECISION_BYTES

        precision = precision.split()[0]
        constants = Roofline(device, precision).constants
        moved = PRECISION_BYTES[precision] * (parameters or 0.0)
        outside = max(
            0.0, moved - sum(level.bytes for level in constants.levels if level.holds != "activations")
        )
        return max(macs / constants.macs_per_s, outside / constants.bytes_per_s)


def rank(group: dict[str, Any], predictions: Predictions) -> dict[str, Any]:
    """Correlations of one group."""
    device, precision, entries = group["device"], group["precision"], group["entries"]
    measured = [ms for _, ms, _, _ in entries]
    aggregate = [predictions.aggregate(device, precision, macs, params) for _, _, macs, params in entries]
    built = [entry for entry in entries if rebuildable(entry[0])]
    layerwise = [predictions.layerwise(device, precision, entry[0]) for entry in built]
    ratios = [entry[1] / 1e3 / s for entry, s in zip(built, layerwise, strict=True)]
    return {
        "table": group["table"],
        "device": device,
        "precision": precision,
        "n": len(entries),
        "spearman_aggregate": spearman(measured, aggregate),
        "spearman_flops": spearman(measured, [macs for _, _, macs, _ in entries]),
        "n_layerwise": len(built),
        "spearman_layerwise": spearman([entry[1] for entry in built], layerwise),
        "spearman_flops_layerwise": spearman([e[1] for e in built], [e[2] for e in built]),
        "networks_layerwise": [entry[0] for entry in built],
        "measured_over_predicted": [round(r, 3) for r in ratios],
    }


def energy_rows(predictions: Predictions) -> list[dict[str, Any]]:
    """Power of the Xavier at full throughput as P = P0 + images/s · (e_mac · MACs + e_byte · bytes).

    Nine rows do not tell what a byte costs (its least-squares value is 0), so that it is set, not fitted.
    """
    from scipy.optimize import nnls

    from sartor.cost_models.roofline import Roofline

    precisions = ("int8", "f16", "f32")
    rows = [r for r in tables()["3.4"] if r["device"] == XAVIER and r["precision"] in precisions]
    columns, power, moving, names = [], [], [], []
    for row in rows:
        cost = Roofline(XAVIER, row["precision"]).estimate(predictions.workload(row["model"]))
        macs, traffic = (row["images_per_s"] * cost.read(m) for m in ("macs", "traffic_bytes"))
        columns.append([1.0, *(1e-12 * macs * (row["precision"] == p) for p in precisions)])
        moving.append(1e-12 * PJ_PER_BYTE * traffic)
        power.append(row["power_w"])
        names.append(row["model"])
    matrix, watts, fixed = np.array(columns), np.array(power), np.array(moving)

    def fitted(kept: np.ndarray) -> np.ndarray:
        return nnls(matrix[kept] / watts[kept, None], (1 - fixed / watts)[kept])[0]

    everything = np.ones(len(watts), bool)
    found = fitted(everything)
    first = dict(zip(("static_w", "pj_int8", "pj_f16", "pj_f32"), found.round(3).tolist(), strict=True))
    worst = float(np.abs((matrix @ found + fixed) / watts - 1).max())
    result: list[dict[str, Any]] = [
        {**first, "pj_per_byte": PJ_PER_BYTE, "worst_relative_error": round(worst, 3)}
    ]
    for left_out in dict.fromkeys(names):
        kept = np.array([name != left_out for name in names])
        errors = (matrix @ fitted(kept) + fixed)[~kept] / watts[~kept] - 1
        result.append({"left_out": left_out, "relative_errors": [round(float(e), 3) for e in errors]})
    return result


def training_rows(predictions: Predictions) -> list[dict[str, Any]]:
    """Table 5.11: shares of resolution-adaptive training, and the memory of a full-resolution step."""
    from sartor.cost_models.roofline import Roofline
    from sartor.cost_models.roofline_law import RooflineConstants
    from sartor.cost_models.training import TrainingModel, adaptive_share

    measured = {(r["model"], r["method"]): r for r in tables()["5.11"]}
    model = TrainingModel(Roofline(RooflineConstants(1e13, 1e12)), batch=128)
    result = []
    for name in ("AlexNet", *TRAINED):
        base, adaptive = measured[name, "Baseline"], measured[name, "RAT"]
        row = {"model": name, "share_predicted": round(adaptive_share(32, 200), 4)}
        for column in ("training_macs_m", "step_ms", "memory_gb"):
            row[f"share_{column}"] = round(adaptive[column] / base[column], 4)
        if name in TRAINED:
            cost = model.evaluate(predictions.workload(name))
            row["macs_m_predicted"] = round(float(cost.macs) / 128 / 1e6, 2)
            row["macs_m"] = base["training_macs_m"]
            row["memory_gb_predicted"] = round(float(cost.step_bytes) / 1e9, 2)
            row["memory_gb"] = base["memory_gb"]
        result.append(row)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    predictions = Predictions()
    rows = [rank(group, predictions) for group in groups()]
    print(
        "table  device             precision             n  aggregate  FLOPs |  n  layerwise  FLOPs  measured/roofline"
    )
    for row in rows:
        shown = [_show(row[key]) for key in ("spearman_aggregate", "spearman_flops")]
        layers = [_show(row[key]) for key in ("spearman_layerwise", "spearman_flops_layerwise")]
        print(
            f"{row['table']:6} {row['device']:18} {row['precision']:20} {row['n']:2}  {shown[0]:>9}  {shown[1]:>5} | "
            f"{row['n_layerwise']:2}  {layers[0]:>9}  {layers[1]:>5}  {row['measured_over_predicted']}"
        )
    ratios = np.log([r for row in rows for r in row["measured_over_predicted"]])
    summary = {
        "groups": len(rows),
        "spearman_aggregate_median": _median(rows, "spearman_aggregate"),
        "spearman_flops_median": _median(rows, "spearman_flops"),
        "spearman_layerwise_median": _median(rows, "spearman_layerwise"),
        "spearman_flops_layerwise_median": _median(rows, "spearman_flops_layerwise"),
        "measured_over_predicted_median": float(np.exp(np.median(ratios))),
        "log_sd_of_measured_over_predicted": float(np.std(ratios)),
    }
    energy, training = energy_rows(predictions), training_rows(predictions)
    for title, lines in (("energy of the Xavier, fitted", energy), ("training, table 5.11", training)):
        print(f"\n{title}")
        for line in lines:
            print(f"  {line}")
    print()
    print(json.dumps(summary, indent=1))
    record.write(options.json, "thesis_ranking", rows, summary, energy=energy, training=training)


def _show(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.2f}"


def _median(rows: list[dict[str, Any]], key: str) -> float | None:
    values = [row[key] for row in rows if row[key] is not None]
    return float(np.median(values)) if values else None


if __name__ == "__main__":
    main()
