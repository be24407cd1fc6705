"""DPR's files become a data root: every sample's positives, every answer as a string and never as code, and its own way to count."""

import gzip
import json
import tracemalloc

import numpy as np
import pytest

from jdmdr import answers, convert_run, corpus, datasets, dpr, metrics, questions, reading
from jdmdr.types import UserError

PSGS = (
    "id\ttext\ttitle\n"
    '1\t"Aaron ( or ; ""Ahärôn"") is a prophet."\tAaron\n'
    "2\tThe Nile flows north, \"they\" say.\t\"The \"\"Nile\"\"\"\n"
    '3\t" quoted\tas it stands\n'
)  # fmt: skip


def context(key, docid):
    return {"title": "T", "text": "x", "score": 1000, "title_score": 1, key: docid}


SAMPLES = [
    {"dataset": "nq", "question": "who was aaron??", "answers": ["Aaron", "a \"prophet\""], "positive_ctxs":
     [context("passage_id", "1"), context("passage_id", "2"), context("passage_id", "1")], "negative_ctxs": [],
     "hard_negative_ctxs": [context("passage_id", "3")]},
    {"question": "no positive", "answers": ["x"], "positive_ctxs": [], "negative_ctxs": [], "hard_negative_ctxs": [context("passage_id", "3")]},
    {"question": "no hard negative", "answers": ["x"], "positive_ctxs": [context("passage_id", "1")], "negative_ctxs": [], "hard_negative_ctxs": []},
    {"question": "where does\tthe nile flow?", "answers": ["north"], "positive_ctxs": [context("psg_id", 2)], "negative_ctxs": [],
     "hard_negative_ctxs": [context("psg_id", "3")]},
]  # fmt: skip


@pytest.fixture
def root(tmp_path):
    (tmp_path / "psgs_w100.tsv").write_text(PSGS, encoding="utf-8")
    (tmp_path / "train.json").write_text(json.dumps(SAMPLES, indent=4), encoding="utf-8")
    csv = (
        "what is the nile\t['a river', \"the 'long' one\"]\n"
        + 'who "was" aaron\t"[""a \\""prophet\\"""", \'x\\u00e9\']"\n'
    )
    with gzip.open(tmp_path / "nq-test.qa.csv.gz", "wt", encoding="utf-8") as file:
        file.write(csv)
    return tmp_path


def test_passages_are_read_as_they_are_published(root):
    found = datasets.discover(root)
    assert [*found] == ["en"]
    corpus.ingest("en", found["en"], root / "out")
    collection = corpus.Collection(root / "out")
    assert [collection.passage(row)[:3] for row in range(3)] == [
        ("1", "Aaron", 'Aaron ( or ; "Ahärôn") is a prophet.'), ("2", 'The "Nile"', 'The Nile flows north, "they" say.'),
        ("3", "as it stands", '" quoted'),
    ]  # fmt: skip
    (root / "psgs_w100.tsv").write_text("id\ttext\ttitle\n1\ttext\n")
    with pytest.raises(UserError, match="line 2: 2 TAB-separated fields where id TAB text TAB title is expected"):
        list(reading.passages(root / "psgs_w100.tsv"))


def test_samples_become_queries_with_all_their_positives_and_the_root_is_ingested(root, capsys):
    made = questions.write([root / "train.json", root / "train.json"], "", "", "train", None, root)
    assert made == {"en.train": 4} and "2 of 4 samples have no positive or no hard negative" in capsys.readouterr().err
    topics = (root / "topics" / "en.train.tsv").read_text()
    assert topics.startswith("train-1\twho was aaron?\ntrain-4\twhere does the nile flow\ntrain-5\twho was aaron?\n")
    rows = [json.loads(line) for line in (root / "answers" / "en.train.jsonl").read_text().splitlines()]
    assert rows[0] == {"qid": "train-1", "answers": ["Aaron", 'a "prophet"'], "title": "", "window": ""}
    report = corpus.ingest("en", datasets.discover(root)["en"], root / "out")
    assert report.queries == {"train": 4} and not report.unknown_docids["train"]
    judged = corpus.read_qrels(root / "out", "train")
    assert judged == {
        "train-1": {"1": 1, "2": 1},
        "train-4": {"2": 1},
        "train-5": {"1": 1, "2": 1},
        "train-8": {"2": 1},
    }


def test_questions_of_a_test_set_keep_their_answers(root):
    assert questions.write([root / "nq-test.qa.csv.gz"], "", "", "test", None, root) == {"en.test": 2}
    assert (root / "topics" / "en.test.tsv").read_text() == 'test-1\twhat is the nile\ntest-2\twho "was" aaron\n'
    found, without = answers.read(root / "answers" / "en.test.jsonl")
    assert [of.answers for of in found.values()] == [
        ["a river", "the 'long' one"],
        ['a "prophet"', "xé"],
    ] and not without


