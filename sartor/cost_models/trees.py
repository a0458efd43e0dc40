"""Boosted regression trees as plain arrays, evaluated with numpy: predicting needs no library.

Nodes lie in preorder, so the left child of a split is the node behind it and only the right one is stored. A row
goes left where `x[feature] <= number`; a leaf has feature -1 and its value as number.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
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
        """Only those of the pairs of a tree and a row go on that have not reached a leaf."""
        left, right, roots = self._without(rows[0], (rows == rows[0]).all(0))
        width, count = np.int32(rows.shape[1]), len(rows)
        flat = rows.ravel()
        node = np.repeat(roots, count)  # [trees · rows]
        active = np.flatnonzero(self._feature[node] >= 0)
        first = (active % count).astype(np.int32) * width  # where the row of each of them starts
        here = node[active]
        while len(active):
            goes_left = flat[first + self._feature[here]] <= self.number[here]
            here = np.where(goes_left, left[here], right[here])
            node[active] = here
            on = self._feature[here] >= 0
            active, first, here = active[on], first[on], here[on]
        return self.number[node].reshape(len(roots), count).sum(0)

    def _without(self, row: np.ndarray, same: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Children and roots with the splits passed over that all rows take alike; most of what describes a kernel."""
        feature = self._feature
        passed = (feature >= 0) & same[feature]
        goes_left = row[feature] <= self.number
        after = np.arange(len(feature), dtype=np.int32)
        after = np.where(passed, np.where(goes_left, after + 1, self._right), after)
        while (passed[after]).any():
            after = after[after]
        return (
            after[np.minimum(np.arange(1, len(after) + 1), len(after) - 1)],
            after[self._right],
            after[self._roots],
        )

    @functools.cached_property
    def _feature(self) -> np.ndarray:
        return self.feature.astype(np.int32)

    @functools.cached_property
    def _right(self) -> np.ndarray:
        return self.right.astype(np.int32)

    @functools.cached_property
    def _roots(self) -> np.ndarray:
        return self.roots.astype(np.int32)

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
