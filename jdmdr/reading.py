"""Reads the files of a data root into the nouns of `types.py`; every complaint names the file and the line.

Accepted without a word: gzip or not whatever the name says, several gzip members, a byte order mark, CRLF, blank lines,
no final line end, any character inside a string. Only the byte "\\n" ends a line: U+2028, U+0085 and their like are
text. A lone surrogate (a `\\ud800` escape), which is no Unicode text, becomes U+FFFD.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from jdmdr.types import Passage, Query, UserError

Qrels = dict[str, dict[str, int]]  # qid -> docid -> relevance

FIELDS = ("title", "text")  # of a passage, that are its text
TREC = ["qid", "Q0", "docid", "rel"]
BEIR_HEADER = ["query-id", "corpus-id", "score"]
PASSAGE_FIELDS = {"docid": "text", "_id": "text", "id": "contents"}  # id and text: MIRACL; BEIR; Mr. TyDi, Pyserini
TSV_FIELDS = {2: ("docid", "text"), 4: ("docid", "url", "title", "text")}  # MS MARCO's passages; its documents
DPR_HEADER = ["id", "text", "title"]  # of DPR's passages, psgs_w100.tsv, whose fields may stand in quotes
BLANK = " "

OnError = Callable[[UserError], None] | None  # what is told of a line that cannot be read; None: the error is raised
Record = TypeVar("Record")

_BUFFER = 1 << 20
_TELL_EVERY = 2048  # lines
_LARGEST = 1 << 28  # characters of an object in a JSON list
_BOM = b"\xef\xbb\xbf"


class TrainRow(NamedTuple):
    """A training query with the docids of its positives and its judged negatives."""

    query: Query
    positives: list[str]
    negatives: list[str]


def lines(path: Path, on_bytes: Callable[[int], None] | None = None) -> Iterator[tuple[int, str]]:
    """Streams the non-blank lines of a UTF-8 file with their numbers, from 1.

    `on_bytes` is told now and then how many bytes of the file have been read. Raises UserError for a damaged gzip file,
    for what is not UTF-8, and for a file that cannot be opened.
    """
    number = 0
    try:
        with open(path, "rb", _BUFFER) as handle:
            gzipped = handle.peek(2)[:2] == b"\x1f\x8b"
            stream = io.BufferedReader(gzip.GzipFile(fileobj=handle), _BUFFER) if gzipped else handle
            for number, line in enumerate(stream, 1):
                if on_bytes and number % _TELL_EVERY == 0:
                    on_bytes(handle.raw.tell())
                line = line.removeprefix(_BOM).removesuffix(b"\n").removesuffix(b"\r")
                if line and not line.isspace():
                    yield number, line.decode()
    except UnicodeDecodeError as error:
        raise bad_line(path, number, f"byte 0x{error.object[error.start]:02x} at offset {error.start} is not UTF-8; "
                                     "convert the file to UTF-8") from error  # fmt: skip
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: the gzip data is cut off or damaged after line {number} ({error}); "
                        "copy or download the file again") from error  # fmt: skip
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); a readable file is expected there") from error


def json_list(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Streams the objects of a file that holds one JSON list, gzipped or not, with their numbers, from 1.

    Held are an object and about as much of the file again. Raises UserError for what is no list of objects.
    """
    decoder, number = json.JSONDecoder(), 0
    try:
        with _text(path) as text:
            held, place = text.read(_BUFFER).lstrip(), 1
            if held[:1] != "[":
                raise UserError(f"{path} is no JSON list; it starts with {_short(held[:20])}")
            while True:
                place += re.compile(r"[\s,]*").match(held, place).end() - place
                if held[place : place + 1] == "]":
                    return
                try:
                    row, end = decoder.raw_decode(held, place)
                except json.JSONDecodeError as error:
                    held, place = held[place:], 0
                    inside = (
                        error.msg.startswith("Unterminated")
                        or error.pos - (len(error.doc) - len(held)) > len(held) - 16
                    )
                    more = text.read(max(_BUFFER, len(held))) if inside and len(held) < _LARGEST else ""
                    if not more:
                        raise UserError(
                            f"{path}, entry {number + 1}: not valid JSON, or cut off ({error.msg})"
                        ) from error
                    held += more
                    continue
                if type(row) is not dict:
                    raise UserError(f"{path}, entry {number + 1}: {_short(row)} where a JSON object is expected")
                number, place = number + 1, end
                yield number, row
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: behind entry {number} stands what is not UTF-8; convert the file to UTF-8") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"{path}: the gzip data is cut off or damaged behind entry {number}; copy the file again"
        ) from error
    except RecursionError as error:
        raise UserError(f"{path}, entry {number + 1}: JSON that is nested too deep") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); a readable file is expected there") from error


