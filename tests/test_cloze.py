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
def test_every_sentence_of_each_script_becomes_a_query_of_the_rest(text, sentences):
    pairs = list(cloze.inverse_cloze([(4, Passage("d", "", text))]))
    assert [pair.query for pair in pairs] == sentences
    for pair in pairs:
        assert pair.row == 4 and pair.query not in pair.passage
        assert sorted((pair.query + pair.passage).replace(" ", "")) == sorted("".join(text.split()))


def test_the_title_is_a_query_of_the_text_and_stays_before_what_a_sentence_leaves():
    passages = [
        (10, Passage("a", "Nile", "")),
        (11, Passage("b", "", "")),
        (12, Passage("c", "Oslo", "It is cold. It is dark.")),
    ]
    assert list(cloze.inverse_cloze(passages)) == [
        ("It is cold.", "Oslo It is dark.", 12),
        ("It is dark.", "Oslo It is cold.", 12),
        ("Oslo", "It is cold. It is dark.", 12),
    ]


@pytest.mark.parametrize("lang", ["ar", "en", "hi", "ja", "ko", "sw", "th", "zh"])
def test_most_real_passages_give_a_title_and_two_sentences(lang):
    with open(TINYPEDIA / "corpus" / f"{lang}.jsonl", encoding="utf-8") as lines:
        passages = [(row, Passage(**json.loads(line))) for row, line in enumerate(lines)]
    assert len(list(cloze.inverse_cloze(passages))) > 2.5 * len(passages)
