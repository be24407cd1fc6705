"""Cuts the articles of an extracted Wikipedia into passages of a fixed number of tokens: the corpus of a data root.

    python -m jdmdr.cut_passages EXTRACTED --lang=ko --out=DIR --tokenizer=intfloat/multilingual-e5-small

    EXTRACTED          what wikiextractor wrote: a file wiki_* or a directory of them, `<doc id= url= title=>` blocks or, with
                       its --json, an object a line; gzip or not
    --lang CODE        the language; the passages go to DIR/corpus/CODE.jsonl
    --tokenizer NAME   a Hugging Face name or directory: the one that will embed them
    --tokens N         at most so many a passage, special tokens not counted; 126 by default
    --overlap N        tokens of a passage that the next one repeats; 0 by default

A passage ends where a word ends, as long as its second half has such a place; in scripts without blanks between words it ends
with a token. It is what the article says between two of its characters, so that text and tokens cannot differ, and tokenised
alone it has no more than N tokens. docid = ARTICLE#NUMBER; the title stands apart (--config.data.fields=text leaves it out).
Articles of fewer than 5 tokens and passages of fewer than 2 are left out. Articles are streamed.
"""

from __future__ import annotations

import html
import json
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from absl import flags

from jdmdr import cli, progress, reading, workdir
from jdmdr.corpus import passage_row, write_jsonl
from jdmdr.types import Passage, UserError

LEAST_ARTICLE, LEAST_PASSAGE = 5, 2  # tokens
_DOC = re.compile(r'<doc id="([^"]*)" url="[^"]*" title="(.*)">')


class Article(NamedTuple):
    id: str
    title: str
    text: str  # its lines joined by line ends


def files(source: pathlib.Path) -> list[pathlib.Path]:
    """The file itself, or those called wiki_* under a directory, in order."""
    if source.is_file():
        return [source]
    found = sorted(path for path in source.rglob("wiki_*") if path.is_file()) if source.is_dir() else []
    if not found:
        raise UserError(f"{source} is no file and holds none called wiki_*; name what wikiextractor wrote")
    return found


def read(path: pathlib.Path) -> Iterator[Article]:
    """Streams the articles of a file; raises UserError with file and line for what is no article."""
    open_, lines = None, []
    for number, line in reading.lines(path):
        if open_ is None and line.startswith("{"):
            row = reading.json_object(line, path, number)
            if not all(isinstance(row.get(key), str) for key in ("id", "title", "text")):
                raise reading.bad_line(
                    path, number, "no id, title and text, all strings, as wikiextractor --json writes them"
                )
            yield Article(row["id"], row["title"], row["text"])
        elif open_ is None:
            open_ = _DOC.fullmatch(line.strip())
            if not open_:
                raise reading.bad_line(
                    path, number, f'{line[:60]!r} where <doc id="..." url="..." title="..."> is expected'
                )
        elif line.strip() == "</doc>":
            title = html.unescape(open_[2])
            body = lines[1:] if lines and html.unescape(lines[0]).strip() == title.strip() else lines
            yield Article(open_[1], title, "\n".join(body))
            open_, lines = None, []
        else:
            lines.append(line)
    if open_:
        raise UserError(f"{path}: article {open_[1]!r} has no </doc>; the file is cut off, extract it again")


