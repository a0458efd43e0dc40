"""Options of one written item: of a pass in a pipeline, or of a strategy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sartor.errors import InternalError, UsageError
from sartor.passes.options import Option, bare_words, suggestion
from sartor.passes.pipeline_text import ItemText, OptionText, text_error


def values_of(text: str, item: ItemText, options: tuple[Option, ...]) -> dict[str, Any]:
    """Values by field of what an item sets.

    Args:
        text: that the item was written in, for messages.
        item: as `sartor.passes.pipeline_text` read it.
        options: that it may set.

    Raises:
        UsageError: an option is unknown, given twice, missing or not of its type, with its column.
    """
    known = {entry.name: entry for entry in options}
    values: dict[str, Any] = {}
    for written in item.options:
        name = written.name.replace("_", "-")
        if written.is_bare:
            entry, value = _bare(text, item, options, written)
        elif name in known:
            entry, value = known[name], _value(text, item, known[name], written)
        else:
            names = ", ".join(f"'{n}'" for n in known) or "none"
            raise text_error(
                text,
                written.column,
                f"Unknown option '{written.name}' of '{item.name}'; known: {names}.{suggestion(name, known)}",
            )
        if entry.field in values:
            raise text_error(text, written.column, f"Option '{entry.name}' of '{item.name}' is given twice")
        values[entry.field] = value
    missing = [entry.name for entry in options if entry.required and entry.field not in values]
    if missing:
        raise text_error(text, item.column, f"'{item.name}' needs option '{missing[0]}'")
    return values


def _bare(text: str, item: ItemText, options: tuple[Option, ...], written: OptionText) -> tuple[Option, Any]:
    known = bare_words(options)
    name = written.name.replace("_", "-")
    if name in known or written.name in known:
        return known[name if name in known else written.name]
    if any(entry.name == name for entry in options):
        raise text_error(text, written.column, f"Expected '=' after option '{written.name}'")
    words = ", ".join(f"'{word}'" for word in known) or "none"
    raise text_error(
        text,
        written.column,
        f"'{written.name}' may not stand alone in '{item.name}'; words that may: {words}.{suggestion(name, known)}",
    )


def _value(text: str, item: ItemText, entry: Option, written: OptionText) -> Any:
    words = written.words
    column = words[0].column if words else written.column
    try:
        if not written.is_list and entry.optional and words[0].text == entry.absent and not words[0].quoted:
            return None
        if written.is_list != entry.is_tuple:
            raise ValueError("a list where one value is expected, or the reverse")
        read = [entry.from_word(word.text, quoted=word.quoted) for word in words]
        return entry.coerce(tuple(read) if entry.is_tuple else read[0])
    except ValueError as error:
        shown = ", ".join(word.text for word in words)
        observed = f"[{shown}]" if written.is_list else shown
        raise text_error(
            text,
            column,
            f"Option '{entry.name}' of '{item.name}' must be {entry.allowed_text}, got '{observed}'",
        ) from error


def made(text: str, item: ItemText, make: Callable[[], Any]) -> Any:
    """What `make` gives; a rule over several options that it finds broken is located in the text."""
    try:
        return make()
    except InternalError:
        raise
    except UsageError as error:  # a rule over several options
        raise text_error(text, item.column, str(error).rstrip(".")) from error
