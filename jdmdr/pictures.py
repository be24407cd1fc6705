"""The pictures of the HTML report, as SVG to be inlined: they take the page's font, and its colours in light and dark.

Equal input gives equal bytes on one machine: no dates, no random ids.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np

INK, GRID = "#010203", "#040506"  # stand for the page's colours until the SVG is text
# Okabe and Ito (2008), told apart by the colour-blind and on white and on black; grey for what others are compared with
COLOURS = ("#999999", "#56b4e9", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#2f86c8", "#b8a800")
STYLE = {
    "svg.fonttype": "none", "font.size": 9, "font.family": "sans-serif", "axes.grid": True, "grid.color": GRID,
    "grid.linewidth": 0.6, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GRID, "xtick.color": INK,
    "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "legend.frameon": False, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left",
}  # fmt: skip


def _svg(name: str, size: tuple[float, float], draw: Callable[[Any], None]) -> str:
    """The figure that `draw` fills; `name` keeps the ids of a page's pictures apart."""
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor").replace(GRID, "var(--grid)")
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.S)
    text = re.sub(r'font: [^;"]*?([0-9.]+px)[^;"]*', r"font: \1 inherit; font-family: inherit; font-size: \1", text)
    # Ids of one picture must not be those of another: matplotlib numbers groups from 1 in each.
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'(xlink:href="|url\()#', rf"\1#{name}-", text)
    return re.sub(
        r'<svg [^>]*?viewBox="([^"]+)"[^>]*>',
        r'<svg role="img" viewBox="\1" xmlns:xlink="http://www.w3.org/1999/xlink">',
        text,
        count=1,
    )


def bars(name: str, langs: Sequence[str], values: Mapping[str, Sequence[float]], label: str) -> str:
    """Groups of bars, a group a language and a bar a system."""

    def draw(figure: Any) -> None:
        axis = figure.add_subplot()
        width = 0.8 / len(values)
        for i, (system, heights) in enumerate(values.items()):
            at = np.arange(len(langs)) + (i - (len(values) - 1) / 2) * width
            axis.bar(at, heights, width * 0.92, color=COLOURS[i % len(COLOURS)], label=system)
        axis.set_xticks(range(len(langs)), langs)
        axis.set(ylabel=label, ylim=(0, 1), xlim=(-0.6, len(langs) - 0.4))
        axis.grid(False, axis="x")
        figure.legend(loc="outside upper left", ncols=len(values), fontsize=9)

    return _svg(name, (max(5.0, 1.4 + 0.75 * len(langs)), 2.8), draw)


def curves(name: str, runs: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]) -> str:
    """`runs[run][title] = (steps, values)`: a row a run, a panel a title; dots where there are few points."""
    titles = list(dict.fromkeys(title for of in runs.values() for title in of))

    def draw(figure: Any) -> None:
        axes = figure.subplots(len(runs), len(titles), squeeze=False)
        for row, (run, of) in zip(axes, runs.items(), strict=True):
            for axis, title in zip(row, titles, strict=True):
                steps, values = of.get(title, ([], []))
                axis.plot(steps, values, color=COLOURS[6], lw=1.5, marker="o" if len(steps) < 30 else None, ms=3.5)
                axis.set(title=f"{run}: {title}", xlabel="step")
                if not len(steps):
                    axis.text(0.5, 0.5, "no figures", transform=axis.transAxes, ha="center", va="center")

    return _svg(name, (8.2, 2.3 * len(runs)), draw)


def refreshes(
    name: str, title: str, quality: Sequence[tuple[int, float]], changed: Sequence[tuple[int, float]], last: int
) -> str:
    """(step, value) of the models that mined, beside (step, share) of the negatives that were new; a line where training took
    them."""

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        for axis in (left, right):
            for step, _ in changed:
                axis.axvline(step, color=COLOURS[0], lw=0.8, ls=":")
            axis.set(xlabel="step", xlim=(0, max(last, 1) * 1.03))
        left.plot(*zip(*quality, strict=True) if quality else ([], []), color=COLOURS[6], lw=1.5, marker="o", ms=3.5)
        left.set(title=title)
        right.bar([step for step, _ in changed], [share for _, share in changed], max(last, 1) / 60, color=COLOURS[5])
        right.set(title="share of the negatives that were new", ylim=(0, 1))

    return _svg(name, (8.2, 2.5), draw)