class Chunker:
    """Cuts texts by the tokens of a tokenizer."""

    def __init__(self, name: str, tokens: int, overlap: int):
        from jdmdr.tokenizer import load_pretrained  # late: a mistake on the command line needs no transformers

        self._backend = load_pretrained(name).backend_tokenizer
        self._backend.no_padding()
        self._backend.no_truncation()
        self._tokens, self._overlap = tokens, overlap

    def chunks(self, text: str) -> list[str]:
        """The passages of an article, in order; none of one that is too short."""
        begins = [begin for begin, _ in self._backend.encode(text, add_special_tokens=False).offsets]
        out, start = [], 0
        while len(begins) >= LEAST_ARTICLE and start < len(begins):
            stop = self._fitting(text, begins, start, min(start + self._tokens, len(begins)))
            if stop - start >= LEAST_PASSAGE or stop < len(begins):
                out.append(_piece(text, begins, start, stop))
            if stop == len(begins):
                break
            start = max(_word(text, begins, range(stop - self._overlap, stop), stop), start + 1)
        return [piece for piece in out if piece]

    def _fitting(self, text: str, begins: Sequence[int], start: int, stop: int) -> int:
        """The token before which a passage that starts at `start` ends, at `stop` at the latest."""
        while stop > start + 1:
            if stop < len(begins):
                stop = _word(text, begins, range(stop, start + (stop - start) // 2, -1), stop)
            alone = self._backend.encode(_piece(text, begins, start, stop), add_special_tokens=False)
            if len(alone.ids) <= self._tokens:
                return stop
            stop = max(stop - (len(alone.ids) - self._tokens), start + 1)
        return start + 1


def _word(text: str, begins: Sequence[int], places: Iterable[int], otherwise: int) -> int:
    """The first of these places where a word begins."""
    for place in places:
        begin = begins[place]
        if begin and (text[begin].isspace() or text[begin - 1].isspace()):
            return place
    return otherwise


def _piece(text: str, begins: Sequence[int], start: int, stop: int) -> str:
    end = begins[stop] if stop < len(begins) else len(text)
    return text[begins[start] if start else 0 : end].strip()


def passages(paths: Sequence[pathlib.Path], chunker: Chunker, counts: dict[str, int]) -> Iterator[Passage]:
    """The passages of all articles; what was read is added up in `counts`."""
    seen: set[str] = set()
    for path in progress.bar(paths, "  cutting", "files"):
        for article in read(path):
            if article.id in seen:
                raise UserError(
                    f"{path}: the article {article.id!r} was there before; extract one dump into one directory"
                )
            seen.add(article.id)
            found = chunker.chunks(article.text)
            counts["articles"] += 1
            counts["too_short"] += not found
            counts["passages"] += len(found)
            for number, text in enumerate(found):
                yield Passage(f"{article.id}#{number}", article.title, text)


def cut(source: pathlib.Path, lang: str, out: pathlib.Path, name: str, tokens: int, overlap: int) -> dict[str, Any]:
    """Writes the corpus and, beside it, how it was made."""
    counts = {"articles": 0, "too_short": 0, "passages": 0}
    rows = passages(files(source), Chunker(name, tokens, overlap), counts)
    write_jsonl(out / "corpus" / f"{lang}.jsonl", map(passage_row, rows))
    if not counts["passages"]:
        raise UserError(f"{source}: no article is long enough for a passage; name what wikiextractor wrote")
    made = {"tokenizer": pathlib.PurePath(name).name, "tokens": tokens, "overlap": overlap, **counts}
    workdir.write_json(out / f"passages.{lang}.json", made)
    return made


def main() -> None:
    flags.DEFINE_string("lang", "", "Code of the language.")
    flags.DEFINE_string("out", "", "Data root to write to.")
    flags.DEFINE_string("tokenizer", "", "Hugging Face name or directory.")
    flags.DEFINE_integer("tokens", 126, "Of a passage, at most.")
    flags.DEFINE_integer("overlap", 0, "Tokens that two passages share.")
    cli.run_tool(_command, __doc__)


def _command(words: list[str], values: flags.FlagValues) -> int:
    if len(words) != 1:
        raise UserError(f"name one file or directory of articles; there are {len(words)}")
    if lacking := [name for name in ("lang", "out", "tokenizer") if not values[name].value]:
        raise UserError(f"--{lacking[0]} is missing; --help shows what it is")
    if values.tokens < LEAST_PASSAGE or not 0 <= values.overlap < values.tokens:
        raise UserError(
            f"--tokens is {values.tokens} and --overlap {values.overlap}; tokens are at least {LEAST_PASSAGE}, the overlap fewer"
        )
    made = cut(
        pathlib.Path(words[0]), values.lang, pathlib.Path(values.out), values.tokenizer, values.tokens, values.overlap
    )
    print(json.dumps(made, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    main()
