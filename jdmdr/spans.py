"""Extractive question answering across languages: trains on SQuAD's JSON, and measures F1 and EM on every pair of languages.

    python -m jdmdr.spans --config configs/mlqa.py --workdir runs/mlqa --config.encoder.name=DIR --config.spans.train=FILE
        --config.spans.test='DIR/test-context-{context}-question-{question}.json'

With `spans.data`, a data root, the JSON is made of its queries and passages (jdmdr/squad.py) and left in `squad/`. Contexts longer
than a window are read in overlapping windows that together hold every token; the answer is the best span of all of them.
`answers/` gets the predictions of each pair, {question id: text}, as SQuAD's own script reads them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from tabulate import tabulate

from jdmdr import encoders, models, pairs, parallel, pipeline, progress, squad, train, workdir
from jdmdr.check import check_config
from jdmdr.encoders import pretrained
from jdmdr.encoders.lengthen import lengthen
from jdmdr.objectives import spans
from jdmdr.planner import Planner
from jdmdr.tokenizer import load_pretrained
from jdmdr.types import Tokens, UserError
from jdmdr.workdir import Stage, read_json, write_json

TARGET = "answers"
SIDES = ("context", "question")
WINDOWS_AT_A_TIME = {"cpu": 16, "gpu": 128, "tpu": 128}


class Window(NamedTuple):
    """A part of a context with its question."""

    question: int
    ids: np.ndarray  # of the question
    first: int  # context token that the window begins with
    context: np.ndarray  # ids of the window's context tokens
    span: tuple[int, int]  # of the answer, in the window's tokens; (0, 0) where it is not in it


class Texts:
    """Questions as windows of token ids, and the way back from tokens to characters."""

    def __init__(self, questions: Sequence[squad.Question], tokenizer: pairs.PairTokenizer, backend: Any, config: Any):
        self.questions, self._template, self._length = questions, tokenizer.template, config.length
        self.offsets: list[list[tuple[int, int]]] = []  # of each question's context tokens
        self.windows: list[Window] = []
        longest = min(config.query_length, tokenizer.longest_query)
        contexts: dict[str, tuple[np.ndarray, list[tuple[int, int]]]] = {}
        asked = tokenizer.ids([q.question for q in questions])
        for i, q in enumerate(questions):
            if q.context not in contexts:
                found = backend.encode(q.context, add_special_tokens=False)
                contexts[q.context] = np.asarray(found.ids, np.int32), found.offsets
            ids, offsets = contexts[q.context]
            self.offsets.append(offsets)
            question = asked[i][:longest]
            room = config.length - self._template.size - len(question)
            span = _token_span(offsets, *q.answers[0]) if q.answers else None
            for first in pairs.window_starts(len(ids), room, config.overlap):
                part = ids[first : first + room]
                self.windows.append(
                    Window(i, question, first, part, self._place(span, first, len(part), len(question)))
                )

    def begin(self, window: Window) -> int:
        """Where the context begins in a window's tokens."""
        return len(self._template.prefix) + len(window.ids) + len(self._template.middle)

    def _place(self, span: tuple[int, int] | None, first: int, count: int, question: int) -> tuple[int, int]:
        if span is None or span[0] < first or span[1] >= first + count:
            return 0, 0
        begin = len(self._template.prefix) + question + len(self._template.middle)
        return begin + span[0] - first, begin + span[1] - first

    def block(self, rows: Sequence[int], segments: bool) -> tuple[Tokens, np.ndarray]:
        """Tokens of some windows, and which of them are choices: BxT, the context's and the first."""
        of = [self.windows[row] for row in rows]
        every = np.arange(len(of))
        source = pairs.Pairs(
            self._template, [w.ids for w in of], every, [w.context for w in of], every, self._length, segments
        )
        choices = np.zeros((len(of), self._length), bool)
        choices[:, 0] = True
        for i, window in enumerate(of):
            begin = self.begin(window)
            choices[i, begin : begin + len(window.context)] = True
        return source.gather(every, self._length), choices


