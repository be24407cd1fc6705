"""Batches of a query and a document read together, from weak pairs of sections: masked for query language modelling, and with
negatives for relevance ranking. A batch is a pure function of (seed, step, data)."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jdmdr.batches import Ragged
from jdmdr.cloze import split_sentences
from jdmdr.encoders.long_attention import MOST_GLOBAL
from jdmdr.hashing import rng
from jdmdr.pairs import Pairs, PairTokenizer, Template
from jdmdr.planner import Planner
from jdmdr.reading import lines
from jdmdr.section_pairs import Sections
from jdmdr.tokenizer import NO_END, TokenStore, write_tokens
from jdmdr.types import Tokens, UserError

MASK_MODES = ("query", "document", "mixed")
PARTS = ("qlm", "rr", "bi")  # of the objective (objectives/qlm_rr.py)
EASY = 0.75  # to the power of the number of hard negatives: the chance that a negative is an easy one
SHORTEST_QUERY = 5  # tokens
WIDTH_MULTIPLE = 16


class _Words:
    """A pair tokenizer as `write_tokens` wants one: no special tokens, for they stand around pairs."""

    end = NO_END

    def __init__(self, tokenizer: PairTokenizer):
        self.vocab_size, self.encode = tokenizer.vocab_size, tokenizer.ids


def write_section_tokens(
    sections: Mapping[str, Sections], tokenizer: PairTokenizer, out_dir: pathlib.Path
) -> None:  # fmt: skip
    """Every section as its sentences, each a sequence of a token store, and where each section's sentences begin."""
    for lang, of in sections.items():
        starts = [0]

        def texts(of: Sections = of, starts: list[int] = starts) -> Iterable[str]:
            for row in of:
                found = split_sentences(row["text"]) or [row["text"]]
                starts.append(starts[-1] + len(found))
                yield from found

        write_tokens(_Words(tokenizer), texts(), out_dir, lang)
        np.save(out_dir / f"{lang}.sections.npy", np.array(starts, np.int64))


class SectionTokens:
    """The sections of all languages by global row, languages one after another."""

    def __init__(self, directory: pathlib.Path, langs: Sequence[str], vocab_size: int):
        self._store = TokenStore(directory, langs, vocab_size)
        starts = [np.load(directory / f"{lang}.sections.npy") for lang in langs]
        self.bases = np.cumsum([0, *(len(of) - 1 for of in starts)])
        # every section ends where the next begins, that of the next language too
        self._starts = np.concatenate([*(of[:-1] + base for of, base in zip(starts, self._store.bases, strict=False)),
                                       [len(self._store)]])  # fmt: skip

    def __len__(self) -> int:
        return int(self.bases[-1])

    def sentences(self, row: int) -> np.ndarray:
        """The rows of a section's sentences."""
        return np.arange(self._starts[row], self._starts[row + 1])

    def lengths(self, sentences: np.ndarray) -> np.ndarray:
        return self._store.lengths(sentences)

    def ids(self, sentences: np.ndarray) -> np.ndarray:
        """The token ids of sentences behind one another, int32."""
        if not len(sentences):
            return np.empty(0, np.int32)
        found = self._store.gather(sentences, int(self._store.lengths(sentences).max()))
        return found.ids_BxT[found.mask_BxT > 0]


class Alone:
    """A token source whose sequence i is the text `ids_of(i)` by itself, with the special tokens of a text."""

    def __init__(self, template: Template, ids_of: Callable[[int], np.ndarray], length: int):
        self._template, self._ids_of = template, ids_of
        self._room = length - len(template.prefix) - len(template.suffix)

    def _ids(self, row: int) -> np.ndarray:
        return np.concatenate([self._template.prefix, self._ids_of(row)[: self._room], self._template.suffix])

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        return np.fromiter((len(self._ids(row)) for row in rows), np.int32, len(rows))

    def gather(self, rows: np.ndarray, width: int) -> Tokens:
        ids, mask = np.zeros((2, len(rows), width), np.int32)
        for i, row in enumerate(rows):
            sequence = self._ids(row)
            ids[i, : len(sequence)], mask[i, : len(sequence)] = sequence, 1
        return Tokens(ids, mask)


