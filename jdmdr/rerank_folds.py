"""Fine-tunes and measures a re-ranker by cross-validation over a collection's own queries, as CLEF is used.

    python -m jdmdr.rerank_folds --config configs/clir_rerank.py --workdir runs/rerank --config.encoder.name=DIR
        --config.rerank.topics=FILE --config.rerank.qrels=FILE --config.rerank.corpus=FILE --config.rerank.run=FILE

The queries fall into five folds; for each k, three train (f_k, f_k+1, f_k+2), the next chooses the checkpoint by MAP, and the last
is ranked by what was chosen, once. So every query is ranked once by a model that has not seen it: `ranking/TASK.trec` holds all
of them, for jdmdr.score too. The candidates of a query are the hits of `rerank.run`, a TREC run or the word bm25; with the word article the passages of the
articles (docids `article#passage`) that hold a relevant one; or, without any, what is judged for it.

Source: Yu, Fei and Li, "Cross-lingual Language Model Pretraining for Retrieval" (WWW 2021) and its released code, which measured the
test fold whenever the dev fold improved.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tabulate import tabulate

from jdmdr import corpus, encoders, metrics, models, pairs, parallel, pipeline, progress, reading, train
from jdmdr.check import check_config
from jdmdr.encode import InBlocks
from jdmdr.encoders import huggingface, pretrained
from jdmdr.encoders.cross_encoder import CrossEncoder
from jdmdr.encoders.lengthen import lengthen
from jdmdr.hashing import rng, stable_hash
from jdmdr.index.bm25 import Bm25Searcher
from jdmdr.index.searcher import best_first
from jdmdr.objectives import qlm_rr
from jdmdr.planner import Planner
from jdmdr.types import NO_HIT, Query, UserError
from jdmdr.workdir import Stage, read_json, write_json

FOLDS = 5
TARGET = "ranking"
BM25, ARTICLE, JUDGED = "bm25", "article", "judged"
MEASURES = ("map", "p@5", "p@10", "ndcg@10")
LISTS = ("query", "document")  # what {query} and {document} in a path stand for


class Task(NamedTuple):
    """Queries of one language against documents of one, and the files that say so."""

    name: str
    topics: pathlib.Path
    qrels: pathlib.Path
    corpus: pathlib.Path
    run: pathlib.Path | None
    pool: str  # where else candidates come from: bm25 | article | judged

    def files(self) -> tuple[pathlib.Path, ...]:
        return tuple(path for path in self if isinstance(path, pathlib.Path))


def tasks(config: Any) -> list[Task]:
    """The tasks of a recipe's `rerank` keys; {query} and {document} in their paths go through its languages."""
    for key in ("topics", "qrels", "corpus"):
        if not config[key]:
            raise UserError(
                f"rerank.{key} is empty; name a file, in which {{query}} and {{document}} may stand for languages"
            )
    langs = {side: config[f"{side}_langs"].split(",") for side in LISTS}
    every = [t for t in itertools.product(*langs.values()) if config.monolingual or t[0] != t[1] or not t[0]]
    found = []
    for query, document in every:
        fill = lambda path, q=query, d=document: pathlib.Path(path.replace("{query}", q).replace("{document}", d))
        paths = {key: fill(config[key]) for key in ("topics", "qrels", "corpus", "run") if config[key]}
        pool = config.run if config.run in (BM25, ARTICLE) else JUDGED
        if pool != JUDGED:
            paths.pop("run")
        for key, path in paths.items():
            if not path.is_file():
                raise UserError(f"rerank.{key}: there is no file {path}")
        name = f"{query}-{document}" if query or document else "all"
        found.append(Task(name, paths["topics"], paths["qrels"], paths["corpus"], paths.get("run"), pool))
    if not found:
        raise UserError("rerank.query_langs and document_langs leave no pair of languages; set rerank.monolingual")
    return found


class Collection(NamedTuple):
    """The queries of a task and their candidates; a document is its place in `texts`."""

    qids: list[str]
    queries: list[str]
    candidates: list[np.ndarray]  # of each query, ascending
    relevant: list[np.ndarray]  # those of its candidates that are
    docids: list[str]
    texts: list[str]
    qrels: metrics.Qrels


