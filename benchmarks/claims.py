"""Claims of the sources, reproduced in kind: `claims.py NAME` measures one, `claims.py all` all six, minutes each.

Writes `claim-NAME.json`, rows and a verdict in plain numbers with `holds`, and its plot `claim-NAME.svg` to `--out`.
Rows are written as they are finished, and a run goes on where the last one stopped. Where a claim does not hold here,
that is the result. Wants an otherwise idle machine: latencies are taken on one thread, training takes all processors.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import traceback
import warnings
from pathlib import Path

from claims_dimensions import DIMENSION, UTILISATION
from claims_granularity import GRANULARITY
from claims_imprint import IMPRINT
from claims_quality import INES, RAT
from claims_record import Rows

ROOT = Path(__file__).parent.parent
CLAIMS = {claim.name: claim for claim in (GRANULARITY, DIMENSION, INES, UTILISATION, RAT, IMPRINT)}


def run(name: str, options: argparse.Namespace) -> None:
    """Measure what is missing of a claim, and write verdict and plot."""
    claim, start = CLAIMS[name], time.perf_counter()
    rows = Rows(claim, options.out, claim.settings(options), options.again and not options.plot_only)
    if not options.plot_only:
        claim.measure(rows, options)
        rows.write()
    drawn = rows.draw()
    print(json.dumps({"name": name, **claim.summarize(rows.rows)}, indent=1))
    print(
        f"{name}: {len(rows.rows)} rows, {time.perf_counter() - start:.0f} s, {drawn or 'nothing to draw'}",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("claim", choices=[*CLAIMS, "all"], nargs="+")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--work", type=Path, default=ROOT / "out/claims", help="scratch folder")
    parser.add_argument(
        "--draws", type=int, default=18, help="random cuts of each kind (granularity; the source: 100)"
    )
    parser.add_argument("--seeds", type=int, default=3, help="of training (ines, rat)")
    parser.add_argument("--again", action="store_true", help="forget rows that are there")
    parser.add_argument("--plot-only", action="store_true", help="of the rows that are there")
    parser.add_argument(
        "--quick", action="store_true", help="tiny settings that only show that all of it runs"
    )
    options = parser.parse_args()

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    failed = []
    for name in CLAIMS if "all" in options.claim else dict.fromkeys(options.claim):
        try:
            run(name, options)
        except Exception:  # the other claims are measured all the same
            traceback.print_exc()
            failed.append(name)
    if failed:
        print(
            f"failed: {', '.join(failed)}; the same command goes on from the rows that are there",
            file=sys.stderr,
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
