"""Ranks the hits of a run, or candidates, afresh by a cross-encoder or a bi-encoder.

    python -m jdmdr.rerank 'runs/bm25/{lang}.trec' --model=NAME --data=DIR --out=runs/reranked
    python -m jdmdr.rerank 'runs/dmdr/evaluate/dev.dmdr.{lang}.trec' --model=NAME --data=runs/dmdr --out=runs/reranked
    python -m jdmdr.rerank MSMARCO/top1000.dev --encoder=runs/ance/export --data=MSMARCO --depth=1000 --out=runs/reranked

    --model NAME     cross-encoder: a Hugging Face name or directory (BERT, RoBERTa or XLM-R with a classification head)
    --encoder NAME   instead, a bi-encoder as mine.retrievers names one: an export of jdmdr, a sentence-transformers directory, a
                     preset or PRESET=DIR, with its own prompts
    --data DIR       queries and passages: a data root (docs/data.md), or a working directory
    --out DIR        where LANG.trec are written; the same command goes on there after it was stopped
    --depth N        hits of each query that are scored, and that its new list has; 100 by default
    --length N       tokens of query, passage and special tokens together, with --encoder of a passage; 512 by default
    --overlap N      a passage beyond --length is read in windows that overlap by N tokens, and its best window counts; by default it
                     is cut
    --query_length N with --encoder: tokens of a query; 64 by default
    --label NAME     of a cross-encoder with several labels, the one that means relevant
    --topics NAME    the set of queries that the run answers; by default all sets are looked through
    --corpus NAME    what the run searched: own (the default; the query's language), a language, or pool (all of them)
    --lang CODE      the language of a run without {lang} in its path; not needed where DIR has one
    --fields LIST    fields of a data root's passages that are their text; title,text by default
    --dtype NAME     float32 or bfloat16 of the matmuls; by default float32 on CPU, else bfloat16

A run is a TREC run, or in MS MARCO's form, or MS MARCO's candidates, `qid TAB docid TAB query TAB passage`; in its path {lang} stands
for the language. Scores are the log-odds of being relevant, or inner products; jdmdr.score measures the result.
"""

from __future__ import annotations

import pathlib
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from jdmdr import __version__, cli, corpus, datasets, metrics, progress, reading, workdir
from jdmdr.index.searcher import best_first
from jdmdr.library import TRAIN, Library
from jdmdr.score import LANG, ONE, find
from jdmdr.splits import OWN, POOL
from jdmdr.types import NO_HIT, UserError

DEFAULT_QUERY = 64  # tokens
WEIGHTS = ("*.json", "*.model", "*.txt", "*.safetensors", "*.bin")  # files of a checkpoint that its scores depend on
TAG = "rerank"


class Source(NamedTuple):
    """Where the texts of one language are."""

    queries: Mapping[str, Callable[[], dict[str, str]]]  # {set: its queries' texts by qid}
    passages: Callable[[set[str]], dict[str, str]]  # the texts of those docids that are there
    stamp: Any  # changes when the passages do


def open_data(directory: pathlib.Path, fields: Sequence[str]) -> dict[str, Source]:
    """The languages of a working directory or a data root."""
    if (directory / "corpus" / workdir.MANIFEST).is_file():
        library = Library(directory / "corpus")
        return {lang: _ingested(library, i, lang) for i, lang in enumerate(library.langs)}
    return {lang: _files(found, fields) for lang, found in datasets.discover(directory).items()}


def _ingested(library: Library, index: int, lang: str) -> Source:
    collection = library.collections[index]

    def queries(name: str) -> dict[str, str]:
        return dict(zip(*library.queries(lang, name), strict=True))

    def passages(docids: set[str]) -> dict[str, str]:
        names = sorted(docids)
        rows = zip(names, collection.rows(names), strict=True)
        return {name: corpus.passage_text(collection.passage(row)) for name, row in rows if row >= 0}

    sets = {name: lambda name=name: queries(name) for name in corpus.topics(library.directory / lang)}
    return Source(sets, passages, workdir.file_digest(library.directory / workdir.MANIFEST))


