"""Runs a twin on many batches node by node, all batches at one node before any of them at the next.

So a weight can be changed by what all batches show at it, and everything behind sees the new one, in one pass over
the network. In memory is what later nodes still read, of all batches.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from sartor.errors import InternalError, SartorError
from sartor.ir.fx_run import Runner
from sartor.ir.fx_tensors import to_tensor
from sartor.ir.program import Program


class Lockstep:
    """One run of a program, in float32.

    Args:
        program: canonical; its large weights are read when a node needs them.
        batches: arrays by input name.
        wanted: nodes of the main graph whose results will be asked for.

    Raises:
        UnsupportedOperatorError: as `to_fx`.
    """

    def __init__(
        self, program: Program, batches: Iterable[Mapping[str, np.ndarray]], wanted: Collection[str] = ()
    ):
        self._runner = Runner(program, torch.float32)
        self._nodes: list[fx.Node] = list(self._runner.module.graph.nodes)
        self._wanted = frozenset(wanted)
        self._results: dict[str, list[Tensor]] = {}
        self._position = 0
        places = [node for node in self._nodes if node.op == "placeholder"]
        info = self._runner.info
        self._environments: list[dict[fx.Node, Any]] = [
            {
                place: to_tensor(inputs[name], info.dtype)
                for place, name in zip(places, info.inputs, strict=True)
            }
            for inputs in batches
        ]
        self._keys = {name: key for key, name in info.names.items()}

    def entering(self, name: str) -> list[Tensor]:
        """The first operand of a node on every batch; the node has not run.

        Raises:
            ModelError: a node before it fails; names it.
            InternalError: it has run already, or there is no such node.
        """
        index = next((i for i, n in enumerate(self._nodes) if n.meta.get("onnx_node") == name), -1)
        if index < self._position:
            raise InternalError(f"Node '{name}' has run already, or the twin does not have it.")
        while self._position < index:
            self._step()
        operand = self._nodes[index].args[0]
        assert isinstance(operand, fx.Node)
        return [environment[operand] for environment in self._environments]

    def result(self, name: str) -> list[Tensor]:
        """The result of one of the wanted nodes on every batch, once.

        Raises:
            ModelError: a node fails; names it.
            InternalError: it is none of the wanted, or was asked for before.
        """
        while name not in self._results and self._position < len(self._nodes):
            self._step()
        if name not in self._results:
            raise InternalError(f"The result of node '{name}' was not kept, or the twin does not have it.")
        return self._results.pop(name)

    def set_initializer(self, name: str, array: np.ndarray) -> None:
        """Let nodes that have not run read another array of the same shape; the program has it already.

        What was computed from it alone, such as a transposed weight, is computed again.
        """
        key = self._keys.get(name)
        if key is None:
            return  # nothing that is left reads it
        tensor: Tensor = self._runner.fetch_attr(key)
        if not tensor.is_meta:  # else it is read from the program
            with torch.no_grad():
                tensor.copy_(to_tensor(array, torch.float32))
        for environment in self._environments:
            again = dict(environment)  # with operands that were let go
            changed: set[fx.Node] = set()
            for node in self._nodes[: self._position]:
                if (node.op == "get_attr" and node.target == key) or changed.intersection(
                    node.all_input_nodes
                ):
                    changed.add(node)
                    self._run(node, again)
                    if node in environment:
                        environment[node] = again[node]

    def _run(self, node: fx.Node, environment: dict[fx.Node, Any]) -> None:
        self._runner.env = environment
        try:
            with torch.no_grad():
                environment[node] = self._runner.run_node(node)
        except SartorError:
            raise
        except Exception as error:
            raise self._runner.located(error) from error
        finally:
            self._runner.env = {}

    def _step(self) -> None:
        """Run one node on every batch, and let go what no other reads."""
        node = self._nodes[self._position]
        self._position += 1
        if node.op in ("placeholder", "output"):
            return
        name = str(node.meta.get("onnx_node", ""))
        for environment in self._environments:
            self._run(node, environment)
            if name in self._wanted:
                self._results.setdefault(name, []).append(environment[node])
            for done in self._runner.user_to_last_uses.get(node, ()):
                environment.pop(done, None)