def _token_span(offsets: Sequence[tuple[int, int]], answer: str, start: int) -> tuple[int, int] | None:
    """The first and last token that touch the answer's characters."""
    inside = [t for t, (a, b) in enumerate(offsets) if a < start + len(answer) and b > start]
    return (inside[0], inside[-1]) if inside else None


def best_span(logits_Tx2: np.ndarray, begin: int, count: int, longest: int) -> tuple[float, int, int]:
    """The best first and last token, both relative to the context's begin, with last - first < `longest`; and their score."""
    starts, ends = logits_Tx2[begin : begin + count].T
    scores = starts[:, None] + ends
    place = np.arange(count)
    length = place - place[:, None]
    scores[(length < 0) | (length >= longest)] = -np.inf
    first, last = np.unravel_index(scores.argmax(), scores.shape)
    return float(scores[first, last]), int(first), int(last)


class Answering:
    """A config bound to a working directory."""

    def __init__(self, config: ConfigDict, directory: pathlib.Path):
        self.config, self.directory = config, directory

    def stages(self) -> list[Stage]:
        c, s = self.config, self.config.spans
        if not c.encoder.name:
            raise UserError("encoder.name is empty; name a checkpoint, such as export/encoder of jdmdr.pretrain")
        if not s.data and not (s.train and s.test):
            raise UserError(
                "spans.train and spans.test name files of SQuAD's JSON; or set spans.data to a data root to make them of"
            )
        plain = s.to_dict()
        made = {key: plain.pop(key) for key in ("data", "train_split", "test_split", "train_langs", "langs")}
        outside = () if s.data else tuple(map(pathlib.Path, [*s.train.split(","), *self._tests().values()]))
        if missing := [path for path in outside if not path.is_file()]:
            raise UserError(
                f"spans: there is no file {missing[0]}; {{context}} and {{question}} in spans.test stand for languages"
            )
        needs = ("squad",) if s.data else ()
        name = pretrained.find_checkpoint(c.encoder.name)
        weights = tuple(path for glob in ("*.json", "*.safetensors", "*.bin") for path in sorted(name.glob(glob)))
        settings = {"spans": plain, "seed": c.seed, "window": c.encoder.window, "dtype": c.encoder.dtype}
        stages = [Stage("squad", self.write_squad, made)] if s.data else []
        return [
            *stages,
            Stage("train", self.train, settings, needs, (*outside, *weights), volatile=train.VOLATILE, precious=True),
            Stage(TARGET, self.answer, {"langs": s.langs}, (*needs, "train"), outside),
        ]

    # ------------------------------------------------------------------------------------------------------- data

    @functools.cached_property
    def _root(self) -> squad.Root:
        return squad.Root(pathlib.Path(self.config.spans.data))

    def _langs(self, key: str) -> list[str]:
        s = self.config.spans
        return s[key].split(",") if s[key] else self._root.langs if s.data else [""]

    def _pairs(self) -> list[tuple[str, str]]:
        """(context, question) languages of the tests."""
        langs = self._langs("langs")
        return list(itertools.product(langs, langs))

    def _tests(self) -> dict[str, pathlib.Path]:
        """{context-question: file}."""
        home, s = self.directory / "squad", self.config.spans
        if s.data:
            return {f"{c}-{q}": home / f"test-context-{c}-question-{q}.json" for c, q in self._pairs()}
        fill = lambda c, q: pathlib.Path(s.test.replace("{context}", c).replace("{question}", q))
        return {f"{c}-{q}": fill(c, q) for c, q in self._pairs()}

    def write_squad(self, out_dir: pathlib.Path) -> dict[str, Any]:
        s, counts = self.config.spans, {}
        training = []
        for lang in self._langs("train_langs"):
            found = self._root.questions(lang, lang, s.train_split)
            training += [q._replace(id=f"{lang}:{q.id}") for q in found]
        squad.write(out_dir / "train.json", training)
        for context, question in progress.bar(self._pairs(), "  writing", "pairs"):
            found = self._root.questions(question, context, s.test_split)
            squad.write(out_dir / f"test-context-{context}-question-{question}.json", found)
            counts[f"{context}-{question}"] = len(found)
        return {"train": len(training), "test": counts}

    @functools.cached_property
    def _tokenizer(self) -> tuple[pairs.PairTokenizer, Any]:
        name = str(pretrained.find_checkpoint(self.config.encoder.name))
        backend = load_pretrained(name).backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        return pairs.PairTokenizer(name, self.config.spans.length), backend

    def _texts(self, paths: Sequence[pathlib.Path]) -> Texts:
        questions = [question for path in paths for question in squad.read(path)]
        return Texts(questions, *self._tokenizer, self.config.spans)

    # ------------------------------------------------------------------------------------------------------- model

    @functools.cached_property
    def _start(self) -> tuple[encoders.EncoderConfig, Any]:
        c, s = self.config, self.config.spans
        config, params = encoders.load_pretrained(c.encoder.name, pooling="cls", normalize=False)
        if config.kind != "transformer" or config.untied or config.projection:
            raise UserError(
                f"encoder.name {c.encoder.name} is no bare transformer; a span is read off one, with nothing behind it"
            )
        if c.encoder.window:
            config, params = lengthen(config, params, s.length, c.encoder.window)
        if s.length > config.usable_positions:
            raise UserError(f"spans.length is {s.length}, but {c.encoder.name} has room for {config.usable_positions}; lower it, or set "
                            "encoder.window")  # fmt: skip
        params[spans.HEAD] = spans.init_head(jax.random.key(c.seed), config.width)
        return dataclasses.replace(config, dtype=models.matmul_dtype(c.encoder.dtype), remat=c.encoder.remat), params

    def _segments(self) -> bool:
        return self._tokenizer[0].uses_segments and self._start[0].type_vocab > 1

    def train(self, out_dir: pathlib.Path) -> dict[str, Any]:
        c, s = self.config, self.config.spans
        mesh = parallel.data_mesh()
        config, params = self._start
        if s.batch_size % mesh.devices.size:
            raise UserError(f"spans.batch_size is {s.batch_size}, not a multiple of the {mesh.devices.size} devices")
        paths = [self.directory / "squad" / "train.json"] if s.data else list(map(pathlib.Path, s.train.split(",")))
        texts = self._texts(paths)
        same = np.zeros(len(texts.windows), np.int32)
        planner = Planner(same, same, s.batch_size, c.seed, "random")

        def make(step: int) -> tuple[dict[str, Any], dict[str, float]]:
            rows = planner.batch_indices(step).tolist()
            block, choices = texts.block(rows, self._segments())
            spans_Bx2 = np.array([texts.windows[row].span for row in rows], np.int32)
            figures = {"padding_share": 1 - block.mask_BxT.mean(), "epoch": planner.epoch_of(step)}
            return {"windows": block, "choices_BxT": choices, "spans_Bx2": spans_Bx2}, figures

        section = s.copy_and_resolve_references()
        with section.unlocked(), section.ignore_type():
            section.steps = math.ceil(s.epochs * planner.steps_before(1)) if s.steps is None else s.steps
        there = sum(window.span != (0, 0) for window in texts.windows)
        progress.say(
            f"  {len(texts.questions)} questions in {len(texts.windows)} windows, {there} of which hold the answer; {section.steps} steps"
        )
        params, counts = train.train(
            section,
            encoders.build(config),
            params,
            spans.make_objective(),
            make,
            1,
            lambda params: None,
            out_dir,
            c.seed,
            mesh,
        )
        models.save_tree(out_dir / "reader.safetensors", params)
        return {**counts, "questions": len(texts.questions), "windows": len(texts.windows),
                "unanswerable": sum(not q.answers for q in texts.questions)}  # fmt: skip

    # ------------------------------------------------------------------------------------------------------- answers

    @functools.cached_property
    def _apply(self) -> Callable:
        encoder = encoders.build(self._start[0])

        def logits(params: Any, tokens: Tokens, choices_BxT: jax.Array) -> jax.Array:
            return spans.span_logits(params[spans.HEAD], encoder.apply(params, tokens, "tokens"), choices_BxT)

        return jax.jit(logits)

    def _answers(self, params: Any, texts: Texts, null: bool) -> dict[str, str]:
        """The best span of each question; with `null` none where that scores less than "not here" in every window."""
        mesh = parallel.data_mesh()
        size = WINDOWS_AT_A_TIME.get(jax.default_backend(), 128) * mesh.devices.size
        best: dict[int, tuple[float, str]] = {}
        nothing = np.full(len(texts.questions), np.inf)
        for start in range(0, len(texts.windows), size):
            rows = list(range(start, min(start + size, len(texts.windows))))
            block, choices = texts.block(rows + [rows[-1]] * (size - len(rows)), self._segments())
            logits_BxTx2 = np.asarray(self._apply(params, *parallel.put_batch((block, choices), mesh)))
            for row, logits_Tx2 in zip(rows, logits_BxTx2, strict=False):
                window = texts.windows[row]
                q = window.question
                nothing[q] = min(nothing[q], logits_Tx2[0].sum())
                if not len(window.context):
                    continue
                score, first, last = best_span(
                    logits_Tx2, texts.begin(window), len(window.context), self.config.spans.max_answer
                )
                if score > best.get(q, (-np.inf, ""))[0]:
                    a, b = texts.offsets[q][window.first + first][0], texts.offsets[q][window.first + last][1]
                    best[q] = score, texts.questions[q].context[a:b]
        empty = -np.inf, ""
        found = {q.id: best.get(i, empty) for i, q in enumerate(texts.questions)}
        return {
            name: "" if null and score < nothing[i] else text for i, (name, (score, text)) in enumerate(found.items())
        }

    def answer(self, out_dir: pathlib.Path) -> dict[str, Any]:
        params = models.load_tree(self.directory / "train" / "reader.safetensors")
        null = workdir.counts_of(self.directory, "train")["unanswerable"] > 0
        measured = {}
        for name, path in progress.bar(self._tests().items(), "  answering", "pairs", total=len(self._tests())):
            if not (out_dir / f"{name}.json").exists():  # else a killed run got so far
                write_json(out_dir / f"{name}.json", self._answers(params, self._texts([path]), null))
            answers = read_json(out_dir / f"{name}.json")
            measured[name] = squad.score(squad.read(path), answers, name.split("-")[0])
        write_json(out_dir / "f1.json", measured)
        return {"average_f1": float(np.mean([of["f1"] for of in measured.values()]))}


