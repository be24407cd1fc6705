"""A Wikipedia dump becomes articles of plain sections, joined to other languages by Wikidata id."""

import bz2
import gzip
import json

import pytest

from jdmdr import articles, wikipedia
from jdmdr.types import UserError

WIKITEXT = """{{Infobox|name=Nil}}The '''Nile'''<ref>A source</ref> is a [[river]] of [[Africa|the continent]].
[[File:Nile.jpg|thumb|A picture with a [[boat]].]]

== Course ==
It flows ''north'' to the [[Mediterranean_Sea#Coast|sea]].
=== Delta ===
The delta is wide.
{| class="wikitable"
| a table
|}
== Empty ==
{{template}}
[[Category:Rivers]]
"""
PAGE = "<page><title>{title}</title><ns>{ns}</ns><id>{id}</id>{redirect}<revision><id>1</id><text>{text}</text></revision></page>"
PAGES = [
    {"title": "Nile", "ns": 0, "id": 1, "text": WIKITEXT.replace("<", "&lt;").replace(">", "&gt;")},
    {"title": "River", "ns": 0, "id": 2, "text": "A river is water."},
    {"title": "Nil", "ns": 0, "id": 3, "text": "#REDIRECT [[Nile]]", "redirect": '<redirect title="Nile" />'},
    {"title": "Talk:Nile", "ns": 1, "id": 4, "text": "no article"},
    {"title": "Nobody", "ns": 0, "id": 5, "text": "Wikidata does not know it."},
]


def test_the_table_of_page_properties_gives_wikidata_ids(tmp_path):
    path = tmp_path / "props.sql.gz"
    path.write_bytes(
        gzip.compress(
            b"INSERT INTO `page_props` VALUES (1,'wikibase_item','Q3392',NULL),(2,'defaultsort','x',NULL),(2,'wikibase_item','Q4022',NULL);\n"
        )
    )
    assert wikipedia.concepts(path) == {1: "Q3392", 2: "Q4022"}
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="names no Wikidata id"):
        wikipedia.concepts(path)


def test_a_dump_becomes_articles(tmp_path):
    pytest.importorskip("mwparserfromhell")
    pytest.importorskip("mwxml")
    pages = "".join(PAGE.format(**{"redirect": "", **page}) for page in PAGES)
    info = "<siteinfo><sitename>W</sitename><namespaces><namespace key='0'/><namespace key='1'>Talk</namespace></namespaces></siteinfo>"
    (tmp_path / "d.xml.bz2").write_bytes(bz2.compress(f"<mediawiki>{info}{pages}</mediawiki>".encode()))
    (tmp_path / "p.sql").write_bytes(
        b"(1,'wikibase_item','Q3392',NULL),(2,'wikibase_item','Q4022',NULL),(3,'wikibase_item','Q9',NULL),(4,'wikibase_item','Q8',NULL)"
    )
    assert wikipedia.extract(tmp_path / "d.xml.bz2", tmp_path / "p.sql", tmp_path / "out" / "en.jsonl") == 2
    rows = [json.loads(line) for line in (tmp_path / "out" / "en.jsonl").read_text().splitlines()]
    assert [(row["title"], row["concept"]) for row in rows] == [("Nile", "Q3392"), ("River", "Q4022")]
    assert rows[0]["sections"] == [
        {"heading": "", "text": "The Nile is a river of the continent.", "items": ["Q4022"]},
        {"heading": "Course", "text": "It flows north to the sea.\nDelta\nThe delta is wide.", "items": []},
    ]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["en.jsonl"]
    languages, _ = articles.read(articles.parse(f"articles:{tmp_path / 'out'}")[0])
    assert next(iter(languages["en"]())).sections[0].items == {"Q4022"}
