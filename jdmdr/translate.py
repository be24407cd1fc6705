"""Translates the source language's training queries by a language model, for a student to learn from.

    python -m jdmdr.translate --config configs/kdr_stage1.py --workdir runs/kdr --config.distill.translate=ko,ja
        --config.llm.base_url=http://localhost:8000/v1 --config.llm.model=NAME

    ... --dry_run       calls, tokens, cost and time before anything is sent

Writes `translate/LANG.tsv` (qid TAB query) and `failed` (language, qid, reason by TABs): replies that are empty, in another script
than the language's, still the query itself, or much longer or shorter than it (`RATIO`).
"""

from __future__ import annotations

import pathlib
import unicodedata
from collections.abc import Sequence
from typing import Any

import langcodes
from ml_collections import ConfigDict

from jdmdr import llm, progress, reading, workdir
from jdmdr.datasets import scripts
from jdmdr.library import TrainingQuery
from jdmdr.llm import counting
from jdmdr.types import UserError

VERSION = "query-1"  # of the prompt below
PROMPT = (
    "You translate questions to a search engine from {source} into {language}. Write the question as a speaker of {language} "
    "would type it; leave names, numbers and the meaning as they are. The question is text to translate, and you do not "
    'answer it. Reply with a JSON object of one field, "query", alone.'
)
SCHEMA = {
    "type": "object",
    "properties": {"query": {"type": "string"}},
    "required": ["query"],
    "additionalProperties": False,
}
ROOM = 64  # tokens of a reply beside two for every character of the query
RATIO = 5.0  # a translation is at most so many times as wide as its query, and at least that part of it

Query = tuple[str, TrainingQuery]  # the language to translate to, and the query


def languages(config: ConfigDict) -> list[str]:
    """The codes of `distill.translate`."""
    found = [lang.strip() for lang in config.translate.split(",") if lang.strip()]
    for lang in found:
        if not scripts.scripts(lang) or lang == config.source:
            raise UserError(
                f"distill.translate: {lang!r} is no language to translate to from {config.source!r}; write such as ko,ja"
            )
    return found


def request(lang: str, source: str, query: TrainingQuery) -> llm.Request:
    """The call that translates a query."""
    names = {"language": lang, "source": source}
    system = PROMPT.format(**{key: langcodes.Language.get(code).display_name() for key, code in names.items()})
    return llm.Request(
        purpose="query_translation", about=f"{lang} {query.qid}", version=VERSION, schema=SCHEMA,
        messages=[{"role": "system", "content": system}, {"role": "user", "content": query.text}],
        params={"temperature": 0.0, "max_tokens": ROOM + 2 * len(query.text)},
    )  # fmt: skip


def translate(
    client: llm.Client, config: ConfigDict, queries: Sequence[TrainingQuery], out_dir: pathlib.Path
) -> dict[str, Any]:  # fmt: skip
    """Writes the translations of all queries; returns how many there are of each language and how many failed."""

    async def ask(item: Query) -> tuple[str, str]:
        lang, query = item
        reply = await client.complete(request(lang, config.source, query))
        if reply.finish != "stop":
            return "", f"the reply ended by {reply.finish}"
        text = (llm.json_object(reply.text) or {}).get("query")
        if not isinstance(text, str):
            return "", "the reply is no object with a query"
        text = " ".join(reading.clean(text).split())
        return text, fault(text, query.text, lang)

    langs = languages(config)
    todo = [(lang, query) for lang in langs for query in queries]
    lines: dict[str, list[str]] = {lang: [] for lang in langs}
    failed = []
    for (lang, query), (text, reason) in zip(todo, client.map(ask, todo, "  translating"), strict=True):
        if reason:
            failed.append(f"{lang}\t{query.qid}\t{reason}\n")
        else:
            lines[lang].append(f"{query.qid}\t{text}\n")
    for lang, of in lines.items():
        workdir.write_text(out_dir / f"{lang}.tsv", "".join(of))
    workdir.write_text(out_dir / "failed", "".join(failed))
    if failed:
        progress.say(f"  {len(failed)} of {len(todo)} translations are of no use; {out_dir / 'failed'} tells why")
    if len(failed) == len(todo):
        raise UserError(f"no translation is of use; {out_dir / 'failed'} tells why")
    return {"translated": {lang: len(of) for lang, of in lines.items()}, "failed": len(failed)}


def fault(text: str, original: str, lang: str) -> str:
    """Why a translation is of no use; "" for a good one."""
    if not text:
        return "it is empty"
    if not scripts.in_script(text, lang):
        return f"it is written in {scripts.main_script(text)}"
    if text.casefold().split() == original.casefold().split():
        return "it is still the query"
    ratio = _width(text) / max(1, _width(original))
    if not 1 / RATIO <= ratio <= RATIO:
        return f"it is {ratio:.2g} times as long as the query"
    return ""


def _width(text: str) -> int:
    """Columns of a terminal: a Chinese character says about as much as two letters."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def plan(client: llm.Client, config: ConfigDict, queries: Sequence[TrainingQuery]) -> llm.Plan:
    """What `translate` would send."""
    requests = [request(lang, config.source, query) for lang in languages(config) for query in queries]
    most = max((one.params["max_tokens"] for one in requests), default=0)
    found = counting.ask(counting.missing(client, requests), most)
    return llm.Plan(found, {"every reply is of use": found}, found)


if __name__ == "__main__":
    from jdmdr import pipeline

    pipeline.command("translate", __doc__, plan=lambda recipe: recipe.plan_translate())
