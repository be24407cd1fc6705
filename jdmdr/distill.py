"""What a distillation trains on: queries of many languages on the teacher's passages, and translations; with its vectors.

The queries of a language are translations of the source language's training queries: of `distill.translations`, a directory
of LANG.tsv (qid TAB query), else what a language model wrote (`distill.translate`), else the data root's queries of the same
qid. The source language's own queries are among them.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jdmdr import negatives, objectives, parallel_text, reading, retrievers, teacher, tokenizer, workdir
from jdmdr.batches import Ragged, Taught, TrainingSet
from jdmdr.corpus import passage_text
from jdmdr.library import TRAIN, Library, TrainingQuery, used_in_training
from jdmdr.tokenizer import Tokenizer, TokenStore
from jdmdr.types import NO_HIT, UserError

QUERIES, PASSAGES, BITEXT = "queries", "passages", "bitext"  # of the teacher's vectors


def distils(config: ConfigDict) -> bool:
    return config.train.objective.name in objectives.DISTILLING


def on_bitext(config: ConfigDict) -> bool:
    """Whether there are batches of translations."""
    return config.train.objective.name == objectives.BITEXT


def has_bitext(config: ConfigDict) -> bool:
    """Whether there are translations, to train on or for a vocabulary to know before a later stage trains on them."""
    return distils(config) and bool(config.distill.bitext or config.distill.parallel)


def on_queries(config: ConfigDict) -> bool:
    """Whether there are batches of queries and passages."""
    return distils(config) and (not on_bitext(config) or config.train.replay_share > 0)


def used(training: Sequence[TrainingQuery], library: Library, source: str) -> list[TrainingQuery]:
    """The source language's training queries that are not held out. Raises UserError where there is none."""
    if source not in library.langs:
        raise UserError(f"distill.source is {source!r}, which data.root has no corpus of; there are: {', '.join(library.langs)}")  # fmt: skip
    found = used_in_training(training, library.langs.index(source))
    if not found:
        raise UserError(f"data.root has no training queries in {source!r} (distill.source) that are not held out")
    return found


# ------------------------------------------------------------------------------------------------ the translated queries


def translations(
    config: ConfigDict, library: Library, queries: Sequence[TrainingQuery], written: pathlib.Path
) -> dict[str, dict[int, str]]:  # fmt: skip
    """{language: {number of the source query: its text there}}, the source language first.

    Args:
      written: the directory of what a language model wrote, LANG.tsv.
    """
    c = config.distill
    wanted = [lang.strip() for lang in c.langs.split(",") if lang.strip()]
    found = {c.source: {i: q.text for i, q in enumerate(queries)}}
    numbers = {q.qid: i for i, q in enumerate(queries)}
    for texts_of in (files(c.translations), files(str(written) if c.translate else ""), dict.fromkeys(library.langs)):
        for lang, path in texts_of.items():
            if lang not in found and (not wanted or lang in wanted):
                texts = dict(reading.topics(path)) if path else dict(zip(*library.queries(lang, TRAIN), strict=True))
                known = {numbers[qid]: text for qid, text in texts.items() if qid in numbers}
                if known:
                    found[lang] = known
    if lacking := [lang for lang in wanted if lang not in found]:
        raise UserError(
            f"distill.langs names {lacking[0]!r}, and no query of {c.source!r} is there in it: the data root has none of the "
            "same qid; name files of translations with distill.translations, or let a language model write them with "
            "distill.translate"
        )
    return {lang: texts for lang, texts in found.items() if not wanted or lang in wanted}


def files(directory: str) -> dict[str, pathlib.Path]:
    """{language: file} of a directory of LANG.tsv."""
    if not directory:
        return {}
    home = pathlib.Path(directory)
    found = {path.name.split(".")[0]: path for path in sorted(home.glob("*.tsv*"))}
    if not found:
        raise UserError(f"distill.translations: {home} holds no LANG.tsv; a line is qid TAB query")
    return found


def write_queries(
    texts: Mapping[str, Mapping[int, str]], queries: Sequence[TrainingQuery], words: Tokenizer, out_dir: pathlib.Path
) -> dict[str, int]:  # fmt: skip
    """Writes of each language `LANG.tsv`, the number of every source query, and the tokens; returns how many there are."""
    for lang, of in texts.items():
        lines = (f"{queries[i].qid}\t{' '.join(text.split())}\n" for i, text in of.items())
        workdir.write_text(out_dir / f"{lang}.tsv", "".join(lines))
        np.save(out_dir / f"{lang}.numbers.npy", np.array([*of], np.int64))
        tokenizer.write_tokens(words, of.values(), out_dir / "tokens", lang)
    return {lang: len(of) for lang, of in texts.items()}


# --------------------------------------------------------------------------------------------------- the training sets


def query_set(
    queries: Sequence[TrainingQuery], library: Library, passages: TokenStore, home: pathlib.Path, vocab_size: int,
    version: pathlib.Path | None, taught: pathlib.Path, source: str,
) -> TrainingSet:  # fmt: skip
    """Every translation of a source query is a training query, with that one's positives and negatives.

    Args:
      home: what `write_queries` left; `version` of the negatives store; `taught`: the teacher's vectors.
    """
    langs = sorted(path.name.split(".")[0] for path in home.glob("*.tsv"))
    number_n = np.concatenate([np.load(home / f"{lang}.numbers.npy") for lang in langs])
    counts = [len(np.load(home / f"{lang}.numbers.npy")) for lang in langs]
    positives, mined = [q.positives for q in queries], mined_rows(queries, library, version, source)
    of_query, of_passage = (teacher.read(taught / name) for name in (QUERIES, PASSAGES))
    return TrainingSet(
        lang_n=np.repeat(np.arange(len(langs), dtype=np.int32), counts),
        topic_n=np.zeros(len(number_n), np.int32),
        positives=Ragged.of(positives[i] for i in number_n),
        negatives=Ragged.of(mined[i] for i in number_n),
        passage_topic=None,
        queries=TokenStore(home / "tokens", langs, vocab_size),
        passages=passages,
        taught=Taught(lambda index: of_query(number_n[index]), of_passage),
    )