def is_json_list(path: Path) -> bool:
    """Whether the file begins as a JSON list does."""
    try:
        with _text(path) as text:
            return text.read(_TELL_EVERY).lstrip()[:1] == "["
    except (OSError, EOFError, zlib.error, UnicodeDecodeError):
        return False  # whoever reads it tells


@contextlib.contextmanager
def _text(path: Path) -> Iterator[io.TextIOWrapper]:
    with open(path, "rb", _BUFFER) as handle:
        gzipped = handle.peek(2)[:2] == b"\x1f\x8b"
        yield io.TextIOWrapper(gzip.GzipFile(fileobj=handle) if gzipped else handle, "utf-8-sig")


def csv_fields(line: str, count: int) -> list[str]:
    """The `count` fields between TABs, quoted or not, of a line; where quotation marks do not give so many, they are text."""
    try:
        fields = next(csv.reader([line], delimiter="\t"))
    except csv.Error:
        return line.split("\t")
    return fields if len(fields) == count else line.split("\t")


def passages(path: Path, fields: Sequence[str] = FIELDS, separator: str = BLANK) -> Iterator[Passage]:
    """Streams the passages of a corpus shard; a title that is absent or null is empty.

    A row is {"docid", "title", "text"}, {"_id", "title", "text"} (BEIR) or {"id", "contents"} (Mr. TyDi), whose contents
    are the title, an empty line and the text; in a .tsv file `docid TAB text` or `docid TAB url TAB title TAB text` (MS
    MARCO), without the blanks at a field's end, or under the header `id TAB text TAB title` those three (DPR). The text is the `fields` joined by `separator`. A title that is the first
    of them stands apart as the passage's title.
    """
    return (passage for _, passage in numbered_passages(path, fields=fields, separator=separator))


def numbered_passages(
    path: Path, on_error: OnError = None, on_bytes: Callable[[int], None] | None = None,
    fields: Sequence[str] = FIELDS, separator: str = BLANK,
) -> Iterator[tuple[int, Passage]]:  # fmt: skip
    """As `passages`, each with the number of its line."""
    row_of, header = json_object, False
    if ".tsv" in path.suffixes:
        header = next(lines(path), (0, ""))[1].split("\t") == DPR_HEADER
        row_of = _dpr_row if header else _tsv_row
    records = _records(path, functools.partial(_passage, fields, separator, row_of), on_error, on_bytes)
    yield from itertools.islice(records, int(header), None)


def train_rows(path: Path, on_error: OnError = None) -> Iterator[TrainRow]:
    """Streams training rows: {"query_id", "query", "positive_passages", "negative_passages"}; only docids are kept."""
    first: dict[str, int] = {}

    def train_row(line: str, path: Path, number: int) -> TrainRow:
        row = json_object(line, path, number)
        query = Query(_id(row, "query_id", path, number), _string(row, "query", path, number))
        _once(first, query.qid, "query_id", path, number)
        positives = _docids(row, "positive_passages", path, number)
        negatives = _docids(row, "negative_passages", path, number) if "negative_passages" in row else []
        return TrainRow(query, positives, negatives)

    return (row for _, row in _records(path, train_row, on_error))


