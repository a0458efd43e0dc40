"""Non-dominated sorting under constraints, by Optuna's NSGA-II.

Reference: K. Deb et al., "A fast and elitist multiobjective genetic algorithm: NSGA-II", IEEE Transactions on
Evolutionary Computation 6(2), 2002.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Evolved:
    """One individual.

    Attributes:
        genes: value by name.
        objectives: each to be as small as possible.
        violation: how far it is from being allowed; 0 where it is.
    """

    genes: Mapping[str, float]
    objectives: tuple[float, ...]
    violation: float


def evolve(
    genes: Mapping[str, tuple[float, float] | int],
    rate: Callable[[Sequence[Mapping[str, float]]], Sequence[tuple[Sequence[float], float]]],
    *,
    population: int,
    generations: int,
    objectives: int,
    crossover: float = 0.9,
    mutation: float | None = None,
    seed: int = 0,
    first: Sequence[Mapping[str, float]] = (),
) -> list[Evolved]:
    """Everything that was tried, in order.

    Args:
        genes: by name, bounds of a real number, or how many choices an integer has.
        rate: objectives and violation of every individual of a generation.
        population: individuals per generation.
        generations: how many, the first one included.
        objectives: how many there are.
        crossover: probability that an individual has two parents.
        mutation: probability that a gene is drawn anew; None: one in an individual.
        seed: of everything that is drawn.
        first: individuals that the first generation is to have.

    Raises:
        UsageError: Optuna is not installed.
    """
    from sartor.backends.telemetry import import_vendor

    optuna = import_vendor("optuna", "sartor[search]")
    distributions = {
        name: optuna.distributions.IntDistribution(0, space - 1)
        if isinstance(space, int)
        else optuna.distributions.FloatDistribution(*space)
        for name, space in genes.items()
    }
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        sampler = optuna.samplers.NSGAIISampler(
            population_size=population, crossover_prob=crossover, mutation_prob=mutation, seed=seed
        )
        study = optuna.create_study(directions=["minimize"] * objectives, sampler=sampler)
        for individual in first:
            study.enqueue_trial(dict(individual))
        found = []
        for _ in range(generations):
            trials = [study.ask(distributions) for _ in range(population)]
            rated = rate([trial.params for trial in trials])
            for trial, (values, violation) in zip(trials, rated, strict=True):
                trial.set_constraint("limits", float(violation))
                study.tell(trial, [float(value) for value in values])
                found.append(Evolved(dict(trial.params), tuple(map(float, values)), float(violation)))
        return found
    finally:
        optuna.logging.set_verbosity(level)


def front(tried: Sequence[Evolved]) -> list[Evolved]:
    """Allowed individuals that no other allowed one is better than in everything; each once."""
    allowed = list({str(sorted(one.genes.items())): one for one in tried if one.violation <= 0}.values())
    values = np.array([one.objectives for one in allowed])
    return [
        one
        for one, mine in zip(allowed, values, strict=True)
        if not ((values <= mine).all(1) & (values < mine).any(1)).any()
    ]


def weighted(chosen: Sequence[Evolved], weights: Sequence[float]) -> Evolved:
    """The individual of the smallest weighted sum of objectives, each scaled to [0, 1] over all of them."""
    values = np.array([one.objectives for one in chosen])
    span = values.max(0) - values.min(0)
    scaled = (values - values.min(0)) / np.where(span > 0, span, 1.0)
    return chosen[int(np.argmin(scaled @ np.asarray(weights)))]
