"""How far apart positives and candidates score, by retriever and language, and what a margin would do.

    scores.json     counts, means and quantiles; histograms; the margins below
    scores.md       the same tables to read
    histogram.png   positives, candidates, and the candidates that were kept

A *left-out positive* measures false negatives where judgments allow it: of a query with two or more known positives each
in turn is taken for an unlabelled passage, and the lowest of the others for the query's positive. A rule that keeps it
would have made a negative out of a passage that answers the query.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from tabulate import tabulate

from jdmdr.filters.rules import CROSS_ENCODER, RULES, SCORE_RULES, Candidates, Context
from jdmdr.types import NO_HIT
from jdmdr.workdir import atomic, write_json, write_text

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
KINDS = ("positive", "candidate", "kept", "difference")
ALL = "all"
SCREEN = "simple"  # tabulate's form on the terminal, where the margins tried are left out
BINS = 60
GRID = {
    "percent_of_positive": (0.98, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5),
    "relative_margin": (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5),
    "absolute_margin": (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5),
    "max_score": (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2),
}
CAUGHT = 0.9  # share of the left-out positives that a suggested margin drops
FEWEST = 20  # left-out positives below which no margin is suggested


class Scored(NamedTuple):
    """One language's scores by one retriever; NaN where there is no passage or no score."""

    candidates_QxK: np.ndarray
    positives_QxM: np.ndarray
    kept_QxK: np.ndarray  # bool, of the candidates

    def values(self) -> dict[str, np.ndarray]:
        """Flat scores of each of KINDS; a difference is a query's lowest positive minus one of its candidates."""
        lowest_Q = _lowest(self.positives_QxM)
        of_kind = {
            "positive": self.positives_QxM,
            "candidate": self.candidates_QxK,
            "kept": self.candidates_QxK[self.kept_QxK],
            "difference": lowest_Q[:, None] - self.candidates_QxK,
        }
        return {kind: values[np.isfinite(values)].astype(np.float64) for kind, values in of_kind.items()}


def score_table(scored: dict[str, dict[str, Scored]]) -> dict[str, dict[str, dict[str, Any]]]:
    """{retriever: {language or "all": {kind: {"count", "mean", "quantiles"}}}}; `scored[retriever][lang]`."""
    table: dict[str, Any] = {}
    for name, of_lang in scored.items():
        values = {lang: scores.values() for lang, scores in of_lang.items()}
        values[ALL] = {kind: np.concatenate([v[kind] for v in values.values()]) for kind in KINDS}
        table[name] = {lang: {kind: _summary(v[kind]) for kind in KINDS} for lang, v in values.items()}
    return table


def _summary(values_N: np.ndarray) -> dict[str, Any]:
    if not len(values_N):
        return {"count": 0, "mean": None, "quantiles": [None] * len(QUANTILES)}
    found = np.quantile(values_N, QUANTILES)
    return {
        "count": len(values_N),
        "mean": round(float(values_N.mean()), 6),
        "quantiles": [round(float(q), 6) for q in found],
    }


def histograms(scored: dict[str, dict[str, Scored]]) -> dict[str, dict[str, list[float]]]:
    """{retriever: {"edges": BINS + 1 numbers, kind: BINS counts}} over all languages, without the differences."""
    found = {}
    for name, of_lang in scored.items():
        values = [scores.values() for scores in of_lang.values()]
        joined = {kind: np.concatenate([v[kind] for v in values]) for kind in KINDS[:3]}
        everything = np.concatenate(list(joined.values()))
        if len(everything):
            edges = np.histogram_bin_edges(everything, BINS)
            counts = {kind: np.histogram(v, edges)[0].tolist() for kind, v in joined.items()}
            found[name] = {"edges": [round(float(e), 6) for e in edges], **counts}
    return found


