"""Weak query-document pairs: sections of articles about one thing in two languages, aligned, with hard negatives.

Writes `sections/{lang}.jsonl`, rows {"id", "article", "heading", "text"}, and `pairs/{x}-{y}.jsonl`, rows {"src", "tgt",
"neg_tgt", "neg_src", "score"}: ids of a section in x and one in y that are about the same, and of the other sections of the
same two articles. x-x holds sections paired with themselves: a sentence with the rest of its own section.

Source: Yu, Fei and Li, "Cross-lingual Language Model Pretraining for Retrieval" (WWW 2021). How its sections were aligned was
not published; the aligner here is this project's.
"""

from __future__ import annotations

import itertools
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jdmdr import progress
from jdmdr.articles import Article, Source, read
from jdmdr.cloze import split_sentences
from jdmdr.hashing import stable_hash
from jdmdr.index.bm25 import tokenize_words
from jdmdr.tokenizer import Tokenizer, write_tokens
from jdmdr.types import UserError
from jdmdr.workdir import atomic

HEAD_SENTENCES = 2  # of a section, that its vector is made of

Embed = Callable[[Sequence[str]], np.ndarray]


def write_sections(sources: Sequence[Source], min_words: int, out_dir: pathlib.Path) -> dict[str, Any]:
    """Writes the sections of at least `min_words` words; returns their number by language."""
    by_lang: dict[str, list[Callable[[], Iterator[Article]]]] = {}
    for number, source in enumerate(sources):
        for lang, of in read(source)[0].items():
            by_lang.setdefault(lang, []).append(lambda of=of, number=number: _named(of(), number))
    counts = {}
    for lang, sources_of in progress.bar(sorted(by_lang.items()), "  reading", "languages", total=len(by_lang)):
        kept = 0
        with atomic(out_dir / f"{lang}.jsonl") as path, open(path, "w", encoding="utf-8") as file:
            for article in itertools.chain.from_iterable(of() for of in sources_of):
                for place, section in enumerate(article.sections):
                    if len(tokenize_words(section.text)) < min_words:
                        continue
                    row = {"id": f"{article.id}#{place}", "article": article.id, "heading": section.heading,
                           "text": section.text, "concept": article.concept, "place": place,
                           "of": len(article.sections), "items": sorted(section.items)}  # fmt: skip
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    kept += 1
        counts[lang] = kept
    if not any(counts.values()):
        raise UserError(f"pretrain.sources hold no section of {min_words} words or more; lower pretrain.min_words")
    return counts


def _named(articles: Iterator[Article], source: int) -> Iterator[Article]:
    """Ids and concepts that are unique over the sources; Wikidata's mean the same in all of them."""
    for article in articles:
        concept = article.concept
        if concept is not None and not (concept[:1] == "Q" and concept[1:].isdigit()):
            concept = f"{source}/{concept}"
        yield article._replace(id=f"{source}/{article.id}", concept=concept)


class Sections:
    """The sections of a language on disk, by row."""

    def __init__(self, path: pathlib.Path):
        self._path = path
        ends = [0]
        self.ids: list[str] = []
        self.about: list[str] = []  # the concept of each, or its article
        self.concepts: dict[str, list[int]] = {}  # rows of each
        self.articles: dict[str, list[int]] = {}
        with open(path, "rb") as file:
            for row, line in enumerate(file):
                found = json.loads(line)
                ends.append(ends[-1] + len(line))
                self.ids.append(found["id"])
                self.articles.setdefault(found["article"], []).append(row)
                self.about.append(found["concept"] or found["article"])
                if found["concept"] is not None:
                    self.concepts.setdefault(found["concept"], []).append(row)
        self._ends = np.array(ends)

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        with open(self._path, "rb") as file:
            out = []
            for row in rows:
                file.seek(int(self._ends[row]))
                out.append(json.loads(file.read(int(self._ends[row + 1] - self._ends[row]))))
        return out

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with open(self._path, encoding="utf-8") as file:
            yield from map(json.loads, file)


def write_pairs(
    sections: Mapping[str, Sections], config: Any, monolingual: bool, embed: Embed | None, out_dir: pathlib.Path
) -> dict[str, int]:
    """Aligns every two languages; returns how many pairs each two have.

    Args:
      config: the recipe's `pretrain.align` keys.
      embed: texts to vectors, for the part of the score that compares them; None leaves it out.
    """
    heads = {}
    if embed:
        for lang, of in progress.bar(sections.items(), "  encoding", "languages", total=len(sections)):
            texts = [" ".join([row["heading"], *split_sentences(row["text"])[:HEAD_SENTENCES]]).strip() for row in of]
            vectors_CxD = embed(texts)
            norms = np.linalg.norm(vectors_CxD, axis=1, keepdims=True)
            heads[lang] = vectors_CxD / np.maximum(norms, 1e-12)
    counts = {}
    for x, y in itertools.combinations_with_replacement(sorted(sections), 2):
        if x == y and not monolingual:
            continue
        rows = _own(sections[x]) if x == y else _aligned(sections[x], sections[y], config, heads.get(x), heads.get(y))
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        if lines:
            with atomic(out_dir / f"{x}-{y}.jsonl") as path:
                path.write_text("".join(lines), encoding="utf-8")
            counts[f"{x}-{y}"] = len(lines)
    if not counts:
        raise UserError("no two languages of pretrain.sources have a section in common; link the articles by concept or links, "
                        "lower pretrain.align.threshold, or set pretrain.monolingual")  # fmt: skip
    return counts


