import json

import pytest
from conftest import TINYPEDIA

from jdmdr import cloze
from jdmdr.types import Passage


@pytest.mark.parametrize(
    "text, sentences",
    [
        ("It flows 3.5 km. Does it end? In a delta!", ["It flows 3.5 km.", "Does it end?", "In a delta!"]),
        ("尼罗河位于非洲东北部。它的两大支流汇合！真的不知道吗？", ["尼罗河位于非洲东北部。", "它的两大支流汇合！"]),
        ("नील एक नदी है। वह उत्तर बहती है।", ["नील एक नदी है।", "वह उत्तर बहती है।"]),
        ("یہ ایک دریا ہے۔ کیا یہ لمبا ہے؟", ["یہ ایک دریا ہے۔", "کیا یہ لمبا ہے؟"]),
        ("แม่น้ำไนล์เป็นแม่น้ำ ไหลขึ้นไปทางทิศเหนือ", ["แม่น้ำไนล์เป็นแม่น้ำ", "ไหลขึ้นไปทางทิศเหนือ"]),
        ("first line of it\nsecond line of it", ["first line of it", "second line of it"]),
        ("One sentence only, without a mark", []),
    ],
)  # fmt: skip
def test_a_sentence_of_each_script_becomes_a_query(text, sentences):
    found = set()
    for seed in range(20):
        queries, rows = cloze.inverse_cloze([(4, Passage("d", "", text))], seed)
        assert len(queries) == len(rows) <= 1
        found |= set(queries)
    # Pieces too short to stand for their passage never do.
    assert found == set(sentences)


def test_titles_are_queries_and_rows_are_kept():
    passages = [
        (10, Passage("a", "Nile", "")),
        (11, Passage("b", "", "")),
        (12, Passage("c", "Oslo", "It is cold. It is dark.")),
    ]
    queries, rows = cloze.inverse_cloze(passages, seed=0)
    assert queries[:2] == ["Nile", "Oslo"] and queries[2] in ("It is cold.", "It is dark.")
    assert rows.tolist() == [10, 12, 12]


@pytest.mark.parametrize("lang", ["ar", "en", "hi", "ja", "ko", "sw", "th", "zh"])
def test_most_real_passages_give_a_title_and_a_sentence(lang):
    with open(TINYPEDIA / "corpus" / f"{lang}.jsonl", encoding="utf-8") as lines:
        passages = [(row, Passage(**json.loads(line))) for row, line in enumerate(lines)]
    queries, rows = cloze.inverse_cloze(passages, seed=0)
    assert len(queries) > 1.8 * len(passages)
    texts = {row: f"{passage.title}\n{passage.text}" for row, passage in passages}
    assert all(query in texts[row] for query, row in zip(queries, rows.tolist(), strict=True))
    sentences = [query for query, row in zip(queries, rows.tolist(), strict=True) if query != passages[row][1].title]
    assert max(map(len, sentences)) < max(len(passage.text) for _, passage in passages)
