"""Options of a pass: dataclass fields with declared type, unit, range and choices, checked and printed here.

One definition gives the constructor, the pipeline text, the error text and the documentation.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from sartor.errors import InternalError, UsageError

_METADATA = "sartor.option"
BARE_WORD = re.compile(r"[A-Za-z0-9_./*?:+\-]+")
"""Text of an option that needs no quotes in a pipeline."""
_SCALARS = (bool, int, float, str)


class _Required:
    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED: Any = _Required()
"""Default of an option that must be given."""


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of a pass.

    Attributes:
        field: field name, snake_case.
        scalar: bool, int, float or str; the element type when `is_tuple`.
        is_tuple: the value is a tuple of `scalar` of any length.
        optional: None is allowed.
        default: default value, or `REQUIRED`.
        help: one sentence for people.
        unit: unit of the number, e.g. `bytes`; empty for pure numbers.
        minimum, maximum: inclusive bounds.
        above, below: exclusive bounds.
        choices: allowed values; empty means any.
        bare: how a choice reads as a word alone in a pipeline, with `{}` for its value.
        absent: the word for None.
    """

    field: str
    scalar: type
    is_tuple: bool = False
    optional: bool = False
    default: Any = REQUIRED
    help: str = ""
    unit: str = ""
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[Any, ...] = ()
    bare: str = "{}"
    absent: str = "none"

    @property
    def name(self) -> str:
        """Name in pipeline text, kebab-case."""
        return self.field.replace("_", "-")

    @property
    def required(self) -> bool:
        """Whether the option has no default."""
        return self.default is REQUIRED

    @property
    def type_text(self) -> str:
        """Type as people read it: `int`, `[str, …]`, `float or none`."""
        text = f"[{self.scalar.__name__}, …]" if self.is_tuple else self.scalar.__name__
        return f"{text} or {self.absent}" if self.optional else text

    @property
    def allowed_text(self) -> str:
        """Type, unit, range and choices in one phrase for messages and documentation."""
        if self.choices:
            return f"one of {', '.join(str(c) for c in self.choices)}"
        low = f"≥ {self.minimum:g}" if self.minimum is not None else ""
        low = f"> {self.above:g}" if self.above is not None else low
        high = f"≤ {self.maximum:g}" if self.maximum is not None else ""
        high = f"< {self.below:g}" if self.below is not None else high
        bounds = " and ".join(part for part in (low, high) if part)
        return " ".join(part for part in (self.type_text, bounds, self.unit and f"({self.unit})") if part)

    def coerce(self, value: Any) -> Any:
        """`value` in canonical form, or raise.

        An int is accepted for a float and a list for a tuple; nothing else is converted.

        Raises:
            ValueError: wrong type, out of range, or not among the choices.
        """
        if value is None and self.optional:
            return None
        if self.is_tuple:
            if isinstance(value, str) or not isinstance(value, (tuple, list)):
                raise ValueError("not a list")
            return tuple(self._coerce_scalar(item) for item in value)
        return self._coerce_scalar(value)

    def _coerce_scalar(self, value: Any) -> Any:
        if self.scalar is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        # bool is a subclass of int in Python, but `seed=true` is a mistake
        if type(value) is not self.scalar:
            raise ValueError("wrong type")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError("not finite")
        if isinstance(value, (int, float)) and not self._within_bounds(value):
            raise ValueError("out of range")
        if self.choices and value not in self.choices:
            raise ValueError("not a choice")
        return value

    def _within_bounds(self, number: float) -> bool:
        return (
            (self.minimum is None or number >= self.minimum)
            and (self.maximum is None or number <= self.maximum)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        )

    def to_text(self, value: Any) -> str:
        """`value` as pipeline text; `from_tokens` reads it back."""
        if value is None:
            return self.absent
        if self.is_tuple:
            return "[" + ",".join(self._scalar_to_text(item) for item in value) + "]"
        return self._scalar_to_text(value)

    def _scalar_to_text(self, value: Any) -> str:
        if isinstance(value, bool):
            return "true" if value else "false"
        if isinstance(value, str):
            if BARE_WORD.fullmatch(value) and not (self.optional and value == self.absent):
                return value
            return json.dumps(value, ensure_ascii=False)
        return repr(value)

    def from_word(self, word: str, *, quoted: bool) -> Any:
        """Read one scalar from text; a quoted word is always a string.

        Raises:
            ValueError: the word is not of this option's type.
        """
        if quoted:
            if self.scalar is not str:
                raise ValueError("wrong type")
            return word
        if self.scalar is str:
            return word
        if self.scalar is bool:
            if word not in ("true", "false"):
                raise ValueError("wrong type")
            return word == "true"
        # Python's int() and float() accept '1_000', ' 1' and 'nan', which do not round-trip.
        pattern = r"[+-]?\d+" if self.scalar is int else r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?"
        if not re.fullmatch(pattern, word, re.ASCII):
            raise ValueError("wrong type")
        return self.scalar(word)


