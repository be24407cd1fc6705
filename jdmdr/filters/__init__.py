"""Filters: labelled candidates in, the usable hard negatives out, with a reason for every drop.

A new filter is a `Filter(name, keep)`; a rule of one number gets a line in `rules.RULES`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from jdmdr.filters.audit import EMPTY, KEPT
from jdmdr.filters.rules import CROSS_ENCODER, Candidates, Context, Filter, cross_encoder_rules, rules_from_config
from jdmdr.types import NO_HIT

__all__ = ["CROSS_ENCODER", "EMPTY", "KEPT", "Candidates", "Context", "Filter", "apply_filters", "counts_table",
           "cross_encoder_rules", "rules_from_config"]  # fmt: skip


def apply_filters(
    candidates: Candidates, filters: Sequence[Filter], context: Context
) -> tuple[Candidates, np.ndarray, dict[str, int]]:
    """Runs the filters in order; each sees only what the earlier ones left, still at its own place.

    Returns the survivors moved to the front (same shapes, `NO_HIT` behind), reasons_QxK for the places of the input
    (index of the filter that dropped the candidate, `KEPT` or `EMPTY`), and the counts: one key a filter, then
    'kept'.
    """
    present_QxK = candidates.rows_QxK != NO_HIT
    reasons_QxK = np.where(present_QxK, KEPT, EMPTY).astype(np.int32)
    counts = {}
    for i, filter_ in enumerate(filters):
        alive_QxK = reasons_QxK == KEPT
        alive = candidates._replace(rows_QxK=np.where(alive_QxK, candidates.rows_QxK, NO_HIT))
        dropped_QxK = alive_QxK & ~filter_.keep(alive, context)
        reasons_QxK[dropped_QxK] = i
        counts[filter_.name] = int(dropped_QxK.sum())
    kept_QxK = reasons_QxK == KEPT
    counts["kept"] = int(kept_QxK.sum())

    front_QxK = np.argsort(~kept_QxK, axis=1, kind="stable")
    left_QxK = np.take_along_axis(kept_QxK, front_QxK, 1)

    def compact(values_QxK: np.ndarray, empty: float) -> np.ndarray:
        return np.where(left_QxK, np.take_along_axis(values_QxK, front_QxK, 1), np.asarray(empty, values_QxK.dtype))

    kept = Candidates(
        compact(candidates.rows_QxK, NO_HIT),
        compact(candidates.scores_QxK, -np.inf),
        compact(candidates.threshold_scores_QxK, -np.inf),
        candidates.positive_score_Q,
    )
    return kept, reasons_QxK, counts


def counts_table(counts: Mapping[str, int]) -> str:
    """The counts of `apply_filters` as lines of text: rule, candidates dropped, share of all candidates."""
    total = sum(counts.values())
    width = max(map(len, [*counts, "candidates"]))
    lines = [f"{'candidates':{width}}  {total:>10,}"]
    lines += [f"{name:{width}}  {count:>10,}  {count / max(total, 1):>6.1%}" for name, count in counts.items()]
    return "\n".join(lines)
