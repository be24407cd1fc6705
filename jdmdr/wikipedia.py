"""Articles of a Wikipedia dump by sections, for `pretrain.sources=articles:DIR`.

    python -m jdmdr.wikipedia --dump=dewiki-latest-pages-articles.xml.bz2 --page_props=dewiki-latest-page_props.sql.gz
        --lang=de --out=DIR

    --dump FILE        pages-articles, .xml, .xml.bz2 or .xml.gz, from https://dumps.wikimedia.org
    --page_props FILE  the table page_props of the same dump, .sql or .sql.gz: the Wikidata ids that join languages
    --lang CODE        the language
    --out DIR          gets LANG.jsonl

Needs mwxml and mwparserfromhell: pip install 'jdmdr[wikipedia]'. A row is an article with its Wikidata id as concept; sections are the
lead and those of level 2, as plain text without tables, templates, references and pictures; items are the concepts of the
section's links. Redirects, other namespaces and articles without a Wikidata id are left out.
"""

from __future__ import annotations

import gzip
import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from absl import flags

from jdmdr import cli, progress
from jdmdr.types import UserError
from jdmdr.workdir import atomic

ITEM = re.compile(rb"\((\d+),'wikibase_item','(Q\d+)'")


def concepts(path: pathlib.Path) -> dict[int, str]:
    """The Wikidata id of each page id, from the table page_props."""
    found: dict[int, str] = {}
    try:
        with open(path, "rb") as raw:
            gzipped = raw.peek(2)[:2] == b"\x1f\x8b"
            for line in gzip.GzipFile(fileobj=raw) if gzipped else raw:
                found.update((int(page), item.decode()) for page, item in ITEM.findall(line))
    except OSError as error:
        raise UserError(f"--page_props {path}: cannot be read ({error.strerror or error}); fetch it again") from error
    if not found:
        raise UserError(f"--page_props {path} names no Wikidata id; give the dump's table page_props")
    return found


def sections(wikitext: str) -> list[dict[str, Any]]:
    """Heading, plain text and linked titles (`links`) of the lead and of every section of level 2."""
    import mwparserfromhell

    code = mwparserfromhell.parse(wikitext)
    found = []
    for part in code.get_sections(levels=[2], include_lead=True):
        for node in part.filter(forcetype=(mwparserfromhell.nodes.Tag, mwparserfromhell.nodes.Template)):
            if isinstance(node, mwparserfromhell.nodes.Template) or str(node.tag).strip() in (
                "ref",
                "table",
                "gallery",
            ):
                _remove(part, node)
        links = []
        for link in part.filter_wikilinks():
            title = str(link.title).strip()
            if ":" in title.lstrip(":"):  # a file, a category, another wiki
                _remove(part, link)
            elif title:
                links.append(title.partition("#")[0].replace("_", " "))
        headings = part.filter_headings(matches=lambda node: node.level == 2)
        heading = headings[0].title.strip_code().strip() if headings else ""
        for node in headings[:1]:
            _remove(part, node)
        text = "\n".join(line.strip() for line in part.strip_code().splitlines() if line.strip())
        if text:
            found.append(
                {
                    "heading": heading,
                    "text": text,
                    "links": sorted({title[:1].upper() + title[1:] for title in links if title}),
                }
            )
    return found


def _remove(code: Any, node: Any) -> None:
    try:
        code.remove(node)
    except ValueError:
        return  # it stood in another one that is gone


def articles(dump: pathlib.Path, items: dict[int, str], titles: dict[str, str]) -> Iterator[dict[str, Any]]:
    """The articles that have a Wikidata id; `titles` gets the id of each title that was passed."""
    import mwtypes.files
    import mwxml

    with mwtypes.files.reader(str(dump)) as handle:
        for page in mwxml.Dump.from_file(handle):
            if page.namespace != 0 or page.redirect or page.id not in items:
                continue
            titles[page.title] = items[page.id]
            text = next((revision.text for revision in page), None)
            if text:
                yield {"id": str(page.id), "title": page.title, "concept": items[page.id], "sections": sections(text)}


def extract(dump: pathlib.Path, page_props: pathlib.Path, out: pathlib.Path) -> int:
    """Writes the articles of a dump to `out`; returns how many. Nothing is there until all of it is."""
    if not dump.is_file():
        raise UserError(f"--dump {dump}: there is no such file")
    items = concepts(page_props)
    titles: dict[str, str] = {}
    count = 0
    linked = out.with_name(f".{out.name}.linked")
    try:
        linked.parent.mkdir(parents=True, exist_ok=True)
        with open(linked, "w", encoding="utf-8") as file:
            for row in progress.bar(articles(dump, items, titles), "  reading", "articles"):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
        if not count:
            raise UserError(f"--dump {dump} holds no article that --page_props knows; give both of one dump")
        # a link's Wikidata id is known once all titles are
        with atomic(out) as path, open(path, "w", encoding="utf-8") as file, open(linked, encoding="utf-8") as rows:
            for line in rows:
                row = json.loads(line)
                for section in row["sections"]:
                    section["items"] = sorted({titles[title] for title in section.pop("links") if title in titles})
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    finally:
        linked.unlink(missing_ok=True)
    return count


def main() -> None:
    flags.DEFINE_string("dump", "", "pages-articles of a Wikipedia.")
    flags.DEFINE_string("page_props", "", "Its table page_props.")
    flags.DEFINE_string("lang", "", "The language.")
    flags.DEFINE_string("out", "", "Directory to write to.")
    cli.run_tool(_command, __doc__)


def _command(words: list[str], values: flags.FlagValues) -> int:
    if words or not (values.dump and values.page_props and values.lang and values.out):
        raise UserError("--dump, --page_props, --lang and --out are needed")
    try:
        import mwparserfromhell  # noqa: F401
        import mwxml  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error.name} is not installed; pip install 'jdmdr[wikipedia]'") from error
    out = pathlib.Path(values.out) / f"{values.lang}.jsonl"
    print(f"{out}: {extract(pathlib.Path(values.dump), pathlib.Path(values.page_props), out)} articles")
    return 0


if __name__ == "__main__":
    main()