def read(task: Task, depth: int, fields: Sequence[str]) -> Collection:
    """Reads a task; judgments of documents that its corpus does not have are left out.

    Raises:
      UserError: no query has a relevant document among its candidates.
    """
    judged = reading.qrels(task.qrels)[0]
    queries = [query for query in reading.topics(task.topics) if query.qid in judged]
    run = first_run(task, queries, depth, fields)
    if task.pool == ARTICLE:
        of_article: dict[str, list[str]] = {}
        for passage in reading.passages(task.corpus, fields):
            of_article.setdefault(corpus.article(passage.docid), []).append(passage.docid)
    wanted: dict[str, Sequence[str]] = {}
    for qid in (query.qid for query in queries):
        if task.pool == ARTICLE:
            hold = {corpus.article(docid) for docid, relevance in judged[qid].items() if relevance > 0}
            wanted[qid] = [docid for article in sorted(hold & of_article.keys()) for docid in of_article[article]]
        else:
            wanted[qid] = sorted(judged[qid]) if run is None else metrics.ranked(run.get(qid, {}), depth)
    names = {docid for of in wanted.values() for docid in of} | {d for query in queries for d in judged[query.qid]}
    texts = {p.docid: corpus.passage_text(p) for p in reading.passages(task.corpus, fields) if p.docid in names}
    docids = sorted(texts)
    place = {docid: i for i, docid in enumerate(docids)}
    qrels = {q.qid: of for q in queries if (of := {d: r for d, r in judged[q.qid].items() if d in texts})}
    queries = [query for query in queries if any(r > 0 for r in qrels.get(query.qid, {}).values())]
    candidates = [np.array(sorted(place[d] for d in wanted[q.qid] if d in place), np.int64) for q in queries]
    relevant = [
        np.array([i for i in of if qrels[q.qid].get(docids[i], 0) > 0], np.int64)
        for q, of in zip(queries, candidates, strict=True)
    ]
    if not any(map(len, relevant)):
        raise UserError(f"{task.name}: no query of {task.topics} has a relevant document of {task.corpus} among its candidates; "
                        "the files are of different collections, or the run finds none")  # fmt: skip
    return Collection([q.qid for q in queries], [q.text for q in queries], candidates, relevant, docids,
                      [texts[docid] for docid in docids], {q.qid: qrels[q.qid] for q in queries})  # fmt: skip


def first_run(task: Task, queries: Sequence[Query], depth: int, fields: Sequence[str]) -> metrics.Run | None:
    """The run that candidates are taken from; None where they are what is judged."""
    if task.pool != BM25:
        return metrics.read_run(task.run) if task.run else None
    passages = list(reading.passages(task.corpus, fields))
    hits = Bm25Searcher(map(corpus.passage_text, passages)).search([query.text for query in queries], depth)
    return {query.qid: {passages[row].docid: float(score) for row, score in zip(*of, strict=True) if row != NO_HIT}
            for query, *of in zip(queries, *hits, strict=True)}  # fmt: skip


def folds(qids: Sequence[str], seed: int, path: str = "") -> np.ndarray:
    """The fold, 0 to 4, of each query: a fifth of them by a hash, or those of a file {"f1": [qid, ...], ... "f5"}.

    Queries that differ in a language's prefix alone, as in XQuAD-R, are in one fold.
    """
    if path:
        given = read_json(pathlib.Path(path))
        of = {str(qid): k for k in range(FOLDS) for qid in (given or {}).get(f"f{k + 1}", ())}
        if missing := [qid for qid in qids if qid not in of]:
            raise UserError(f"rerank.folds {path} lacks {len(missing)} queries, the first {missing[0]!r}; it is "
                            '{"f1": [qid, ...], ... "f5": [...]}')  # fmt: skip
        return np.array([of[qid] for qid in qids])
    hashes = [stable_hash(seed, "fold", re.sub(r"^[a-z]{2,3}-", "", qid)) for qid in qids]
    return np.unique(np.array(hashes, np.uint64), return_inverse=True)[1] % FOLDS


