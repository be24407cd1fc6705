"""What a person can look at: every drop with its reason, and a sheet of samples to judge by hand."""

from __future__ import annotations

import csv
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from jdmdr.filters.rules import Candidates, Filter
from jdmdr.hashing import hash_array
from jdmdr.workdir import atomic

KEPT = -1  # reason of a candidate that passed every filter
EMPTY = -2  # reason of an empty place
DROPS = ("qid", "docid", "rule", "score", "threshold")
SHEET = (
    "lang",
    "qid",
    "query",
    "positive",
    "candidate",
    "docid",
    "rank",
    "score",
    "positive_score",
    "outcome",
    "verdict",
)
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet takes for a formula at the start of a cell


def write_drops(
    path: pathlib.Path, qids: Sequence[str], candidates: Candidates, reasons_QxK: np.ndarray, filters: Sequence[Filter],
    docid: Callable[[int], str],
) -> None:  # fmt: skip
    """One line a dropped candidate: DROPS, TAB-separated; score and threshold where the rule compares scores."""
    comparisons = [f.compared(candidates) if f.compared else None for f in filters]
    with atomic(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write("\t".join(DROPS) + "\n")
        for q, place in np.argwhere(reasons_QxK >= 0):
            reason = reasons_QxK[q, place]
            compared = ("", "")
            if comparisons[reason] is not None:
                scores_QxK, threshold_Q = comparisons[reason]
                compared = f"{scores_QxK[q, place]:.6g}", f"{threshold_Q[q]:.6g}"
            row = int(candidates.rows_QxK[q, place])
            file.write("\t".join([qids[q], docid(row), filters[reason].name, *compared]) + "\n")


def sample(
    lang: str, count: int, queries: Sequence[Any], base: int, candidates: Candidates, reasons_QxK: np.ndarray,
    filters: Sequence[Filter], docid: Callable[[int], str], text: Callable[[int], str], seed: int,
) -> Iterator[list[str]]:  # fmt: skip
    """`count` rows of the sheet, half of them kept and half dropped candidates where there are as many.

    Chosen by a hash, so that the same data and rules give the same sheet.
    """
    for reasons, share in ((reasons_QxK == KEPT, count - count // 2), (reasons_QxK > KEPT, count // 2)):
        pairs = np.argwhere(reasons)
        keys = hash_array(seed, f"audit {lang}", pairs[:, 0] * reasons.shape[1] + pairs[:, 1])
        for q, place in pairs[np.sort(np.argsort(keys, kind="stable")[:share])]:
            query, reason = queries[q], reasons_QxK[q, place]
            row = int(candidates.rows_QxK[q, place])
            scores = candidates.threshold_scores_QxK[q, place], candidates.positive_score_Q[q]
            yield [
                lang, query.qid, query.text, text(int(query.positives[0]) - base), text(row), docid(row), str(place + 1),
                *("" if np.isnan(s) else f"{s:.4f}" for s in scores),
                "kept" if reason == KEPT else f"dropped: {filters[reason].name}", "",
            ]  # fmt: skip


def write_sheet(path: pathlib.Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A CSV that spreadsheets open as UTF-8; no cell is taken for a formula."""
    with atomic(path) as temporary, open(temporary, "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows([f"'{cell}" if cell.startswith(FORMULA) else cell for cell in row] for row in rows)