def _files(files: datasets.LanguageFiles, fields: Sequence[str]) -> Source:
    def passages(docids: set[str]) -> dict[str, str]:
        found: dict[str, str] = {}
        for path in files.corpus:
            for passage in reading.passages(path, fields):
                if passage.docid in docids:
                    found[passage.docid] = corpus.passage_text(passage)
                    if len(found) == len(docids):
                        return found
        return found

    def train() -> dict[str, str]:
        return {row.query.qid: row.query.text for row in reading.train_rows(files.train)}

    sets = {name: lambda path=path: dict(reading.topics(path)) for name, path in files.topics.items()}
    if files.queries:
        sets[files.queries.name] = lambda: dict(reading.queries(files.queries))
    if files.train:
        sets.setdefault(TRAIN, train)
    return Source(sets, passages, [[path.name, path.stat().st_size] for path in files.corpus])


# ------------------------------------------------------------------------------------------------- what a run is about


def find_queries(qids: Sequence[str], source: Source, topics: str, path: pathlib.Path) -> list[str]:
    """The texts of a run's queries; raises UserError for one that is nowhere, or worded in two ways."""
    if topics and topics not in source.queries:
        raise UserError(
            f"--topics={topics}: there are no such queries; there are: {', '.join(source.queries) or 'none'}"
        )
    sets = [read() for name, read in source.queries.items() if name == (topics or name)]
    texts = [{of[qid] for of in sets if qid in of} for qid in qids]
    missing = [qid for qid, found in zip(qids, texts, strict=True) if not found]
    if missing:
        raise UserError(
            f"{path}: {len(missing)} of {len(qids)} queries, the first {missing[0]!r}, are not among the queries of "
            f"--data ({topics or ', '.join(source.queries) or 'none'}); give the data that the run was made on"
        )
    if several := next((qid for qid, found in zip(qids, texts, strict=True) if len(found) > 1), None):
        raise UserError(f"{path}: the query {several!r} has several texts in the sets {', '.join(source.queries)}; name "
                        "the run's own by --topics")  # fmt: skip
    return [found.pop() for found in texts]


def find_passages(
    names: set[str], sources: Mapping[str, Source], langs: Sequence[str], path: pathlib.Path
) -> dict[str, str]:
    """The texts of passages by their names in a run: docids of the languages searched, or LANG:docid where it searched
    several. Raises UserError for one that is nowhere, or in two languages."""
    found: dict[str, str] = {}
    for lang in langs:
        wanted = {name: name for name in names}
        if len(langs) > 1:
            wanted |= {name.removeprefix(f"{lang}:"): name for name in names if name.startswith(f"{lang}:")}
        texts = {wanted[docid]: text for docid, text in sources[lang].passages(set(wanted)).items()}
        if twice := min(texts.keys() & found.keys(), default=None):
            raise UserError(f"{path}: the docid {twice!r} is in several languages; a run over a pool writes LANG:docid")
        found |= texts
    if missing := sorted(names - found.keys()):
        raise UserError(
            f"{path}: {len(missing)} of {len(names)} passages, the first {missing[0]!r}, are not in the corpus of "
            f"{', '.join(langs)} under --data; give the data that the run was made on, and --corpus if it searched another"
        )
    return found


def _searched(lang: str, name: str, sources: Mapping[str, Source]) -> list[str]:
    """The languages whose passages a run of `lang` names."""
    if name not in (OWN, POOL, *sources):
        raise UserError(f"--corpus is {name!r}; it is one of {OWN}, {POOL}, {', '.join(sources)}")
    return [*sources] if name == POOL else [lang if name == OWN else name]


