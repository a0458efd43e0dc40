"""Boosted regression trees as plain arrays, evaluated with numpy: predicting needs no library.

Nodes lie in preorder, so the left child of a split is the node behind it and only the right one is stored. A row
goes left where `x[feature] <= number`; a leaf has feature -1 and its value as number.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_CELLS = 1 << 16  # (tree, row) pairs that are walked at once: what a core's own caches hold


@dataclasses.dataclass(frozen=True, eq=False)
class Trees:
    """A sum of regression trees.

    Attributes:
        feature: column that a split reads, -1 for a leaf, `[nodes]`.
        number: threshold of a split, value of a leaf, `[nodes]`.
        right: index of the right child, `[nodes]`; a leaf names itself.
        roots: index of every tree's root, ascending.
    """

    feature: np.ndarray
    number: np.ndarray
    right: np.ndarray
    roots: np.ndarray

    def predict(self, rows: np.ndarray) -> np.ndarray:
        """Sum over all trees, `[rows]`.

        Args:
            rows: `[rows, features]`, float64: thresholds are compared exactly.
        """
        total = np.zeros(len(rows))
        if not len(self.roots):
            return total
        chunk = max(1, _CELLS // len(self.roots))
        for start in range(0, len(rows), chunk):
            total[start : start + chunk] = self._walk(rows[start : start + chunk])
        return total

    def _walk(self, rows: np.ndarray) -> np.ndarray:
        feature, number, right, depth = self._compact
        flat, first = rows.ravel(), np.arange(len(rows), dtype=np.int32) * np.int32(rows.shape[1])
        node = np.repeat(self.roots.astype(np.int32)[:, None], len(rows), 1)  # [trees, rows]
        for _ in range(depth):
            goes_left = flat[first + feature[node]] <= number[node]
            node = np.where(goes_left, node + np.int32(1), right[node])
        return self.number[node].sum(0)

    @functools.cached_property
    def _compact(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        """Small arrays, in which a leaf is a split whose right child it is itself; and the depth of the deepest."""
        leaf = self.feature < 0
        feature = np.where(leaf, 0, self.feature).astype(np.int32)
        level = np.zeros(len(leaf), np.int64)
        for parent in np.flatnonzero(~leaf):  # in preorder, children come behind
            level[[parent + 1, self.right[parent]]] = level[parent] + 1
        number = np.where(leaf, -np.inf, self.number)
        return feature, number, self.right.astype(np.int32), int(level.max(initial=0))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {field.name: getattr(self, field.name).tolist() for field in dataclasses.fields(self)}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Trees:
        """Inverse of `to_dict`.

        Raises:
            ValueError: the arrays are no trees.
        """
        feature, right, roots = (np.asarray(data[k], np.int64) for k in ("feature", "right", "roots"))
        number = np.asarray(data["number"], float)
        here = np.arange(len(feature))
        split = feature >= 0
        whole = len(feature) == len(number) == len(right) and bool(np.isfinite(number).all())
        # A right child lies behind its parent and its left sibling, so every walk ends.
        if not (whole and (right[~split] == here[~split]).all() and (right[split] > here[split] + 1).all()):
            raise ValueError("the arrays of the trees do not belong together")
        if len(right) and (right.max() >= len(feature) or (len(roots) and roots.max() >= len(feature))):
            raise ValueError("the trees name nodes that they do not have")
        return Trees(feature, number, right, roots)


def from_lightgbm(dump: Mapping[str, Any]) -> Trees:
    """Trees of `lightgbm.Booster.dump_model()`: numeric splits on features without missing values."""
    feature: list[int] = []
    number: list[float] = []
    right: list[int] = []
    roots: list[int] = []

    def add(node: Mapping[str, Any]) -> None:
        index = len(feature)
        right.append(index)
        if "leaf_value" in node:
            feature.append(-1)
            number.append(float(node["leaf_value"]))
            return
        if node["decision_type"] != "<=":
            raise ValueError(f"a split of kind '{node['decision_type']}' is not numeric")
        feature.append(int(node["split_feature"]))
        number.append(float(node["threshold"]))
        add(node["left_child"])
        right[index] = len(feature)
        add(node["right_child"])

    for tree in dump["tree_info"]:
        roots.append(len(feature))
        add(tree["tree_structure"])
    return Trees(np.array(feature, np.int64), np.array(number), np.array(right, np.int64), np.array(roots))


def mean_and_spread(folds: Sequence[Trees], rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of what several ensembles say, each `[rows]`."""
    said = np.stack([trees.predict(rows) for trees in folds])
    return said.mean(0), said.std(0)
