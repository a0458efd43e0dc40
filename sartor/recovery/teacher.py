"""The original as a teacher: its outputs on samples, asked for as rarely as they can be."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sartor.recovery import samples as training_set
from sartor.recovery.processes import Processes
from sartor.recovery.samples import Batch, Samples
from sartor.recovery.view import View

Outputs = dict[str, Tensor]


class Teacher:
    """Outputs of the original by name, and the attention maps of its view.

    It runs once per sample that is held in memory, in whichever process, where its answers fit into `CACHE_BYTES` too;
    else each time.

    Args:
        view: of the original.
        samples: of which the batches come.
        processes: among which answers are shared; alone by default.

    Attributes:
        view: as given.
        asked: samples that it was run on.
    """

    def __init__(self, view: View, samples: Samples, processes: Processes | None = None):
        self.view, self._samples = view, samples
        self._processes = processes or Processes()
        view.gm.requires_grad_(False)
        self.asked = 0
        self._met = 0  # where no answers are kept
        self._met_rows = torch.zeros(samples.count or 0, dtype=torch.bool)
        self._known = self._met_rows.clone()
        self._caches = samples.cached
        self._shares = samples.cached and not self._processes.alone
        self._news: list[tuple[Tensor, Outputs]] = []
        self._answers: Outputs = {}
        self._kept: dict[int, Outputs] = {}

    def __call__(self, batch: Batch, which: Tensor | None = None) -> Outputs:
        """Its outputs.

        Args:
            batch: samples.
            which: those to ask about, booleans `[N]`, of which one at least is true; None for all.
        """
        kept = self._kept.get(id(batch))
        if kept is not None:
            return kept if which is None else {name: output[which] for name, output in kept.items()}
        inputs, rows, count = batch.inputs, batch.rows, batch.count
        if which is not None:
            inputs, count = self._samples.some(inputs, which), int(which.sum())
            rows = None if rows is None else rows[which]
        if rows is not None and self._caches:
            fresh = ~self._known[rows]
            if bool(fresh.any()):
                answers = self._run(self._samples.some(inputs, fresh), int(fresh.sum()))
                self._learn(rows[fresh], answers)
            if self._caches:
                return {name: output[rows] for name, output in self._answers.items()}
        return self._run(inputs, count)

    def remember(self, batches: Sequence[Batch]) -> None:
        """Keep the answers to batches that it is asked about again and again."""
        for batch in batches:
            answers = self(batch)
            if not self._caches:
                self._kept[id(batch)] = answers

    def share(self) -> None:
        """Tell the other processes what was learned since; all of them call this at the same time."""
        if not self._shares:
            return
        said = self._processes.gathered((self._caches, self._news))
        self._news = []
        self._caches = all(caches for caches, _ in said)
        for rank, (_, news) in enumerate(said):
            for rows, answers in news if self._caches and rank != self._processes.rank else ():
                self._store(rows, answers)
        self._shares = self._caches and not bool(self._known.all())

    # ---- how much it was spared ------------------------------------------------------------
    def meet(self, batch: Batch) -> None:
        """Count a batch that it would have been asked about as a whole."""
        if batch.rows is not None and self._caches:
            self._met_rows[batch.rows] = True
        else:
            self._met += batch.count

    def counts(self) -> tuple[int, int]:
        """Of all processes: samples that it was run on, and that it would have been, asked about all that it met."""
        state = self.state()
        asked, met = (int(count) for count in state["counts"])
        return asked, met + int(state["met"].sum())

    def state(self) -> dict[str, Tensor]:
        """Counts of all processes for a checkpoint; the answers are not in it."""
        counts = self._processes.total(torch.tensor([self.asked, self._met]))
        return {"counts": counts, "met": self._processes.total(self._met_rows.to(torch.int32)) > 0}

    def resume(self, state: dict[str, Tensor]) -> None:
        """Go on counting from a checkpoint."""
        self.asked, self._met = (int(count) for count in state["counts"])
        self._met_rows = state["met"]

    # ---- asking ----------------------------------------------------------------------------
    def _run(self, inputs: Sequence[Tensor], count: int) -> Outputs:
        self.asked += count
        with torch.no_grad():
            return self.view(inputs)

    def _learn(self, rows: Tensor, answers: Outputs) -> None:
        count = len(self._known)
        sizes = (answer.numel() * answer.element_size() // len(rows) for answer in answers.values())
        if not self._answers and count * sum(sizes) > training_set.CACHE_BYTES:
            self._caches = False
            return
        if self._shares:
            self._news.append((rows, answers))
        self._store(rows, answers)

    def _store(self, rows: Tensor, answers: Outputs) -> None:
        count = len(self._known)
        for name, answer in answers.items():
            if name not in self._answers:
                self._answers[name] = torch.zeros((count, *answer.shape[1:]), dtype=answer.dtype)
            self._answers[name][rows] = answer
        self._known[rows] = True
