"""Articles become passages that say what they say, questions keep all their answers, and an answer counts in one passage."""

import json
import runpy

import numpy as np
import pytest
import tokenizers
from conftest import REPO

from jdmdr import answers, cut_passages, pipeline, questions, tokenizer
from jdmdr.corpus import Collection
from jdmdr.types import UserError

KOREAN = " ".join(f"{i}번째 강은 서울을 지나 {i * 7}번 바다로 흐른다." for i in range(12))
ENGLISH = " ".join(
    f"River {i} runs north through Egypt to sea {i * 7}. Its valley is narrow, its delta wide." for i in range(9)
)


def wiki(path, *found):
    blocks = [
        f'<doc id="{i}" url="https://x?curid={i}" title="{title}">\n{title}\n\n{text}\n\n</doc>\n'
        for i, title, text in found
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(blocks), encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------- articles


def test_both_forms_of_the_extractor_say_the_same(tmp_path):
    wiki(tmp_path / "AA" / "wiki_00", ("7", 'Tea &amp; "cake"', "First line.\nSecond line."), ("9", "Sea", "Water."))
    rows = [{"id": "7", "url": "u", "title": 'Tea & "cake"', "text": "First line.\nSecond line."},
            {"id": "9", "url": "u", "title": "Sea", "text": "Water."}]  # fmt: skip
    (tmp_path / "AA" / "wiki_01").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = cut_passages.files(tmp_path)
    assert [path.name for path in paths] == ["wiki_00", "wiki_01"]
    blocks, objects = ([*cut_passages.read(path)] for path in paths)
    assert blocks == objects and blocks[0].text == "First line.\nSecond line."


@pytest.mark.parametrize("text, says", [
    ("words\n", "line 1: 'words' where <doc"), ('<doc id="1" url="u" title="t">\nt\nwords\n', "'1' has no </doc>"),
    ('{"id": 1, "title": "t", "text": "x"}\n', "line 1: no id, title and text"),
])  # fmt: skip
def test_what_is_no_article_is_told(tmp_path, text, says):
    (tmp_path / "wiki_00").write_text(text)
    with pytest.raises(UserError, match=says):
        list(cut_passages.read(tmp_path / "wiki_00"))
    with pytest.raises(UserError, match="holds none called wiki_"):
        cut_passages.files(tmp_path / "nothing")


JAPANESE = "".join(f"大きな川{i}は海{i * 7}へ流れる。小さな川も山から海へ行く。" for i in range(12))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer.train_unigram([KOREAN, ENGLISH, JAPANESE], 120, directory)
    return directory


@pytest.mark.parametrize("tokens, overlap", [(8, 0), (20, 0), (20, 6)])
@pytest.mark.parametrize("text", [KOREAN, ENGLISH, JAPANESE])
def test_passages_are_the_articles_own_words_in_order_and_fit_when_tokenised_alone(home, text, tokens, overlap):
    chunks = cut_passages.Chunker(str(home), tokens, overlap).chunks(text)
    backend = tokenizers.Tokenizer.from_file(str(home / "tokenizer.json"))
    assert len(chunks) > 1 and all(len(backend.encode(chunk).ids) <= tokens for chunk in chunks)
    assert min(len(backend.encode(chunk).ids) for chunk in chunks[:-1]) > tokens // 4
    place = covered = 0
    for chunk in chunks:
        found = text.index(chunk, place)
        assert not text[covered:found].strip(), "nothing is left out"
        place, covered = found + 1, found + len(chunk)
    assert len(backend.encode(text[covered:]).ids) < 2
    if not overlap:
        assert "".join(chunks).replace(" ", "") == text[:covered].replace(" ", ""), "and nothing twice"
    if tokens > 8 and text is not JAPANESE:
        assert {word for chunk in chunks for word in chunk.split()} <= set(text.split()), "no word is cut in two"


def test_short_articles_are_left_out_and_a_second_one_of_an_id_is_refused(home, tmp_path):
    wiki(tmp_path / "in" / "wiki_00", ("1", "Nile", ENGLISH), ("2", "Stub", "Sea."))
    made = cut_passages.cut(tmp_path / "in", "en", tmp_path / "out", str(home), 20, 0)
    rows = [json.loads(line) for line in (tmp_path / "out" / "corpus" / "en.jsonl").read_text().splitlines()]
    assert made["articles"] == 2 and made["too_short"] == 1 and made["passages"] == len(rows) > 3
    assert [row["docid"] for row in rows] == [f"1#{n}" for n in range(len(rows))] and {
        row["title"] for row in rows
    } == {"Nile"}
    wiki(tmp_path / "in" / "wiki_01", ("1", "Again", ENGLISH))
    with pytest.raises(UserError, match="the article '1' was there before"):
        cut_passages.cut(tmp_path / "in", "en", tmp_path / "out", str(home), 20, 0)


# ------------------------------------------------------------------------------------------------------------ questions


def squad(path, *found):
    """(title, context, [(qid, question, [answers])])."""
    data = [
        {"title": title, "paragraphs": [{"context": context, "qas": [
            {"id": qid, "question": text, "answers": [{"text": a, "answer_start": context.index(a)} for a in of]}
            for qid, text, of in asked]}]}
        for title, context, asked in found
    ]  # fmt: skip
    path.write_text(json.dumps({"version": "1", "data": data}), encoding="utf-8")


def test_every_question_and_every_answer_is_kept_with_its_place(tmp_path):
    context = "서울을 지나 흐르는 한강은 길이가 494 km이다."
    squad(
        tmp_path / "dev.json",
        ("한_강", context, [("1", "길이는?", ["494", "494 km"]), ("2", "어디를\n지나는가?", ["서울"])]),
    )
    assert questions.write([tmp_path / "dev.json"], "ko", "", "dev", None, tmp_path) == {"ko.dev": 2}
    assert (tmp_path / "topics" / "ko.dev.tsv").read_text(encoding="utf-8") == "1\t길이는?\n2\t어디를 지나는가?\n"
    rows = [
        json.loads(line) for line in (tmp_path / "answers" / "ko.dev.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert rows[0] == {"qid": "1", "answers": ["494", "494 km"], "title": "한 강", "window": " 길이가 494 km이다"}
    with pytest.raises(UserError, match="--lang is missing"):
        list(questions.read([tmp_path / "dev.json"], "", "dev"))
    (tmp_path / "bad.json").write_text('{"data": [{"title": "x"}]}')
    with pytest.raises(UserError, match="not in SQuAD's form .KeyError: 'paragraphs'"):
        list(questions.read([tmp_path / "bad.json"], "ko", "dev"))


def test_questions_about_another_languages_corpus_are_a_split_of_it(tmp_path):
    lines = [{"id": "5", "question": "나일강?", "lang": "ko", "answers": ["Egypt", ""], "split": "dev"},
             {"id": "6", "question": "ナイル川?", "lang": "ja", "answers": ["north"]}]  # fmt: skip
    (tmp_path / "xor.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    squad(tmp_path / "gold.json", ("Nile", ENGLISH, [("5", "?", ["Egypt"])]))
    both = questions.write([tmp_path / "xor.jsonl"], "", "en", "dev", tmp_path / "gold.json", tmp_path / "all")
    assert both == {"en.ko-dev": 1, "en.ja-dev": 1}
    row = json.loads((tmp_path / "all" / "answers" / "en.ko-dev.jsonl").read_text())
    assert row == {"qid": "5", "answers": ["Egypt"], "title": "Nile", "window": "ough Egypt to s"}
    assert questions.write([tmp_path / "xor.jsonl"], "ko", "en", "dev", None, tmp_path) == {"en.ko-dev": 1}
    with pytest.raises(UserError, match="no question in 'fi'"):
        questions.write([tmp_path / "xor.jsonl"], "fi", "en", "dev", None, tmp_path)


# -------------------------------------------------------------------------------------------------------------- answers


def asked(*of, window=""):
    return answers.Answers([answers.normalised(answer) for answer in of], answers.normalised(window))


def test_measures_of_a_case_by_hand():
    found = answers.score(
        {
            "a": asked("São Paulo", window="in São Paulo it"), "b": asked("nile", "the sea"), "c": asked("green tea"),
            "d": asked("nothing"),
        },
        {
            "a": ["x", "It is in SA\u0303O  PAULO."], "b": ["y"] * 6 + ["to the\nsea"], "c": ["green", "tea", "greentea"],
        },
    )  # fmt: skip
    assert found["Acc@1"] == 0 and found["Acc@5"] == 0.25 and found["Acc@10"] == found["Acc@100"] == 0.5
    assert found["MRR@10"] == pytest.approx((1 / 2 + 1 / 7) / 4) == found["MRR@100"]
    assert found["gold@1"] == found["gold@100"] == 0, "the answer is there, what stands around it is not"


def test_words_are_counted_through_the_passages():
    filler = "word " * 1000
    texts = [filler, filler + "here it is", "here it is", filler * 3 + "late"]
    of = lambda answer: answers.score({"a": asked(answer)}, {"a": texts})
    assert (of("here")["R@2kt"], of("here")["R@5kt"], of("late")["R@5kt"], of("late")["Acc@5"]) == (0, 1, 0, 1)
    assert of("word")["R@2kt"] == 1


@pytest.mark.parametrize("line, says", [('{"qid": "1"}', "line 1: no qid and list"), ('{"qid": "1", "answers": []}', "no question with an answer")])  # fmt: skip
def test_answers_that_cannot_be_read_are_told(tmp_path, line, says):
    (tmp_path / "a.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=says):
        answers.read(tmp_path / "a.jsonl")


def test_from_articles_to_figures_across_languages(finished, home, command, tmp_path):
    """XOR-TyDi's way: English articles in passages, questions of another language, an encoder as it is."""
    own, data, work = finished.library.collections[0], tmp_path / "data", tmp_path / "work"
    passages = [own.passage(row) for row in range(len(own))]
    wiki(tmp_path / "in" / "wiki_00", *((f"{i}", p.title, p.text) for i, p in enumerate(passages)))
    assert command("jdmdr.cut_passages", tmp_path / "in", "--lang=en", f"--out={data}", f"--tokenizer={home}", "--tokens=200").returncode == 0  # fmt: skip
    shown = [(str(i), p, p.text.split(". ")[0]) for i, p in enumerate(passages[:12])]
    rows = [
        {"id": qid, "question": f"{p.title} {answer}", "lang": "sw", "answers": [answer[-12:]]}
        for qid, p, answer in shown
    ]
    (tmp_path / "xor.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    squad(tmp_path / "gold.json", *((p.title, p.text, [(qid, "?", [answer[-12:]])]) for qid, p, answer in shown))
    made = command(
        "jdmdr.questions", tmp_path / "xor.jsonl", "--corpus=en", f"--gold={tmp_path / 'gold.json'}", f"--out={data}"
    )
    assert made.returncode == 0 and "12 questions" in made.stdout, made.stderr
    config = runpy.run_path(REPO / "configs" / "kdr_answers.py")["get_config"]()
    config.data.root, config.data.splits = str(data), "sw-dev=sw-dev:none:own"
    config.encoder.name = str(finished.directory / "export")
    pipeline.run(config, work, "evaluate")
    runs = sorted((work / "evaluate").glob("sw-dev.*.trec"))
    assert [run.name for run in runs] == [f"sw-dev.{name}.en.trec" for name in ("bm25", "encoder", "hybrid")]
    result = command("jdmdr.answers", *runs, f"--corpus={work / 'corpus' / 'en'}", f"--answers={data / 'answers' / 'en.sw-dev.jsonl'}", f"--out={tmp_path / 'found.json'}")  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["counts"] | {"reachable": 0} == {"questions": 12, "reachable": 0, "with_gold": 12, "without_answer": 0}
    collection = Collection(work / "corpus" / "en")
    whole = [answers.normalised(collection.passage(row).text) for row in range(len(collection))]
    windows = [json.loads(line)["window"] for line in (data / "answers" / "en.sw-dev.jsonl").read_text().splitlines()]
    there = sum(any(answers.normalised(window) in text for text in whole) for window in windows)
    assert found["counts"]["reachable"] == there >= 6
    findable = np.mean([any(answers.normalised(row["answers"][0]) in text for text in whole) for row in rows])
    assert 0.5 < found["runs"][str(runs[0])]["Acc@1"] <= found["runs"][str(runs[0])]["Acc@100"]
    assert found["runs"][str(runs[0])]["Acc@100"] == pytest.approx(findable, abs=1e-3), (
        "an answer that passages cut counts for none"
    )
    # against a count of its own over the files
    texts = answers.texts_of(runs[1], collection)
    hits = [
        any(row["answers"][0].casefold() in " ".join(text.split()).casefold() for text in texts[row["id"]][:5])
        for row in rows
    ]
    assert found["runs"][str(runs[1])]["Acc@5"] == pytest.approx(np.mean(hits), abs=1e-3)
