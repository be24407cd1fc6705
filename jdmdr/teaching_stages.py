"""The stages of a distillation before it trains: translations, queries in other languages, the teacher's vectors."""

from __future__ import annotations

import functools
import itertools
import pathlib
import tempfile
from typing import Any

from jdmdr import distill, llm, negatives, parallel_text, sources, teacher, translate
from jdmdr.llm import estimate
from jdmdr.workdir import Stage
from jdmdr.workspace import Workspace


class TeachingStages(Workspace):
    """What a recipe does whose objective has a teacher; in order."""

    def _teaching_stages(self, split: dict[str, Any], mined: bool) -> list[Stage]:
        """What a distillation reads: translations, queries in other languages, the teacher's vectors."""
        c, spec = self.config, teacher.parse(self.config.distill.teacher)
        found = []
        lengths = {k: v for k, v in c.encoder.to_dict().items() if k.endswith(("_prompt", "_length"))}
        if distill.has_bitext(c):
            texts = parallel_text.files(c.distill.bitext, c.distill.split)
            keys = {"source": c.distill.source, "parallel": c.distill.parallel, **(split if c.distill.parallel else {})}
            found.append(Stage("bitext", self.read_bitext, keys, ("corpus",), tuple(texts)))
        if distill.on_bitext(c):
            found.append(Stage("bitext-tokens", self.tokenize_bitext, lengths, ("bitext", "tokenizer")))
        if distill.on_queries(c):
            written = ("translate",) if c.distill.translate else ()
            asked = {"langs": c.distill.translate, "source": c.distill.source, "model": c.llm.model,
                     "extra_body": c.llm.extra_body, "version": translate.VERSION, **split}  # fmt: skip
            found += [Stage(name, self.translate, asked, ("corpus",)) for name in written]
            keys = {"source": c.distill.source, "langs": c.distill.langs, **lengths, **split}
            given = tuple(distill.files(c.distill.translations).values())
            found.append(Stage("queries", self.translate_queries, keys, ("corpus", "tokenizer", *written), given))
        about = {
            "teacher": pathlib.Path(spec.source).name, "preset": spec.preset, "source": c.distill.source,
            "queries": distill.on_queries(c), "bitext": distill.on_bitext(c), "dtype": c.encode.dtype,
            "dtype_of_matmuls": c.encoder.dtype, **{key: c.encoder[key] for key in ("query_length", "passage_length")}, **split,
        }  # fmt: skip
        needs = ("corpus", *(["bitext"] if distill.on_bitext(c) else []), *(["negatives"] if mined else []))
        found.append(Stage("teacher", self.teach, about, needs, teacher.files(spec, c.distill.source)))
        return found

    def read_bitext(self, out_dir: pathlib.Path) -> dict[str, Any]:
        c = self.config.distill
        given = (pair for path in parallel_text.files(c.bitext, c.split) for pair in parallel_text.read(path, c.source))
        own = parallel_text.of_library(self.library, self.training, c.source) if c.parallel else ()
        return parallel_text.write(itertools.chain(given, own), out_dir)

    def tokenize_bitext(self, out_dir: pathlib.Path) -> dict[str, Any]:
        distill.write_bitext_tokens(self.directory / "bitext", self._tokenizer("passage"), out_dir)
        return {}

    @functools.cached_property
    def _source_queries(self):
        return distill.used(self.training, self.library, self.config.distill.source)

    def translate(self, out_dir: pathlib.Path) -> dict[str, Any]:
        with llm.open_client(self.config.llm, self.directory) as client:
            return translate.translate(client, self.config.distill, self._source_queries, out_dir)

    def plan_translate(self) -> str:
        """What `translate` would send, as a table."""
        with llm.open_client(self.config.llm, self.directory) as client:
            plan = translate.plan(client, self.config.distill, self._source_queries)
            return estimate.table(plan, self.config.llm, client.log.totals)

    def translate_queries(self, out_dir: pathlib.Path) -> dict[str, Any]:
        queries, written = self._source_queries, self.directory / "translate"
        texts = distill.translations(self.config, self.library, queries, written)
        return distill.write_queries(texts, queries, self._tokenizer("query"), out_dir)

    @property
    def _negatives_version(self) -> pathlib.Path | None:
        """Of the store, where this recipe mines."""
        mined = any(stage.name == "negatives" for stage in self.stages())
        return negatives.version_dir(self.directory / "negatives", 0) if mined else None

    def teach(self, out_dir: pathlib.Path) -> dict[str, Any]:
        c, spec = self.config, teacher.parse(self.config.distill.teacher)
        queries = self._source_queries if distill.on_queries(c) else []
        mined = distill.mined_rows(queries, self.library, self._negatives_version, c.distill.source)
        cache = pathlib.Path(c.distill.cache) if c.distill.cache else self.directory / "teacher-cache"
        with tempfile.TemporaryDirectory() as scratch:
            make = lambda: teacher.Teacher(spec, c, self.own_mesh, cache, pathlib.Path(scratch))
            bitext = self.directory / "bitext" if distill.on_bitext(c) else None
            return distill.teach(c, spec, make, self.library, queries, mined, bitext, out_dir)

    def _distilling_sources(self) -> tuple[list[sources.Source], list[str]]:
        """Where batches come from, and the languages of the first source."""
        c, taught, found, langs = self.config, self.directory / "teacher", [], []
        share = c.train.replay_share if distill.on_bitext(c) else 1.0
        if distill.on_bitext(c):
            home, tokens = self.directory / "bitext", self.directory / "bitext-tokens"
            pairs_ = distill.bitext_set(home, tokens, self.vocab_size, taught)
            found.append(sources.Source(pairs_, 1 - share, 1))
            langs = parallel_text.langs(home)
        if distill.on_queries(c):
            asked = distill.query_set(
                self._source_queries, self.library, self.stores.passages, self.directory / "queries", self.vocab_size,
                self._negatives_version, taught, c.distill.source,
            )  # fmt: skip
            found.append(sources.Source(asked, share, c.train.passages_per_query))
            langs = langs or sorted(distill.files(str(self.directory / "queries")))
        return found, langs
