"""The append-only log of what a language model answered, and the index by which an answer is found again.

    calls.jsonl     one JSON object a call, in the order of arrival; nothing in it is ever changed
    index.sqlite    content key -> place in the log; made anew from the log whenever the two disagree

The log alone is what counts: a line that a kill or a full disk cut off is dropped when the log is next opened, and the call
that it belonged to is sent again. No key of a server and no header is ever written.
"""

from __future__ import annotations

import errno
import json
import os
import pathlib
import sqlite3
from collections.abc import Iterator
from typing import Any, NamedTuple

from jdmdr import progress
from jdmdr.types import UserError

LOG, INDEX = "calls.jsonl", "index.sqlite"
_TABLES = """
CREATE TABLE IF NOT EXISTS calls (key BLOB PRIMARY KEY, place INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS totals (one INTEGER PRIMARY KEY CHECK (one = 1), read INTEGER, answers INTEGER,
    requests INTEGER, bytes INTEGER, tokens_in INTEGER, tokens_out INTEGER, cost REAL, seconds REAL);
INSERT OR IGNORE INTO totals VALUES (1, 0, 0, 0, 0, 0, 0, 0, 0);
"""


class Totals(NamedTuple):
    """Of all that the log holds."""

    answers: int  # replies of the model, usable or not
    requests: int  # sent for them and for what was given up, repetitions included
    bytes: int  # UTF-8 of the prompts
    tokens_in: int
    tokens_out: int
    cost: float  # at the prices of each call's day
    seconds: float  # waited for replies, summed over the calls


class Log:
    """The log under `directory`, opened for reading and appending by this process alone."""

    def __init__(self, directory: pathlib.Path):
        self.path = directory / LOG
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115 - closed by `close`
        except OSError as error:
            raise UserError(f"llm.cache {directory}: {error.strerror}; name a directory that can be written") from error
        self._drop_cut_line()
        try:
            self._index = self._open_index()
            self._catch_up()
        except sqlite3.DatabaseError:
            self._renew_index()

    def get(self, key: str) -> dict[str, Any] | None:
        """The last record of a call: its answer, or the error for which it was given up; None where there is none."""
        try:
            found = self._index.execute("SELECT place FROM calls WHERE key = ?", (bytes.fromhex(key),)).fetchone()
        except sqlite3.DatabaseError:
            self._renew_index()
            return self.get(key)
        if not found:
            return None
        self._file.seek(found[0])
        record = _parsed(self._file_line())
        if record is None or record.get("key") != key:  # another log was put in this one's place
            self._renew_index()
            return self.get(key)
        return record

    def add(self, record: dict[str, Any]) -> None:
        """Appends one record in one write, so that a kill leaves it whole or cut, never mixed with another."""
        line = json.dumps(record, ensure_ascii=False, sort_keys=True).encode("utf-8", "backslashreplace") + b"\n"
        place = self._file.seek(0, os.SEEK_END)
        written = self._file.write(line)
        if written != len(line):
            os.truncate(self.path, place)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        self._enter(record, place, place + len(line))

    @property
    def totals(self) -> Totals:
        return Totals(*self._index.execute(f"SELECT {', '.join(Totals._fields)} FROM totals").fetchone())

    def close(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()
        self._index.close()

    def _enter(self, record: dict[str, Any], place: int, end: int) -> None:
        if record:
            self._index.execute("INSERT OR REPLACE INTO calls VALUES (?, ?)", (bytes.fromhex(record["key"]), place))
        of = [record.get(field, 0) for field in Totals._fields[1:]]
        self._index.execute(
            "UPDATE totals SET read = ?, answers = answers + ?, requests = requests + ?, bytes = bytes + ?, tokens_in = tokens_in + ?, "
            "tokens_out = tokens_out + ?, cost = cost + ?, seconds = seconds + ?",
            (end, int("text" in record), *of),
        )

    def _open_index(self) -> sqlite3.Connection:
        index = sqlite3.connect(self.path.with_name(INDEX), isolation_level=None, check_same_thread=False)
        index.execute("PRAGMA locking_mode = EXCLUSIVE")  # the directory is this process's, on shared file systems too
        index.execute("PRAGMA journal_mode = WAL")
        index.execute("PRAGMA synchronous = OFF")  # what a power cut loses of it is read from the log again
        index.executescript(_TABLES)
        return index

    def _renew_index(self) -> None:
        if hasattr(self, "_index"):
            self._index.close()
        for path in self.path.parent.glob(f"{INDEX}*"):
            path.unlink()
        self._index = self._open_index()
        self._catch_up()

    def _catch_up(self) -> None:
        """Enters what stands in the log behind the last entry of the index."""
        (read,) = self._index.execute("SELECT read FROM totals").fetchone()
        size = self.path.stat().st_size
        if read > size:
            raise sqlite3.DatabaseError("the log is shorter than what the index has read of it")
        self._index.execute("BEGIN")
        damaged = 0
        for place, line in self._lines(read):
            record = _parsed(line)
            damaged += record is None
            self._enter(record or {}, place, place + len(line))
        self._index.execute("COMMIT")
        if damaged:
            progress.say(
                f"  warning: {self.path} has {damaged} lines that are no record; their calls count as not made"
            )

    def _lines(self, start: int) -> Iterator[tuple[int, bytes]]:
        with open(self.path, "rb") as file:
            file.seek(start)
            for line in file:
                yield start, line
                start += len(line)

    def _file_line(self) -> bytes:
        parts = []
        while block := self._file.read(4096):
            parts.append(block)
            if b"\n" in block:
                break
        return b"".join(parts).partition(b"\n")[0]

    def _drop_cut_line(self) -> None:
        size = self._file.seek(0, os.SEEK_END)
        end = size
        while end:  # to behind the last newline
            start = max(0, end - 65536)
            self._file.seek(start)
            found = self._file.read(end - start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
        if end < size:
            progress.say(f"  {self.path}: the last line was cut off and is dropped")
            os.truncate(self.path, end)


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
        return record if isinstance(record, dict) and len(bytes.fromhex(record["key"])) == 32 else None
    except (ValueError, KeyError, TypeError):
        return None
