"""What a strategy is, and how it is named: a frozen dataclass whose fields are its options, as a pass is.

`budgeted-greedy`, or with options as in a pipeline: `teco{step=0.05,alpha=0.5}`.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

from sartor.errors import UsageError
from sartor.passes.item_values import made, values_of
from sartor.passes.options import options_of, validate
from sartor.passes.pipeline_text import parse
from sartor.strategies.registry import REGISTRY
from sartor.strategies.space import Decision, Space, State

Search = Callable[[Mapping[str, float]], Decision]
"""The plan for absolute limits by budget key; asked again and again while a fit aims."""


class Strategy(abc.ABC):
    """Chooses what of a network stays.

    Attributes:
        name: as users write it.
        needs_data: it asks how good candidates are, so there must be data.
        resizes: it chooses among sizes of the inputs.
        grows: within limits above the original's cost it makes the network larger.
    """

    name: ClassVar[str]
    needs_data: ClassVar[bool] = False
    resizes: ClassVar[bool] = False
    grows: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            UsageError: one has the wrong type or is out of range.
        """
        validate(self, self.name)

    @abc.abstractmethod
    def prepare(self, space: Space) -> Search:
        """Everything that does not depend on limits, done once.

        Raises:
            UsageError: the network has nothing of what the strategy removes.
        """

    def smallest(self, space: Space) -> Sequence[State]:
        """The smallest networks that the strategy can make: what is cheaper than all of them cannot be reached."""
        return [space.smallest(sizes=self.resizes), space.smallest(blocks=False, sizes=self.resizes)]


def strategy(text: str) -> Strategy:
    """A strategy by what a user wrote.

    Raises:
        UsageError: there is no such strategy, or its options are malformed.
    """
    items = parse(text)
    if len(items) != 1 or items[0].body is not None:
        raise UsageError(
            f"'{text}' is no strategy; give one name, such as budgeted-greedy or teco{{step=0.1}}."
        )
    (item,) = items
    loaded = REGISTRY.load(item.name)
    if not (isinstance(loaded, type) and issubclass(loaded, Strategy) and dataclasses.is_dataclass(loaded)):
        raise UsageError(
            f"What is registered as strategy '{item.name}' is none; repair the package that has it."
        )
    values = values_of(text, item, options_of(loaded))
    found: Strategy = made(text, item, lambda: loaded(**values))
    return found
