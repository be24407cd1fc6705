"""A config and its working directory, and what several stages read there: data, tokens, models, embeddings, retrievers."""

from __future__ import annotations

import contextlib
import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jdmdr import (
    corpus,
    datasets,
    distill,
    encode,
    encoders,
    expand,
    maxp,
    mine,
    models,
    parallel,
    processes,
    progress,
    requery,
    retrievers,
    sources,
    splits,
    tokenizer,
    topup,
    workdir,
)
from jdmdr.index import dense_searcher
from jdmdr.index.bm25 import Bm25Searcher
from jdmdr.library import TRAIN, Library
from jdmdr.splits import OWN, POOLED
from jdmdr.tokenizer import Tokenizer, TokenStore
from jdmdr.types import UserError


class Workspace:
    """A config bound to a working directory. Everything is read when it is first asked for."""

    def __init__(self, config: ConfigDict, directory: pathlib.Path):
        self.config, self.directory = config, directory

    @functools.cached_property
    def files(self) -> dict[str, Any]:
        return datasets.discover(pathlib.Path(self.config.data.root), self.config.data.langs)

    @functools.cached_property
    def splits(self) -> list[splits.Split]:
        return splits.resolve(self.config.data.splits, self.files)

    @functools.cached_property
    def library(self):
        return Library(self.directory / "corpus")

    @functools.cached_property
    def training(self):
        queries = self.library.training_queries(self.config.data.valid_share, self.config.seed)
        if not any(not q.held_out for q in queries) and not self.evaluates_alone and self._asks_queries:
            raise UserError(
                f"data.root {self.config.data.root}: no language has a training query with a positive in its corpus; add "
                "train/{lang}.jsonl, or topics/{lang}.train.tsv with qrels/{lang}.train.tsv; to evaluate an encoder as it "
                "is, set warmup.epochs and train.epochs to 0 and run jdmdr.evaluate"
            )
        return queries

    @property
    def _asks_queries(self) -> bool:
        """Whether anything trains on queries; translations need none."""
        c = self.config
        return trains(c.warmup) or not distill.distils(c) or distill.on_queries(c) or c.distill.parallel

    @functools.cached_property
    def evaluates_alone(self) -> bool:
        """Whether nothing trains and there is nothing to train on: the encoder is evaluated as it is loaded."""
        asked = any(files.train or TRAIN in {*files.topics, *files.qrels} for files in self.files.values())
        return not asked and not trains(self.config.warmup) and not trains(self.config.train)

    @functools.cached_property
    def mesh(self):
        """All devices of the run: what trains, with all processes together, lies on it."""
        return parallel.data_mesh()

    @functools.cached_property
    def own_mesh(self):
        """The devices of this process: what it encodes and searches by itself."""
        return parallel.own_mesh()

    def _languages(self) -> list[tuple[str, corpus.Collection]]:
        return list(zip(self.library.langs, self.library.collections, strict=True))

    def _texts(self, collection: corpus.Collection) -> Iterator[str]:
        return (corpus.passage_text(collection.passage(row)) for row in range(len(collection)))

    def _tokenizer(self, side: str):
        encoder = self.config.encoder
        chunks = (encoder.chunks, encoder.chunk_specials) if side == "passage" else ()
        return Tokenizer(self.directory / "tokenizer", encoder[f"{side}_length"], encoder[f"{side}_prompt"], *chunks)

    def _tokenize(
        self,
        tokenizer_of: Callable[[str], Tokenizer],
        langs: Sequence[str],
        topics: Sequence[str],
        out_dir: pathlib.Path,
    ) -> None:
        """The passages and queries of some languages as token stores; `tokenizer_of` is asked for a side."""
        for lang in processes.claimed(progress.bar(langs, "  tokenising", "languages")):
            collection = self.library.collections[self.library.langs.index(lang)]
            work = {"passages": ("passage", self._texts(collection))}
            work |= {f"queries.{split}": ("query", self.library.queries(lang, split)[1]) for split in topics}
            for name, (side, texts) in work.items():
                if not tokenizer.has_tokens(out_dir / name, lang):
                    tokenizer.write_tokens(tokenizer_of(side), texts, out_dir / name, lang)

    @functools.cached_property
    def vocab_size(self) -> int:
        return workdir.counts_of(self.directory, "tokenizer")["vocab_size"]

    @functools.cached_property
    def stores(self):
        return sources.open_stores(self.directory / "tokens", self.library, self.vocab_size)

    @functools.cached_property
    def passages(self) -> TokenStore | maxp.Chunked:
        """The passages as they are embedded: each one text, or its chunks."""
        return _chunked(self.stores.passages, self.config.encoder)

    def _first_encoder(self):
        """The encoder and its parameters before any training."""
        home = self.directory / "tokenizer"
        return models.start(self.config.encoder, self.vocab_size, self.stores.passages, self.config.seed, home)

    def _model(self, stage: str):
        """The encoder and the parameters that a training stage ended with."""
        return models.load(self.directory / stage)

    def _final_model(self):
        """The trained encoder as it is evaluated and exported: with the dimensions that `encode.dimensions` keeps."""
        model, kept = self._model("train"), self.config.encode.dimensions
        return encoders.truncate(*model, kept) if kept else model

    def _embed(
        self, model: tuple[encoders.EncoderConfig, Any], section: ConfigDict, tokens: pathlib.Path, vocab_size: int,
        langs: Sequence[str], topics: Sequence[str], out_dir: pathlib.Path, passages: bool = True,
    ) -> dict[str, Any]:  # fmt: skip
        """Encodes passages and queries; without `passages` their vectors are there already."""
        c = self.config.encode
        encoder_config, params = model
        encoder = encoders.build(encoder_config)
        sides = {"passages": "passage"} if passages else {}
        sides |= {f"queries.{split}": "query" for split in topics}
        stores = {name: TokenStore(tokens / name, langs, vocab_size) for name in sides}
        bar = progress.bar(None, "  encoding", "texts", total=sum(map(len, stores.values())))
        embedders = {
            side: encode.Embedder(encoder, self.own_mesh, section[f"{side}_length"], side) for side in encoders.SIDES
        }
        shards = [
            (name, shard)
            for name, store in stores.items()
            for index, lang in enumerate(langs)
            for shard in encode.shards_of(*map(int, store.bases[index : index + 2]), out_dir / lang, name, c.shard_rows)
        ]
        texts = {**stores, **({"passages": _chunked(stores["passages"], section)} if passages else {})}
        if passages and section.chunks > 1:
            for index, lang in processes.claimed(enumerate(langs)):
                rows = range(*map(int, stores["passages"].bases[index : index + 2]))
                encode.write_first_chunks(texts["passages"], rows, out_dir / lang)
        for name, shard in processes.claimed(shards):
            encode.encode_shard(embedders[sides[name]], params, texts[name], shard, c.dtype)
            bar.update(len(shard.rows))
        bar.close()
        return {
            "encoder": encoder_config.to_dict(),
            "similarity": "cosine" if encoder_config.normalize else "dot",
        }

    def _mined_langs(self) -> list[str]:
        return [lang for lang in self.library.langs if self.library.queries(lang, TRAIN)[0]]

    def _retriever(self, system: str, lang: str, topics: str, corpus: str = OWN):
        """Ranks `corpus` (jdmdr/splits.py) for the queries `topics` of a language."""
        searched = splits.members(self.library, lang, corpus)
        if system == retrievers.BM25:
            home = self.directory / ("bm25-pool" if corpus in POOLED else f"bm25/{searched[0]}")
            return retrievers.bm25(home, self.library.queries(lang, topics)[1])
        embeddings = self.directory / (
            "embeddings" if system == self.config.name and not self.evaluates_alone else "embeddings-warmup"
        )
        vectors = retrievers.stored(embeddings / lang, topics, [embeddings / member for member in searched])
        return retrievers.dense(vectors, "exact", "Flat", self.own_mesh)

    def _member(self, spec: retrievers.Spec, lang: str, search: Callable) -> retrievers.Retriever:
        """A retriever of the ensemble over the training queries of a language."""
        qids, texts = self.library.queries(lang, TRAIN)
        collection = self.library.collections[self.library.langs.index(lang)]
        match spec.kind:
            case retrievers.BM25:
                return retrievers.bm25(self.directory / "bm25" / lang, texts)
            case retrievers.RANDOM:
                return retrievers.at_random(lang, len(collection), self.config.seed)
            case retrievers.RUN:
                return retrievers.external_run(retrievers.run_path(spec, lang), qids, collection)
            case retrievers.TRIPLES:
                return retrievers.external_triples(retrievers.run_path(spec, lang), qids, texts, collection)
            case retrievers.VECTORS:
                return search(retrievers.external_vectors(pathlib.Path(spec.source), lang, qids, collection))
        embeddings = self.directory / f"embeddings-{spec.name}" / lang
        return search(retrievers.stored(embeddings, TRAIN, [embeddings]))

    def _other_encoder(self, spec: retrievers.Spec):
        """(its `encoder` keys, tokenizer's directory, vocabulary, encoder and parameters) of a checkpoint of the ensemble."""
        section = retrievers.encoder_section(spec, self.config.encoder)
        tokens, langs = self.directory / f"tokens-{spec.name}", self._mined_langs()
        vocab_size = workdir.counts_of(self.directory, tokens.name)["vocab_size"]
        model = models.start(section, vocab_size, TokenStore(tokens / "passages", langs, vocab_size), self.config.seed)
        return section, tokens / "tokenizer", vocab_size, model

    def _query_embedder(self, spec: retrievers.Spec) -> requery.Embed:
        """Embeds new queries as a retriever of the ensemble does; its encoder is loaded when it is first asked."""

        @functools.cache
        def loaded():
            if spec.kind == retrievers.WARMUP:
                section, home, model = self.config.encoder, self.directory / "tokenizer", self._model("warmup")
            else:
                section, home, _, model = self._other_encoder(spec)
            config, params = model
            embedder = encode.Embedder(encoders.build(config), self.own_mesh, section.query_length, "query")
            return embedder, params, Tokenizer(home, section.query_length, section.query_prompt)

        def embed(texts: Sequence[str]) -> np.ndarray:
            return encode.embed_texts(*loaded(), texts).astype(self.config.encode.dtype).astype(np.float32)

        return embed

    def _asked_member(self, spec: retrievers.Spec, lang: str, embed: requery.Embed) -> Bm25Searcher | requery.Encoded:
        """A retriever of the ensemble for queries that are not in the data."""
        if spec.kind == retrievers.BM25:
            return Bm25Searcher.load(self.directory / "bm25" / lang)
        return requery.Encoded(encode.shards(self.directory / f"embeddings-{spec.name}" / lang, "passages"), embed)

    def _searching(self, scratch: pathlib.Path) -> expand.Open:
        """Opens the ensemble for new queries of a language; each of its encoders is loaded once, when it is first asked."""
        c, weights = self.config.mine, workdir.counts_of(self.directory, "mine")["weights"]
        asked = requery.askable(retrievers.parse(c.retrievers))
        embedders = {spec.name: self._query_embedder(spec) for spec in asked if spec.dense}
        index = lambda blocks: dense_searcher(c.index, blocks, self.own_mesh, c.factory)

        @contextlib.contextmanager
        def opened(of: expand.Language) -> Iterator[topup.Search]:
            members = {spec.name: self._asked_member(spec, of.lang, embedders.get(spec.name)) for spec in asked}
            pool = mine.candidate_pool(of.queries, of.base, c.pool)
            with requery.opened(members, weights, c.fusion, index, scratch) as search:
                yield of.search(search, pool)

        return opened

    def _query_tokens(self, text: str) -> int:
        """Of a query, special tokens included; texts longer than any query are not counted to their end."""
        return len(self._counting_tokenizer.encode([text])[0])

    @functools.cached_property
    def _counting_tokenizer(self) -> Tokenizer:
        return Tokenizer(self.directory / "tokenizer", self.config.expand.query_length + 1)


def _chunked(passages: TokenStore, section: ConfigDict) -> TokenStore | maxp.Chunked:
    """Passages as the `encoder` keys `section` have them embedded."""
    return maxp.Chunked(passages, section.passage_length, section.chunks) if section.chunks > 1 else passages


def trains(section: ConfigDict) -> bool:
    """Whether a training section asks for any step."""
    return bool(section.epochs if section.steps is None else section.steps)