def margins(scored: dict[str, Scored], rules: dict[str, Any]) -> dict[str, Any]:
    """What each margin of GRID, and the score rules in force, would keep of one retriever's candidates.

    Args:
      scored: {language: scores} by the retriever whose scores the rules compare.
      rules: the `filters` keys of the recipe.

    Returns:
      {"left_out_positives": their number, "grid": rows, "in_force": a row or None, "suggested": {rule: value}}. A row is
      {"rule", "value", "candidates_kept": share, "left_out_kept": share or None}. Suggested is the loosest value of a
      rule that drops CAUGHT of the left-out positives, where there are FEWEST of them.
    """
    candidates = [
        Candidates(_rows(s.candidates_QxK), *(s.candidates_QxK,) * 2, _lowest(s.positives_QxM)) for s in scored.values()
    ]
    left_out = [_left_out(s.positives_QxM) for s in scored.values()]
    count = sum(len(c.rows_QxK) for c in left_out)

    def row(name: str, value: Any, active: dict[str, Any]) -> dict[str, Any]:
        kept = _share_kept(left_out, active) if count else None
        return {"rule": name, "value": value, "candidates_kept": _share_kept(candidates, active), "left_out_kept": kept}

    grid = [row(name, value, {name: value}) for name, values in GRID.items() for value in values]
    active = {name: rules[name] for name in SCORE_RULES if rules.get(name) is not None}
    in_force = row(", ".join(active), list(active.values()), active) if active else None
    suggested: dict[str, float] = {}
    if count >= FEWEST:
        for entry in grid:  # loosest first
            if entry["left_out_kept"] <= 1 - CAUGHT and entry["candidates_kept"] > 0:
                suggested.setdefault(entry["rule"], entry["value"])
    return {"left_out_positives": count, "grid": grid, "in_force": in_force, "suggested": suggested}


def _lowest(positives_QxM: np.ndarray) -> np.ndarray:
    known_QxM = np.where(np.isfinite(positives_QxM), positives_QxM, np.inf)
    lowest_Q = known_QxM.min(axis=1, initial=np.inf)
    return np.where(np.isfinite(lowest_Q), lowest_Q, np.nan)


def _rows(scores_QxK: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(scores_QxK), 0, NO_HIT)


def _left_out(positives_QxM: np.ndarray) -> Candidates:
    """Each positive of a query with two or more as the one candidate of a query whose positives are the others."""
    known_QxM = np.isfinite(positives_QxM)
    several = known_QxM.sum(axis=1) >= 2
    query_N, place_N = np.nonzero(known_QxM & several[:, None])
    others_NxM = positives_QxM[query_N].copy()
    score_Nx1 = others_NxM[np.arange(len(query_N)), place_N][:, None]
    others_NxM[np.arange(len(query_N)), place_N] = np.nan
    return Candidates(_rows(score_Nx1), score_Nx1, score_Nx1, _lowest(others_NxM))


def _share_kept(parts: Sequence[Candidates], rules: dict[str, Any]) -> float:
    """The share of the candidates that all these score rules keep."""
    kept = total = 0
    for candidates in parts:
        there_QxK = candidates.rows_QxK != NO_HIT
        keep_QxK = there_QxK.copy()
        for name, value in rules.items():
            keep_QxK &= RULES[name](value).keep(candidates, Context([], str))
        kept, total = kept + int(keep_QxK.sum()), total + int(there_QxK.sum())
    return round(kept / max(total, 1), 4)


# --------------------------------------------------------------------------------------------------------- what is shown


def explain(
    scored: dict[str, dict[str, Scored]], compared: str | None, rules: dict[str, Any], out_dir: pathlib.Path
) -> str:
    """Writes scores.json, scores.md and histogram.png; returns what the terminal shows.

    Args:
      scored: {retriever: {language: scores}}, the cross-encoder among them where there is one.
      compared: the retriever whose scores the rules compare, None without an encoder in the ensemble.
    """
    found = {
        "compared": compared,
        "quantiles": list(QUANTILES),
        "table": score_table(scored),
        "histograms": histograms(scored),
        "margins": margins(scored[compared], rules) if compared else None,
        CROSS_ENCODER: margins(scored[CROSS_ENCODER], rules[CROSS_ENCODER]) if CROSS_ENCODER in scored else None,
    }
    write_json(out_dir / "scores.json", found)
    write_text(out_dir / "scores.md", _page(found))
    with atomic(out_dir / "histogram.png") as path:
        draw(found["histograms"], path)
    return "\n\n".join(_tables(found, [ALL], SCREEN))


