"""Grammar of pipeline text, without any knowledge of which passes exist.

    pipeline = [ item { "," item } ]
    item     = name [ "{" [ option { "," option } ] "}" ] [ "(" pipeline ")" ]
    option   = name "=" value | word
    value    = word | string | "[" [ scalar { "," scalar } ] "]"

A string is JSON. White space between tokens is ignored. A word alone sets the flag of that name, or the one option
that has it among its choices. Example:
`prune-channels{ratio=0.5,approximate},cast{fp16},repeat{max=3}(fold-constants,remove-dead)`.
"""

from __future__ import annotations

import dataclasses
import json
import re

from sartor.errors import UsageError
from sartor.passes.options import BARE_WORD

_TOKEN = re.compile(
    rf"""(?P<space>\s+)|(?P<string>"(?:[^"\\]|\\.)*")|(?P<word>{BARE_WORD.pattern})|(?P<mark>[,{{}}()\[\]=])""",
    re.DOTALL,
)
MAXIMUM_DEPTH = 16
"""Nesting of parentheses; text comes from command lines and files, so recursion is bounded."""


@dataclasses.dataclass(frozen=True)
class Word:
    """One scalar as written: its text, whether it was quoted, and its column (from 0)."""

    text: str
    quoted: bool
    column: int


@dataclasses.dataclass(frozen=True)
class OptionText:
    """One option as written; `is_list` tells `[a]` from `a`. A word alone is a name without words."""

    name: str
    column: int
    words: tuple[Word, ...]
    is_list: bool

    @property
    def is_bare(self) -> bool:
        """Whether it is a word alone."""
        return not self.words and not self.is_list


@dataclasses.dataclass(frozen=True)
class ItemText:
    """One item as written; `body` is None without parentheses."""

    name: str
    column: int
    options: tuple[OptionText, ...] = ()
    body: tuple[ItemText, ...] | None = None


def text_error(text: str, column: int, message: str) -> UsageError:
    """A UsageError that names the column (from 1) and carries the text with a caret as a note."""
    error = UsageError(f"{message} (at column {column + 1} of the pipeline)")
    start = max(0, column - 60)
    error.add_note(f"  {text[start : column + 60]}\n  {' ' * (column - start)}^")
    return error


def parse(text: str) -> tuple[ItemText, ...]:
    """Split pipeline text into items.

    Raises:
        UsageError: the text does not follow the grammar; names what was expected and where.
    """
    parser = _Parser(text)
    items = parser.pipeline(0)
    if parser.kind:
        raise parser.expected("',' or the end of the pipeline")
    return items


class _Parser:
    """Recursive descent over tokens; `kind` and `value` describe the current one, empty at the end."""

    def __init__(self, text: str):
        self.text = text
        self.column = 0
        self.kind = ""
        self.value = ""
        self._next = 0
        self.advance()

    def advance(self) -> None:
        while True:
            self.column = self._next
            if self.column >= len(self.text):
                self.kind = self.value = ""
                return
            match = _TOKEN.match(self.text, self.column)
            if match is None:
                character = self.text[self.column]
                what = "unterminated string" if character == '"' else f"unexpected character {character!r}"
                raise text_error(self.text, self.column, f"The pipeline has an {what}.")
            self._next = match.end()
            if match.lastgroup != "space":
                self.kind, self.value = match.lastgroup or "", match.group()
                return

    def expected(self, what: str) -> UsageError:
        found = f"'{self.value}'" if self.kind else "the end"
        return text_error(self.text, self.column, f"Expected {what}, found {found}.")

    def take(self, mark: str) -> bool:
        if self.kind == "mark" and self.value == mark:
            self.advance()
            return True
        return False

    def require(self, mark: str, what: str) -> None:
        if not self.take(mark):
            raise self.expected(what)

    def word(self, what: str) -> tuple[str, int]:
        if self.kind != "word":
            raise self.expected(what)
        found = (self.value, self.column)
        self.advance()
        return found

    def pipeline(self, depth: int) -> tuple[ItemText, ...]:
        if depth > MAXIMUM_DEPTH:
            raise text_error(self.text, self.column, f"Parentheses nest deeper than {MAXIMUM_DEPTH}.")
        if not self.kind or self.value == ")":
            return ()
        items = [self.item(depth)]
        while self.take(","):
            items.append(self.item(depth))
        return tuple(items)

    def item(self, depth: int) -> ItemText:
        name, column = self.word("the name of a pass")
        options: list[OptionText] = []
        if self.take("{") and not self.take("}"):
            options.append(self.option())
            while self.take(","):
                options.append(self.option())
            self.require("}", "',' or '}' after an option")
        body = None
        if self.take("("):
            body = self.pipeline(depth + 1)
            self.require(")", "',' or ')' after a pass")
        return ItemText(name, column, tuple(options), body)

    def option(self) -> OptionText:
        name, column = self.word("the name of an option")
        if self.kind == "mark" and self.value in ",}":
            return OptionText(name, column, (), False)
        self.require("=", f"'=' after option '{name}'")
        if not self.take("["):
            return OptionText(name, column, (self.scalar(),), False)
        words: list[Word] = []
        if not self.take("]"):
            words.append(self.scalar())
            while self.take(","):
                words.append(self.scalar())
            self.require("]", "',' or ']' in a list")
        return OptionText(name, column, tuple(words), True)

    def scalar(self) -> Word:
        if self.kind == "string":
            try:
                text = json.loads(self.value, strict=False)
            except ValueError as error:
                raise text_error(self.text, self.column, f"The string is not valid JSON: {error}.") from error
            word = Word(text, True, self.column)
        elif self.kind == "word":
            word = Word(self.value, False, self.column)
        else:
            raise self.expected("a value")
        self.advance()
        return word