def _own(sections: Sections) -> Iterator[dict[str, Any]]:
    """Sections of two sentences or more, each with itself."""
    for rows in sections.articles.values():
        for row, found in zip(rows, sections.rows(rows), strict=True):
            if len(split_sentences(found["text"])) > 1:
                others = [sections.ids[other] for other in rows if other != row]
                yield {"src": found["id"], "tgt": found["id"], "neg_tgt": others, "neg_src": others, "score": 1.0}


def _aligned(
    one: Sections, two: Sections, config: Any, one_CxD: np.ndarray | None, two_CxD: np.ndarray | None
) -> Iterator[dict[str, Any]]:
    for concept in one.concepts:
        if concept not in two.concepts:
            continue
        rows = one.concepts[concept], two.concepts[concept]
        cosine = None if one_CxD is None else one_CxD[rows[0]] @ two_CxD[rows[1]].T
        found = one.rows(rows[0]), two.rows(rows[1])
        ids = tuple([row["id"] for row in side] for side in found)
        for i, j, score in align(*found, config, cosine):
            yield {"src": ids[0][i], "tgt": ids[1][j], "neg_tgt": ids[1][:j] + ids[1][j + 1 :],
                   "neg_src": ids[0][:i] + ids[0][i + 1 :], "score": round(float(score), 4)}  # fmt: skip


def write_training(
    home: pathlib.Path, langs: Sequence[str], seed: int, directory: pathlib.Path, query_tokenizer: Tokenizer,
    passage_tokenizer: Tokenizer,
) -> dict[str, int]:  # fmt: skip
    """The pairs of a working directory of jdmdr.pretrain for a bi-encoder: a sentence of either section with the other section.

    Writes token stores `queries/` and `passages/` by the passage's language, and `LANG.rows.npy`, a number for each passage that is
    the same for the same section; returns how many pairs each of `langs` has.

    Raises:
      UserError: `home` has no pairs, or none in `langs`.
    """
    paths = sorted((home / "pairs").glob("*-*.jsonl"))
    if not paths:
        raise UserError(f"data.pairs {home} holds no pairs; name a working directory of jdmdr.pretrain")
    found: dict[str, list[tuple[str, str, int]]] = {lang: [] for lang in langs}
    sections = {path.stem: Sections(path) for path in sorted((home / "sections").glob("*.jsonl"))}
    texts = {lang: {row["id"]: row["text"] for row in of} for lang, of in sections.items()}
    firsts = dict(zip(sections, np.cumsum([0, *map(len, sections.values())]).tolist(), strict=False))
    places = {lang: {name: row + firsts[lang] for row, name in enumerate(of.ids)} for lang, of in sections.items()}
    for path in paths:
        x, y = path.stem.split("-")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
            pair = json.loads(line)
            ways = [((x, pair["src"]), (y, pair["tgt"])), ((y, pair["tgt"]), (x, pair["src"]))]
            for way, ((query_lang, query), (lang, passage)) in enumerate(ways[: 1 if x == y else 2]):
                if lang not in found:
                    continue
                sentences = split_sentences(texts[query_lang][query])
                sentence = sentences[stable_hash(seed, "weak pair", path.stem, number, way) % len(sentences)]
                text = texts[lang][passage]
                text = " ".join(text.replace(sentence, " ", 1).split()) if x == y else text
                found[lang].append((sentence, text, places[lang][passage]))
    if not any(found.values()):
        raise UserError(
            f"data.pairs {home} holds no pair with a document in {', '.join(langs)}; its languages are {', '.join(texts)}"
        )
    for lang, of in found.items():
        write_tokens(query_tokenizer, (query for query, _, _ in of), directory / "queries", lang)
        write_tokens(passage_tokenizer, (passage for _, passage, _ in of), directory / "passages", lang)
        np.save(directory / f"{lang}.rows.npy", np.array([row for _, _, row in of], np.int64))
    return {lang: len(of) for lang, of in found.items()}


def align(
    one: Sequence[Mapping[str, Any]], two: Sequence[Mapping[str, Any]], config: Any, cosine: np.ndarray | None
) -> list[tuple[int, int, float]]:
    """The sections of two articles that are each other's best, one to one, with their scores of 0 to 1.

    score = (a cos + b jaccard + c position) / (a + b + c), over the cosine of heads, the linked items and the relative
    places; a part that the sections do not have counts nowhere. The first section of an article goes with the first.

    Args:
      one, two: rows with "place", "of" (the article's sections, the dropped ones too) and "items".
    """
    parts = [(config.position, _positions(one, two))]
    if cosine is not None:
        parts.append((config.cosine, np.clip(cosine, 0, 1)))
    items = [[frozenset(row["items"]) for row in side] for side in (one, two)]
    if any(items[0]) and any(items[1]):
        parts.append((config.items, np.array([[_jaccard(a, b) for b in items[1]] for a in items[0]])))
    score = sum(weight * part for weight, part in parts) / max(sum(weight for weight, _ in parts), 1e-9)
    free = score.copy()
    found = []
    leads = [
        [row["place"] for row in side].index(0) if any(row["place"] == 0 for row in side) else None
        for side in (one, two)
    ]
    if None not in leads:
        found.append((*leads, score[tuple(leads)]))
        free[leads[0]], free[:, leads[1]] = -1, -1
    for i in range(len(one)):
        j = int(free[i].argmax())
        if free[i, j] >= max(config.threshold, 0) and int(free[:, j].argmax()) == i:
            found.append((i, j, free[i, j]))
    return sorted(found)


def _positions(one: Sequence[Mapping[str, Any]], two: Sequence[Mapping[str, Any]]) -> np.ndarray:
    at = [np.array([row["place"] / max(row["of"] - 1, 1) for row in side]) for side in (one, two)]
    return 1 - np.abs(at[0][:, None] - at[1])


def _jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    return len(a & b) / len(a | b) if a | b else 0.0
