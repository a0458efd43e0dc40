"""`tico`: depth, width and resolution by NSGA-II, for training time, training memory, latency and accuracy at once.

All four are predicted: a polynomial of one statistic of the network, which weighs its MACs, parameters and
activations; weights by random search, the polynomial by least squares, one predictor per quantity, fitted to networks
that were drawn at random and measured. Latency within the limits is the cost model's. Formulas and symbols:
METHODS.md, (5.10) to (5.14).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from sartor.passes.options import option
from sartor.strategies.dimensions import Dimension, dimensions, state_of, widest
from sartor.strategies.evolution import evolve, front, weighted
from sartor.strategies.protocol import Search, Strategy
from sartor.strategies.space import Decision, Space, State, over, within

_DEGREE = 3
_DRAWS = 200  # of the weights of the statistic
_QUANTITIES = ("training time", "training memory", "accuracy drop")


@dataclasses.dataclass(frozen=True)
class Tico(Strategy):
    """Kept shares of depth, width and resolution by NSGA-II over four predicted objectives."""

    name: ClassVar[str] = "tico"
    needs_data: ClassVar[bool] = True
    resizes: ClassVar[bool] = True

    samples: int = option(24, help="networks that predictors are fitted to", minimum=6, maximum=1000)
    validation: int = option(8, help="networks that their error is reported on", minimum=2, maximum=1000)
    generations: int = option(35, help="of the search", minimum=1, maximum=1000)
    population: int = option(40, help="of the search", minimum=4, maximum=1000)
    weights: tuple[float, ...] = option(
        (0.1, 0.1, 0.1, 1.0),
        help="of training time, training memory, latency and accuracy drop in the choice from the front",
        minimum=0.0,
    )

    def __post_init__(self) -> None:
        """See `Strategy.__post_init__`."""
        from sartor.errors import UsageError

        super().__post_init__()
        if len(self.weights) != 4 or not sum(self.weights) > 0:
            raise UsageError(
                f"Option 'weights' of 'tico' must be four numbers, one of them above 0, got {list(self.weights)}."
            )

    def prepare(self, space: Space) -> Search:
        """See `Strategy.prepare`."""
        found = dimensions(space)
        generator = np.random.default_rng(space.seed)
        drawn = [
            _state(space, found, {name: generator.random() for name in found})
            for _ in range(self.samples + self.validation)
        ]
        plans = [space.plan(state, self.name) for state in drawn]
        start = space.judge.score(space.plan(space.start(), self.name))
        trained = [space.judge.training(plan) for plan in plans]
        measured = {
            "training time": [seconds for seconds, _ in trained],
            "training memory": [size for _, size in trained],
            "accuracy drop": [start - space.judge.score(plan) for plan in plans],
        }
        features = _features(space, drawn)
        predictors = {}
        for name, values in measured.items():
            one = Predictor.fit(features[: self.samples], np.array(values[: self.samples]), generator)
            predictors[name] = one
            error = np.abs(one(features[self.samples :]) - values[self.samples :])
            spread = float(np.ptp(values)) or 1.0
            space.notes.append(f"{name} is predicted to {float(error.mean()) / spread:.1%} of its range")
        return lambda limits: self._search(space, found, predictors, limits)

    def _search(
        self,
        space: Space,
        found: Mapping[str, Dimension],
        predictors: Mapping[str, Predictor],
        limits: Mapping[str, float],
    ) -> Decision:
        def rate(population: Sequence[Mapping[str, float]]) -> list[tuple[list[float], float]]:
            states = [_state(space, found, genes) for genes in population]
            priced, features = space.priced(states, limits), _features(space, states)
            predicted = [predictors[name](features) for name in _QUANTITIES]
            return [
                ([time, memory, one.get("latency", 0.0), drop], over(one, limits))
                for one, time, memory, drop in zip(priced, *predicted, strict=True)
            ]

        tried = evolve(
            {name: (0.0, 1.0) for name in found},
            rate,
            population=self.population,
            generations=self.generations,
            objectives=4,
            crossover=0.9,
            mutation=0.3,
            seed=space.seed,
            first=[dict.fromkeys(found, 1.0)],  # the smallest, so that there is one within the limits
        )
        allowed = front(tried)
        if not allowed:
            best = min(tried, key=lambda one: one.violation)
            return space.decision(_state(space, found, best.genes), limits, self.name)
        state = _state(space, found, weighted(allowed, self.weights).genes)
        if "width" in found:
            depth = 1.0 - len(state.removed) / max(len(space.blocks), 1)
            wider = widest(space, limits, depth, state.size)
            if within(space.priced([wider], limits)[0], limits):
                state = wider
        return space.decision(state, limits, self.name)


@dataclasses.dataclass(frozen=True)
class Predictor:
    """`G(N) = Σ θ_i S(N)^i` (5.12) of `S = λ · (MACs, parameters, activations)` (5.13), each over the original's.

    Attributes:
        weights: λ, not negative, of sum 1.
        terms: θ, the power of the last first.
    """

    weights: np.ndarray
    terms: np.ndarray

    @staticmethod
    def fit(features: np.ndarray, values: np.ndarray, generator: np.random.Generator) -> Predictor:
        """λ by random search over the simplex, θ by least squares (5.14).

        Args:
            features: `[networks, 3]`.
            values: `[networks]`.
            generator: of λ.
        """
        best, least = None, np.inf
        degree = min(_DEGREE, len(values) - 1)
        for weights in (*np.eye(features.shape[1]), *generator.dirichlet(np.ones(features.shape[1]), _DRAWS)):
            statistic = features @ weights
            powers = np.vander(statistic, degree + 1)
            terms, *_ = np.linalg.lstsq(powers, values, rcond=None)
            error = float(np.square(powers @ terms - values).sum())
            if error < least:
                best, least = Predictor(weights, terms), error
        assert best is not None
        return best

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Values of networks, `[networks]`."""
        return np.polyval(self.terms, features @ self.weights)


def _state(space: Space, found: Mapping[str, Dimension], genes: Mapping[str, float]) -> State:
    """Genes run from 0, the original, to 1, as small as it can be."""
    chosen = {}
    for name, one in found.items():
        chosen[name] = one.values[min(int(genes[name] * len(one.values)), len(one.values) - 1)]
    return state_of(space, chosen)


def _features(space: Space, states: Sequence[State]) -> np.ndarray:
    """MACs, parameters and bytes of activations over those of the original, `[networks, 3]`."""
    keys = ("macs", "parameters", "bytes_written")
    (start,) = space.static([space.start()])
    return np.array([[one[key] / max(start[key], 1.0) for key in keys] for one in space.static(states)])
