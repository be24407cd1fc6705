"""The retrievers of an ensemble: what `mine.retrievers` can name, what each reads, and how it ranks a collection.

`mine.retrievers` is a list separated by commas. An entry is

    warmup              the encoder that training starts from
    bm25                BM25
    random              passages drawn at random, in an order of their own for each query
    PRESET              a checkpoint of jdmdr/presets.py by its name, with its own pooling, prompts and lengths
    DIR or HUB/NAME     a sentence-transformers directory or hub name (an export of jdmdr is one), with its own modules,
                        prompts and length
    run:PATTERN         TREC runs made elsewhere, a file a language: {lang} in PATTERN stands for its code
    triples:PATTERN     negatives that a file of triples gives (jdmdr/triples.py), a file a language
    vectors:DIR         vectors made elsewhere (docs/data.md)

and may be given a name, as in `splade=run:runs/{lang}.trec`; `PRESET=DIR` is that preset with weights from DIR.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from jdmdr import encode, hashing, maxp, metrics, progress, triples
from jdmdr.corpus import Collection
from jdmdr.index import dense_searcher
from jdmdr.index.bm25 import Bm25Searcher
from jdmdr.index.fusion import Rescore, dense_rescore
from jdmdr.index.searcher import Searcher, best_first
from jdmdr.presets import PRESETS
from jdmdr.types import NO_HIT, Hits, UserError

KEY = "mine.retrievers"
WARMUP, BM25, RANDOM, ENCODER, RUN, VECTORS = "warmup", "bm25", "random", "encoder", "run", "vectors"
TRIPLES = "triples"
DENSE = (WARMUP, ENCODER, VECTORS)
ENSEMBLE = "ensemble"  # the fused list's name among the runs
RESERVED = (WARMUP, BM25, RANDOM, ENSEMBLE, "cross_encoder")


class Spec(NamedTuple):
    """One entry of `mine.retrievers`."""

    name: str  # in files, runs and reports
    kind: str
    source: str = ""  # directory, hub name or pattern
    preset: str = ""

    @property
    def dense(self) -> bool:
        return self.kind in DENSE


class Vectors(NamedTuple):
    """The embeddings behind a dense retriever."""

    queries_QxD: np.ndarray  # float32
    blocks: list[np.ndarray]  # of the passages, CixD, memory-mapped
    first_C: np.ndarray | None = None  # of passages in chunks (jdmdr/maxp.py), where each one's rows begin, and the end


class Retriever(NamedTuple):
    """A way to rank one collection for queries known by their row in a split."""

    search: Callable[[np.ndarray, int], Hits]  # (query rows, k) -> hits
    vectors: Vectors | None = None  # of a dense retriever

    def rescore(self, rows: np.ndarray) -> Rescore | None:
        """Exact scores of any pairs of these queries (by place) and passages; None where only lists are known."""
        if self.vectors is None:
            return None
        rescore = dense_rescore(self.vectors.queries_QxD[rows], self.vectors.blocks)
        return rescore if self.vectors.first_C is None else maxp.rescore_best(rescore, self.vectors.first_C)


def parse(entries: str, key: str = KEY) -> list[Spec]:
    """`mine.retrievers`, or another key that names retrievers, as specs; raises UserError on an empty entry and on two of one name."""
    specs = [_spec(entry.strip(), key) for entry in entries.split(",")]
    names = [spec.name for spec in specs]
    if double := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"{key} names two retrievers {double!r}; give one a name of its own: NAME={double}")
    return specs


def _spec(entry: str, key: str) -> Spec:
    name, equals, source = entry.partition("=")
    if not equals:
        name, source = "", entry
    if not source or (equals and not name):
        raise UserError(f"{key} has the entry {entry!r}; separate names by single commas, and write NAME=ENTRY")
    if source in (WARMUP, BM25, RANDOM) and not name:
        return Spec(source, source)
    kind, colon, place = source.partition(":")
    if colon and kind in (RUN, TRIPLES, VECTORS):
        if not place:
            raise UserError(f"{key}: {entry!r} names no file; write {kind}:PATH")
        return Spec(_checked(name or kind, key), kind, place)
    if source in PRESETS:
        return Spec(_checked(name or source, key), ENCODER, PRESETS[source].name, source)
    if "/" not in source and not pathlib.Path(source).is_dir():
        raise UserError(
            f"{key}: {source!r} is neither a retriever nor a directory; there are {WARMUP}, {BM25}, {RANDOM}, "
            f"{', '.join(PRESETS)}, a checkpoint's directory or HUB/NAME, {RUN}:PATH, {TRIPLES}:PATH and {VECTORS}:DIR"
        )
    return Spec(_checked(name or pathlib.PurePath(source).name, key), ENCODER, source, name if name in PRESETS else "")


def _checked(name: str, key: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or name in RESERVED:
        raise UserError(
            f"{key}: {name!r} cannot be the name of a retriever; give it one of letters, digits, '.', '_' and "
            f"'-', as in NAME=ENTRY, other than {', '.join(RESERVED)}"
        )
    return name


def encoder_section(spec: Spec, section: ConfigDict) -> ConfigDict:
    """The `encoder` keys that this retriever encodes with: its preset's, or those its directory tells.

    `section` are the recipe's own; device settings (dtype) come from there, and lengths where nothing else says them.
    """
    from jdmdr.encoders import huggingface, pretrained  # late: they load jax and the hub's client

    own = section.copy_and_resolve_references()
    directory = pretrained.find_checkpoint(spec.source)
    with own.unlocked(), own.ignore_type():
        own.projection, own.projection_norm, own.towers, own.remat, own.passage_name = 0, False, "", False, ""
        own.window, own.new_vocabulary, own.layers, own.chunks = 0, False, 0, 1
        if spec.preset:
            own.update(PRESETS[spec.preset].encoder())
            own.name = str(directory)
            return own
        own.name, own.pooling, own.normalize = str(directory), "", None  # the last two as its modules say
        prompts = _json(directory / "config_sentence_transformers.json").get("prompts") or {}
        own.query_prompt = prompts.get("query", "")
        own.passage_prompt = next((prompts[key] for key in ("document", "passage") if key in prompts), "")
        longest = _json(directory / "sentence_bert_config.json").get("max_seq_length") or own.passage_length
        if (directory / "config.json").is_file():
            longest = min(longest, huggingface.read_config(directory / "config.json", "mean", False).usable_positions)
        own.query_length, own.passage_length = (min(own[f"{side}_length"], longest) for side in ("query", "passage"))
    return own


def words(spec: Spec, section: ConfigDict) -> tuple[str, str]:
    """What `tokenizer.copy_pretrained` takes for this retriever, whose `encoder` keys are `section`."""
    if not spec.preset:
        return section.name, ""
    own = PRESETS[spec.preset].words()
    return own["name"] or section.name, own["as_in"]


def _json(path: pathlib.Path) -> dict[str, Any]:
    """A file of a sentence-transformers directory; empty where there is none."""
    from jdmdr.encoders import huggingface

    return huggingface.read_json_file(path) if path.is_file() else {}


# ------------------------------------------------------------------------------------------------------- how they rank


def bm25(index_dir: pathlib.Path, texts: Sequence[str]) -> Retriever:
    """BM25 over a stored index; `texts` are the queries of the split."""
    return lexical(Bm25Searcher.load(index_dir), texts)


def lexical(searcher: Bm25Searcher, texts: Sequence[str]) -> Retriever:
    return Retriever(lambda rows, k: searcher.search([texts[row] for row in rows], k))


def at_random(lang: str, collection_rows: int, seed: int) -> Retriever:
    """Passages drawn at random for each query, the same ones at every call; earlier ranks score higher."""

    def search(rows: np.ndarray, k: int) -> Hits:
        k = min(k, collection_rows)
        rngs = (hashing.rng(seed, "random retriever", lang, int(row)) for row in rows)
        drawn = [rng.choice(collection_rows, k, replace=False) for rng in rngs]
        return Hits(np.array(drawn, np.int64).reshape(-1, k), np.tile(-np.arange(k, dtype=np.float32), (len(rows), 1)))

    return Retriever(search)


def dense(vectors: Vectors, index: str, factory: str, mesh: Any) -> Retriever:
    """Inner product over vectors, by an index of `jdmdr.index.SEARCHERS`."""
    return over(dense_searcher(index, vectors.blocks, mesh, factory), vectors)


def over(searcher: Searcher, vectors: Vectors) -> Retriever:
    """Inner product over vectors whose passages `searcher` holds."""
    if vectors.first_C is not None:
        searcher = maxp.BestChunkSearcher(searcher, vectors.first_C)
    return Retriever(lambda rows, k: searcher.search(vectors.queries_QxD[rows], k), vectors)


def stored(queries: pathlib.Path, split: str, passages: Sequence[pathlib.Path]) -> Vectors:
    """The embeddings that a stage wrote: queries of one language, passages of one language or of several in a row."""
    blocks = [block for directory in passages for block in encode.shards(directory, "passages")]
    firsts = [first for directory in passages if (first := encode.first_chunks(directory)) is not None]
    bases = np.cumsum([0, *(first[-1] for first in firsts)])
    first_C = np.concatenate([*(f[:-1] + base for f, base in zip(firsts, bases, strict=False)), bases[-1:]])
    queries_QxD = np.concatenate(encode.shards(queries, f"queries.{split}")).astype(np.float32)
    return Vectors(queries_QxD, blocks, first_C if firsts else None)


def external_run(path: pathlib.Path, qids: Sequence[str], collection: Collection) -> Retriever:
    """A TREC run made elsewhere; a query that it lacks has no hit.

    Raises UserError on a malformed line, on a docid that the collection does not hold, and on a run of other queries.
    """
    if not path.is_file():
        raise UserError(f"mine.retrievers: {path} does not exist; write {{lang}} where the language's code stands")
    run = metrics.read_run(path)
    if qids and not set(run) & set(qids):
        raise UserError(f"{path} has no training query (its first is {next(iter(run), 'none')!r}, ours {qids[0]!r})")
    listed: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for qid in set(qids) & set(run):
        docids = list(run[qid])
        rows_K = collection.rows(docids)
        if (rows_K < 0).any():
            raise UserError(f"{path}: docid {docids[int(np.argmin(rows_K))]!r} of query {qid!r} is not in the corpus")
        listed[qid] = rows_K, np.array(list(run[qid].values()), np.float32)

    def search(rows: np.ndarray, k: int) -> Hits:
        rows_QxK = np.full((len(rows), k), NO_HIT, np.int64)
        scores_QxK = np.full((len(rows), k), -np.inf, np.float32)
        for place, row in enumerate(rows):
            rows_K, scores_K = listed.get(qids[row], (np.empty(0, np.int64), np.empty(0, np.float32)))
            best = best_first(rows_K[None], scores_K[None])
            found = min(k, len(rows_K))
            rows_QxK[place, :found] = best.rows_QxK[0, :found]
            scores_QxK[place, :found] = best.scores_QxK[0, :found]
        return Hits(rows_QxK, scores_QxK)

    return Retriever(search)


def external_triples(
    path: pathlib.Path, qids: Sequence[str], texts: Sequence[str], collection: Collection
) -> Retriever:  # fmt: skip
    """The negatives of a file of triples, in its order; a query that it lacks has no hit. Tells what of it is not known.

    Raises UserError for a file that does not exist, and as `triples.read` does.
    """
    if not path.is_file():
        raise UserError(f"mine.retrievers: {path} does not exist; write {{lang}} where the language's code stands")
    given = triples.read(path, qids, texts, collection)
    counts_Q = np.diff(given.offsets)
    progress.say(
        "  {}: {triples} triples; {unknown_queries} of no training query, {unknown_negatives} with a negative that is not in "
        "the corpus; {} of {} queries have any, up to {}".format(
            path, int((counts_Q > 0).sum()), len(qids), int(counts_Q.max()), **given.counts
        )
    )

    def search(rows: np.ndarray, k: int) -> Hits:
        there_QxK = np.arange(k) < counts_Q[rows][:, None]
        found = np.where(there_QxK, given.offsets[rows][:, None] + np.arange(k), 0)
        scores_QxK = np.where(there_QxK, -np.arange(k, dtype=np.float32), -np.inf)
        return Hits(np.where(there_QxK, given.rows[found], NO_HIT), scores_QxK.astype(np.float32))

    return Retriever(search)


def external_vectors(directory: pathlib.Path, lang: str, qids: Sequence[str], collection: Collection) -> Vectors:
    """Vectors made elsewhere: `LANG.passages.npy`, `LANG.passages.txt`, `LANG.queries.npy`, `LANG.queries.txt`.

    The .npy hold a vector a row, the .txt the docid or qid of each. Every passage and every query of `qids` must be
    there, once; others are left out.
    """
    docids = collection.docids(np.arange(len(collection)))
    passages = named_rows("mine.retrievers", directory, f"{lang}.passages", "docid", docids)
    queries = named_rows("mine.retrievers", directory, f"{lang}.queries", "qid", qids)
    if passages.shape[1] != queries.shape[1]:
        raise UserError(
            f"{directory}: {lang}.passages.npy is {passages.shape[1]} wide and {lang}.queries.npy {queries.shape[1]}; "
            "make both with one model"
        )
    return Vectors(queries.astype(np.float32), [passages])


def named_rows(key: str, directory: pathlib.Path, stem: str, kind: str, wanted: Sequence[str]) -> np.ndarray:
    """The rows of `STEM.npy` whose ids in `STEM.txt` are `wanted`, in that order; mapped where it is the file's own.

    `key` is the config key that names the directory, for the refusals.
    """
    path, ids_path = directory / f"{stem}.npy", directory / f"{stem}.txt"
    for needed in (path, ids_path):
        if not needed.is_file():
            raise UserError(f"{key}: {needed} does not exist; docs/data.md tells what a directory of vectors holds")
    try:
        vectors_CxD = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no .npy array ({error}); write it with numpy.save") from error
    ids = ids_path.read_text(encoding="utf-8").splitlines()
    if vectors_CxD.ndim != 2 or vectors_CxD.dtype.kind != "f" or len(vectors_CxD) != len(ids):
        raise UserError(
            f"{path} holds {vectors_CxD.dtype} of shape {vectors_CxD.shape} for the {len(ids)} lines of {ids_path.name}; "
            "one row of floating-point numbers a line is expected"
        )
    place = {name: row for row, name in enumerate(ids)}
    if len(place) < len(ids):
        row = next(row for row, name in enumerate(ids) if place[name] != row)
        raise UserError(f"{ids_path}, line {row + 1}: {kind} {ids[row]!r} stands there twice; keep one row of each")
    if missing := next((name for name in wanted if name not in place), None):
        raise UserError(
            f"{ids_path} lacks the {kind} {missing!r}; vectors for every passage and training query are needed"
        )
    rows = np.array([place[name] for name in wanted])
    found_CxD = vectors_CxD if np.array_equal(rows, np.arange(len(ids))) else vectors_CxD[rows]
    finite_C = np.isfinite(found_CxD.sum(axis=1, dtype=np.float32))
    if not finite_C.all():
        raise UserError(f"{path}: the vector of {kind} {wanted[int(np.argmin(finite_C))]!r} holds NaN or infinity")
    return found_CxD


def external_files(spec: Spec, langs: Sequence[str]) -> tuple[pathlib.Path, ...]:
    """The files there are of runs, triples or vectors made elsewhere; what the mining stage depends on."""
    paths: list[pathlib.Path] = []
    if spec.kind in (RUN, TRIPLES):
        paths = [run_path(spec, lang) for lang in langs]
    elif spec.kind == VECTORS:
        parts = ("passages.npy", "passages.txt", "queries.npy", "queries.txt")
        paths = [pathlib.Path(spec.source) / f"{lang}.{part}" for lang in langs for part in parts]
    return tuple(path for path in dict.fromkeys(paths) if path.is_file())


def run_path(spec: Spec, lang: str) -> pathlib.Path:
    return pathlib.Path(spec.source.replace("{lang}", lang))