def roles(k: int) -> tuple[set[int], int, int]:
    """(training folds, dev fold, test fold) of round k."""
    return {k, (k + 1) % FOLDS, (k + 2) % FOLDS}, (k + 3) % FOLDS, (k + 4) % FOLDS


class Lists:
    """Batches of queries, each with a relevant candidate and K others; a pure function of (seed, step, data)."""

    def __init__(self, found: Collection, rows: np.ndarray, source: Callable[..., pairs.Pairs], config: Any, seed: int):
        K = config.negatives
        self._others = {q: np.setdiff1d(found.candidates[q], found.relevant[q]) for q in rows.tolist()}
        self._items = np.array([(q, d) for q in rows.tolist() if len(self._others[q]) >= K for d in found.relevant[q]])
        if not len(self._items):
            raise UserError(
                f"no training query has a relevant candidate and {K} others; lower rerank.negatives or raise its depth"
            )
        same = np.zeros(len(self._items), np.int32)
        self._planner = Planner(same, same, config.batch_size, seed, "random")
        self._source, self._config, self._seed = source, config, seed
        self.steps_per_epoch = self._planner.steps_before(1)

    def make(self, step: int) -> tuple[dict[str, Any], dict[str, float]]:
        plan = self._planner.plan(step)
        random = rng(self._seed, "negatives of a re-ranker", step)
        K = self._config.negatives
        query_N, passage_N = [], []
        for query, document in self._items[plan.index_B]:
            query_N += [query] * (1 + K)
            passage_N += [document, *random.choice(self._others[query], K, replace=False)]
        source = self._source(np.array(query_N), np.array(passage_N))
        block = source.gather(np.arange(len(query_N)), self._config.length)
        return {"rr": block}, {"epoch": plan.epoch, "padding_share": 1 - block.mask_BxT.mean()}