def runs_of(pattern: str, lang: str, sources: Mapping[str, Source]) -> dict[str, pathlib.Path]:
    """`{language: run}`, of languages that the data have."""
    found = find(pattern)
    if LANG not in pattern:
        if not lang and len(sources) > 1:
            raise UserError(
                f"{pattern}: --data has the languages {', '.join(sources)}; say by --lang which one this run is of"
            )
        found = {lang or next(iter(sources)): found[ONE]}
    if odd := [name for name in found if name not in sources]:
        raise UserError(f"{pattern}: --data has no language {', '.join(odd)}; there are: {', '.join(sources)}")
    return found


# ------------------------------------------------------------------------------------------------------------- the work


def rerank(
    path: pathlib.Path, lang: str, sources: Mapping[str, Source], searched: Sequence[str], topics: str, depth: int,
    scorer: Any, out: pathlib.Path,
) -> int:  # fmt: skip
    """Writes the first `depth` hits of a run's queries in the order of their new scores; returns how many pairs there are.

    Equal scores keep the run's order.
    """
    from jdmdr import pairs

    run = {qid: metrics.ranked(hits, depth) for qid, hits in metrics.read_run(path).items()}
    if not run:
        raise UserError(f"{path} holds no hit; give a TREC run")
    queries = find_queries(list(run), sources[lang], topics, path)
    texts = find_passages({name for hits in run.values() for name in hits}, sources, searched, path)
    names = sorted(texts)
    place = {name: row for row, name in enumerate(names)}
    lengths_Q = [len(hits) for hits in run.values()]
    query_N = np.repeat(np.arange(len(run)), lengths_Q)
    hit_N = [name for hits in run.values() for name in hits]
    passage_N = np.array([place[name] for name in hit_N])
    partial = out.with_name(f".{out.name}.scores")
    with progress.bar(None, f"  scoring {lang}", "pairs", total=len(hit_N)) as bar:
        score_N = pairs.score_all(
            scorer, queries, query_N, passage_N, lambda rows: [texts[names[row]] for row in rows], partial, bar
        )
    rows_QxK = np.full((len(run), max(lengths_Q)), NO_HIT, np.int64)
    scores_QxK = np.full(rows_QxK.shape, -np.inf, np.float32)
    there_QxK = np.arange(rows_QxK.shape[1]) < np.array(lengths_Q)[:, None]
    rows_QxK[there_QxK], scores_QxK[there_QxK] = np.arange(len(hit_N)), score_N
    metrics.write_run(out, list(run), best_first(rows_QxK, scores_QxK), hit_N.__getitem__, TAG)
    partial.unlink()
    return len(hit_N)


def promise(out: pathlib.Path, made_from: dict[str, Any]) -> None:
    """Writes down what `out` is made from; raises UserError where it holds something else."""
    before = workdir.read_json(out / workdir.PLAN)
    work = [path.name for path in sorted(out.iterdir()) if path.suffix in (".trec", ".scores")]
    if work and before is None:
        raise UserError(f"--out {out} holds runs made elsewhere ({work[0]}); name a directory of its own")
    if work and (changes := workdir.differences(before, made_from)):
        raise UserError(f"--out {out} holds the work of another command ({'; '.join(changes[:6])}); choose another --out, "
                        "or delete it")  # fmt: skip
    workdir.write_json(out / workdir.PLAN, made_from)


def main() -> None:
    flags.DEFINE_string("model", "", "The cross-encoder.")
    flags.DEFINE_string("encoder", "", "Instead, a bi-encoder.")
    flags.DEFINE_integer("query_length", DEFAULT_QUERY, "Tokens of a query, with --encoder.", lower_bound=1)
    flags.DEFINE_string("data", "", "A data root, or a working directory.")
    flags.DEFINE_string("out", "", "Directory to write to.")
    flags.DEFINE_integer("depth", 100, "Hits of a query.", lower_bound=1)
    flags.DEFINE_integer("length", 512, "Tokens of a pair.", lower_bound=1)
    flags.DEFINE_integer("overlap", None, "Tokens that two windows of a passage share.", lower_bound=0)
    flags.DEFINE_string("label", "", "The label that means relevant.")
    flags.DEFINE_string("topics", "", "The set of queries.")
    flags.DEFINE_string("corpus", OWN, "What the run searched.")
    flags.DEFINE_string("lang", "", "The run's language.")
    flags.DEFINE_string("fields", "title,text", "Fields of a passage.")
    flags.DEFINE_enum("dtype", "", ("", "float32", "bfloat16"), "Of the matmuls.")
    cli.restart_with_malloc_settings()
    cli.run_tool(_command, __doc__)