def topics(path: Path, on_error: OnError = None) -> list[Query]:
    """Reads topics, `qid TAB query`, each qid once; blanks at a query's end are no part of it."""
    first: dict[str, int] = {}

    def topic(line: str, path: Path, number: int) -> Query:
        fields = line.split("\t")
        if len(fields) != 2:
            raise bad_line(path, number, f"{len(fields)} TAB-separated fields where 2 are expected: qid TAB query")
        _check_id(fields[0], "qid", path, number)
        _once(first, fields[0], "qid", path, number)
        return Query(fields[0], fields[1].rstrip())

    return [topic for _, topic in _records(path, topic, on_error)]


def queries(path: Path, on_error: OnError = None) -> list[Query]:
    """Reads the queries of a BEIR data set, {"_id", "text"}, each _id once."""
    first: dict[str, int] = {}

    def query(line: str, path: Path, number: int) -> Query:
        row = json_object(line, path, number)
        found = Query(_id(row, "_id", path, number), _string(row, "text", path, number))
        _once(first, found.qid, "_id", path, number)
        return found

    return [query for _, query in _records(path, query, on_error)]


def qrels(path: Path, on_error: OnError = None) -> tuple[Qrels, int]:
    """Reads TREC judgments `qid Q0 docid rel`, separated by blanks or TABs, or BEIR's, three columns under a header.

    A pair judged twice keeps the higher relevance; the second value counts the pairs judged differently.
    """
    judged: Qrels = {}
    conflicts, form = 0, TREC

    def judgment(line: str, path: Path, number: int) -> tuple[str, str, int] | None:
        nonlocal form
        if number == 1 and line.strip().split("\t") == BEIR_HEADER:
            form = BEIR_HEADER
            return None
        return _judgment(line, form, path, number)

    for _, found in _records(path, judgment, on_error):
        if found:
            conflicts += judge(judged, *found)
    return judged, conflicts


def judge(judged: Qrels, qid: str, docid: str, rel: int) -> bool:
    """Adds a judgment, the higher one of two; says whether an earlier one differed."""
    of_query = judged.setdefault(qid, {})
    before = of_query.get(docid, rel)
    of_query[docid] = max(before, rel)
    return before != rel


def clean(text: str) -> str:
    """Replaces lone surrogates by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def bad_line(path: Path, number: int, what: str) -> UserError:
    return UserError(f"{path}, line {number}: {what}")


def _records(
    path: Path,
    parse: Callable[[str, Path, int], Record],
    on_error: OnError,
    on_bytes: Callable[[int], None] | None = None,
) -> Iterator[tuple[int, Record]]:
    for number, line in lines(path, on_bytes):
        try:
            record = parse(line, path, number)
        except UserError as error:
            if on_error is None:
                raise
            on_error(error)
        else:
            yield number, record


def _passage(
    fields: Sequence[str], separator: str, row_of: Callable[[str, Path, int], dict[str, Any]], line: str, path: Path,
    number: int,
) -> Passage:  # fmt: skip
    row = row_of(line, path, number)
    key = next((key for key in PASSAGE_FIELDS if key in row), "docid")
    docid, text = _id(row, key, path, number), _string(row, PASSAGE_FIELDS[key], path, number)
    title = "" if row.get("title") is None else _string(row, "title", path, number)
    if PASSAGE_FIELDS[key] == "contents" and "title" not in row:
        title, _, text = text.partition("\n\n") if "\n\n" in text else ("", "", text)
    apart = fields[0] == "title"
    known = {"title": title, "text": text}
    texts = [known[name] if name in known else _string(row, name, path, number) for name in fields[apart:]]
    return Passage(docid, title if apart else "", separator.join(texts), separator if apart else BLANK)


def _tsv_row(line: str, path: Path, number: int) -> dict[str, Any]:
    values = [value.rstrip() for value in line.split("\t")]
    if len(values) not in TSV_FIELDS:
        forms = " or ".join(" TAB ".join(names) for names in TSV_FIELDS.values())
        raise bad_line(path, number, f"{len(values)} TAB-separated fields where {forms} is expected")
    return dict(zip(TSV_FIELDS[len(values)], values, strict=True))


def _dpr_row(line: str, path: Path, number: int) -> dict[str, Any]:
    values = csv_fields(line, len(DPR_HEADER))
    if len(values) != len(DPR_HEADER):
        raise bad_line(path, number, f"{len(values)} TAB-separated fields where {' TAB '.join(DPR_HEADER)} is expected")
    docid, text, title = values
    return {"docid": docid, "title": title, "text": text}


def _judgment(line: str, form: list[str], path: Path, number: int) -> tuple[str, str, int]:
    fields = line.split("\t") if form is BEIR_HEADER else re.split(r"[ \t]+", line.strip(" \t"))
    if len(fields) != len(form):
        hint = "; three columns need the header line query-id TAB corpus-id TAB score" if len(fields) == 3 else ""
        raise bad_line(path, number, f"{len(fields)} fields where {len(form)} are expected: {' '.join(form)}{hint}")
    qid, docid, rel = fields[0], fields[-2], fields[-1]
    _check_id(qid, "qid", path, number)
    _check_id(docid, "docid", path, number)
    if not re.fullmatch(r"[+-]?[0-9]{1,9}", rel):
        raise bad_line(path, number, f"the relevance {_short(rel)} is not a whole number; write 0 or 1")
    return qid, docid, int(rel)


def json_object(line: str, path: Path, number: int) -> dict[str, Any]:
    """The JSON object of a line; raises UserError where there is none."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        fault = error.msg.removesuffix(" at")
        raise bad_line(path, number, f"not valid JSON ({fault}, column {error.colno}); write one object "
                                     "a line, with control characters escaped") from error  # fmt: skip
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, endless nesting
        raise bad_line(path, number, f"JSON that cannot be read ({error}); shorten the value") from error
    if type(row) is not dict:
        raise bad_line(path, number, f"{_short(row)} where a JSON object is expected; write one object a line")
    return row


