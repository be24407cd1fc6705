"""Articles in several languages that tell which are about the same thing: what weak training pairs are made of.

A source is KIND:DIR, or KIND:DIR@LANG+LANG for some of its languages.

    articles:DIR   DIR/{lang}.jsonl[.gz], a row an article: {"id", "title", "sections": [{"heading", "text", "items"}]} and
                   "concept" (a Wikidata id, or any other word that the languages share) or "links" ({lang: title}). `items`
                   are the concepts that the section links to; they and headings may be missing
    parallel:DIR   a data root whose docids `article#passage` are the same in every language, such as tinypedia: a passage is
                   a section
    corpus:DIR     a data root whose languages have nothing to do with each other: sections for pairs within a language
    xquad_r:DIR    XQuAD-R: a paragraph is a section

Articles that an evaluation is about are left out: those with an answer to a `test` question of a parallel collection, or to a
`clean` question of XQuAD-R.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from jdmdr import datasets, reading
from jdmdr.corpus import article as article_of
from jdmdr.reading import bad_line
from jdmdr.types import UserError


class Section(NamedTuple):
    heading: str
    text: str
    items: frozenset[str] = frozenset()


class Article(NamedTuple):
    """`concept` is equal in all languages; None where nothing links the article to others."""

    id: str
    title: str
    concept: str | None
    sections: list[Section]


Languages = dict[str, Callable[[], Iterator[Article]]]


class Source(NamedTuple):
    kind: str
    directory: pathlib.Path
    langs: tuple[str, ...]  # empty: all


def parse(sources: str) -> list[Source]:
    """The words of `pretrain.sources`."""
    found = []
    for word in filter(None, map(str.strip, sources.split(","))):
        kind, colon, place = word.partition(":")
        directory, _, langs = place.partition("@")
        if not colon or kind not in KINDS:
            raise UserError(
                f"pretrain.sources has {word!r}; a source is KIND:DIR, and the kinds are {', '.join(KINDS)}"
            )
        if not pathlib.Path(directory).is_dir():
            raise UserError(f"pretrain.sources: {directory} is not a directory; name one that holds articles")
        found.append(Source(kind, pathlib.Path(directory), tuple(filter(None, langs.split("+")))))
    if not found:
        raise UserError(f"pretrain.sources is empty; name KIND:DIR, where the kinds are {', '.join(KINDS)}")
    return found


def read(source: Source) -> tuple[Languages, list[pathlib.Path]]:
    """The languages of a source, and the files that they are read from."""
    found, files = KINDS[source.kind](source.directory)
    if unknown := sorted({*source.langs} - {*found}):
        raise UserError(
            f"pretrain.sources: {source.directory} has no language {', '.join(unknown)}; there are: {', '.join(found)}"
        )
    wanted = {lang: of for lang, of in found.items() if lang in (source.langs or found)}
    return wanted, sorted({path for lang in wanted for path in files[lang]})


Found = tuple[Languages, dict[str, list[pathlib.Path]]]


def _articles(directory: pathlib.Path) -> Found:
    paths = {}
    for path in sorted(directory.iterdir()):
        if match := re.fullmatch(r"([\w-]+)\.jsonl(\.gz)?", path.name):
            paths[match[1]] = path
    if not paths:
        raise UserError(f"{directory} holds no LANG.jsonl; articles are a file a language, a row an article")
    concepts: dict[tuple[str, str], str] = {}  # filled when the first language is read

    def of(lang: str) -> Iterator[Article]:
        if not concepts:
            concepts.update(_linked(paths))
        for _, row in _rows(paths[lang]):
            sections = [_section(s, paths[lang], row["id"]) for s in row["sections"]]
            concept = row.get("concept") or concepts.get((lang, row["title"]))
            yield Article(row["id"], row["title"], concept, sections)

    return {lang: lambda lang=lang: of(lang) for lang in paths}, {lang: [path] for lang, path in paths.items()}


def _rows(path: pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in reading.lines(path):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise bad_line(path, number, f"no JSON ({error})") from error
        for key, kind in (("id", str), ("title", str), ("sections", list)):
            if not isinstance(row, dict) or not isinstance(row.get(key), kind):
                raise bad_line(path, number, f'no {key}; an article is {{"id", "title", "sections": [...]}}')
        yield number, row


def _section(found: Any, path: pathlib.Path, article: str) -> Section:
    if not isinstance(found, dict) or not isinstance(found.get("text"), str):
        raise UserError(f'{path}: a section of the article {article!r} has no text; a section is {{"heading", "text"}}')
    return Section(found.get("heading") or "", found["text"], frozenset(found.get("items") or ()))


def _linked(paths: dict[str, pathlib.Path]) -> dict[tuple[str, str], str]:
    """A concept for each (language, title) that a link names or that has links: titles joined by any chain are one."""
    parent: dict[tuple[str, str], tuple[str, str]] = {}

    def root(node: tuple[str, str]) -> tuple[str, str]:
        while parent.setdefault(node, node) != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for lang, path in paths.items():
        for number, row in _rows(path):
            links = row.get("links") or {}
            if not isinstance(links, dict):
                raise bad_line(path, number, "links is no object; it is {language: title}")
            for other in links.items():
                parent[root(other)] = root((lang, row["title"]))
    return {node: ":".join(root(node)) for node in list(parent)}


def _corpus(directory: pathlib.Path, linked: bool, left_out: str) -> Found:
    files = datasets.discover(directory)
    hidden = _asked_about(files, left_out) if left_out else {}

    def of(lang: str) -> Iterator[Article]:
        grouped: dict[str, list[Section]] = {}
        titles: dict[str, str] = {}
        for path in files[lang].corpus:
            for passage in reading.passages(path):
                name = article_of(passage.docid)
                titles.setdefault(name, passage.title)
                grouped.setdefault(name, []).append(Section("", passage.text))
        for name, sections in grouped.items():
            if name not in hidden.get(lang, ()):
                yield Article(name, titles[name], name if linked else None, sections)

    paths = {lang: [*found.corpus, *found.topics.values(), *found.qrels.values()] for lang, found in files.items()}
    return {lang: lambda lang=lang: of(lang) for lang in files}, paths


def _asked_about(files: dict[str, datasets.LanguageFiles], split: str) -> dict[str, set[str]]:
    """The articles that answer the questions of a split, by language."""
    hidden = {}
    for lang, found in files.items():
        qids = {query.qid for query in reading.topics(found.topics[split])} if split in found.topics else set()
        judged = [reading.qrels(path)[0] for path in found.qrels.values()]
        hidden[lang] = {article_of(docid) for of in judged for qid in qids & of.keys() for docid in of[qid]}
    return hidden


def _xquad_r(directory: pathlib.Path) -> Found:
    files = {lang: found for lang, found in datasets.discover(directory).items() if found.topics}
    hidden = {name.split("-")[1] for names in _asked_about(files, "clean").values() for name in names}
    if not hidden:
        raise UserError(
            f"{directory} has no topics/LANG.clean.tsv with their qrels; XQuAD-R without them cannot be trained on"
        )

    def of(lang: str) -> Iterator[Article]:
        paragraphs: dict[str, dict[str, str]] = {}
        titles: dict[str, str] = {}
        for path in files[lang].corpus:
            for passage in reading.passages(path, ("title", "context")):
                name = article_of(passage.docid).split("-")[1]
                titles[name] = passage.title
                paragraphs.setdefault(name, {})[article_of(passage.docid)] = passage.text
        for name, texts in paragraphs.items():
            if name not in hidden:
                yield Article(name, titles[name], name, [Section("", text) for text in texts.values()])

    paths = {lang: [*found.corpus, *found.topics.values(), *found.qrels.values()] for lang, found in files.items()}
    return {lang: lambda lang=lang: of(lang) for lang in files}, paths


KINDS: dict[str, Callable[[pathlib.Path], Found]] = {
    "articles": _articles,
    "parallel": lambda directory: _corpus(directory, linked=True, left_out="test"),
    "corpus": lambda directory: _corpus(directory, linked=False, left_out=""),
    "xquad_r": _xquad_r,
}