def _page(found: dict[str, Any]) -> str:
    langs = [lang for lang in next(iter(found["table"].values()), {}) if lang != ALL]
    parts = ["# Scores of positives and candidates", *_tables(found, [ALL, *langs], "github"), "![](histogram.png)"]
    return "\n\n".join(parts) + "\n"


def _tables(found: dict[str, Any], langs: Iterable[str], form: str) -> list[str]:
    headers = ["retriever", "lang", "scores of", "count", "mean", *(f"{q:.0%}" for q in found["quantiles"])]
    rows = [
        [name, lang, kind, f"{s['count']:,}", *(_number(v) for v in (s["mean"], *s["quantiles"]))]
        for name, of_lang in found["table"].items()
        for lang in langs if lang in of_lang
        for kind, s in of_lang[lang].items()
    ]  # fmt: skip
    shown = [
        tabulate(rows, headers, form, disable_numparse=True, colalign=["left"] * 3 + ["right"] * (len(headers) - 3))
    ]
    if found["margins"]:
        shown += _margin_lines(found["compared"], "", found["margins"], form)
    if found[CROSS_ENCODER]:
        shown += _margin_lines(CROSS_ENCODER, f"{CROSS_ENCODER}.", found[CROSS_ENCODER], form)
    return list(dict.fromkeys(shown))  # both may say that positives are too few


def _margin_lines(compared: str, prefix: str, margins_: dict[str, Any], form: str) -> list[str]:
    count, suggested = margins_["left_out_positives"], margins_["suggested"]
    entries = [*([margins_["in_force"]] if margins_["in_force"] else []), *margins_["grid"]]
    if form == SCREEN:
        entries = [e for e in entries if e is margins_["in_force"] or suggested.get(e["rule"]) == e["value"]]
    rows = [
        [
            f"{entry['rule']} (in force)" if entry is margins_["in_force"] else entry["rule"],
            ", ".join(f"{v:g}" for v in np.atleast_1d(entry["value"])),
            f"{entry['candidates_kept']:.1%}",
            "-" if entry["left_out_kept"] is None else f"{entry['left_out_kept']:.1%}",
        ]
        for entry in entries
    ]
    headers = [f"rule, by {compared}", "value", "candidates kept", "left-out positives kept"]
    lines = []
    if rows:
        lines.append(tabulate(rows, headers, form, disable_numparse=True, colalign=("left", "right", "right", "right")))
    if count < FEWEST:
        lines.append(
            f"{count} left-out positives are too few to measure false negatives ({FEWEST} are needed: queries with two or more "
            "positives); no margin is suggested. Look at audit.csv and scores.md."
        )
    elif not suggested:
        lines.append(f"No margin of the table drops {CAUGHT:.0%} of the {count} left-out positives. Look at audit.csv.")
    else:
        flags = "\n".join(f"    --config.filters.{prefix}{name}={value:g}" for name, value in suggested.items())
        lines.append(
            f"The loosest margins that drop {CAUGHT:.0%} of the {count} left-out positives, to choose one of:\n{flags}"
        )
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


COLOURS = {"positive": "#0072b2", "candidate": "#999999", "kept": "#e69f00"}  # Okabe and Ito 2008


def draw(histograms_: dict[str, dict[str, list[float]]], path: pathlib.Path) -> None:
    """One panel a retriever: shares of the positives, the candidates, and those kept, by score."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    panels = max(len(histograms_), 1)
    figure, axes = pyplot.subplots(panels, 1, figsize=(7, 2.4 * panels), squeeze=False, layout="constrained")
    for axis, (name, of_kind) in zip(axes[:, 0], histograms_.items(), strict=False):
        edges = np.array(of_kind["edges"])
        for kind, colour in COLOURS.items():
            counts = np.array(of_kind[kind], float)
            filled = {"fill": True, "alpha": 0.35} if kind == "candidate" else {"linewidth": 1.6}
            label = f"{kind} ({int(counts.sum()):,})"
            axis.stairs(counts / max(counts.sum(), 1), edges, color=colour, label=label, **filled)
        axis.set(title=name, ylabel="share", xlim=(edges[0], edges[-1]))
        axis.title.set(fontsize=10, fontweight="bold")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    axes[-1, 0].set_xlabel("score")
    figure.savefig(path, dpi=120, format="png", metadata={"Software": None})
    pyplot.close(figure)
