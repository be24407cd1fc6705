"""Spans: windows skip nothing, answers come back as characters, F1 and EM are those of SQuAD and MLQA."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SHARED, TINYPEDIA
from hypothesis import given
from hypothesis import strategies as st

from jdmdr import squad
from jdmdr.objectives import spans as objective
from jdmdr.pairs import window_starts
from jdmdr.spans import best_span
from jdmdr.types import UserError


@given(st.integers(0, 400), st.integers(1, 90), st.integers(0, 90))
def test_windows_skip_nothing_and_overlap(tokens, room, overlap):
    starts = window_starts(tokens, room, overlap)
    seen = np.zeros(tokens, int)
    for first in starts:
        assert first == 0 or first + room <= tokens
        seen[first : first + room] += 1
    assert (seen > 0).all() and starts == sorted(set(starts))
    for one, two in zip(starts, starts[1:], strict=False):
        assert two <= one + room - min(overlap, room // 2)


def test_the_best_span_is_the_best_of_all():
    random = np.random.default_rng(0)
    logits = random.normal(size=(20, 2))
    every = {(i, j): logits[4 + i, 0] + logits[4 + j, 1] for i in range(12) for j in range(i, min(i + 3, 12))}
    score, first, last = best_span(logits, 4, 12, 3)
    assert (first, last) == max(every, key=every.get) and score == pytest.approx(max(every.values()))


def test_the_loss_of_spans():
    random = np.random.default_rng(1)
    hidden, head = random.normal(size=(3, 6, 4)), {"kernel": random.normal(size=(4, 2)), "bias": random.normal(size=2)}
    choices = random.random((3, 6)) < 0.6
    choices[:, 0], choices[0, 2:5] = True, True
    spans = np.array([[2, 4], [0, 0], [0, 0]])
    expected = []
    for b in range(3):
        logits = hidden[b][choices[b]] @ head["kernel"] + head["bias"]
        place = np.cumsum(choices[b]) - 1
        for side in (0, 1):
            expected.append(np.log(np.exp(logits[:, side]).sum()) - logits[place[spans[b, side]], side])
    as_float = lambda x: jnp.asarray(x, jnp.float32)
    made = objective.span_logits({k: as_float(v) for k, v in head.items()}, as_float(hidden), jnp.asarray(choices))
    np.testing.assert_allclose(objective.span_loss(made, jnp.asarray(spans)), np.mean(expected), rtol=1e-5)


@pytest.mark.parametrize("prediction, answers, lang, f1, em", [
    ("The cat sat.", ["a cat sat"], "en", 1, 1),
    ("the black cat", ["cat"], "en", 2 / 3, 0),  # found: black cat
    ("the cat", ["the dog", "cats", "cat the"], "en", 1, 1),
    ("der Hund", ["Hund"], "de", 1, 1),
    ("der Hund", ["Hund"], "es", 2 / 3, 0),
    ("北京市", ["北京"], "zh", 0.8, 0),
    ("1,000 km", ["1000 km"], "en", 1, 1),
    ("", [], "en", 1, 1),
    ("something", [], "en", 0, 0),
    ("", ["something"], "en", 0, 0),
])  # fmt: skip
def test_f1_and_exact_match(prediction, answers, lang, f1, em):
    assert squad.f1_and_em(prediction, answers, lang) == (pytest.approx(f1), em)


def test_a_question_without_a_prediction_counts():
    questions = [squad.Question(str(i), "?", "a b", [("b", 2)]) for i in range(4)]
    assert squad.score(questions, {"0": "b", "1": "b"}, "de") == {"f1": 0.5, "em": 0.5, "questions": 4}


def test_questions_across_languages_are_made_of_retrieval_data(tmp_path):
    root = squad.Root(TINYPEDIA)
    found = root.questions("en", "sw", "test")
    assert len(found) == 192
    passages = {
        row["docid"]: row for row in map(json.loads, (TINYPEDIA / "corpus" / "sw.jsonl").read_text().splitlines())
    }
    qrels = dict(line.split()[::2][:2] for line in (TINYPEDIA / "qrels" / "en.test.tsv").read_text().splitlines())
    for q in found[:20]:
        (text, start), docid = q.answers[0], qrels[q.id]
        assert text == passages[docid]["text"] and q.context[start : start + len(text)] == text
        assert all(passages[f"{docid.split('#')[0]}#{i}"]["text"] in q.context for i in range(3))
    path = tmp_path / "x.json"
    squad.write(path, found)
    assert sorted(squad.read(path)) == sorted(found)
    left = root.questions("en", "en", "dev-train")
    assert len(left) == 384
    with pytest.raises(UserError, match="has no topics 'clean' of en; there are: dev, test, train"):
        root.questions("en", "en", "clean")


@pytest.mark.skipif(not (SHARED / "xquad-r").is_dir(), reason="XQuAD-R is not here")
def test_xquad_r_gives_sentences_of_paragraphs_and_keeps_its_halves_apart():
    root = squad.Root(SHARED / "xquad-r")
    clean, rest = (root.questions("en", "de", split) for split in ("clean", "test-clean"))
    assert len(clean) + len(rest) > 1150 and not {q.context for q in clean} & {q.context for q in rest}
    assert sum(len(q.answers[0][0]) < len(q.context) for q in clean) > 0.9 * len(clean)


@pytest.mark.parametrize("text, sentence", [
    ("{", "is no SQuAD JSON"),
    ('{"data": [{"paragraphs": [{"qas": []}]}]}', "KeyError: 'context'|holds no question"),
    ('{"data": []}', "holds no question"),
    ('{"data": [{"paragraphs": [{"context": "abc", "qas": [{"id": "7", "question": "?", "answers": [{"text": "b", "answer_start": 0}]}]}]}]}',
     "the answer 'b' of question '7' does not stand at character 0"),
])  # fmt: skip
def test_what_is_no_squad_json_is_told(text, sentence, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=sentence):
        squad.read(tmp_path / "x.json")


def test_version_2_has_questions_without_an_answer(tmp_path):
    qas = [{"id": 1, "question": "?", "is_impossible": True, "answers": [], "plausible_answers": []}]
    (tmp_path / "x.json").write_text(
        json.dumps({"version": "v2.0", "data": [{"paragraphs": [{"context": "c", "qas": qas}]}]})
    )
    assert squad.read(tmp_path / "x.json") == [squad.Question("1", "?", "c", [])]