@pytest.mark.parametrize("text", [
    "__import__('os').system('touch ran')", "[open('ran', 'w')]", "['a' + 'b']", "[1]", "{'a'}", "'a'", "[", "('a',)", "[" * 9999, "['a'] * 3",
])  # fmt: skip
def test_answers_that_are_no_list_of_strings_are_refused_by_line_and_never_run(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q.csv").write_text(f"fine\t['a']\nwho\t{text}\n")
    with pytest.raises(UserError, match="q.csv, (line|entry) 2: "):
        list(dpr.questions(tmp_path / "q.csv"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("text, says", [
    ("{}", "is no JSON list"), ("[1]", "entry 1: 1 where a JSON object"), ('[{"a": 1}, {"b": ', "entry 2: not valid JSON, or cut off"),
    ('[{"a": 1} {"b" 2}, ' + '{"c": 3}, ' * 50, "entry 2: not valid JSON"), ('[{"question": "q"}]', "entry 1: no question, answers"),
    ('[{"question": "q", "answers": [], "positive_ctxs": [{}], "hard_negative_ctxs": [{}]}]', "entry 1: a positive without passage_id or psg_id"),
    ('[{"question": "q", "answers": [2], "positive_ctxs": [{}], "hard_negative_ctxs": [{}]}]', "entry 1: '.2.' where a list of answers"),
])  # fmt: skip
def test_what_is_no_file_of_samples_is_told(tmp_path, text, says):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=says):
        [list(read(tmp_path / "x.json")) for read in (reading.json_list, dpr.samples)]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("buffer", [2, 7, 64, 1 << 20])
def test_a_list_is_streamed_whatever_the_pieces_it_is_read_in(tmp_path, monkeypatch, indent, buffer):
    rng = np.random.default_rng(buffer)
    rows = [
        {"k": '\\"é]}\u2028' * int(rng.integers(0, 9)), "n": [-1.5e-7, True, None, {"x": []}] * int(rng.integers(0, 3))}
        for _ in range(40)
    ]
    (tmp_path / "x.json").write_text(json.dumps(rows, indent=indent, ensure_ascii=bool(buffer % 2)), encoding="utf-8")
    monkeypatch.setattr(reading, "_BUFFER", buffer)
    assert list(reading.json_list(tmp_path / "x.json")) == list(enumerate(rows, 1))


def test_a_large_list_takes_little_memory(tmp_path):
    with open(tmp_path / "x.json", "w") as file:
        file.write("[" + ", ".join([json.dumps({"text": "word " * 2000})] * 3000) + "]")
    tracemalloc.start()
    assert sum(1 for _ in reading.json_list(tmp_path / "x.json")) == 3000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 << 20 < (tmp_path / "x.json").stat().st_size


def test_retrieval_accuracy_counts_tokens_as_dpr_does(root):
    """Top-k of hand-made rankings; a string inside a word is no token, and characters are one after another."""
    of = {"a": answers.Answers(["Nile"], ""), "b": answers.Answers(["U.S."], ""), "c": answers.Answers(["no\u0308rth"], ""), "d": answers.Answers(["x y"], "")}  # fmt: skip
    ranked = {
        "a": ["Niles", "juvenile", "The NILE."], "b": ["US of A"] * 19 + ["the U. S. army"], "c": ["fl\u00f6ws n\u00f6rth"],
        "d": ["x  y" if rank == 50 else "x, y" for rank in range(100)],
    }  # fmt: skip
    found = answers.score(of, ranked, answers.tokens)
    assert [found[f"Acc@{k}"] for k in (1, 5, 20, 50, 100)] == [0.25, 0.5, 0.75, 0.75, 1.0]
    assert answers.score(of, ranked)["Acc@1"] == 0.5, "as text, Nile is in Niles"
    assert (
        answers.tokens("  \u200b") == ""
        and answers.score({"a": answers.Answers(["", "\u200b"], "")}, {"a": ["x"]}, answers.tokens)["Acc@1"] == 0
    )
    words = {"a": answers.Answers(["end"], "")}
    assert answers.score(words, {"a": ["word " * 1999 + "end more"]}, answers.tokens)["R@2kt"] == 1
    assert answers.score(words, {"a": ["word " * 2000 + "end more"]}, answers.tokens)["R@2kt"] == 0


def test_results_of_dprs_retriever_are_a_run_of_the_topics(root, tmp_path):
    questions.write([root / "nq-test.qa.csv.gz"], "", "", "test", None, root)
    hits = [{"id": "wiki:2", "title": "", "text": "", "score": "81.25", "has_answer": True}, {"id": "1", "score": 80.5}]
    rows = [
        {"question": "what is the nile?", "answers": [], "ctxs": hits},
        {"question": "another", "answers": [], "ctxs": hits},
    ]
    (tmp_path / "r.json").write_text(json.dumps(rows))
    topics = root / "topics" / "en.test.tsv"
    assert convert_run.convert(tmp_path / "r.json", tmp_path / "r.trec", 0, "dpr", topics) == ("TREC's form", 1, 2)
    assert metrics.read_run(tmp_path / "r.trec") == {"test-1": {"2": 81.25, "1": 80.5}}
    with pytest.raises(UserError, match="name the queries with --topics"):
        convert_run.convert(tmp_path / "r.json", tmp_path / "s.trec", 0, "dpr")
    (tmp_path / "r.json").write_text(json.dumps([{"question": "another", "ctxs": []}]))
    with pytest.raises(UserError, match="none of its 1 questions is among the topics"):
        convert_run.convert(tmp_path / "r.json", tmp_path / "s.trec", 0, "dpr", topics)
    (tmp_path / "r.json").write_text(json.dumps([{"question": "what is the nile", "ctxs": [{"id": 1}]}]))
    with pytest.raises(UserError, match="entry 1: a passage without an id and a score"):
        convert_run.convert(tmp_path / "r.json", tmp_path / "s.trec", 0, "dpr", topics)


def test_a_data_root_of_dprs_files_passes_the_audit_and_the_commands_say_what_they_did(root, tmp_path, command):
    made = command("jdmdr.questions", root / "train.json", "--split=train", f"--out={root}")
    assert made.returncode == 0 and "2 questions" in made.stdout, made.stderr
    checked = command("jdmdr.corpus", "check", root)
    assert checked.returncode == 0, checked.stdout