def _command(words: list[str], values: flags.FlagValues) -> int:
    if len(words) != 1 or not (bool(values.model) != bool(values.encoder) and values.data and values.out):
        raise UserError("one run, --model or --encoder, --data and --out are needed; write python -m jdmdr.rerank RUN "
                        "--model=NAME --data=DIR --out=DIR")  # fmt: skip
    if values.encoder and values.label:
        raise UserError("--label is for a cross-encoder, and --encoder names a bi-encoder; leave it out")
    if values.encoder and values.overlap is not None:
        raise UserError(
            "--overlap is for a cross-encoder; a bi-encoder reads in windows by encoder.chunks (docs/ance.md)"
        )
    out = pathlib.Path(values.out)
    sources = open_data(pathlib.Path(values.data), corpus.parse_fields(values.fields))
    runs = runs_of(words[0], values.lang, sources)
    searched = {lang: _searched(lang, values.corpus, sources) for lang in runs}

    checkpoints, open_scorer = _scorer(values)
    settings = ("depth", "length", "label", "topics", "corpus", "fields", "dtype", "overlap", "query_length")
    settings = {name: values[name].value for name in settings if values.encoder or name != "query_length"}
    inputs = {
        "model": {
            str(path.relative_to(home)): workdir.file_digest(path)
            for home in checkpoints
            for glob in WEIGHTS
            for path in sorted(home.rglob(glob) if values.encoder else home.glob(glob))
        },
        "run": {lang: workdir.file_digest(path) for lang, path in runs.items()},
        "passages": {lang: sources[lang].stamp for of in searched.values() for lang in of},
    }
    made_from = {"version": __version__, "settings": settings, "inputs": inputs}
    with workdir.locked(out, "--out"):
        promise(out, workdir.as_json(made_from))
        scorer = None
        for lang, path in runs.items():
            target = out / f"{lang}.trec"
            if target.exists():
                progress.say(f"{lang}: up to date")
                continue
            scorer = scorer or open_scorer()
            rerank(path, lang, sources, searched[lang], values.topics, values.depth, scorer, target)
    print(f"{out / LANG}.trec: {', '.join(runs)}; python -m jdmdr.score '{out / LANG}.trec' --qrels=FILE measures them")
    return 0


def _scorer(values: flags.FlagValues) -> tuple[list[pathlib.Path], Callable[[], Any]]:
    """The directories of the checkpoints that score, and what opens their scorer."""
    from ml_collections import ConfigDict

    from jdmdr import pairs, parallel, retrievers  # late: a mistake on the command line needs no jax
    from jdmdr.encoders.pretrained import find_checkpoint

    if values.model:
        home = find_checkpoint(values.model)
        section = types.SimpleNamespace(name=str(home), label=values.label, length=values.length)
        return [home], lambda: pairs.Scorer(section, values.dtype, parallel.data_mesh(), values.overlap)
    spec = retrievers.parse(values.encoder, "--encoder")[0]
    if spec.kind != retrievers.ENCODER:
        raise UserError(f"--encoder is {values.encoder!r}; it is a preset, PRESET=DIR, a directory or HUB/NAME")
    own = {"query_length": values.query_length, "passage_length": values.length, "dtype": values.dtype}
    section = retrievers.encoder_section(spec, ConfigDict({**own, "attention_dropout": None}))
    homes = [find_checkpoint(name) for name in (section.name, section.passage_name) if name]
    return homes, lambda: pairs.DualScorer(spec, section, parallel.data_mesh())


if __name__ == "__main__":
    main()
