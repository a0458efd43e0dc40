"""Latencies of networks over those of reference networks that are measured beside them, and what these take."""

from __future__ import annotations

import argparse
import hashlib
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sartor.ir.files import write_atomic

SEED = 0  # of the profile
_FEWEST = 4  # repetitions
_SCALED_BY = (1, 2, 3)  # numbers of the profile's networks, of every kind, that say what the references take
_T95 = (
    12.71,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
)  # Student, from 1 degree of freedom


def references_of(work: Path) -> dict[str, bytes]:
    """The models that others are measured against, by name: generated once, and kept beside what was measured.

    (What generates networks changes; what a published one takes in units of these does not.)
    """
    from sartor.profiling.networks import anchors, network

    folder, found = work / "references", {}
    for name in anchors(SEED):
        path = folder / f"{name}.onnx"
        if not path.exists():
            write_atomic(path, network(name))
        found[name] = path.read_bytes()
    return found


def repeated(
    models: Sequence[bytes],
    options: argparse.Namespace,
    references: Mapping[str, bytes],
    known: Sequence[Sequence[float]] = (),
    fewest: int = _FEWEST,
) -> list[list[float]]:
    """Logarithms of the latencies of models over the geometric mean of the references, a list of repetitions each.

    All are visited in turn in one process, in quiet moments as a reference kernel tells them, each for a while before
    its time counts (a network that ran after others is up to 8 % slower at first); time that other processes had of the
    processor does not count. Every repetition compiles them anew, because where weights lie in memory is
    part of the noise; the interval is that of the mean over repetitions.

    Args:
        models: serialized.
        options: target, threads, how long and how well.
        references: models by name.
        known: repetitions of an earlier turn, per model; those of this one are added.
        fewest: repetitions, the known ones included.
    """
    from sartor.backends.protocol import TargetOptions
    from sartor.profiling.timing import Effort, KernelTimer

    everything = [*references.values(), *models]
    effort = Effort(
        half_width=options.half_width,
        fewest=4,
        most=6,
        visit_s=0.03,
        settle_s=0.03,
        quantile=0.5,
        warm_s=0.15,
    )
    logs = [list(series) for series in known] or [[] for _ in models]
    begun = time.monotonic()
    with KernelTimer(options.target, TargetOptions(threads=options.threads)) as timer:
        while len(logs[0]) < fewest or (
            not enough(logs, options.half_width) and time.monotonic() - begun < options.seconds
        ):
            times = timer(everything, effort).times
            failed = [timed.reason for timed in times if timed.warm is None]
            if failed:
                raise RuntimeError(failed[0])
            found = [math.log(timed.warm.ratio) for timed in times if timed.warm is not None]
            base = statistics.fmean(found[: len(references)])
            for series, value in zip(logs, found[len(references) :], strict=True):
                series.append(value - base)
    return logs


def enough(logs: Sequence[Sequence[float]], wanted: float) -> bool:
    """Whether the interval of every model is as narrow as is wanted."""
    return len(logs[0]) >= _FEWEST and max(map(half_width, logs)) <= wanted


def ratio_of(series: Sequence[float]) -> dict[str, Any]:
    """The latency over that of the references, and its 95 % interval."""
    middle, half = math.exp(statistics.fmean(series)), half_width(series)
    return {"ratio": middle, "ci95": [middle / (1 + half), middle * (1 + half)]}


def scale_of(
    profile: Any, journal: Any, options: argparse.Namespace, references: Mapping[str, bytes]
) -> float:
    """Seconds that the references stand for, and what is known of them, printed.

    The median over networks of every kind of what the profile says they take, over what they take in references: four
    networks would not do, one of which may be 7 % slower in this process than when the profile was built. Measured anew
    where what generates them has changed.
    """
    from sartor.profiling import networks

    known = {n.name: n.latency_s for n in profile.networks}
    digest_of = {n.name: n.sha256 for n in profile.networks}
    logs = []
    for number in _SCALED_BY:
        names = [f"{kind}-{SEED}-{number}" for kind in networks.KINDS]
        models = {name: networks.network(name) for name in names if name in known}
        if not models:
            continue
        digests = {name: hashlib.sha256(model).hexdigest() for name, model in models.items()}
        others = [name for name, digest in digests.items() if digest_of[name] not in (digest, "")]
        if others:
            raise SystemExit(
                f"The profile's networks {', '.join(others[:3])} are not those that this version generates; use the "
                "version that built it, or build it again."
            )
        found = journal.find("scale", number=number)
        measured = {} if found is None else {name: digest for name, digest, _ in found["ratios"]}
        if not digests.items() <= measured.items() and not options.predict_only:
            logs_of = repeated(list(models.values()), options, references)
            ratios = [[n, digests[n], ratio_of(own)["ratio"]] for n, own in zip(models, logs_of, strict=True)]
            found = journal.append("scale", number=number, ratios=ratios)
        for name, digest, ratio in found["ratios"] if found is not None else ():
            if digests.get(name) == digest:
                logs.append(math.log(known[name] / ratio))
    if len(logs) < _FEWEST:
        raise SystemExit(
            "The journal in --work does not say what the reference networks take; measure it (--turns 0), with a "
            f"profile of seed {SEED}."
        )
    middle = math.exp(statistics.median(logs))
    deviation = 1.2533 * half_width(logs)  # of a median, for a normal distribution
    print(f"references: {1e3 * middle:.3f} ms +- {deviation:.1%}, by {len(logs)} networks of the profile")
    return middle


def half_width(logs: Sequence[float]) -> float:
    """Of the 95 % interval of the mean of repetitions, as a share."""
    factor = _T95[min(len(logs) - 2, len(_T95) - 1)]
    return math.expm1(factor * statistics.stdev(logs) / math.sqrt(len(logs)))
