"""EDLAB: six metrics of networks on targets, each with its own protocol, and each target's practical roofline.

Reference: the EDLAB benchmark of edge deep learning accelerators: one front end converts one network to many
targets under the same deployment parameters; parameterized networks draw what a device can give, and real ones
are placed on that.
"""

from __future__ import annotations

__all__ = ["SCHEMA", "read_report", "run_bench", "write_report"]

from sartor.bench.document import SCHEMA, read_report, write_report
from sartor.bench.run import run_bench