def table(directory: pathlib.Path) -> str:
    """F1 (EM) in percent: a row a context's language, a column a question's."""
    found = read_json(directory / TARGET / "f1.json")
    langs = {side: sorted({name.split("-")[i] for name in found}) for i, side in enumerate(SIDES)}
    cell = lambda of: f"{100 * of['f1']:.1f} ({100 * of['em']:.1f})"
    rows = [
        [context, *(cell(found[f"{context}-{question}"]) for question in langs["question"])]
        for context in langs["context"]
    ]
    average = {measure: float(np.mean([of[measure] for of in found.values()])) for measure in ("f1", "em")}
    text = tabulate(rows, ["context \\ question", *langs["question"]], disable_numparse=True, stralign="right")
    return f"{text}\naverage F1 (EM): {cell(average)}"


def check(config: ConfigDict) -> None:
    """Raises UserError for the first value of `spans` that no stage could use."""
    s = config.spans
    for key, bound in {
        "length": 8,
        "query_length": 1,
        "overlap": 0,
        "max_answer": 1,
        "batch_size": 1,
        "epochs": 0,
    }.items():
        if s[key] < bound:
            raise UserError(f"spans.{key} is {s[key]}; it is at least {bound}")


def stages(config: ConfigDict, directory: pathlib.Path) -> list[Stage]:
    """The stages of a config under `directory`, its values checked."""
    check_config(config)
    check(config)
    return Answering(config, directory).stages()


if __name__ == "__main__":
    pipeline.staged(stages, TARGET, table, __doc__)
