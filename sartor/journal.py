"""An append-only journal of measurements and decisions, one JSON document per line.

Every record is flushed to disk before `append` returns, so that a run that was killed can be resumed from
what it already measured. A last line that was torn by the kill is dropped; a damaged line anywhere else is
an error, because something other than a kill has edited the file.

The first line is the header: `{"schema": "sartor.journal/1", "key": ...}`. The key names what was measured
(model, target, versions, options); a journal with another key is not resumed.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sartor.errors import UsageError

SCHEMA = "sartor.journal/1"


class Journal:
    """Records of one run, kept in `path`.

    Args:
        path: the JSONL file; it is created with its folder.
        key: JSON value that identifies the run. An existing journal with another key starts afresh.

    Raises:
        UsageError: the file is no journal, is damaged, or another process is writing it.
    """

    def __init__(self, path: str | os.PathLike[str], key: Any):
        self.path = Path(path)
        self.key = json.loads(json.dumps(key, sort_keys=True))
        self._records: list[dict[str, Any]] = []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = open(self.path, "a+b")  # noqa: SIM115  (kept open and locked until close)
        try:
            try:
                fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UsageError(
                    f"The journal '{self.path}' is being written by another process; wait for it or choose "
                    "another --out."
                ) from error
            self._restore()
        except BaseException:
            self._stream.close()
            raise

    @property
    def records(self) -> tuple[dict[str, Any], ...]:
        """All records so far, resumed ones first."""
        return tuple(self._records)

    def append(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Add a record and wait until it is on disk.

        Args:
            kind: what it is, e.g. `measurement` or `decision`.
            fields: JSON values; NaN and infinity are refused.
        """
        record = {"kind": kind, "time_unix_s": round(time.time(), 3), **fields}
        self._write(record)
        record = json.loads(json.dumps(record))
        self._records.append(record)
        return record

    def find(self, kind: str, **fields: Any) -> dict[str, Any] | None:
        """The latest record of `kind` whose given fields are equal, or None."""
        wanted = json.loads(json.dumps(fields))
        for record in reversed(self._records):
            if record.get("kind") == kind and all(record.get(k) == v for k, v in wanted.items()):
                return record
        return None

    def clear(self) -> None:
        """Forget every record and start afresh, under the same key."""
        self._records = []
        self._stream.truncate(0)
        self._write({"schema": SCHEMA, "key": self.key})

    def close(self) -> None:
        """Close the file and give up its lock."""
        self._stream.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _restore(self) -> None:
        self._stream.seek(0)
        content = self._stream.read()
        header, records, good_bytes = parse(content, str(self.path))
        if header is not None and header.get("key") == self.key:
            self._stream.truncate(good_bytes)
            self._records = records
        else:
            self.clear()

    def _write(self, document: Mapping[str, Any]) -> None:
        line = json.dumps(document, allow_nan=False, sort_keys=True) + "\n"
        self._stream.write(line.encode())
        self._stream.flush()
        os.fsync(self._stream.fileno())


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], ...]:
    """The records of a journal, without locking or changing it.

    Raises:
        UsageError: the file cannot be read, is no journal or is damaged.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"The journal '{path}' cannot be read: {error.strerror}.") from error
    header, records, _ = parse(content, str(path))
    if header is None:
        raise UsageError(f"'{path}' is empty; expected a journal of schema '{SCHEMA}'.")
    return tuple(records)


def parse(content: bytes, name: str) -> tuple[dict[str, Any] | None, list[dict[str, Any]], int]:
    """Header, records and the number of leading bytes that are whole lines.

    Raises:
        UsageError: a whole line is not a JSON object, or the header is of another schema.
    """
    documents: list[dict[str, Any]] = []
    good_bytes = 0
    for number, line in enumerate(content.splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break  # torn by a kill: append writes the newline last
        try:
            document = json.loads(line)
        except ValueError:
            document = None
        if not isinstance(document, dict):
            raise UsageError(f"Line {number} of the journal '{name}' is damaged; move the file away.")
        documents.append(document)
        good_bytes += len(line)
    if not documents:
        return None, [], 0
    if documents[0].get("schema") != SCHEMA:
        raise UsageError(f"'{name}' is not a journal of schema '{SCHEMA}'; move the file away.")
    return documents[0], documents[1:], good_bytes