class PairSet(NamedTuple):
    """n pairs of global section rows; `group_n` numbers the two languages of each, `lang_n` is by section."""

    source_n: np.ndarray
    target_n: np.ndarray
    group_n: np.ndarray
    hard_targets: Ragged
    hard_sources: Ragged
    groups: tuple[str, ...]


def read_pairs(
    directory: pathlib.Path, sections: Mapping[str, Sections], keep: Callable[[str, int], bool]
) -> PairSet:  # fmt: skip
    """The pairs of `directory` whose source section `keep(lang, row)` wants; ids become global rows."""
    langs = sorted(sections)
    bases = dict(zip(langs, np.cumsum([0, *(len(sections[lang]) for lang in langs)]).tolist(), strict=False))
    rows_of = {lang: {name: row for row, name in enumerate(of.ids)} for lang, of in sections.items()}
    found: list[tuple[int, int, int, list[int], list[int]]] = []
    groups = []
    for path in sorted(directory.glob("*-*.jsonl")):
        x, y = path.stem.split("-")
        here = lambda name, lang: bases[lang] + rows_of[lang][name]
        for number, line in lines(path):
            pair = json.loads(line)
            try:
                if not keep(x, rows_of[x][pair["src"]]):
                    continue
                found.append((here(pair["src"], x), here(pair["tgt"], y), len(groups),
                              [here(n, y) for n in pair["neg_tgt"]], [here(n, x) for n in pair["neg_src"]]))  # fmt: skip
            except KeyError as error:
                raise UserError(
                    f"{path}, line {number}: {error} is no section or field; make the pairs again"
                ) from error
        groups.append(path.stem)
    source_n, target_n, group_n = np.array([row[:3] for row in found], np.int64).reshape(-1, 3).T
    hard_targets, hard_sources = (Ragged.of(row[part] for row in found) for part in (3, 4))
    return PairSet(source_n, target_n, group_n.astype(np.int32), hard_targets, hard_sources, tuple(groups))


class Example(NamedTuple):
    """One query with a document of another section, or of the rest of its own."""

    query: np.ndarray  # token ids
    document: np.ndarray
    row: int  # the document's section


