"""Triples give each query the negatives that stand in the file, by text or by id, and what is not known is counted."""

import numpy as np
import pytest
from test_refresh import recipe_over

from jdmdr import negatives, retrievers, triples, versions, workdir
from jdmdr.corpus import passage_text
from jdmdr.types import NO_HIT, UserError


def lines(library, known, by_text, passages):
    """A file of (query, negative), places among `known` queries and rows; the last of either is unknown."""
    collection = library.collections[1]
    texts = [passage_text(collection.passage(row)) for row in range(len(collection))]
    names = [*texts, "some other text"] if by_text else [*collection.docids(range(len(collection))), "no_docid"]
    asked = [*((f" {text} " if by_text else qid) for qid, text in known), "what else?" if by_text else "no_qid"]
    return "".join(f"{asked[q]}\t{names[0]}\t{names[row]}\n" for q, row in passages)


@pytest.mark.parametrize("by_text", [False, True])
def test_negatives_are_those_of_the_file_in_its_order_each_once(library, tmp_path, by_text, monkeypatch):
    monkeypatch.setattr(triples, "BLOCK", 7)
    known = list(zip(*library.queries("sw", "train"), strict=True))
    rng = np.random.default_rng(3)
    passages = [(int(q), int(row)) for q, row in zip(rng.integers(-1, 6, 90), rng.integers(-1, 24, 90), strict=True)]
    path = tmp_path / "triples.tsv"
    path.write_text(lines(library, known, by_text, passages), encoding="utf-8")
    qids, texts = zip(*known, strict=True)
    given = triples.read(path, qids, texts, library.collections[1])
    for q in range(len(qids)):
        expected = list(dict.fromkeys(row for at, row in passages if at == q and row >= 0))
        assert given.rows[given.offsets[q] : given.offsets[q + 1]].tolist() == expected
    assert given.counts == {
        "triples": 90, "unknown_queries": sum(q < 0 for q, _ in passages), "unknown_negatives": sum(row < 0 for _, row in passages)
    }  # fmt: skip
    search = retrievers.external_triples(path, qids, texts, library.collections[1]).search
    hits = search(np.array([5, 9, 0]), 4)
    assert (
        hits.rows_QxK[0].tolist() == given.rows[given.offsets[5] :][:4].tolist() and (hits.rows_QxK[1] == NO_HIT).all()
    )
    assert hits.scores_QxK[2].tolist() == [0, -1, -2, -3] and np.isneginf(hits.scores_QxK[1]).all()


def test_queries_of_one_text_share_its_triples_and_a_repeated_passage_is_the_first(library, tmp_path):
    collection = library.collections[1]
    text = passage_text(collection.passage(4))
    (tmp_path / "t.tsv").write_text(f"who?\tx\t{text}\n", encoding="utf-8")
    given = triples.read(tmp_path / "t.tsv", ["a", "b", "c"], ["who?", "where?", "who?"], collection)
    assert given.offsets.tolist() == [0, 1, 1, 2] and given.rows.tolist() == [4, 4]


@pytest.mark.parametrize("text, says", [
    ("", "holds no triple"), ("a\tb\n", "line 1: 2 TAB-separated fields where 3"), ("a\tb\tc\nd\n", "line 2: 1 TAB"),
    ("a\tb\tc\n", "of 1 triples none has a training query .*taken for ids"), ("a b\tc\td e\n", "taken for texts"),
])  # fmt: skip
def test_what_is_no_file_of_triples_is_told(library, tmp_path, text, says):
    (tmp_path / "t.tsv").write_text(text)
    with pytest.raises(UserError, match=says):
        triples.read(tmp_path / "t.tsv", ["q"], ["who"], library.collections[1])


def test_a_recipe_selects_the_given_negatives_and_nothing_else(finished, tmp_path):
    recipe = recipe_over(finished, tmp_path / "run", mode="off")
    wanted = {}
    for index, lang in enumerate(recipe.library.langs):
        collection, base = recipe.library.collections[index], recipe.library.bases[index]
        known = [q for q in recipe.training if q.lang == index]
        rows = []
        for q, query in enumerate(known[:-3]):
            own = (query.positives - base).tolist()
            wanted[query.qid, lang] = [row for row in range(q % 7, q % 7 + 1 + q % 3) if row not in own]
            rows += [(query.qid, row) for row in [*own, *wanted[query.qid, lang]]]
        text = "".join(f"{qid}\tx\t{collection.docid(row)}\n" for qid, row in rows)
        (tmp_path / f"{lang}.tsv").write_text(text)
    with recipe.config.unlocked():
        recipe.config.mine.update({"retrievers": f"triples:{tmp_path}/{{lang}}.tsv", "sample": "best", "least": 1})
    for stage in recipe.stages():
        if stage.name in ("mine", "negatives"):
            workdir.bring_up_to_date(stage, recipe.directory, False, lambda line: None)
    for lang in recipe.library.langs:
        qids, stored = negatives.read(versions.version_dir(recipe.directory / "negatives", 0), lang)
        for qid, rows_N in zip(qids, stored.rows_QxN, strict=True):
            assert rows_N[rows_N != NO_HIT].tolist() == wanted.get((qid, lang), [])