def mined_rows(
    queries: Sequence[TrainingQuery], library: Library, version: pathlib.Path | None, source: str
) -> list[np.ndarray]:
    """The negatives of each query, global rows; none without a version of the store."""
    if version is None:
        return [np.empty(0, np.int64)] * len(queries)
    qids, stored = negatives.read(version, source)
    base = library.bases[library.langs.index(source)]
    of = {qid: rows[rows != NO_HIT] + base for qid, rows in zip(qids, np.asarray(stored.rows_QxN), strict=True)}
    return [of[q.qid] for q in queries]


def bitext_set(home: pathlib.Path, tokens: pathlib.Path, vocab_size: int, taught: pathlib.Path) -> TrainingSet:
    """Every text of `parallel_text.write` is a training query, its sources are its positives."""
    langs = parallel_text.langs(home)
    of_lang = {lang: [rows for _, rows in parallel_text.texts(home, lang)] for lang in langs}
    counts = [len(of_lang[lang]) for lang in langs]
    return TrainingSet(
        lang_n=np.repeat(np.arange(len(langs), dtype=np.int32), counts),
        topic_n=np.zeros(sum(counts), np.int32),
        positives=Ragged.of(rows for lang in langs for rows in of_lang[lang]),
        negatives=Ragged.of([] for _ in range(sum(counts))),
        passage_topic=None,
        queries=TokenStore(tokens / "translations", langs, vocab_size),
        passages=TokenStore(tokens / "sources", ["sources"], vocab_size),
        taught=Taught(None, teacher.read(taught / BITEXT)),
    )


def write_bitext_tokens(home: pathlib.Path, words: Tokenizer, out_dir: pathlib.Path) -> None:
    tokenizer.write_tokens(words, parallel_text.sources(home), out_dir / "sources", "sources")
    for lang in parallel_text.langs(home):
        tokenizer.write_tokens(words, (text for text, _ in parallel_text.texts(home, lang)), out_dir / "translations", lang)  # fmt: skip


def bitext_texts(home: pathlib.Path) -> Iterator[str]:
    """All texts of both sides, for a tokenizer to be trained on."""
    yield from parallel_text.sources(home)
    for lang in parallel_text.langs(home):
        yield from (text for text, _ in parallel_text.texts(home, lang))


# --------------------------------------------------------------------------------------------------- the teacher's part


def teach(
    config: ConfigDict, spec: Any, make: Any, library: Library, queries: Sequence[TrainingQuery],
    mined: Sequence[np.ndarray], bitext: pathlib.Path | None, out_dir: pathlib.Path,
) -> dict[str, Any]:  # fmt: skip
    """Leaves the teacher's vectors of the source queries, of every passage that a batch can hold, and of the source texts.

    Args:
      make: the `teacher.Teacher` of an encoder, when it is asked.
      queries, mined: the source queries and their negatives (global rows); none where no batch has queries.
      bitext: what `parallel_text.write` left, or None.
    """
    source = config.distill.source
    work: dict[str, tuple[str, Any, Sequence[str]]] = {}  # name -> side, number -> text, ids made elsewhere
    used_C = np.empty(0, np.int64)
    if queries:
        used_C = np.unique(np.concatenate([*(q.positives for q in queries), *mined]))
        collection, base = (of[library.langs.index(source)] for of in (library.collections, library.bases))
        text_of = lambda i: passage_text(collection.passage(int(used_C[i] - base)))
        work[QUERIES] = "query", lambda i: queries[i].text, [q.qid for q in queries]
        work[PASSAGES] = "passage", text_of, collection.docids(used_C - base)
    if bitext:
        lines = list(parallel_text.sources(bitext))
        work[BITEXT] = "passage", lines.__getitem__, lines
    widths, counts = set(), {}
    teaching = None if spec.kind == retrievers.VECTORS else make()
    for name, (side, text_of, ids) in work.items():
        if teaching:
            rows_N, home = teaching.vectors(side, text_of, len(ids))
            teacher.write(out_dir, name, rows_N, home)
            widths.add(teaching.width)
        else:
            stem, kind = (name, "sentence") if name == BITEXT else (f"{source}.{name}", "id")
            vectors_NxE = retrievers.named_rows(teacher.KEY, pathlib.Path(spec.source), stem, kind, ids)
            teacher.write_given(out_dir, name, vectors_NxE)
            widths.add(int(vectors_NxE.shape[1]))
        counts[name] = len(ids)
    if len(widths) > 1:
        raise UserError(f"distill.teacher: the vectors in {spec.source} are of different widths ({sorted(widths)}); make all with one model")  # fmt: skip
    if queries:  # batches know passages by their global row
        rows_C = np.full(int(library.bases[-1]), teacher.MISSING, np.int64)
        rows_C[used_C] = np.load(out_dir / PASSAGES / "rows.npy")
        np.save(out_dir / PASSAGES / "rows.npy", rows_C)
    return {"width": widths.pop(), **counts}