class Reranking:
    """A config bound to a working directory."""

    def __init__(self, config: ConfigDict, directory: pathlib.Path):
        self.config, self.directory, self.tasks = config, directory, tasks(config.rerank)

    def stages(self) -> list[Stage]:
        c = self.config
        plain = c.rerank.to_dict()
        for key in (*("topics", "qrels", "corpus", "run"), *(f"{side}_langs" for side in LISTS), "monolingual"):
            plain.pop(key)
        name = pretrained.find_checkpoint(c.encoder.name) if c.encoder.name else None
        if name is None:
            raise UserError(
                "encoder.name is empty; name a checkpoint to re-rank by, such as export/reranker of jdmdr.pretrain"
            )
        weights = tuple(path for glob in ("*.json", "*.safetensors", "*.bin") for path in sorted(name.glob(glob)))
        settings = {"rerank": plain, "seed": c.seed, "window": c.encoder.window, "dtype": c.encoder.dtype}
        found = []
        for task in self.tasks:
            for k in range(FOLDS):
                run = functools.partial(self.train_fold, task, k)
                found.append(Stage(f"fold-{task.name}-{k + 1}", run, settings, files=(*task.files(), *weights),
                                   volatile=train.VOLATILE, precious=True))  # fmt: skip
        return [*found, Stage(TARGET, self.rank, {}, tuple(stage.name for stage in found))]

    @functools.cached_property
    def _start(self) -> tuple[encoders.EncoderConfig, Any]:
        """The encoder and its parameters with a `head`: the checkpoint's own, or a new one where it has none."""
        c = self.config
        directory = pretrained.find_checkpoint(c.encoder.name)
        config = huggingface.read_config(directory / "config.json", pooling="cls", normalize=False)
        try:
            params = huggingface.read_classifier(directory, config)
        except UserError:
            progress.say(f"  {c.encoder.name} has no head that ranks: it starts at random")
            params, _ = huggingface.read_params(directory, config)
            params["head"] = qlm_rr.init_heads(jax.random.key(c.seed), config, True)[qlm_rr.RANK_HEAD]
        if len(params["head"]["out"]["bias"]) > 1:
            raise UserError(
                f"{c.encoder.name} has {len(params['head']['out']['bias'])} labels; a re-ranker to be tuned has one"
            )
        if c.encoder.window:
            config, params = lengthen(config, params, c.rerank.length, c.encoder.window)
        if c.rerank.length > config.usable_positions:
            raise UserError(f"rerank.length is {c.rerank.length}, but {c.encoder.name} has room for {config.usable_positions}; lower "
                            "it, or set encoder.window")  # fmt: skip
        return dataclasses.replace(config, dtype=models.matmul_dtype(c.encoder.dtype), remat=c.encoder.remat), params

    @functools.cached_property
    def _tokenizer(self) -> pairs.PairTokenizer:
        return pairs.PairTokenizer(str(pretrained.find_checkpoint(self.config.encoder.name)), self.config.rerank.length)

    @functools.cache  # noqa: B019 - lives as long as the command
    def _open(self, task: Task) -> tuple[Collection, Callable[[np.ndarray, np.ndarray], pairs.Pairs], np.ndarray]:
        c = self.config.rerank
        found = read(task, c.depth, corpus.parse_fields(c.fields))
        tokens = self._tokenizer
        queries = [ids[: tokens.longest_query] for ids in tokens.ids(found.queries)]
        documents = tokens.ids(found.texts)
        segments = tokens.uses_segments and self._start[0].type_vocab > 1

        def source(query_N: np.ndarray, passage_N: np.ndarray) -> pairs.Pairs:
            return pairs.Pairs(tokens.template, queries, query_N, documents, passage_N, c.length, segments)

        return found, source, folds(found.qids, self.config.seed, c.folds)

    def _rank(self, params: Any, task: Task, rows: np.ndarray) -> metrics.Run:
        """The candidates of some queries by their scores."""
        found, source, _ = self._open(task)
        encoder = CrossEncoder(self._start[0])
        query_N = np.repeat(rows, [len(found.candidates[q]) for q in rows])
        passage_N = np.concatenate([found.candidates[q] for q in rows])
        blocks = InBlocks(encoder, parallel.data_mesh(), self.config.rerank.length)
        scores_N = blocks.apply(params, source(query_N, passage_N), np.arange(len(query_N)))
        run: metrics.Run = {found.qids[q]: {} for q in rows}
        for q, d, score in zip(query_N, passage_N, scores_N, strict=True):
            run[found.qids[q]][found.docids[d]] = float(score)
        return run

    def train_fold(self, task: Task, k: int, out_dir: pathlib.Path) -> dict[str, Any]:
        c, r = self.config, self.config.rerank
        mesh = parallel.data_mesh()
        config, params = self._start
        params = jax.tree.map(jnp.array, params)  # the step donates its buffers
        found, source, fold = self._open(task)
        training, dev, test = (np.flatnonzero(np.isin(fold, list(of))) for of in map(_as_set, roles(k)))
        lists = Lists(found, training, source, r, c.seed)
        if r.batch_size % mesh.devices.size:
            raise UserError(f"rerank.batch_size is {r.batch_size}, not a multiple of the {mesh.devices.size} devices")
        section = r.copy_and_resolve_references()
        with section.unlocked(), section.ignore_type():
            section.steps = math.ceil(r.epochs * lists.steps_per_epoch) if r.steps is None else r.steps
            section.trainable = r.trainable or _top(config.layers, r.tune_top)
        qrels = {found.qids[q]: found.qrels[found.qids[q]] for q in dev}
        validation = lambda params: _mean(metrics.evaluate_run(qrels, self._rank(params, task, dev), ("map",))["map"])
        objective = qlm_rr.make_objective(r.objective, config, {}, 1 + r.negatives)
        progress.say(
            f"  {len(training)} queries train, {len(dev)} choose, {len(test)} are ranked; {section.steps} steps"
        )
        params, counts = train.train(
            section,
            encoders.build(config),
            params,
            objective,
            lists.make,
            1,
            validation,
            out_dir,
            c.seed,
            mesh,
            measure="map",
        )
        _write_run(out_dir / "test.trec", self._rank(params, task, test))
        return counts

    def rank(self, out_dir: pathlib.Path) -> dict[str, Any]:
        """All folds' test queries together, and how they are ranked before: by the run, and by the checkpoint untuned."""
        table: dict[str, dict[str, dict[str, float]]] = {}
        for task in self.tasks:
            found, _, _ = self._open(task)
            systems: dict[str, metrics.Run] = {}
            queries = [Query(*of) for of in zip(found.qids, found.queries, strict=True)]
            run = first_run(task, queries, self.config.rerank.depth, corpus.parse_fields(self.config.rerank.fields))
            if run is not None:
                kept = [{found.docids[i] for i in of} for of in found.candidates]
                systems["run"] = {qid: {d: s for d, s in run.get(qid, {}).items() if d in of}
                                  for qid, of in zip(found.qids, kept, strict=True)}  # fmt: skip
            systems["untuned"] = self._rank(self._start[1], task, np.arange(len(found.qids)))
            tuned: metrics.Run = {}
            for k in range(FOLDS):
                tuned |= metrics.read_run(self.directory / f"fold-{task.name}-{k + 1}" / "test.trec")
            systems["tuned"] = tuned
            for name, run in systems.items():
                _write_run(out_dir / f"{task.name}.{name}.trec", run)
                values = metrics.evaluate_run(found.qrels, run, MEASURES)
                table.setdefault(task.name, {})[name] = {measure: _mean(of) for measure, of in values.items()}
            metrics.write_qrels(out_dir / f"{task.name}.qrels", found.qrels)
        write_json(out_dir / "folds.json", table)
        return {"tasks": len(self.tasks)}