class PairBatches:
    """Makes the batch of a step.

    Args:
      config: the recipe's `pretrain` keys.
      negatives: documents of a query in `rr` beside its positive; 0 leaves that part out, as a `qlm_weight` of 0 the other.
    """

    def __init__(
        self, sections: SectionTokens, pairs: PairSet, tokenizer: PairTokenizer, config: Any, seed: int, devices: int
    ):
        if config.batch_size % devices:
            raise UserError(f"pretrain.batch_size is {config.batch_size}, not a multiple of the {devices} devices")
        self._sections, self._pairs, self._tokenizer, self._config, self._seed = (
            sections,
            pairs,
            tokenizer,
            config,
            seed,
        )
        self._planner = Planner(pairs.group_n, np.zeros_like(pairs.group_n), config.batch_size, seed, config.policy,
                                config.lang_temp)  # fmt: skip
        self._uses_segments = tokenizer.uses_segments
        size = tokenizer.template.size
        around = len(tokenizer.template.prefix) + len(tokenizer.template.middle)
        self._query_length = min(config.query_length, config.length - size - 1, MOST_GLOBAL - around)
        most = {"query": self._query_length, "document": config.length, "mixed": config.length}[config.mask_mode]
        self._slots = max(1, math.ceil(1.5 * config.mask_rate * most))
        shares = np.arange(1, config.max_profiles + 1) / config.max_profiles
        multiples = np.ceil(shares * config.length / WIDTH_MULTIPLE).astype(int) * WIDTH_MULTIPLE
        self.widths = sorted({min(int(w), config.length) for w in multiples})
        # easy negatives of a language: its sections that training pairs have
        used = np.unique(np.concatenate([pairs.source_n, pairs.target_n]))
        lang = np.searchsorted(sections.bases, used, side="right") - 1
        self._easy = {i: used[lang == i] for i in np.unique(lang).tolist()}
        self.parts = tuple(part for part in PARTS if config.objective[f"{part}_weight"] > 0)
        if not self.parts:
            raise UserError("pretrain.objective has no weight above 0; give one to qlm, rr or bi")
        self._turns = len(self.parts) if config.objective.schedule == "alternate" else 1

    @property
    def shapes(self) -> int:
        """How many differently shaped batches there are."""
        return self._turns * len(self.widths)

    @property
    def steps_per_epoch(self) -> int:
        return self._turns * self._planner.steps_before(1)

    def make(self, step: int) -> tuple[dict[str, Any], dict[str, float]]:
        """The batch and figures to log.

        Returns:
          qlm: Tokens of B pairs with masked tokens, and `mask_pos_BxP`, `mask_tgt_BxP`, `mask_w_BxP`; rr: Tokens of B * (1 + K)
          pairs, each query's positive first; bi: the queries' and the documents' Tokens of B pairs, each text by itself, and
          `bi_ids_B`, equal where two documents are of one section. With the schedule `alternate` one of them by turns.
        """
        c = self._config
        own_step, turn = divmod(step, self._turns)
        parts = self.parts if self._turns == 1 else self.parts[turn : turn + 1]
        plan = self._planner.plan(own_step)
        random = rng(self._seed, "pretraining batch", step)
        examples = {part: [e for index in plan.index_B for e in self._example(index, random, c.negatives if part == "rr" else 0)]
                    for part in parts}  # fmt: skip
        sources: dict[str, tuple[Any, ...]] = {
            part: self._apart(of) if part == "bi" else (self._together(of),) for part, of in examples.items()
        }
        longest = max(int(of.lengths(np.arange(len(examples[part]))).max()) for part in parts for of in sources[part])
        width = next(w for w in self.widths if w >= longest)
        blocks = {part: [of.gather(np.arange(len(examples[part])), width) for of in sources[part]] for part in parts}
        batch: dict[str, Any] = {part: of[0] if len(of) == 1 else tuple(of) for part, of in blocks.items()}
        if "qlm" in parts:
            batch |= self._mask(batch["qlm"], examples["qlm"], random)
        if "bi" in parts:
            batch["bi_ids_B"] = np.array([e.row for e in examples["bi"]], np.int32)
        masks = [block.mask_BxT for of in blocks.values() for block in of]
        padding = 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.size for mask in masks)
        return batch, {"epoch": plan.epoch, "pair": plan.lang, "padding_share": padding}

    def _apart(self, examples: Sequence[Example]) -> tuple[Alone, Alone]:
        sides = [e.query for e in examples], [e.document for e in examples]
        return tuple(Alone(self._tokenizer.template, side.__getitem__, self._config.length) for side in sides)

    def _together(self, examples: Sequence[Example]) -> Pairs:
        every = np.arange(len(examples))
        return Pairs(self._tokenizer.template, [e.query for e in examples], every, [e.document for e in examples], every,
                     self._config.length, self._uses_segments)  # fmt: skip

    def _example(self, index: int, random: np.random.Generator, negatives: int) -> list[Example]:
        """A pair in a random direction, and its query with as many negatives."""
        p = self._pairs
        turned = random.random() < 0.5
        query_row, row = (p.target_n[index], p.source_n[index]) if turned else (p.source_n[index], p.target_n[index])
        hard = p.hard_sources if turned else p.hard_targets
        listed = hard.values[hard.offsets[index] : hard.offsets[index + 1]]
        candidates = self._sections.sentences(query_row)
        long_enough = candidates[self._sections.lengths(candidates) >= SHORTEST_QUERY]
        sentence = int(random.choice(long_enough if len(long_enough) else candidates))
        query = self._sections.ids(np.array([sentence]))[: self._query_length]
        own = self._sections.sentences(row)
        # a sentence stands in no document that it asks for
        found = [Example(query, self._sections.ids(own[own != sentence]), int(row))]
        for other in choose_negatives(random, negatives, int(row), listed, self._easy_for(row)):
            found.append(Example(query, self._sections.ids(self._sections.sentences(other)), other))
        return found

    def _easy_for(self, row: int) -> np.ndarray:
        return self._easy[int(np.searchsorted(self._sections.bases, row, side="right")) - 1]

    def _mask(self, tokens: Tokens, examples: Sequence[Example], random: np.random.Generator) -> dict[str, np.ndarray]:
        """Chooses and changes tokens, in place."""
        t = self._tokenizer.template
        room = self._config.length - t.size
        positions = []
        for example in examples:
            query = len(t.prefix) + np.arange(len(example.query))
            first = len(t.prefix) + len(example.query) + len(t.middle)
            document = first + np.arange(min(len(example.document), room - len(example.query)))
            of = {"query": query, "document": document, "mixed": np.concatenate([query, document])}
            positions.append(of[self._config.mask_mode])
        ordinary = np.setdiff1d(np.arange(self._tokenizer.vocab_size), self._tokenizer.special_ids)
        return mask_tokens(random, tokens.ids_BxT, positions, self._config.mask_rate, self._slots, self._tokenizer.mask_id,
                           ordinary)  # fmt: skip


