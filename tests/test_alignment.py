"""Figures of two languages' vectors are what their names say, and the map pairs what equal ids pair."""

import re

import numpy as np

from jdmdr import alignment, pictures
from jdmdr.splits import Split


def test_figures_of_vectors_by_hand():
    one = np.eye(3)
    same = alignment.figures(one, one)
    assert same["translations"] == 1 and same["others"] == 0
    turned = alignment.figures(one, np.roll(one, 1, axis=0))
    assert turned["translations"] == 0 and turned["others"] == 0.5
    rng = np.random.default_rng(0)
    apart = [rng.normal(size=(40, 8)) * 0.1 + shift for shift in (np.eye(8)[0], np.eye(8)[1])]
    apart = [of / np.linalg.norm(of, axis=1, keepdims=True) for of in apart]
    assert alignment.figures(*apart)["own"] == 1
    mixed = alignment.figures(apart[0], apart[0] + 1e-4 * rng.normal(size=(40, 8)))
    assert 0.35 < mixed["own"] < 0.55 and mixed["translations"] > 0.99


def test_pairs_are_those_of_equal_ids(finished):
    library, split = finished.library, Split("test", "test", "test")
    pairs = alignment.choose(library, split, "en", "xx,sw")
    assert pairs.langs == ("en", "sw")
    qids = [library.queries(lang, "test")[0] for lang in pairs.langs]
    rows = pairs.rows["queries"]
    assert [qids[0][row] for row in rows[0]] == [qids[1][row] for row in rows[1]] and len(rows[0]) > 5
    docids = [of.docids(rows) for of, rows in zip(library.collections, pairs.rows["passages"], strict=True)]
    judged = library.qrels("en", "test")
    assert docids[0] == docids[1] and {*docids[0]} == {d for row in rows[0] for d in judged[qids[0][row]]}
    assert alignment.choose(library, split, "de", "sw") is None
    assert alignment.choose(library, Split("none", "none", "none"), "en", "sw") is None
    panel = alignment.panel(finished.directory / "embeddings", pairs, 0)
    assert {name: of.shape for name, of in panel.points.items()} == {
        f"{lang} {kind}": (len(pairs.rows[kind][0]), 2) for kind in pairs.rows for lang in pairs.langs
    }
    assert all(np.isfinite(of).all() for of in panel.points.values())


def test_the_picture_has_a_panel_a_title_and_a_line_a_pair():
    points = {f"{lang} queries": np.arange(6.0).reshape(3, 2) + i for i, lang in enumerate(("en", "ko"))}
    svg = pictures.translations("t", {"before": points, "after": points}, ("en", "ko"), ["queries"])
    assert svg == pictures.translations("t", {"before": points, "after": points}, ("en", "ko"), ["queries"])
    for word in ("before", "after", "en queries", "ko queries"):
        assert re.search(rf">\s*{word}\s*<", svg), word
    assert svg.count("stroke: var(--grid)") >= 6
