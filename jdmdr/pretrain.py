"""Pretrains an encoder for cross-lingual retrieval on weak pairs: query language modelling and relevance ranking.

    python -m jdmdr.pretrain --config configs/clir_pretrain.py --workdir runs/clir --config.encoder.name=NAME
        --config.pretrain.sources=articles:DIR

Writes `export/encoder`, which encoder.name of any recipe takes; `export/reranker`, for jdmdr.rerank and cross_encoder.name;
`export/masked_lm`; and `alignment/alignment.json`: how often a held-out section's nearest neighbour in another language is its
own counterpart, before and after.

Source: Yu, Fei and Li, "Cross-lingual Language Model Pretraining for Retrieval" (WWW 2021).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tabulate import tabulate

from jdmdr import (
    articles,
    bitext,
    encoders,
    models,
    pair_batches,
    pairs,
    parallel,
    pipeline,
    progress,
    section_pairs,
    tokenizer,
    train,
    workdir,
)
from jdmdr.check import check_config
from jdmdr.encode import Embedder
from jdmdr.encoders import huggingface, pretrained
from jdmdr.encoders.lengthen import lengthen
from jdmdr.hashing import stable_hash
from jdmdr.objectives import qlm_rr
from jdmdr.section_pairs import Sections
from jdmdr.types import UserError
from jdmdr.workdir import Stage, read_json, write_json

TARGET = "alignment"
MEASURE = "alignment"  # of validation: P@1 over held-out sections, mean pooling
POOLINGS = ("mean", "cls")


class Pretraining:
    """A config bound to a working directory."""

    def __init__(self, config: ConfigDict, directory: pathlib.Path):
        self.config, self.directory = config, directory

    def stages(self) -> list[Stage]:
        c, p = self.config, self.config.pretrain
        plain = p.to_dict()
        own = {key: plain.pop(key) for key in ("sources", "min_words", "monolingual", "align")}
        align = {"align": own.pop("align"), "monolingual": own.pop("monolingual")}
        encoder = {key: c.encoder[key] for key in ("name", "window", "dtype", "remat")}
        files = [path for source in articles.parse(p.sources) for path in articles.read(source)[1]]
        run = {**encoder, "seed": c.seed, "pretrain": plain}
        return [
            Stage("sections", self.write_sections, own, files=tuple(files)),
            Stage("pairs", self.write_pairs, align, ("sections",)),
            Stage(
                "tokenizer", self.make_tokenizer, {"encoder": c.encoder.name, **c.tokenizer.to_dict()}, ("sections",)
            ),
            Stage("tokens", self.tokenize, {}, ("sections", "tokenizer")),
            Stage("pretrain", self.train, run, ("sections", "pairs", "tokens"), volatile=train.VOLATILE, precious=True),
            Stage("export", self.export, {}, ("tokenizer", "pretrain")),
            Stage(TARGET, self.measure, {"length": p.length, "valid_share": p.valid_share}, ("pretrain", "export")),
        ]

    # ------------------------------------------------------------------------------------------------------- data

    def write_sections(self, out_dir: pathlib.Path) -> dict[str, Any]:
        p = self.config.pretrain
        return section_pairs.write_sections(articles.parse(p.sources), p.min_words, out_dir)

    @functools.cached_property
    def sections(self) -> dict[str, Sections]:
        paths = sorted((self.directory / "sections").glob("*.jsonl"))
        return {path.stem: Sections(path) for path in paths}

    def write_pairs(self, out_dir: pathlib.Path) -> dict[str, Any]:
        p = self.config.pretrain
        with tempfile.TemporaryDirectory() as scratch:
            embed = None
            if p.align.encoder:
                embed, _ = bitext.open_encoder(self.config, self.directory, p.align.encoder, pathlib.Path(scratch))
            return section_pairs.write_pairs(self.sections, p.align, p.monolingual, embed, out_dir)

    def make_tokenizer(self, out_dir: pathlib.Path) -> dict[str, Any]:
        c = self.config
        if c.encoder.name:
            tokenizer.copy_pretrained(str(pretrained.find_checkpoint(c.encoder.name)), out_dir, c.tokenizer.as_in)
        else:
            tokenizer.train_unigram(self._texts(), c.tokenizer.vocab_size, out_dir)
            tokenizer.add_pair_tokens(out_dir)
        found = self._tokenizer(out_dir)
        if found.mask_id is None and c.pretrain.objective.qlm_weight > 0:
            raise UserError(
                f"the tokenizer of {c.encoder.name} has no mask token; set pretrain.objective.qlm_weight to 0"
            )
        return {"vocab_size": found.vocab_size}

    def _texts(self) -> Iterator[str]:
        return (row["text"] for of in self.sections.values() for row in of)

    def _tokenizer(self, directory: pathlib.Path | None = None) -> pairs.PairTokenizer:
        return pairs.PairTokenizer(str(directory or self.directory / "tokenizer"), self.config.pretrain.length)

    def tokenize(self, out_dir: pathlib.Path) -> dict[str, Any]:
        pair_batches.write_section_tokens(self.sections, self._tokenizer(), out_dir)
        return {}

    @functools.cached_property
    def tokens(self) -> pair_batches.SectionTokens:
        return pair_batches.SectionTokens(
            self.directory / "tokens", sorted(self.sections), self._tokenizer().vocab_size
        )

    def _read_pairs(self, held_out: bool) -> pair_batches.PairSet:
        """Those of the articles that are held out, or of the others; a concept is on one side in all languages."""
        c = self.config
        bound = int(c.pretrain.valid_share * 2**64)
        wanted = lambda lang, row: (
            (stable_hash(c.seed, "held-out articles", self.sections[lang].about[row]) < bound) == held_out
        )
        return pair_batches.read_pairs(self.directory / "pairs", self.sections, wanted)

    # ------------------------------------------------------------------------------------------------------- model

    def _start(self) -> tuple[encoders.EncoderConfig, Any, dict[str, Any]]:
        """The encoder, its parameters and the heads before training."""
        c, p = self.config, self.config.pretrain
        rng = jax.random.key(c.seed)
        vocab_size = self._tokenizer().vocab_size
        tied = p.objective.tied
        if c.encoder.name:
            config, params = encoders.load_pretrained(c.encoder.name, pooling="cls", normalize=False)
            if config.kind != "transformer" or config.untied or config.projection:
                raise UserError(
                    f"encoder.name {c.encoder.name} is no bare transformer; a pair is read by one, with nothing behind it"
                )
            heads = qlm_rr.init_heads(rng, config, tied)
            directory = pretrained.find_checkpoint(c.encoder.name)
            heads[qlm_rr.LM_HEAD] = huggingface.read_lm_head(directory, config, tied) or heads[qlm_rr.LM_HEAD]
        else:
            s = p.scratch
            config = encoders.EncoderConfig(
                "transformer", vocab_size, s.width, pooling="cls", normalize=False, layers=s.layers, heads=s.heads,
                ffn=s.ffn, max_positions=p.length, type_vocab=2, hidden_dropout=0.1, attention_dropout=0.1,
            )  # fmt: skip
            params = encoders.build(config).init(rng)
            heads = qlm_rr.init_heads(jax.random.fold_in(rng, 1), config, tied)
        if vocab_size > config.vocab_size:
            raise UserError(f"the tokenizer of {c.encoder.name} has {vocab_size} tokens, but its weights have vectors for "
                            f"{config.vocab_size}; they do not belong together")  # fmt: skip
        if c.encoder.window:
            config, params = lengthen(config, params, p.length, c.encoder.window)
        if p.length > config.usable_positions:
            raise UserError(f"pretrain.length is {p.length}, but the encoder has room for {config.usable_positions} tokens; lower "
                            "it, or set encoder.window")  # fmt: skip
        config = dataclasses.replace(config, dtype=models.matmul_dtype(c.encoder.dtype), remat=c.encoder.remat)
        return config, params, heads

    def train(self, out_dir: pathlib.Path) -> dict[str, Any]:
        c, p = self.config, self.config.pretrain
        mesh = parallel.data_mesh()
        encoder_config, params, heads = self._start()
        found = self._read_pairs(held_out=False)
        if not len(found.source_n):
            raise UserError(f"all articles of {p.sources} are held out; lower pretrain.valid_share, or add articles")
        batches = pair_batches.PairBatches(self.tokens, found, self._tokenizer(), p, c.seed, mesh.devices.size)
        section = p.copy_and_resolve_references()
        if section.steps is None:
            with section.unlocked(), section.ignore_type():
                section.steps = math.ceil(p.epochs * batches.steps_per_epoch)
        heads = {head: heads[head] for part, head in qlm_rr.HEAD_OF.items() if part in batches.parts}
        objective = qlm_rr.make_objective(p.objective, encoder_config, heads, 1 + p.negatives)
        progress.say(f"  {len(found.source_n)} pairs of {len(found.groups)} pairs of languages, {section.steps} steps")
        validation = lambda params: self._alignment(params, encoder_config, "mean").get("average")
        params, counts = train.train(
            section, encoders.build(encoder_config), params, objective, batches.make, batches.shapes, validation, out_dir, c.seed,
            mesh, c.encoder.name or None, MEASURE,
        )  # fmt: skip
        return {
            **counts,
            "pairs": len(found.source_n),
            "parameters_sha256": models.save(out_dir, encoder_config, params),
        }

    # ------------------------------------------------------------------------------------------------------- outcome

    def export(self, out_dir: pathlib.Path) -> dict[str, Any]:
        """The encoder, and the encoder with either head, as Hugging Face directories."""
        config, params = models.load(self.directory / "pretrain")
        heads = models.load_tree(self.directory / "pretrain" / train.OWN)
        writers = {"encoder": lambda home: huggingface.write_checkpoint(config, params, home)}
        if rank_head := heads.get(qlm_rr.RANK_HEAD):
            writers["reranker"] = lambda home: huggingface.write_classifier(config, {**params, "head": rank_head}, home)
        if lm_head := heads.get(qlm_rr.LM_HEAD):
            writers["masked_lm"] = lambda home: huggingface.write_masked_lm(config, params, lm_head, home)
        for name, write in writers.items():
            shutil.copytree(self.directory / "tokenizer", out_dir / name, dirs_exist_ok=True,
                            ignore=shutil.ignore_patterns(workdir.MANIFEST, workdir.PLAN))  # fmt: skip
            write(out_dir / name)
        return {"directories": sorted(writers)}

    def _alignment(self, params: Any, encoder_config: encoders.EncoderConfig, pooling: str) -> dict[str, float]:
        """P@1 of finding a held-out section's counterpart among those of the other language, mean of both ways, and the average
        over the pairs of languages; nothing where none is held out."""
        found = self._read_pairs(held_out=True)
        if not len(found.source_n):
            return {}
        mesh = parallel.data_mesh()
        encoder = encoders.build(dataclasses.replace(encoder_config, pooling=pooling, normalize=True))
        whole = lambda row: self.tokens.ids(self.tokens.sentences(row))
        source = pair_batches.Alone(self._tokenizer().template, whole, self.config.pretrain.length)
        rows = np.unique(np.concatenate([found.source_n, found.target_n]))
        vectors_CxD = Embedder(encoder, mesh, self.config.pretrain.length, "passage").embed(params, source, rows)
        out = {}
        for group, name in enumerate(found.groups):
            own = found.group_n == group
            x, y = name.split("-")
            if x != y and own.any():
                sides = [vectors_CxD[np.searchsorted(rows, of[own])] for of in (found.source_n, found.target_n)]
                out[name] = precision_at_1(*sides)
        return {**out, "average": float(np.mean(list(out.values())))} if out else {}

    def measure(self, out_dir: pathlib.Path) -> dict[str, Any]:
        before = self._start()[:2]
        after = models.load(self.directory / "pretrain")
        found = {when: {pooling: self._alignment(params, config, pooling) for pooling in POOLINGS}
                 for when, (config, params) in (("before", before), ("after", after))}  # fmt: skip
        write_json(out_dir / f"{TARGET}.json", found)
        return {when: {pooling: of.get("average") for pooling, of in by.items()} for when, by in found.items()}


def precision_at_1(one_NxD: np.ndarray, two_NxD: np.ndarray) -> float:
    """How often row i of one is the nearest neighbour of row i of the other, mean of both ways; vectors of unit length."""
    similarity_NxN = one_NxD @ two_NxD.T
    right = np.arange(len(one_NxD))
    return float(np.mean([similarity_NxN.argmax(axis) == right for axis in (0, 1)]))


def table(directory: pathlib.Path) -> str:
    """Alignment P@1 by pair of languages, and what was exported."""
    found = read_json(directory / TARGET / f"{TARGET}.json")
    names = list(found["after"]["mean"])
    columns = [(when, pooling) for when in ("before", "after") for pooling in POOLINGS]
    rows = [[name, *(f"{found[when][pooling][name]:.3f}" for when, pooling in columns)] for name in names]
    headers = ["alignment P@1", *(f"{when}, {pooling}" for when, pooling in columns)]
    exported = [path for path in sorted((directory / "export").iterdir()) if path.is_dir()]
    return "\n".join([tabulate(rows, headers, disable_numparse=True, stralign="right"), "", *map(str, exported)])


def check(config: ConfigDict) -> None:
    """Raises UserError for the first value of `pretrain` that no stage could use."""
    p = config.pretrain
    choices = {"mask_mode": (p.mask_mode, pair_batches.MASK_MODES), "objective.rr_loss": (p.objective.rr_loss, qlm_rr.RR_LOSSES),
               "objective.schedule": (p.objective.schedule, qlm_rr.SCHEDULES)}  # fmt: skip
    for key, (value, allowed) in choices.items():
        if value not in allowed:
            raise UserError(f"pretrain.{key} is {value!r}; it is one of {', '.join(map(repr, allowed))}")
    least = {
        "min_words": 0,
        "query_length": 1,
        "length": 8,
        "negatives": 1,
        "batch_size": 1,
        "epochs": 0,
        "max_profiles": 1,
    }
    for key, bound in least.items():
        if p[key] < bound:
            raise UserError(f"pretrain.{key} is {p[key]}; it is at least {bound}")
    for key in ("mask_rate", "valid_share"):
        if not 0 <= p[key] < 1:
            raise UserError(f"pretrain.{key} is {p[key]}; it is a share, at least 0 and below 1")


def stages(config: ConfigDict, directory: pathlib.Path) -> list[Stage]:
    """The stages of a config under `directory`, its values checked."""
    check_config(config)
    check(config)
    return Pretraining(config, directory).stages()


if __name__ == "__main__":
    pipeline.staged(stages, TARGET, table, __doc__)
