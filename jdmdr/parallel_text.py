"""Translations of sentences and passages: read from files or from a parallel data root, and kept without repetitions.

`distill.bitext` names files and directories, separated by commas:

    ko-en.tsv, ko-en.train.tsv[.gz]   sentence TAB source sentence; the name begins with the language of the first
    NAME.csv[.gz]                     a header of language codes, then a text a cell; an empty cell is no translation
    NAME.jsonl[.gz]                   {"en": "...", "ko": "..."}
    DIR                               its files NAME.SPLIT.tsv of the split `distill.split`

The stage leaves `sources.jsonl`, a source text a line, and `LANG.jsonl`, {"text", "sources"}: a text of that language and
the lines of the source texts that it translates.
"""

from __future__ import annotations

import csv
import json
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from jdmdr import bitext, progress, reading, workdir
from jdmdr.corpus import article, passage_text, write_jsonl
from jdmdr.library import TRAIN, Library, TrainingQuery, used_in_training
from jdmdr.types import UserError

KEY = "distill.bitext"
SOURCES = "sources.jsonl"


class Translated(NamedTuple):
    """A text, and the source text that it translates."""

    lang: str
    text: str
    source: str


def files(entries: str, split: str) -> list[pathlib.Path]:
    """The files that `distill.bitext` names. Raises UserError for what is not there."""
    found: list[pathlib.Path] = []
    for entry in filter(None, (part.strip() for part in entries.split(","))):
        path = pathlib.Path(entry)
        if path.is_dir():
            found += [file for of in bitext.find(path, split).values() for file in of]
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"{KEY}: there is no file or directory {path}")
    return found


def read(path: pathlib.Path, source: str) -> Iterator[Translated]:
    """Streams the translations of a file; `source` is the code of the source language.

    Raises UserError with file and line for what is no translation, and for a file in a form that is none of the above.
    """
    name = path.name.removesuffix(".gz")
    if name.endswith(".tsv"):
        match = re.match(rf"([\w]+)-{re.escape(source)}\.", name)
        if not match:
            raise UserError(
                f"{KEY}: the name of {path} tells no language; call it LANG-{source}.tsv, or LANG-{source}.SPLIT.tsv"
            )
        yield from (Translated(match[1], *pair) for pair in bitext.pairs(path))
    elif name.endswith(".csv"):
        yield from _columns(path, _csv(path), source)
    elif name.endswith(".jsonl"):
        yield from _columns(path, _objects(path), source)
    else:
        raise UserError(f"{KEY}: {path} is no .tsv, .csv or .jsonl file")


def _csv(path: pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
    numbers, rows = [0], reading.lines(path)

    def lines() -> Iterator[str]:
        for numbers[0], line in rows:
            yield line + "\n"

    for row in csv.DictReader(lines()):
        if None in row:
            raise reading.bad_line(path, numbers[0], "more cells than the header has; quote a text that holds a comma")
        yield numbers[0], row


def _objects(path: pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in reading.lines(path):
        yield number, reading.json_object(line, path, number)


def _columns(
    path: pathlib.Path, rows: Iterable[tuple[int, dict[str, Any]]], source: str
) -> Iterator[Translated]:  # fmt: skip
    for number, row in rows:
        of_source = row.get(source)
        if not isinstance(of_source, str) or not of_source.strip():
            raise reading.bad_line(
                path, number, f"no text under {source!r}, the source language (distill.source); there are: {', '.join(map(str, row))}"
            )  # fmt: skip
        for lang, text in row.items():
            if lang != source and isinstance(text, str) and text.strip():
                yield Translated(lang, text.strip(), of_source.strip())


def of_library(library: Library, training: Sequence[TrainingQuery], source: str) -> Iterator[Translated]:
    """Passages and training queries of a parallel data root, where equal ids are translations.

    Passages are those of articles that hold positives of training queries, none of them held out; so what is evaluated on
    other articles has not been seen.
    """
    if source not in library.langs:
        raise UserError(
            f"distill.parallel needs the corpus of distill.source, {source!r}; there are: {', '.join(library.langs)}"
        )
    index = library.langs.index(source)
    own = library.collections[index]
    used = used_in_training(training, index)
    articles = {article(own.docid(int(row - library.bases[index]))) for q in used for row in q.positives}
    rows = [row for row in range(len(own)) if article(own.docid(row)) in articles]
    docids = own.docids(rows)
    for other, collection in zip(library.langs, library.collections, strict=True):
        if other == source:
            continue
        for row, theirs in zip(rows, collection.rows(docids), strict=True):
            if theirs >= 0:
                yield Translated(other, passage_text(collection.passage(theirs)), passage_text(own.passage(row)))
        texts = dict(zip(*library.queries(other, TRAIN), strict=True))
        yield from (Translated(other, texts[q.qid], q.text) for q in used if q.qid in texts)


def write(translations: Iterable[Translated], out_dir: pathlib.Path) -> dict[str, int]:
    """Writes the stage's files; returns the number of texts of every language. Equal texts are kept once, with all that
    they translate."""
    sources: dict[str, int] = {}
    langs: dict[str, dict[str, dict[int, None]]] = {}
    for lang, text, source in progress.bar(translations, "  reading", "translations"):
        row = sources.setdefault(source, len(sources))
        langs.setdefault(lang, {}).setdefault(text, {})[row] = None
    if not langs:
        raise UserError(f"{KEY} names no translation; name a file LANG-en.tsv or set distill.parallel=True")
    for lang, texts in langs.items():
        write_jsonl(out_dir / f"{lang}.jsonl", ({"text": text, "sources": [*of]} for text, of in texts.items()))
    with workdir.atomic(out_dir / SOURCES) as path, open(path, "w", encoding="utf-8") as handle:
        handle.writelines(json.dumps(text, ensure_ascii=False) + "\n" for text in sources)
    return {"sources": len(sources), **{lang: len(langs[lang]) for lang in sorted(langs)}}


def langs(directory: pathlib.Path) -> list[str]:
    """The languages of translations that the stage left, sorted."""
    return sorted(path.stem for path in directory.glob("*.jsonl") if path.name != SOURCES)


def sources(directory: pathlib.Path) -> Iterator[str]:
    return (json.loads(line) for _, line in reading.lines(directory / SOURCES))


def texts(directory: pathlib.Path, lang: str) -> Iterator[tuple[str, list[int]]]:
    """The texts of a language and the lines of what they translate."""
    rows = (json.loads(line) for _, line in reading.lines(directory / f"{lang}.jsonl"))
    return ((row["text"], row["sources"]) for row in rows)
