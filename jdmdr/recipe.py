"""A recipe bound to a working directory: its stages, what each reads and writes, and which settings it depends on.

What several stages read stands in `workspace.py`, and the stages that mine in `mining_stages.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jdmdr import (
    batches,
    corpus,
    distill,
    embeddings,
    encode,
    encoders,
    evaluate,
    export,
    models,
    negatives,
    objectives,
    parallel,
    pipeline,
    processes,
    progress,
    refresh,
    report,
    section_pairs,
    sources,
    splits,
    tokenizer,
    topics,
    train,
    trainable,
    validate,
    workdir,
)  # fmt: skip
from jdmdr.check import check_config
from jdmdr.encoders import attention, pretrained, vocabulary
from jdmdr.index.bm25 import Bm25Searcher
from jdmdr.library import TrainingQuery
from jdmdr.mining_stages import MiningStages
from jdmdr.splits import POOLED
from jdmdr.teaching_stages import TeachingStages
from jdmdr.train import VOLATILE
from jdmdr.types import UserError
from jdmdr.workdir import Stage
from jdmdr.workspace import trains

# the stages of an evaluation without training
ALONE = ("corpus", "tokenizer", "tokens", "warmup", "bm25", "bm25-pool", "embeddings-warmup", "evaluate")
PARITY_TEXTS = 32  # passages that the export is checked on


class Recipe(MiningStages, TeachingStages):
    """A config bound to a working directory: its stages, and the work of each."""

    def stages(self) -> list[Stage]:
        """All stages in order. Settings hold the config keys that a stage depends on; files are known by their bytes."""
        c = self.config
        check_config(c)
        plain = c.to_dict()
        lengths = {
            k: v for k, v in plain["encoder"].items() if k.endswith(("_prompt", "_length")) or k.startswith("chunk")
        }
        split = {"valid_share": c.data.valid_share, "seed": c.seed}
        stored = {k: v for k, v in plain["encode"].items() if k != "dimensions"}  # a cut of the trained encoder alone
        raw = [p for f in self.files.values() for p in f.paths()]
        wants = lambda s, share: trains(c[s]) and c[s][share] > 0
        cloze = {s: (*(["cloze"] if wants(s, "cloze_share") else []), *(["weak"] if wants(s, "pairs_share") else []))
                 for s in ("warmup", "train")}  # fmt: skip
        weak_files = [
            p for part in ("sections", "pairs") for p in sorted(pathlib.Path(c.data.pairs, part).glob("*.jsonl"))
        ]
        weak = Stage("weak", self.make_weak, {"seed": c.seed, **lengths}, ("corpus", "tokenizer"), tuple(weak_files))
        pooled = any(s.corpus in POOLED for s in self.splits)
        searching = c.train.objective.name in objectives.SEARCHING  # it finds its passages while it trains
        distilling = distill.distils(c)
        mined = not searching and (not distilling or distill.on_queries(c) and c.train.passages_per_query > 1)
        mining = self._mining_stages(split) if mined else []
        teaching = self._teaching_stages(split, mined) if distilling else []
        trained = not c.tokenizer.name and (not c.encoder.name or c.encoder.new_vocabulary)
        read = ("bitext",) if trained and distill.has_bitext(c) else ()
        learned = [*(["embeddings-warmup"] if searching else []), *(["negatives"] if mined else []),
                   *([] if distilling else ["topics"]), *(stage.name for stage in teaching)]  # fmt: skip
        if not trains(c.train) and not distilling:
            learned = []  # an encoder that stays as it is is encoded with before anything is mined
        refreshing = {"refresh": {k: v for k, v in plain["refresh"].items() if k not in ("start", "devices", "replay")}}
        refreshing = refreshing if c.refresh.mode != "off" else {}
        given = embeddings.files(pathlib.Path(c.encode.passages), sorted(self.files)) if c.encode.passages else ()
        every = [
            Stage("corpus", self.ingest, {"langs": sorted(self.files), "fields": c.data.fields, "separator": c.data.separator}, files=tuple(raw), shared=True),
            *[stage for stage in teaching if stage.name == "bitext"],
            Stage("tokenizer", self.make_tokenizer,
                  {"encoder": c.encoder.name, "new": c.encoder.new_vocabulary, **plain["tokenizer"]}, ("corpus", *read)),
            Stage("tokens", self.tokenize, lengths, ("corpus", "tokenizer"), shared=True),
            *[Stage(name, self.make_cloze, {"per_lang": c.data.cloze_per_lang, "seed": c.seed, **lengths},
                    ("corpus", "tokenizer"), shared=True) for name in {*cloze["warmup"], *cloze["train"]} & {"cloze"}],
            *([weak] if "weak" in {*cloze["warmup"], *cloze["train"]} else []),
            Stage("warmup", self.warm_up, {"encoder": plain["encoder"], "warmup": plain["warmup"], **split},
                  ("corpus", "tokens", *cloze["warmup"]), volatile=VOLATILE, precious=True, shared=True),
            Stage("bm25", self.index_bm25, {}, ("corpus",), shared=True),
            *([Stage("bm25-pool", self.index_bm25_pool, {}, ("corpus",))] if pooled else []),
            Stage("embeddings-warmup", self.embed_first, stored, ("corpus", "tokens", "warmup"), given, shared=True),
            *mining,
            *[stage for stage in teaching if stage.name != "bitext"],
            *([] if distilling else [Stage("topics", self.label_topics, {**plain["topics"], **split},
                  ("corpus", "tokenizer", "warmup", "embeddings-warmup"), topics.files(c.topics))]),
            Stage("train", self.train, {"train": plain["train"], "weights": plain["weights"], **refreshing, **split},
                  ("corpus", "tokens", *cloze["train"], "warmup", *learned),
                  (refresh.taken_path(c.refresh.replay),) if c.refresh.mode == "replay" else (),
                  volatile=VOLATILE, precious=True, shared=True),
            Stage("embeddings", self.embed_last, plain["encode"],
                  ("tokens", "train", *(["embeddings-warmup"] if self._keeps_passages else [])), shared=True),
            Stage("evaluate", self.evaluate, {"name": c.name, "splits": self.splits, **plain["evaluate"], **split},
                  ("corpus", "bm25", *(["bm25-pool"] if pooled else []), "embeddings-warmup",
                   *([] if self.evaluates_alone else ["embeddings"])), shared=True),
            Stage("export", self.export, {"name": c.name, "dimensions": c.encode.dimensions},
                  ("corpus", "tokenizer", "train", "evaluate")),
            Stage("report", self.report, {},
                  ("corpus", *(stage.name for stage in mining if stage.name in (*pipeline.LLM_STAGES, "negatives")), "warmup", "train", "embeddings",
                   "evaluate", "export")),
        ]  # fmt: skip
        return [stage for stage in every if stage.name in ALONE] if self.evaluates_alone else every

    def ingest(self, out_dir: pathlib.Path) -> dict[str, Any]:
        fields = corpus.parse_fields(self.config.data.fields)
        bar = progress.bar(self.files.items(), "  reading", "languages", total=len(self.files))
        for lang, files in processes.claimed(bar):
            if not (out_dir / lang).exists():
                partial = out_dir / f".{lang}.partial"
                _empty(partial)
                report = corpus.write_passages(lang, files, partial, fields, self.config.data.separator)
                workdir.write_json(partial / "passages.json", dataclasses.asdict(report))
                partial.rename(out_dir / lang)
        counts = {}
        for lang, files in processes.claimed(self.files.items()):
            path = out_dir / lang / "report.json"
            if not path.exists():
                report = corpus.IngestReport(**workdir.read_json(out_dir / lang / "passages.json"))
                corpus.write_queries(lang, files, out_dir / lang, report, self.library.others(lang))
                workdir.write_json(path, dataclasses.asdict(report))
        for lang in self.files:
            counts[lang] = workdir.read_json(out_dir / lang / "report.json")
            for warning in counts[lang].get("warnings", ()):
                progress.say(f"  warning: {warning}")
        return counts

    def make_tokenizer(self, out_dir: pathlib.Path) -> dict[str, Any]:
        c = self.config
        # The checkpoints' weights come along: that they cannot be fetched is told before any work.
        homes = [pretrained.find_checkpoint(name) for name in (c.encoder.name, c.encoder.passage_name) if name]
        new = c.encoder.new_vocabulary
        name = c.tokenizer.name or (str(homes[0]) if homes and not new else "")
        if name:
            tokenizer.copy_pretrained(name, out_dir, c.tokenizer.as_in)
        else:
            texts = itertools.chain.from_iterable(map(self._texts, self.library.collections))
            if distill.has_bitext(c):
                texts = itertools.chain(texts, distill.bitext_texts(self.directory / "bitext"))
            around = vocabulary.around(pathlib.Path(pretrained.tokenizer_place(str(homes[0])))) if new else None
            tokenizer.train_unigram(texts, c.tokenizer.vocab_size, out_dir, around)
        made = tokenizer.Tokenizer(out_dir, 8)
        if not c.encoder.name and made.special_tokens:
            raise UserError(
                f"tokenizer.name {name!r} puts {made.special_tokens} special tokens around a text, and the from-scratch "
                "encoder has no use for them; leave tokenizer.name empty, or name an encoder with encoder.name"
            )
        return {"vocab_size": made.vocab_size}

    def tokenize(self, out_dir: pathlib.Path) -> dict[str, Any]:
        self._tokenize(self._tokenizer, self.library.langs, self.library.topics(), out_dir)
        return {}

    def make_cloze(self, out_dir: pathlib.Path) -> dict[str, Any]:
        c = self.config
        tokenizers = self._tokenizer("query"), self._tokenizer("passage")
        for index, _ in processes.claimed(enumerate(self.library.langs)):
            sources.write_cloze(self.library, index, c.data.cloze_per_lang, c.seed, out_dir, *tokenizers)
        return {lang: sources.cloze_pairs(out_dir, lang) for lang in self.library.langs}

    def make_weak(self, out_dir: pathlib.Path) -> dict[str, Any]:
        c = self.config
        tokenizers = self._tokenizer("query"), self._tokenizer("passage")
        return section_pairs.write_training(
            pathlib.Path(c.data.pairs), self.library.langs, c.seed, out_dir, *tokenizers
        )

    def _run_training(
        self, out_dir: pathlib.Path, section: Any, encoder_config: Any, params: Any, found: Any, langs: Sequence[str],
        topic_names: Sequence[str], base: str | None, refreshing: refresh.Refresh | None = None,
    ):  # fmt: skip
        """Trains on the sources `found`, whose labels are of `langs` and `topic_names`."""
        c = self.config
        encoder = encoders.build(encoder_config)
        lengths = section.query_length or c.encoder.query_length, section.passage_length or c.encoder.passage_length
        section = with_steps(section, len(found[0].training_set.lang_n), found[0].share)
        make_batch, shapes, sentence = None, 0, "no step: the encoder as it is"
        if section.steps:
            make_batch, shapes, sentence = sources.batch_maker(
                found,
                section,
                c.weights,
                lengths,
                self.mesh.devices.size,
                c.seed,
                max(int(of.training_set.lang_n.max()) for of in found) + 1,
                len(topic_names),
                not attention.packs(encoder_config),
                parallel.own_rows(self.mesh),
            )
        progress.say(f"  {sentence}")
        validation = validate.make_validation(
            self.library,
            self.training,
            self.stores,
            encoder,
            self.mesh,
            lengths,
            section.valid_pool,
            c.seed,
            self.passages,
        )
        made_of = None
        if section.objective.name in objectives.DISTILLING:
            teacher_width = workdir.counts_of(self.directory, "teacher")["width"]
            made_of = objectives.Widths(encoder_config.embedding_width, teacher_width)
        if section.steps and section.objective.name in objectives.SEARCHING:
            trainable.require_frozen_passages(section, encoder_config, params)
            blocks = [block for lang in self.library.langs for block in encode.shards(self.directory / "embeddings-warmup" / lang, "passages")]  # fmt: skip
            made_of = objectives.Collections(blocks, self.library.bases)
        objective = objectives.build(section.objective, encoder_config, self.mesh, made_of)
        params, counts = train.train(
            section, encoder, params, objective, make_batch, shapes, validation, out_dir, c.seed, self.mesh, base,
            fsdp=c.parallel.fsdp, rules=c.parallel.rules, stall=c.parallel.stall, refresh=refreshing,
        )  # fmt: skip
        if section.steps:
            counts |= sources.shares(found[0], section, c.seed, langs, topic_names)
        return {**counts, "parameters_sha256": models.save(out_dir, encoder_config, params)}

    def _with_cloze(self, training_set: Any, section: Any) -> list[Any]:
        """The section's sources: its training set, and inverse-cloze pairs and weak ones where it wants them."""
        own = 1 - section.cloze_share - section.pairs_share
        found = [sources.Source(training_set, own, section.passages_per_query)]
        if trains(section) and section.cloze_share > 0:
            pairs = sources.cloze(self.directory / "cloze", self.library, self.vocab_size)
            found.append(sources.Source(pairs, section.cloze_share, 1))
        if trains(section) and section.pairs_share > 0:
            pairs = sources.weak(self.directory / "weak", self.library, self.vocab_size)
            found.append(sources.Source(pairs, section.pairs_share, 1))
        return found

    def warm_up(self, out_dir: pathlib.Path) -> dict[str, Any]:
        section = self.config.warmup
        encoder_config, params = self._first_encoder()
        if self.evaluates_alone:
            return {"steps": 0, "parameters_sha256": models.save(out_dir, encoder_config, params)}
        found = self._with_cloze(sources.pairs(self.training, self.stores), section)
        return self._run_training(
            out_dir, section, encoder_config, params, found, self.library.langs, [""], self.config.encoder.name or None
        )

    def index_bm25(self, out_dir: pathlib.Path) -> dict[str, Any]:
        for lang, collection in processes.claimed(progress.bar(self._languages(), "  indexing", "languages")):
            Bm25Searcher(self._texts(collection)).save(out_dir / lang)
        return {}

    def index_bm25_pool(self, out_dir: pathlib.Path) -> dict[str, Any]:
        texts = itertools.chain.from_iterable(self._texts(collection) for _, collection in self._languages())
        Bm25Searcher(texts).save(out_dir)
        return {}

    def embed_first(self, out_dir: pathlib.Path) -> dict[str, Any]:
        """Embeddings by the encoder that training starts from, or the passages' taken from elsewhere."""
        model, source = self._model("warmup"), self.config.encode.passages
        made_by = self._origin(model)
        if source and processes.leads():
            langs = self.library.langs, self.library.collections
            embeddings.take(pathlib.Path(source), self.directory, *langs, made_by, out_dir)
        return self._embed_own(model, made_by, out_dir, passages=not source)

    @property
    def _keeps_passages(self) -> bool:
        """Whether the passages' tower ends as it starts, but for a cut of its vectors."""
        return self.config.train.objective.name in objectives.SEARCHING or not trains(self.config.train)

    def embed_last(self, out_dir: pathlib.Path) -> dict[str, Any]:
        """Embeddings by the trained encoder; passages whose tower did not train keep the vectors they have."""
        model, before = self._final_model(), self.directory / "embeddings-warmup"
        made_by = self._origin(model)
        unchanged = self._keeps_passages and made_by == workdir.counts_of(self.directory, before.name)["passages"]
        for lang in self.library.langs if unchanged and processes.leads() else ():
            embeddings.link(before / lang, out_dir / lang)
        return self._embed_own(model, made_by, out_dir, passages=not unchanged)

    def _embed_own(
        self,
        model: tuple[encoders.EncoderConfig, Any],
        made_by: Mapping[str, Any],
        out_dir: pathlib.Path,
        passages: bool,
    ) -> dict[str, Any]:
        counts = self._embed(
            model, self.config.encoder, self.directory / "tokens", self.vocab_size, self.library.langs,
            self.library.topics(), out_dir, passages,
        )  # fmt: skip
        return {**counts, "passages": made_by}

    def _origin(self, model: tuple[encoders.EncoderConfig, Any]) -> dict[str, Any]:
        return embeddings.origin(*model, self.config.encoder, self.directory / "tokenizer")

    def label_topics(self, out_dir: pathlib.Path) -> dict[str, Any]:
        def embed(texts: list[str]) -> np.ndarray:
            encoder_config, params = self._model("warmup")
            side = encode.Embedder(
                encoders.build(encoder_config), self.own_mesh, self.config.encoder.passage_length, "passage"
            )
            return encode.embed_texts(side, params, self._tokenizer("passage"), texts)

        c = self.config
        return topics.label(
            self.library, self.training, self.directory / "embeddings-warmup", embed, c.topics, c.seed, out_dir
        )

    def train(self, out_dir: pathlib.Path) -> dict[str, Any]:
        c = self.config
        encoder_config, params = self._model("warmup")
        base = None if trains(c.warmup) else c.encoder.name or None
        if distill.distils(c):
            found, langs = self._distilling_sources()
            return self._run_training(out_dir, c.train, encoder_config, params, found, langs, [""], base)
        if not trains(c.train):
            found = [sources.Source(sources.pairs(self.training, self.stores), 1.0, 1)]
            return self._run_training(out_dir, c.train, encoder_config, params, found, self.library.langs, [""], base)
        labels = topics.read_topics(self.directory / "topics", self.library)
        version = None
        if c.train.objective.name not in objectives.SEARCHING:
            version = negatives.version_dir(self.directory / "negatives", 0)
        training, short = self.training, {}
        if version and c.mine.least:
            training = sources.with_negatives(training, self.library, version, c.mine.least)
            short = {"short_queries": len(self.training) - len(training)}
            progress.say(
                f"  {short['short_queries']} training queries with fewer than {c.mine.least} negatives are left out"
            )
        training_set = sources.labelled(training, self.stores, self.library, version, labels, c.weights.inherit)
        first, *others = self._with_cloze(training_set._replace(passages=self.passages), c.train)
        used = [q for q in training if not q.held_out]
        refreshing = self._refresh(out_dir, used, training_set.negatives, encoder_config)
        found = [first._replace(refresh=refreshing), *others]
        with contextlib.closing(refreshing) if refreshing else contextlib.nullcontext():
            counts = self._run_training(
                out_dir, c.train, encoder_config, params, found, self.library.langs, topics.names(c.topics), base, refreshing
            )  # fmt: skip
        if refreshing and processes.leads():
            refresh.tidy(out_dir / refresh.DIRECTORY)
        return {**counts, **short}

    def _refresh(
        self, out_dir: pathlib.Path, used: Sequence[TrainingQuery], first: batches.Ragged, encoder_config: Any
    ) -> refresh.Refresh | None:
        """What chooses the version of the negatives of each step, of the queries `used`; None where they stay as they are."""
        from jdmdr import follow  # late: it builds on recipes

        c = self.config
        if c.refresh.mode == "off":
            return None
        return refresh.Refresh(
            c.refresh, c.train.checkpoint_every, refresh.Version(0, 0, first), out_dir / refresh.DIRECTORY,
            lambda version: sources.mined_negatives(used, self.library, version), refresh.fingerprint(self.directory),
            self.mesh, lambda step, params: follow.refresh_next(c, self.directory, step, (encoder_config, params)),
            refresh.prepare(c, self.directory),
        )  # fmt: skip

    def evaluate(self, out_dir: pathlib.Path) -> dict[str, Any]:
        systems = ("bm25", *([] if self.evaluates_alone else ["warmup"]), self.config.name)

        def retriever(system: str, lang: str, split: splits.Split):
            return self._retriever(system, lang, split.topics, split.corpus)

        return evaluate.evaluate(
            self.library, self.training, self.splits, systems, functools.cache(retriever), self.config.evaluate,
            self.config.seed, out_dir,
        )  # fmt: skip

    def export(self, out_dir: pathlib.Path) -> dict[str, Any]:
        c = self.config
        encoder_config, params = self._final_model()
        prompts = {"query": c.encoder.query_prompt, "passage": c.encoder.passage_prompt}
        exported = out_dir.with_name(".export")  # beside it: the stage's own directory already holds its plan
        export.export(
            encoder_config, params, self.directory / "tokenizer", exported, prompts=prompts,
            max_length=c.encoder.passage_length, similarity="cosine" if encoder_config.normalize else "dot",
            card=report.model_card(self, encoder_config),
        )  # fmt: skip
        rows = np.arange(min(PARITY_TEXTS, len(self.library.collections[0])))
        texts = [prompts["passage"] + corpus.passage_text(self.library.collections[0].passage(int(r))) for r in rows]
        exact = encoders.build(dataclasses.replace(encoder_config, dtype="float32"))
        for side in encoders.SIDES if encoder_config.untied else encoders.SIDES[-1:]:
            with jax.default_matmul_precision("highest"):
                embedder = encode.Embedder(exact, self.own_mesh, c.encoder.passage_length, side)
                vectors = embedder.embed(params, self.stores.passages, rows)
            export.check_parity(exported, texts, vectors, max_length=c.encoder.passage_length, side=side)
        shutil.copytree(exported, out_dir, dirs_exist_ok=True)
        shutil.rmtree(exported)
        return {"encoder": encoder_config.kind, "texts_checked": len(texts)}

    def report(self, out_dir: pathlib.Path) -> dict[str, Any]:
        return report.write(self, out_dir)


def with_steps(section: ConfigDict, queries: int, share: float) -> ConfigDict:
    """The section with its number of steps: as given, or what its epochs over `queries` training queries take, which
    `share` of the steps draw from."""
    resolved = section.copy_and_resolve_references()
    if section.steps is None:
        with resolved.unlocked(), resolved.ignore_type():
            resolved.steps = math.ceil(section.epochs * queries / (share * section.batch_size))
    return resolved


def _empty(directory: pathlib.Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
