"""Reads everything that a data root holds and counts what is there and what is wrong with it.

Texts are streamed; of a passage two 64-bit hashes are kept, of its docid and of its title and text. A line that cannot be
read is noted and reading goes on.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jdmdr import progress, reading
from jdmdr.corpus import TRAIN, add_train_rows, hash64
from jdmdr.datasets import LanguageFiles
from jdmdr.datasets.scripts import in_script, main_script
from jdmdr.types import Passage, UserError

SHOWN = 5  # errors of a file, repeated docids of a language
STRANGE = 0.01  # share of texts in a script not their language's that is nothing strange: names, formulas, quotations
QUANTILES = (0.05, 0.5, 0.95, 1.0)


class Finding(NamedTuple):
    """Something that is not as it might be: `count` of `total` in a language and perhaps a split, and one of them."""

    kind: str  # a key of audit_report.KINDS
    lang: str
    split: str
    count: int
    total: int
    example: str


@dataclasses.dataclass
class PassageCounts:
    """What the corpus of one language holds; lengths are of the text, in characters."""

    passages: int = 0
    untitled: int = 0
    empty: int = 0
    duplicates: int = 0
    other_script: int = 0
    lengths: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)


@dataclasses.dataclass
class SplitCounts:
    """What a split of one language holds; a positive is a judgment above 0."""

    queries: int = 0
    judgments: int = 0
    positives: int = 0
    with_positive: int = 0
    other_script: int = 0
    lengths: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)


@dataclasses.dataclass
class Audit:
    """All that was found: counts per language and per (language, split), findings, and the errors of each file."""

    passages: dict[str, PassageCounts] = dataclasses.field(default_factory=dict)
    splits: dict[tuple[str, str], SplitCounts] = dataclasses.field(default_factory=dict)
    findings: list[Finding] = dataclasses.field(default_factory=list)
    errors: dict[str, list[str]] = dataclasses.field(default_factory=lambda: collections.defaultdict(list))
    error_counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def error(self, path: Path, sentence: str) -> None:
        self.error_counts[str(path)] += 1
        if len(self.errors[str(path)]) < SHOWN:
            self.errors[str(path)].append(sentence)

    def note(self, kind: str, lang: str, split: str, of_kind: Iterable[str], total: int) -> None:
        """Adds a finding if there is any of its kind; the first stands as the example."""
        of_kind = iter(of_kind)
        for example in of_kind:
            self.findings.append(Finding(kind, lang, split, 1 + sum(1 for _ in of_kind), total, example))


def audit(files: Mapping[str, LanguageFiles]) -> Audit:
    """Reads the files of every language."""
    found = Audit()
    docids: dict[str, np.ndarray] = {}
    corpora = {lang: of.corpus for lang, of in files.items() if of.corpus}
    for lang in sorted(files.keys() - corpora.keys()):
        found.note("no corpus", lang, "", [""], 1)
    if corpora:
        sizes = [path.stat().st_size for paths in corpora.values() for path in paths if path.is_file()]
        with progress.bar(None, "reading passages", "KB", total=sum(sizes) >> 10) as bar:
            for lang, paths in corpora.items():
                bar.set_postfix_str(lang, refresh=False)
                docids[lang] = _passages(lang, paths, found, bar.update)
    for lang, of in files.items():
        _queries(lang, of, docids, found)
    return found


def quantiles(lengths: Mapping[int, int]) -> list[int]:
    """The QUANTILES of a multiset of lengths, each one of them: the least that so large a share does not exceed."""
    values = sorted(lengths)
    upto = np.cumsum([lengths[value] for value in values])
    return [values[np.searchsorted(upto, q * upto[-1])] for q in QUANTILES] if values else []


# ---------------------------------------------------------------------------------------------------------- passages


def _passages(lang: str, paths: list[Path], found: Audit, on_kilobytes: Callable[[int], Any]) -> np.ndarray:
    """Counts the passages of a language; returns the sorted hashes of their docids."""
    counts = found.passages[lang] = PassageCounts()
    docids, contents, examples = bytearray(), bytearray(), {}
    for path in paths:
        read, before = 0, counts.passages

        def on_bytes(position: int) -> None:
            nonlocal read
            on_kilobytes((position >> 10) - read)
            read = position >> 10

        for number, passage in _noted(path, found, functools.partial(reading.numbered_passages, on_bytes=on_bytes)):
            counts.passages += 1
            docids += hash64(passage.docid)
            contents += hash64(f"{passage.title}\0{passage.text}")
            counts.untitled += not passage.title.strip()
            counts.lengths[len(passage.text)] += 1
            if not passage.text.strip():
                counts.empty += 1
                examples.setdefault("empty passages", f"{passage.docid} ({path.name}, line {number})")
            elif not in_script(passage.text, lang):
                counts.other_script += 1
                at = f"{passage.docid} ({path.name}, line {number}): {main_script(passage.text)}"
                examples.setdefault("other script", at)
        on_bytes(path.stat().st_size if path.is_file() else 0)
        if counts.passages == before and str(path) not in found.errors:
            found.note("empty file", lang, "", [path.name], len(paths))
    if not counts.passages:
        found.error(paths[0], f"the corpus of {lang} holds no passage that can be read; fill or remove it")
    for kind, count in (("empty passages", counts.empty), ("other script", counts.other_script)):
        if count > (STRANGE * counts.passages if kind == "other script" else 0):
            found.findings.append(Finding(kind, lang, "", count, counts.passages, examples[kind]))
    if 0 < counts.untitled < counts.passages:
        found.findings.append(Finding("no title", lang, "", counts.untitled, counts.passages, ""))

    hashes = np.frombuffer(docids, "<u8")
    for first, second in _located(paths, _repeated(hashes), SHOWN, found):
        if first[1].docid == second[1].docid:  # and not only of one hash
            found.error(second[0][0], f"{_place(second)}: the docid {second[1].docid!r} was used before, in "
                                      f"{_place(first)}; give each passage of a language its own")  # fmt: skip
    pairs = _repeated(np.frombuffer(contents, "<u8"))
    counts.duplicates = len(pairs)
    for first, second in _located(paths, pairs, 1, found):
        example = f"{second[1].docid} is {first[1].docid}"
        found.findings.append(Finding("duplicates", lang, "", len(pairs), counts.passages, example))
    return np.sort(hashes)


def _repeated(hashes: np.ndarray) -> np.ndarray:
    """Pairs of rows [n, 2] of equal hashes, each row with the one before it, in the order of the second row."""
    order = np.argsort(hashes, kind="stable")
    twins = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
    pairs = np.stack([order[twins], order[twins + 1]], 1)
    return pairs[np.argsort(pairs[:, 1])]


Located = tuple[tuple[Path, int], Passage]


def _located(paths: list[Path], pairs: np.ndarray, most: int, found: Audit) -> list[tuple[Located, Located]]:
    """The first pairs with their files, lines and passages; reads the files again, up to the last row wanted."""
    pairs = pairs[:most]
    wanted = set(pairs.flatten().tolist())
    there: dict[int, Located] = {}
    rows = (
        (path, number, passage) for path in paths for number, passage in _noted(path, None, reading.numbered_passages)
    )
    for row, (path, number, passage) in enumerate(rows if wanted else ()):
        if row in wanted:
            there[row] = (path, number), passage
            if len(there) == len(wanted):
                break
    return [(there[first], there[second]) for first, second in pairs.tolist()]


def _place(located: Located) -> str:
    (path, number), _ = located
    return f"{path}, line {number}"


def _read(path: Path, found: Audit, read: Callable[..., Any]) -> Any:
    """What `read(path, on_error)` returns; None, and a note, where the file cannot be read."""
    return next(_noted(path, found, lambda path, on_error: [read(path, on_error)]), None)


def _noted(path: Path, found: Audit | None, read: Callable[..., Iterable]) -> Iterator:
    """What `read(path, on_error)` yields; errors of single lines and of the file as a whole are noted."""

    def on_error(error: UserError) -> None:
        if found:
            found.error(path, str(error))

    try:
        yield from read(path, on_error)
    except UserError as error:
        on_error(error)


# ------------------------------------------------------------------------------------------------ queries and judgments


def _queries(lang: str, files: LanguageFiles, docids: Mapping[str, np.ndarray], found: Audit) -> None:
    """Counts the splits of a language and compares them with the corpora and with its training queries."""
    judged: dict[str, reading.Qrels] = {}
    for split, path in files.qrels.items():
        judged[split], conflicts = _read(path, found, reading.qrels) or ({}, 0)
        if conflicts:
            found.findings.append(Finding("contradictions", lang, split, conflicts, _size(judged[split]), ""))
    texts = {split: dict(_read(path, found, reading.topics) or ()) for split, path in files.topics.items()}
    if files.queries:
        every = dict(_read(files.queries, found, reading.queries) or ())
        texts |= {split: {qid: every[qid] for qid in qrels if qid in every} for split, qrels in judged.items()}
        asked = {qid for of_split in texts.values() for qid in of_split}
        found.note("unjudged", lang, "", (qid for qid in every if qid not in asked), len(every))
    if files.train:
        rows = texts.setdefault(TRAIN, {}), judged.setdefault(TRAIN, {})
        _read(files.train, found, lambda path, on_error: add_train_rows(path, *rows, on_error))
    for split in sorted({*texts, *judged}):
        _split(lang, split, texts, judged, docids, found)
        if split in files.qrels and len(docids.get(lang, ())):
            _refuse_foreign_qrels(files.qrels[split], judged[split], lang, docids, found)
        if split != TRAIN and TRAIN in texts and split in texts:
            _overlap(lang, split, texts, judged, found)


def _split(
    lang: str, split: str, texts: Mapping[str, dict[str, str]], judged: Mapping[str, reading.Qrels],
    docids: Mapping[str, np.ndarray], found: Audit,
) -> None:  # fmt: skip
    queries, qrels = texts.get(split, {}), judged.get(split, {})
    positives = {qid: {docid for docid, rel in of_query.items() if rel > 0} for qid, of_query in qrels.items()}
    counts = found.splits[lang, split] = SplitCounts(len(queries), _size(qrels), sum(map(len, positives.values())))
    counts.with_positive = sum(bool(positives.get(qid)) for qid in queries)
    counts.lengths.update(map(len, queries.values()))

    def note(kind: str, of_kind: Iterable[str], total: int) -> None:
        found.note(kind, lang, split, of_kind, total)

    note("empty queries", (qid for qid, text in queries.items() if not text.strip()), len(queries))
    strange = [f"{qid}: {main_script(text)}" for qid, text in queries.items() if not in_script(text, lang)]
    counts.other_script = len(strange)
    if len(strange) > STRANGE * len(queries):
        note("other script", strange, len(queries))
    first: dict[str, str] = {}
    same = ((qid, first.setdefault(_question(text), qid)) for qid, text in queries.items())
    note("repeated questions", (f"{qid} is {before}" for qid, before in same if before != qid), len(queries))

    # topics and qrels of different names may belong together, as one set of questions judged in two ways
    elsewhere = {qid for name, of_split in judged.items() if not qrels and name != TRAIN for qid in of_split}
    note("unjudged", (qid for qid in queries if qid not in qrels and qid not in elsewhere), len(queries))
    note("judged elsewhere", (qid for qid in queries if qid in elsewhere), len(queries))
    known = queries or {qid for name, of_split in texts.items() if name != TRAIN for qid in of_split}
    note("no topic", (qid for qid in qrels if qid not in known), len(qrels))

    unknown: set[str] = set()
    if len(docids.get(lang, ())):
        pairs = [docid for of_query in qrels.values() for docid in of_query]
        unknown = _unknown(pairs, docids[lang])
        missing = _unknown(unknown, *_others(lang, docids)) if unknown else unknown
        note("not in the corpus", (docid for docid in pairs if docid in missing), len(pairs))
        note("in another corpus", (docid for docid in pairs if docid in unknown and docid not in missing), len(pairs))
    note("no positive", (qid for qid in queries if qid in qrels and not positives[qid] - unknown), len(queries))


def _refuse_foreign_qrels(
    path: Path, qrels: reading.Qrels, lang: str, docids: Mapping[str, np.ndarray], found: Audit
) -> None:
    judged = {docid for of_query in qrels.values() for docid in of_query}
    if judged and len(_unknown(judged, docids[lang], *_others(lang, docids))) == len(judged):
        found.error(path, f"{path}: judges no passage of the corpus of {lang} (its first docid is {min(judged)!r}); give "
                          "qrels made for it")  # fmt: skip


def _overlap(
    lang: str, split: str, texts: dict[str, dict[str, str]], judged: dict[str, reading.Qrels], found: Audit
) -> None:
    """What a split shares with the training queries, and figures on it therefore do not tell."""
    trained = {_question(text): qid for qid, text in texts[TRAIN].items()}
    same = (f"{qid} is {trained[_question(text)]}" for qid, text in texts[split].items() if _question(text) in trained)
    found.note("questions of train", lang, split, same, len(texts[split]))

    def positives(of_query: Mapping[str, int]) -> list[str]:
        return [docid for docid, rel in of_query.items() if rel > 0]

    known = {docid for of_query in judged.get(TRAIN, {}).values() for docid in positives(of_query)}
    shared = {qid: known.intersection(positives(of_query)) for qid, of_query in judged.get(split, {}).items()}
    examples = (f"{qid}: {min(docids)}" for qid, docids in shared.items() if docids and qid in texts[split])
    found.note("positives of train", lang, split, examples, len(texts[split]))


def _question(text: str) -> str:
    """A question without case, width, spacing and closing punctuation, so that the same one is found again."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return text.rstrip("?؟。.! ") or text


def _others(lang: str, docids: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The corpora of other languages that share no docid with this one's: only there does a docid alone name a passage."""
    others = (hashes for name, hashes in docids.items() if name != lang)
    return [hashes for hashes in others if not np.isin(docids[lang], hashes).any()]


def _unknown(docids: Iterable[str], *corpora: np.ndarray) -> set[str]:
    """The docids that none of the corpora (sorted hashes) holds."""
    left = sorted(set(docids))
    for hashes in corpora:
        wanted = np.frombuffer(b"".join(map(hash64, left)), "<u8")
        places = np.minimum(np.searchsorted(hashes, wanted), max(len(hashes) - 1, 0))
        held = hashes[places] == wanted if len(hashes) else np.zeros(len(left), bool)
        left = [docid for docid, is_held in zip(left, held, strict=True) if not is_held]
    return set(left)


def _size(qrels: reading.Qrels) -> int:
    return sum(map(len, qrels.values()))