def bare_words(options: Iterable[Option]) -> dict[str, tuple[Option, Any]]:
    """Words that may stand alone, each with what it sets: names of flags, and choices of one option only."""
    single = [entry for entry in options if not entry.is_tuple]
    chosen = [(entry.bare.format(choice), entry, choice) for entry in single for choice in entry.choices]
    spelled = [word for word, _, _ in chosen]
    words = {word: (entry, choice) for word, entry, choice in chosen if spelled.count(word) == 1}
    return words | {entry.name: (entry, True) for entry in single if entry.scalar is bool}


def option(
    default: Any = REQUIRED,
    *,
    help: str,
    unit: str = "",
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: Sequence[Any] = (),
    bare: str = "{}",
    absent: str = "none",
) -> Any:
    """A dataclass field that is an option of a pass.

    Args:
        default: default value; without it the option must be given.
        help: one sentence for people; it appears in the generated documentation.
        unit: unit of a number, e.g. `bytes`.
        minimum: smallest allowed value.
        maximum: largest allowed value.
        above: exclusive lower bound.
        below: exclusive upper bound.
        choices: allowed values.
        bare: how a choice reads as a word alone, `"int{}"` for `quantize{int8}`.
        absent: the word for None, of an option that may be None.
    """
    declared = {
        "help": help,
        "unit": unit,
        "minimum": minimum,
        "maximum": maximum,
        "above": above,
        "below": below,
        "choices": tuple(choices),
        "bare": bare,
        "absent": absent,
    }
    field_default = dataclasses.MISSING if default is REQUIRED else default
    return dataclasses.field(default=field_default, metadata={_METADATA: declared})


@functools.cache
def options_of(cls: Any) -> tuple[Option, ...]:
    """Options of a pass class, in declaration order.

    Raises:
        InternalError: a field has a type that pipeline text cannot express.
    """
    hints = typing.get_type_hints(cls)
    return tuple(_describe(cls, field, hints[field.name]) for field in dataclasses.fields(cls) if field.init)


def _describe(cls: type, field: dataclasses.Field[Any], hint: Any) -> Option:
    optional = False
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        arguments = [a for a in typing.get_args(hint) if a is not type(None)]
        optional = len(arguments) < len(typing.get_args(hint))
        hint = arguments[0] if len(arguments) == 1 else hint
    is_tuple = typing.get_origin(hint) is tuple
    if is_tuple:
        arguments = list(typing.get_args(hint))
        hint = arguments[0] if len(arguments) == 2 and arguments[1] is Ellipsis else hint
    if hint not in _SCALARS:
        raise InternalError(
            f"Option '{field.name}' of pass class '{cls.__name__}' has type {hint!r}; expected bool, int, "
            "float, str, a tuple[T, ...] of one of them, or one of these with None."
        )
    default = REQUIRED if field.default is dataclasses.MISSING else field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    return Option(
        field.name, hint, is_tuple, optional, default=default, **dict(field.metadata.get(_METADATA, {}))
    )


def validate(instance: Any, owner: str) -> None:
    """Check every option of a frozen dataclass instance and store its canonical form.

    Raises:
        UsageError: an option has the wrong type, is out of range or not among its choices.
    """
    for entry in options_of(type(instance)):  # type: ignore[arg-type]  # a class is hashable
        value = getattr(instance, entry.field)
        try:
            canonical = entry.coerce(value)
        except ValueError as error:
            raise UsageError(
                f"Option '{entry.name}' of '{owner}' must be {entry.allowed_text}, got {value!r}."
            ) from error
        object.__setattr__(instance, entry.field, canonical)


def suggestion(word: str, known: Iterable[str], describe: Callable[[str], str] = repr) -> str:
    """`' Did you mean 'x'?'` when a known word is close, else an empty string."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {describe(matches[0])}?" if matches else ""