def _string(row: dict[str, Any], key: str, path: Path, number: int) -> str:
    value = row.get(key)
    if type(value) is str:
        return clean(value)
    if key not in row:
        raise bad_line(path, number, f"the field {key!r} is missing (there are: {_short(list(row))}); add it")
    raise bad_line(path, number, f"{key!r} is {_short(value)} where a string is expected; write it in quotes")


def _id(row: dict[str, Any], key: str, path: Path, number: int) -> str:
    value = row.get(key)
    if key in row and type(value) is not str:
        raise bad_line(path, number, f"{key!r} is {_short(value)}, and ids are strings; write it in quotes")
    value = _string(row, key, path, number)
    _check_id(value, key, path, number)
    return value


def _check_id(value: str, key: str, path: Path, number: int) -> None:
    """Refuses what would break a TREC file or the C code that scores one."""
    if not value:
        raise bad_line(path, number, f"{key!r} is empty; each row needs its own")
    if value.split() != [value] or "\0" in value:
        raise bad_line(path, number, f"{key!r} is {_short(value)}; an id holds no white space and no NUL, rename it")


def _docids(row: dict[str, Any], key: str, path: Path, number: int) -> list[str]:
    if key not in row:
        raise bad_line(path, number, f"the field {key!r} is missing (there are: {_short(list(row))}); add it")
    found = row[key]
    if type(found) is not list or not all(type(passage) is dict for passage in found):
        raise bad_line(path, number, f"{key!r} is {_short(found)} where a list of passages is expected; "
                                     'write [{"docid": ..., "title": ..., "text": ...}]')  # fmt: skip
    return [_id(passage, "docid", path, number) for passage in found]


def _once(first: dict[str, int], qid: str, key: str, path: Path, number: int) -> None:
    before = first.setdefault(qid, number)
    if before != number:
        raise bad_line(path, number, f"the {key} {_short(qid)} was used before, in line {before}; make it unique")


def _short(value: Any) -> str:
    """A value as JSON, cut to one short line in which blanks that look alike can be told apart."""
    text = json.dumps(value, ensure_ascii=False)
    text = text if len(text) <= 60 else text[:57] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