def choose_negatives(
    random: np.random.Generator, count: int, positive: int, hard: np.ndarray, easy: np.ndarray
) -> list[int]:  # fmt: skip
    """Sections for `count` negatives: each an easy one with probability 0.75 ** h, h the number of hard ones, else a hard one,
    both uniform. An easy one is never the positive or a hard one, as it could be in the released code."""
    chosen = []
    for _ in range(count):
        if random.random() < EASY ** len(hard):
            others = np.setdiff1d(easy, np.append(hard, positive)) if len(easy) <= len(hard) + 64 else easy
            if len(others):
                drawn = int(random.choice(others))
                while drawn == positive or drawn in hard:
                    drawn = int(random.choice(others))
                chosen.append(drawn)
                continue
        if not len(hard):
            raise UserError(
                "a section has no other of its language to be ranked above; add articles to pretrain.sources"
            )
        chosen.append(int(random.choice(hard)))
    return chosen


def mask_tokens(
    random: np.random.Generator, ids_BxT: np.ndarray, positions: Sequence[np.ndarray], rate: float, slots: int, mask_id: int,
    ordinary: np.ndarray,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Masks each of a row's `positions` with probability `rate`, at least one of them, and changes `ids_BxT` there.

    80 % become `mask_id`, 10 % one of the `ordinary` ids, 10 % stay. What finds no slot is neither masked nor counted.

    Returns:
      mask_pos_BxP, mask_tgt_BxP: int32, P = `slots`; mask_w_BxP: float32, 1 where a slot is used.
    """
    B = len(ids_BxT)
    place, target = np.zeros((2, B, slots), np.int32)
    weight = np.zeros((B, slots), np.float32)
    for row, candidates in enumerate(positions):
        if not len(candidates):
            continue
        chosen = candidates[random.random(len(candidates)) < rate]
        if not len(chosen):
            chosen = random.choice(candidates, 1)
        if len(chosen) > slots:
            chosen = np.sort(random.choice(chosen, slots, replace=False))
        n = len(chosen)
        place[row, :n], target[row, :n], weight[row, :n] = chosen, ids_BxT[row, chosen], 1
        draw = random.random(n)
        ids_BxT[row, chosen[draw < 0.8]] = mask_id
        other = chosen[draw >= 0.9]
        ids_BxT[row, other] = random.choice(ordinary, len(other))
    return {"mask_pos_BxP": place, "mask_tgt_BxP": target, "mask_w_BxP": weight}