def shares(name: str, groups: Mapping[str, Mapping[str, tuple[float, float]]]) -> str:
    """`groups[title][label] = (wanted, had)`: a panel a title, what was aimed at beside what came of it."""

    def draw(figure: Any) -> None:
        axes = figure.subplots(1, len(groups), squeeze=False, width_ratios=[len(of) + 2 for of in groups.values()])
        for axis, (title, of) in zip(axes[0], groups.items(), strict=True):
            at = np.arange(len(of))
            for offset, colour, label, place in (
                (-0.2, COLOURS[0], "aimed at", 0),
                (0.2, COLOURS[2], "in the batches", 1),
            ):
                axis.bar(at + offset, [pair[place] for pair in of.values()], 0.38, color=colour, label=label)
            axis.set_xticks(at, list(of), rotation=45 if max(map(len, of), default=0) > 3 else 0)
            axis.set(title=title, ylim=(0, None))
            axis.grid(False, axis="x")
        axes[0, 0].set_ylabel("share of the queries")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=2)

    return _svg(name, (8.2, 2.9), draw)


def score_histograms(name: str, histograms: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """A panel a retriever: how the scores of positives, candidates and kept candidates lie."""
    colours = {"positive": COLOURS[6], "candidate": COLOURS[0], "kept": COLOURS[5]}

    def draw(figure: Any) -> None:
        axes = figure.subplots(1, len(histograms), squeeze=False)
        for axis, (retriever, of) in zip(axes[0], histograms.items(), strict=True):
            for kind, colour in colours.items():
                counts = np.array(of[kind], float)
                filled = {"fill": True, "alpha": 0.45} if kind == "candidate" else {"lw": 1.6}
                axis.stairs(counts / max(counts.sum(), 1), of["edges"], color=colour, label=kind, **filled)
            axis.set(title=retriever, xlabel="score", xlim=(of["edges"][0], of["edges"][-1]), ylim=(0, None))
        axes[0, 0].set_ylabel("share")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=3)

    return _svg(name, (max(4.6, min(4.1 * len(histograms), 16.4)), 2.8), draw)


def translations(
    name: str, panels: Mapping[str, Mapping[str, np.ndarray]], langs: tuple[str, str], kinds: Sequence[str]
) -> str:  # fmt: skip
    """Points of the plane before and after, `panels[title][LANG KIND]` Nx2: row i of one language translates row i of the
    other. Colour is the language, the mark the kind (queries, passages), a line joins translations."""
    marks = dict(zip(kinds, ("o", "s"), strict=False))

    def draw(figure: Any) -> None:
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, (title, points) in zip(axes, panels.items(), strict=True):
            for kind in kinds:
                for one, other in zip(*(points[f"{lang} {kind}"] for lang in langs), strict=True):
                    axis.plot(*np.stack([one, other]).T, color=GRID, lw=0.7, zorder=1)
                for lang, colour in zip(langs, (COLOURS[1], COLOURS[2]), strict=True):
                    axis.scatter(*points[f"{lang} {kind}"].T, s=20, marker=marks[kind], color=colour, linewidths=0,
                                 alpha=0.85, zorder=2, label=f"{lang} {kind}")  # fmt: skip
            axis.set(title=title, xticks=[], yticks=[])
            axis.grid(False)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2 * len(kinds))

    return _svg(name, (8.2, 4.6), draw)


def projection(name: str, points_Nx2: np.ndarray, langs_N: Sequence[str], pairs: Sequence[tuple[int, int]]) -> str:
    """Points of the plane: `pairs` are (query, passage) indices, joined by a line; colour is the language."""
    order = sorted(set(langs_N))
    palette = [matplotlib.colormaps["tab20"](i) for i in (0, 2, 4, 6, 8, 10, 12, 16, 18, 1, 3, 5, 7, 9, 11, 13, 17, 19)]

    def draw(figure: Any) -> None:
        axis = figure.add_subplot()
        for query, passage in pairs:
            axis.plot(*points_Nx2[[query, passage]].T, color=GRID, lw=0.7, zorder=1)
        for i, lang in enumerate(order):
            for place, marker, size, edge in ((0, "o", 20, "none"), (1, "s", 24, INK)):
                here = [pair[place] for pair in pairs if langs_N[pair[place]] == lang]
                axis.scatter(*points_Nx2[here].T, s=size, marker=marker, color=palette[i % len(palette)], edgecolors=edge,
                             linewidths=0.5, zorder=2 + place, label=lang if place == 0 else None)  # fmt: skip
        axis.set(xticks=[], yticks=[])
        axis.grid(False)
        figure.legend(loc="outside right upper", ncols=1 + len(order) // 10, handletextpad=0.1)

    return _svg(name, (8.2, 5.2), draw)