def _as_set(of: set[int] | int) -> set[int]:
    return of if isinstance(of, set) else {of}


def _top(layers: int, count: int) -> str:
    """A regex on the parameters of the last `count` layers and the head; 0: all."""
    if not count:
        return ""
    names = "|".join(map(str, range(max(0, layers - count), layers)))
    return f"^layer_({names})/|^head/"


def _mean(values: Mapping[str, float]) -> float:
    return float(np.mean(list(values.values())))


def _write_run(path: pathlib.Path, run: metrics.Run) -> None:
    names = [name for hits in run.values() for name in hits]
    width = max(map(len, run.values()))
    rows_QxK, scores_QxK = np.full((len(run), width), NO_HIT, np.int64), np.full((len(run), width), -np.inf, np.float32)
    there_QxK = np.arange(width) < np.array([[len(hits)] for hits in run.values()])
    rows_QxK[there_QxK] = np.arange(len(names))
    scores_QxK[there_QxK] = [score for hits in run.values() for score in hits.values()]
    metrics.write_run(path, list(run), best_first(rows_QxK, scores_QxK), names.__getitem__, "rerank")


def table(directory: pathlib.Path) -> str:
    found = read_json(directory / TARGET / "folds.json")
    rows = [[task, name, *(f"{of[measure]:.3f}" for measure in MEASURES)]
            for task, systems in found.items() for name in ("run", "untuned", "tuned") if (of := systems.get(name))]  # fmt: skip
    return tabulate(rows, ["task", "ranked by", *MEASURES], disable_numparse=True)


def check(config: ConfigDict) -> None:
    """Raises UserError for the first value of `rerank` that no stage could use."""
    r = config.rerank
    if r.objective.rr_loss not in qlm_rr.RR_LOSSES:
        raise UserError(
            f"rerank.objective.rr_loss is {r.objective.rr_loss!r}; it is one of {', '.join(qlm_rr.RR_LOSSES)}"
        )
    for key, bound in {"length": 8, "depth": 1, "negatives": 1, "batch_size": 1, "epochs": 0, "tune_top": 0}.items():
        if r[key] < bound:
            raise UserError(f"rerank.{key} is {r[key]}; it is at least {bound}")


def stages(config: ConfigDict, directory: pathlib.Path) -> list[Stage]:
    """The stages of a config under `directory`, its values checked."""
    check_config(config)
    check(config)
    return Reranking(config, directory).stages()


if __name__ == "__main__":
    pipeline.staged(stages, TARGET, table, __doc__)
