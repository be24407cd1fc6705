"""The stages from the ensemble's embeddings to the negatives: mining, filtering, judging, topping up."""

from __future__ import annotations

import functools
import pathlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jdmdr import expand, judge, llm, mine, negatives, pairs, pipeline, processes, requery, retrievers, tokenizer
from jdmdr.filters import answers, cross_encoder
from jdmdr.library import TRAIN
from jdmdr.llm import estimate, generate, prompts
from jdmdr.tokenizer import Tokenizer
from jdmdr.workdir import Stage
from jdmdr.workspace import Workspace


class MiningStages(Workspace):
    """What a recipe does that mines its negatives before training; in order."""

    def _mining_stages(self, split: dict[str, Any]) -> list[Stage]:
        """From the ensemble's embeddings to the negatives."""
        c = self.config
        plain, ensemble = c.to_dict(), retrievers.parse(c.mine.retrievers)
        needed = {retrievers.WARMUP: "embeddings-warmup", retrievers.BM25: "bm25"}
        needed |= {spec.name: f"embeddings-{spec.name}" for spec in ensemble if spec.kind == retrievers.ENCODER}
        elsewhere = [path for spec in ensemble for path in retrievers.external_files(spec, sorted(self.files))]
        crossed = ("cross_encoder",) if c.cross_encoder.name else ()
        judged = pipeline.LLM_STAGES if c.llm.base_url else ()
        answered = answers.files(c.filters.answers, sorted(self.files))
        mined = {
            key: value for key, value in plain["mine"].items() if key not in ("negatives", "texts", "sample", "least")
        }  # these come behind
        return [
            *[stage for spec in ensemble if spec.kind == retrievers.ENCODER for stage in self._encoder_stages(spec)],
            Stage("mine", self.mine, {**mined, **split},
                  ("corpus", *(needed[spec.name] for spec in ensemble if spec.name in needed)), tuple(elsewhere), shared=True),
            *([Stage("cross_encoder", self.score_candidates, {**plain["cross_encoder"], "dtype": c.encoder.dtype, **split},
                     ("corpus", "mine"), shared=True)] if c.cross_encoder.name else []),
            *(self._llm_stages(ensemble, needed, crossed, answered, split) if c.llm.base_url else []),
            Stage("negatives", self.select_negatives,
                  {"filters": plain["filters"], "audit": c.audit.rows, "negatives": c.mine.negatives, "pool": c.mine.pool,
                   "texts": c.mine.texts, "sample": c.mine.sample, "least": c.mine.least, **split},
                  ("corpus", "mine", *crossed, *judged), answered),
        ]  # fmt: skip

    # An encoder of the ensemble has a tokenizer, prompts and lengths of its own, and sees the training queries alone.

    def _encoder_stages(self, spec: retrievers.Spec) -> list[Stage]:
        c = self.config
        lengths = {key: c.encoder[key] for key in ("query_length", "passage_length")}
        source = {"source": spec.source, "preset": spec.preset, **lengths}
        stored = {"dtype": c.encode.dtype, "shard_rows": c.encode.shard_rows, "dtype_of_matmuls": c.encoder.dtype}
        tokens = f"tokens-{spec.name}"
        return [
            Stage(tokens, functools.partial(self.tokenize_for, spec), source, ("corpus",), shared=True),
            Stage(f"embeddings-{spec.name}", functools.partial(self.embed_with, spec), stored, (tokens,), shared=True),
        ]

    def tokenize_for(self, spec: retrievers.Spec, out_dir: pathlib.Path) -> dict[str, Any]:
        section = retrievers.encoder_section(spec, self.config.encoder)
        home = out_dir / "tokenizer"
        name, as_in = retrievers.words(spec, section)
        if processes.leads():
            tokenizer.copy_pretrained(name, home, as_in)
        processes.barrier()
        self._tokenize(
            lambda side: Tokenizer(home, section[f"{side}_length"], section[f"{side}_prompt"]), self._mined_langs(), [TRAIN],
            out_dir,
        )  # fmt: skip
        return {"vocab_size": Tokenizer(home, 8).vocab_size}

    def embed_with(self, spec: retrievers.Spec, out_dir: pathlib.Path) -> dict[str, Any]:
        section, home, vocab_size, model = self._other_encoder(spec)
        return self._embed(model, section, home.parent, vocab_size, self._mined_langs(), [TRAIN], out_dir)

    def mine(self, out_dir: pathlib.Path) -> dict[str, Any]:
        c = self.config.mine
        search = functools.partial(retrievers.dense, index=c.index, factory=c.factory, mesh=self.own_mesh)

        @functools.cache
        def open_ensemble(lang: str) -> dict[str, retrievers.Retriever]:
            return {spec.name: self._member(spec, lang, search) for spec in retrievers.parse(c.retrievers)}

        return mine.mine(self.library, self.training, open_ensemble, c, out_dir, search)

    def score_candidates(self, out_dir: pathlib.Path) -> dict[str, Any]:
        c = self.config
        scorer = pairs.Scorer(c.cross_encoder, c.encoder.dtype, self.own_mesh)
        return cross_encoder.score(
            self.library, self.training, self.directory / "mine", scorer, c.cross_encoder.depth, out_dir
        )

    # What a language model judges and writes. Which server it stands behind changes no result.

    def _llm_stages(
        self,
        ensemble: Sequence[retrievers.Spec],
        needed: Mapping[str, str],
        crossed: Sequence[str],
        answered: tuple[pathlib.Path, ...],
        split: Mapping[str, Any],
    ) -> list[Stage]:
        c, plain = self.config, self.config.to_dict()
        judge_ = {
            "judge": plain["judge"], "filters": plain["filters"], "negatives": c.mine.negatives, "model": c.llm.model,
            "extra_body": c.llm.extra_body, "prompt": prompts.JUDGE, **split,
        }  # fmt: skip
        search = {"pool": c.mine.pool, "fusion": c.mine.fusion, "dtype": c.encode.dtype, "tower": c.encoder.dtype}
        asked = requery.askable(ensemble) if c.expand.rounds else []
        makers = {retrievers.WARMUP: "warmup"}  # of a new query's vector or words
        makers |= {spec.name: f"tokens-{spec.name}" for spec in asked if spec.kind == retrievers.ENCODER}
        return [
            Stage("judge", self.judge, {**judge_, "audit": c.audit.rows}, ("corpus", "mine", *crossed), answered),
            Stage("expand", self.expand, {"expand": plain["expand"], "writes": generate.VERSION, **search, **judge_},
                  ("corpus", "tokenizer", "mine", "judge", *crossed,
                   *(of[spec.name] for spec in asked for of in (makers, needed) if spec.name in of)), answered),
        ]  # fmt: skip

    def judge(self, out_dir: pathlib.Path) -> dict[str, Any]:
        with llm.open_client(self.config.llm, self.directory) as client:
            return judge.judge(self.library, self.training, self.directory / "mine", client, self.config, out_dir)

    def plan_judge(self) -> str:
        """What `judge` would send, as a table."""
        with llm.open_client(self.config.llm, self.directory) as client:
            plan = judge.plan(self.library, self.training, self.directory / "mine", client, self.config)
            return estimate.table(plan, self.config.llm, client.log.totals)

    def expand(self, out_dir: pathlib.Path) -> dict[str, Any]:
        with llm.open_client(self.config.llm, self.directory) as client:
            return expand.expand(
                self._judged_languages(), self._searching(out_dir), self._query_tokens, client, out_dir
            )

    def plan_expand(self) -> str:
        """What `expand` would send, as a table."""
        with llm.open_client(self.config.llm, self.directory) as client, tempfile.TemporaryDirectory() as scratch:
            languages = list(self._judged_languages())
            plan = expand.plan(
                languages, self._searching(pathlib.Path(scratch)), self._query_tokens, client, self.config
            )
            return estimate.table(plan, self.config.llm, client.log.totals)

    def _judged_languages(self) -> Iterator[expand.Language]:
        directories = self.directory / "mine", self.directory / "judge"
        for lang in self.library.langs:
            if (directories[1] / f"{lang}.jsonl").exists():
                yield expand.Language(lang, self.library, self.training, *directories, self.config)

    def select_negatives(self, out_dir: pathlib.Path) -> dict[str, Any]:
        return self._select_negatives(out_dir, 0)

    def _select_negatives(self, out_dir: pathlib.Path, version: int) -> dict[str, Any]:
        homes = self.directory / "judge", self.directory / "expand"
        outcome = functools.partial(expand.read, *homes) if self.config.llm.base_url else None
        return negatives.make(
            self.library, self.training, self.directory / "mine", outcome, self.config, out_dir, version
        )
