"""Ingestion keeps every text, names the line of every mistake, and gives equal bytes for equal input."""

import gzip
import json
import os
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from jdmdr import corpus, reading
from jdmdr.corpus import Collection
from jdmdr.datasets import LanguageFiles, discover
from jdmdr.tokenizer import Tokenizer
from jdmdr.types import Passage, Query, UserError

REPO = Path(__file__).parents[1]
TINYPEDIA = REPO / "third_party" / "tinypedia"
SHARED = REPO.parent / "shared" / "data"

AB = [{"docid": "a#0", "title": "A", "text": "first"}, {"docid": "b#0", "title": "B", "text": "second"}]
AB_LINES = b"".join(json.dumps(row).encode() + b"\n" for row in AB)
ROW = {"query_id": "q1", "query": "who?", "positive_passages": [{"docid": "a#0"}], "negative_passages": []}


def as_bytes(content):
    if isinstance(content, bytes):
        return content
    if isinstance(content, str):
        return content.encode()
    return b"".join(json.dumps(row).encode() + b"\n" for row in content)


def make(root, passages=AB, topics=None, qrels=None, train=None):
    """Files of one language; a content is bytes, a string, or a list of JSON rows; topics and qrels are by split."""
    root.mkdir(parents=True, exist_ok=True)

    def write(name, content):
        (root / name).write_bytes(as_bytes(content))
        return root / name

    return LanguageFiles(
        [write("corpus.jsonl", passages)],
        {split: write(f"topics.{split}.tsv", text) for split, text in (topics or {}).items()},
        {split: write(f"qrels.{split}.tsv", text) for split, text in (qrels or {}).items()},
        None if train is None else write("train.jsonl", train),
    )


@pytest.fixture
def ingest(tmp_path):
    def run(passages=AB, **files):
        return corpus.ingest("xx", make(tmp_path / "in", passages, **files), tmp_path / "out"), tmp_path / "out"

    return run


def all_passages(directory):
    collection = corpus.Collection(directory)
    return [collection.passage(row) for row in range(len(collection))]


# ---------------------------------------------------------------------------------------------------------- bad input

RAW_TAB = b'{"docid": "c", "text": "a\tb"}'
DEEP = b'{"docid": "c", "text": "t", "x": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"


@pytest.mark.parametrize("line, says", [
    (b"{", "not valid JSON"),
    (b'{"docid": "c", "text": "cut', "not valid JSON"),
    (RAW_TAB, "not valid JSON.*control character"),
    (DEEP, "JSON"),
    (b'{"docid": "c", "text": "\xff"}', "byte 0xff .* not UTF-8"),
    (b'{"docid": "c", "text": "\xed\xa0\x80"}', "not UTF-8"),
    (b'["c", "text"]', r'\["c", "text"\] where a JSON object is expected'),
    (b"17", "17 where a JSON object"),
    (b'{"text": "t"}', "'docid' is missing .*text.*add it"),
    (b'{"docid": "c"}', "'text' is missing"),
    (b'{"docid": 7, "text": "t"}', "'docid' is 7, and ids are strings"),
    (b'{"docid": null, "text": "t"}', "'docid' is null, and ids are strings"),
    (b'{"docid": "c", "text": null}', "'text' is null where a string"),
    (b'{"docid": "c", "text": ["t"]}', r"'text' is \[\"t\"\] where a string"),
    (b'{"docid": "c", "title": 5, "text": "t"}', "'title' is 5 where a string"),
    (b'{"docid": "", "text": "t"}', "'docid' is empty"),
    *((json.dumps({"docid": bad, "text": "t"}).encode(), "white space")
      for bad in ("c d", "c\t", "\nc", "c\rd", " ", "c\u2028d", "c\xa0d", "c\0d")),
    (b'{"docid": "a#0", "text": "t"}', "'a#0' was used before, in .*corpus.jsonl, line 1;"),
])  # fmt: skip
def test_a_bad_passage_is_refused_with_its_file_and_line(ingest, line, says):
    with pytest.raises(UserError, match=rf"(?i)corpus\.jsonl, line 4: .*{says}") as error:
        ingest(AB_LINES + b"\n" + line)  # the blank line counts
    assert len(str(error.value).splitlines()) == 1


def test_a_docid_repeated_in_another_shard_is_refused_with_both_places(tmp_path):
    first, second = make(tmp_path / "1").corpus[0], make(tmp_path / "2", [{"docid": "c", "text": ""}, *AB]).corpus[0]
    with pytest.raises(UserError, match=rf"{second}, line 2: the docid 'a#0' .* {first}, line 1;"):
        corpus.ingest("xx", LanguageFiles([first, second], {}, {}, None), tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"\n \n\r\n", gzip.compress(b""), b"\xef\xbb\xbf"])
def test_a_corpus_without_passages_is_refused(ingest, content):
    with pytest.raises(UserError, match="the corpus of xx holds no passages"):
        ingest(content)


@pytest.mark.parametrize("damage", [
    lambda z: z[: len(z) // 2],
    lambda z: z[:-3],
    lambda z: z[:2],
    lambda z: z[:-8] + b"\0" * 8,
    lambda z: z[:40] + bytes([z[40] ^ 255]) + z[41:],
    lambda z: z + b"garbage",
])  # fmt: skip
def test_a_damaged_gzip_file_is_refused(ingest, damage):
    rows = [{"docid": str(i), "text": os.urandom(40).hex()} for i in range(500)]
    with pytest.raises(UserError, match=r"corpus\.jsonl: the gzip data is cut off or damaged after line \d+"):
        ingest(damage(gzip.compress(as_bytes(rows))))


def test_what_cannot_be_opened_as_a_file_is_refused_by_name(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "directory").mkdir()
    for name, says in [("loop", "symbolic links"), ("directory", "Is a directory"), ("gone", "No such file")]:
        with pytest.raises(UserError, match=f"{tmp_path / name}: cannot be read .*{says}"):
            corpus.ingest("xx", LanguageFiles([tmp_path / name], {}, {}, None), tmp_path / "out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_refused_by_name(tmp_path):
    files = make(tmp_path)
    files.corpus[0].chmod(0)
    with pytest.raises(UserError, match=r"corpus\.jsonl: cannot be read .*Permission denied"):
        corpus.ingest("xx", files, tmp_path / "out")


@pytest.mark.parametrize("line, says", [
    ("q2 who?", "1 TAB-separated fields where 2 are expected"),
    ("q2\twho?\tme", "3 TAB-separated fields"),
    ("\twho?", "'qid' is empty"),
    ("q 2\twho?", "white space"),
    ("q1\tagain", 'qid "q1" was used before, in line 1'),
])  # fmt: skip
def test_a_bad_topic_is_refused_with_its_line(ingest, line, says):
    with pytest.raises(UserError, match=rf"topics\.dev\.tsv, line 2: .*{says}"):
        ingest(topics={"dev": f"q1\twho?\n{line}\n"})


@pytest.mark.parametrize("line, says", [
    ("q1 Q0 a#0", "3 fields where 4 are expected"),
    ("q1 Q0 a#0 1 bm25", "5 fields"),
    ("q1\tQ0\ta 0\t1", "5 fields"),
    ("q1 Q0 a#0 yes", "relevance .yes. is not a whole number"),
    ("q1 Q0 a#0 1.0", "not a whole number"),
    ("q1 Q0 a#0 \u0661", "not a whole number"),
    ("q1 Q0 a\xa00 1", "'docid' is .*white space"),
])  # fmt: skip
def test_a_bad_judgment_is_refused_with_its_line(ingest, line, says):
    with pytest.raises(UserError, match=rf"qrels\.dev\.tsv, line 2: .*{says}"):
        ingest(topics={"dev": "q1\twho?\n"}, qrels={"dev": f"q1 Q0 b#0 1\n{line}\n"})


@pytest.mark.parametrize("line, says", [
    ("q1 a#0 1", "1 fields where 3 are expected: query-id corpus-id score"),
    ("q1\tQ0\ta#0\t1", "4 fields"),
    ("q1\ta#0\t1.0", "not a whole number"),
    ("q1\ta 0\t1", "'docid' is .*white space"),
])  # fmt: skip
def test_a_bad_judgment_under_the_header_of_beir_is_refused_with_its_line(ingest, line, says):
    with pytest.raises(UserError, match=rf"qrels\.dev\.tsv, line 2: .*{says}"):
        ingest(topics={"dev": "q1\twho?\n"}, qrels={"dev": f"query-id\tcorpus-id\tscore\n{line}\n"})


def test_three_columns_without_their_header_are_refused_with_the_header_to_add(ingest):
    with pytest.raises(UserError, match=r"line 1: 3 fields .* need the header line query-id TAB corpus-id TAB score"):
        ingest(topics={"dev": "q1\twho?\n"}, qrels={"dev": "q1\ta#0\t1\n"})


def test_the_titles_of_pyserini_contents_stand_before_the_first_empty_line(ingest):
    contents = ["A title\n\ntext\n\nmore", "no title\nsecond line", ""]
    _, out = ingest([{"id": str(i), "contents": text} for i, text in enumerate(contents)])
    assert all_passages(out) == [
        Passage("0", "A title", "text\n\nmore"),
        Passage("1", "", "no title\nsecond line"),
        Passage("2", "", ""),
    ]


@pytest.mark.parametrize("row, says", [
    ({"id": 7, "contents": "x"}, "'id' is 7, and ids are strings"),
    ({"_id": 7, "text": "x"}, "'_id' is 7, and ids are strings"),
    ({"_id": "7", "title": "x"}, "the field 'text' is missing"),
    ({"name": "7", "text": "x"}, "the field 'docid' is missing"),
])  # fmt: skip
def test_a_passage_in_the_form_of_another_collection_is_held_to_the_same_rules(ingest, row, says):
    with pytest.raises(UserError, match=rf"corpus\.jsonl, line 1: .*{says}"):
        ingest([row])


@pytest.mark.parametrize("row, says", [
    ({"_id": 1, "text": "x"}, "'_id' is 1, and ids are strings"),
    ({"_id": "q1", "text": "x"}, '_id "q1" was used before, in line 1'),
    ({"_id": "q2"}, "'text' is missing"),
])  # fmt: skip
def test_a_bad_query_of_a_file_for_all_splits_is_refused_with_its_line(tmp_path, row, says):
    files = make(tmp_path / "in", qrels={"dev": "q1 Q0 a#0 1\n"})
    path = tmp_path / "in" / "queries.jsonl"
    corpus.write_jsonl(path, [{"_id": "q1", "text": "who?"}, row])
    with pytest.raises(UserError, match=rf"queries\.jsonl, line 2: .*{says}"):
        corpus.ingest("xx", files._replace(queries=path), tmp_path / "out")


@pytest.mark.parametrize("split", ["dev", "train"])
def test_qrels_that_name_no_passage_of_the_corpus_are_refused(ingest, split):
    with pytest.raises(UserError, match=rf"qrels\.{split}\.tsv judges no passage of the corpus .*'z#9'.*'a#0'"):
        ingest(topics={split: "q1\twho?\n"}, qrels={split: "q1 Q0 z#9 1\nq1 Q0 z#8 0\n"})


@pytest.mark.parametrize("change, says", [
    ({"query_id": 3}, "'query_id' is 3, and ids are strings"),
    ({"query_id": "q 2"}, "white space"),
    ({"query_id": "q1"}, 'query_id "q1" was used before, in line 1'),
    ({"query": None}, "'query' is null"),
    ({"positive_passages": "a#0"}, "'positive_passages' is .a#0. where a list of passages"),
    ({"positive_passages": ["a#0"]}, r"'positive_passages' is \[.a#0.\] where a list of passages"),
    ({"positive_passages": None}, "'positive_passages' is null"),
    ({"negative_passages": "text"}, "'negative_passages' is .text."),
    ({"negative_passages": [{"text": "t"}]}, "'docid' is missing"),
    ({"negative_passages": [{"docid": 1}]}, "'docid' is 1, and ids are strings"),
])  # fmt: skip
def test_a_bad_training_row_is_refused_with_its_line(ingest, change, says):
    with pytest.raises(UserError, match=rf"train\.jsonl, line 2: .*{says}"):
        ingest(train=[ROW, {**ROW, "query_id": "q2", **change}])


def test_a_training_row_without_positives_field_is_refused_and_without_negatives_accepted(ingest):
    with pytest.raises(UserError, match=r"line 1: the field 'positive_passages' is missing"):
        ingest(train=[{"query_id": "q", "query": "w"}])
    assert ingest(train=[{k: v for k, v in ROW.items() if k != "negative_passages"}])[0].queries == {"train": 1}


# ------------------------------------------------------------------------------------------------------ odd but valid


@pytest.mark.parametrize("content", [
    gzip.compress(AB_LINES),
    gzip.compress(AB_LINES[:20]) + gzip.compress(AB_LINES[20:]),
    b"\xef\xbb\xbf" + AB_LINES,
    gzip.compress(b"\xef\xbb\xbf" + AB_LINES),
    AB_LINES.replace(b"\n", b"\r\n"),
    AB_LINES.removesuffix(b"\n"),
    b"\n\r\n  \t\n" + AB_LINES.replace(b"\n", b"\n\n"),
    AB_LINES.replace(b'{"docid"', b'{"id": 5, "x": [NaN, {}], "docid"'),
], ids=["gzip", "members", "bom", "gzip-bom", "crlf", "no-final-newline", "blank-lines", "extra-fields"])  # fmt: skip
def test_odd_files_read_like_plain_ones_whatever_their_name(ingest, content):
    report, out = ingest(content)
    assert all_passages(out) == [Passage(**row) for row in AB]
    assert report.passages == 2 and not report.warnings


def test_a_plain_file_named_gz_is_read(tmp_path):
    path = tmp_path / "plain.jsonl.gz"
    path.write_bytes(AB_LINES)
    assert list(reading.passages(path)) == [Passage(**row) for row in AB]


@pytest.mark.parametrize("text, kept", [
    ("one\u2028two\u2029three\x85four\x1cfive\x0bsix\x0cseven\r\neight\rnine\nten", None),
    ("nul \0 inside", None),
    ("\ud800 high, \udc00 low, \ud83d\ude00 pair", "\ufffd high, \ufffd low, \U0001f600 pair"),
    ("🎉👩‍👩‍👧🇫🇮", None),
    ("x" * 100_000, None),
    ("שלום עולם \u202eabc\u202c مرحبا", None),
    ("\ufeffmark inside", None),
])  # fmt: skip
@pytest.mark.parametrize("escaped", [True, False])
def test_odd_strings_survive_ingestion(ingest, text, kept, escaped):
    line = json.dumps({"docid": "é\u200c#1", "title": text, "text": text}, ensure_ascii=escaped)
    if not escaped and kept:
        pytest.skip("a lone surrogate cannot be written as UTF-8")
    report, out = ingest(line.encode() + b"\n" + AB_LINES)
    assert all_passages(out)[0] == Passage("é\u200c#1", kept or text, kept or text)
    assert report.passages == 3 and not report.warnings
    assert corpus.Collection(out).rows(["é\u200c#1", "b#0"]).tolist() == [0, 2]


def test_titles_may_be_empty_null_or_absent(ingest):
    _, out = ingest(b'{"docid": "1", "text": "t"}\n{"docid": "2", "title": null, "text": "t"}\n'
                    b'{"docid": "3", "title": "", "text": "t"}')  # fmt: skip
    assert [passage.title for passage in all_passages(out)] == ["", "", ""]
    assert corpus.passage_text(Passage("1", "", "t")) == "t" and corpus.passage_text(Passage("1", "T", "t")) == "T t"


def test_empty_texts_are_kept_counted_and_warned_of(ingest):
    report, out = ingest([{"docid": "1", "text": ""}, {"docid": "2", "text": " \n"}, {"docid": "3", "text": "t"}])
    assert report.empty_texts == 2 and report.passages == 3 == len(corpus.Collection(out))
    assert report.warnings == ["xx: 2 passages have an empty text; they are kept"]


def test_odd_topics_and_qrels_read_like_plain_ones(ingest):
    topics = "\ufeffq1\twho\u2028is\x85it \x1c?\r\n\r\nq2\t🎉"
    report, out = ingest(topics={"dev": topics}, qrels={"dev": gzip.compress(b"q1 Q0\ta#0   1 \r\n\n q2\t0\tb#0\t2")})
    assert corpus.read_queries(out, "dev") == [Query("q1", "who\u2028is\x85it \x1c?"), Query("q2", "🎉")]
    assert corpus.read_qrels(out, "dev") == {"q1": {"a#0": 1}, "q2": {"b#0": 2}}
    assert report.queries == {"dev": 2} and report.positives == {"dev": 2} and not report.warnings


def test_unknown_docids_stay_in_the_qrels_and_are_counted(ingest):
    report, out = ingest(topics={"dev": "q1\twho?"}, qrels={"dev": "q1 Q0 a#0 1\nq1 Q0 z#0 1\nq1 Q0 z#1 0\n"})
    assert corpus.read_qrels(out, "dev") == {"q1": {"a#0": 1, "z#0": 1, "z#1": 0}}
    assert report.unknown_docids == {"dev": 2} and report.positives == {"dev": 2}
    assert report.warnings == ["xx, dev: 2 judged passages are not in the corpus; they count as not retrieved"]


def test_judgments_without_a_topic_are_dropped_and_topics_without_judgments_kept(ingest):
    report, out = ingest(
        topics={"dev": "q1\twho?\nq2\twhere?\nq3\t"}, qrels={"dev": "q1 0 a#0 1\nq9 0 a#0 1\nq9 0 b#0 0"}
    )
    assert corpus.read_qrels(out, "dev") == {"q1": {"a#0": 1}}
    assert [query.qid for query in corpus.read_queries(out, "dev")] == ["q1", "q2", "q3"]
    assert report.dropped == {"dev": 2}
    assert report.warnings == [
        "xx, dev: 1 queries are empty; they are kept",
        "xx, dev: 1 judged queries have no topic and are left out",
        "xx, dev: 2 topics have no judgments and are not evaluated",
    ]


def test_a_pair_judged_twice_keeps_the_higher_relevance(ingest):
    qrels = "q1 0 a#0 1\nq1 0 a#0 1\nq1 0 b#0 2\nq1 0 b#0 0\n"
    report, out = ingest(topics={"dev": "q1\twho?"}, qrels={"dev": qrels})
    assert corpus.read_qrels(out, "dev") == {"q1": {"a#0": 1, "b#0": 2}}
    assert [w for w in report.warnings if "contradict" in w] == report.warnings and "dev: 1 " in report.warnings[0]


def test_a_language_may_lack_judgments_topics_and_training_queries(ingest):
    report, out = ingest(topics={"test-a": "q1\twho?"}, qrels={"dev": "q2 Q0 a#0 1", "empty": ""})
    assert corpus.topics(out) == ["test-a"]
    assert corpus.read_queries(out, "train") == [] and corpus.read_qrels(out, "train") == {}
    assert corpus.read_qrels(out, "dev") == {}
    assert corpus.read_queries(out, "test-a") == [Query("q1", "who?")]
    assert len(report.warnings) == 2


def test_topics_and_qrels_of_other_names_are_kept_for_each_other(ingest):
    topics = {"test": "q1\twho?\nq2\twhere?", "clean": "q2\twhere?"}
    report, out = ingest(topics=topics, qrels={"test": "q1 0 a#0 1\nq2 0 b#0 1", "mono": "q2 0 b#0 1\nq9 0 b#0 1"})
    assert corpus.topics(out) == ["clean", "test"]
    assert corpus.read_qrels(out, "mono") == {"q2": {"b#0": 1}}
    assert report.warnings == ["xx, mono: 1 judged queries have no topic and are left out"]


def test_judged_passages_of_another_language_do_not_dangle(tmp_path):
    other = make(tmp_path / "yy", [{"docid": "z#0", "text": "third"}])
    corpus.write_passages("yy", other, tmp_path / "out-yy")
    files = make(tmp_path / "in", topics={"dev": "q1\twho?"}, qrels={"dev": "q1 Q0 a#0 1\nq1 Q0 z#0 1\nq1 Q0 w 1"})
    report = corpus.write_passages("xx", files, tmp_path / "out")
    corpus.write_queries("xx", files, tmp_path / "out", report, [corpus.Collection(tmp_path / "out-yy")])
    assert report.unknown_docids == {"dev": 1}
    assert report.warnings == ["xx, dev: 1 judged passages are not in the corpus; they count as not retrieved"]
    foreign = make(tmp_path / "zz", topics={"dev": "q1\twho?"}, qrels={"dev": "q1 Q0 z#0 1"})
    report = corpus.write_passages("zz", foreign, tmp_path / "out-zz")
    with pytest.raises(UserError, match="judges no passage"):
        corpus.write_queries("zz", foreign, tmp_path / "out-zz", report)
    corpus.write_queries("zz", foreign, tmp_path / "out-zz", report, [corpus.Collection(tmp_path / "out-yy")])


def test_the_fields_of_a_passage_are_those_named(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"docid": "1", "title": "T", "text": "t", "context": "around t"}\n')
    for fields, separator, passage in [
        ("title,text", " ", ("T", "t")), ("text", " ", ("", "t")), ("text, context", " ", ("", "t around t")),
        ("context,title", " ", ("", "around t T")), ("title,text", "<sep>", ("T", "t", "<sep>")), ("title,text", "", ("T", "t", "")),
    ]:  # fmt: skip
        assert list(reading.passages(path, corpus.parse_fields(fields), separator)) == [Passage("1", *passage)]
    with pytest.raises(UserError, match="line 1: the field 'contxt' is missing .*context"):
        list(reading.passages(path, ("text", "contxt")))
    for fields in ("", "title", "text,,context", "text,text"):
        with pytest.raises(UserError, match="data.fields"):
            corpus.parse_fields(fields)


# ----------------------------------------------------------------------------------------------------------- training


def test_training_data_is_the_union_of_qrels_and_training_rows(ingest):
    rows = [
        {**ROW, "query_id": "q1", "query": "reworded?", "positive_passages": [{"docid": "b#0"}, {"docid": "z"}],
         "negative_passages": [{"docid": "a#0"}, {"docid": "c"}, {"docid": "y"}]},
        {**ROW, "query_id": "q2", "positive_passages": [{"docid": "z"}]},
        {**ROW, "query_id": "q4", "positive_passages": [{"docid": "c"}], "negative_passages": [{"docid": "c"}]},
    ]  # fmt: skip
    report, out = ingest(
        [*AB, {"docid": "c", "text": "third"}],
        topics={"train": "q1\twho?\nq2\twho?\nq3\tunjudged?\nq5\tgraded?"},
        qrels={"train": "q1 Q0 a#0 1\nq1 Q0 b#0 2\nq5 Q0 c 3\nq6 Q0 c 1"},
        train=rows,
    )
    assert corpus.read_queries(out, "train") == [Query("q1", "reworded?"), Query("q5", "graded?"), Query("q4", "who?")]
    assert corpus.read_qrels(out, "train") == {"q1": {"a#0": 1, "b#0": 2, "c": 0}, "q5": {"c": 3}, "q4": {"c": 1}}
    assert report.queries == {"train": 3} and report.positives == {"train": 4}
    assert report.unknown_docids == {"train": 3} and report.dropped == {"train": 6}
    assert [warning.removeprefix("xx, train: ").split(" and are")[0] for warning in report.warnings] == [
        "1 queries are worded differently in the topics and in the training rows, which are followed",
        "2 judgments contradict an earlier one of the same pair; the higher relevance is kept",
        "1 judged queries have no topic",
        "3 judged passages are not in the corpus",
        "2 training queries have no positive passage in the corpus",
    ]
    assert corpus.topics(out) == ["train"]


def test_training_data_comes_from_topics_and_qrels_alone_or_from_rows_alone(ingest):
    _, out = ingest(topics={"train": "q1\twho?"}, qrels={"train": "q1 Q0 a#0 1\nq1 Q0 b#0 0"})
    alone = corpus.read_queries(out, "train"), corpus.read_qrels(out, "train")
    _, out = ingest(train=[{**ROW, "negative_passages": [AB[1]]}])
    assert (corpus.read_queries(out, "train"), corpus.read_qrels(out, "train")) == alone
    assert alone == ([Query("q1", "who?")], {"q1": {"a#0": 1, "b#0": 0}})


# --------------------------------------------------------------------------------------------------------- collection


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs", "Z", "Cc"]), min_size=1),
    st.tuples(st.text(), st.text(st.characters(exclude_categories=[]))),
    min_size=1,
))  # fmt: skip
def test_any_unicode_round_trips(tmp_path_factory, rows):
    root = tmp_path_factory.mktemp("any")
    files = make(root / "in", [{"docid": docid, "title": title, "text": text} for docid, (title, text) in rows.items()])
    corpus.ingest("xx", files, root / "out")
    # json joins a high and a low surrogate that stand side by side; what is left alone becomes U+FFFD
    expected = [
        Passage(docid, title, text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        for docid, (title, text) in rows.items()
    ]
    assert all_passages(root / "out") == expected
    collection = corpus.Collection(root / "out")
    assert collection.rows(rows).tolist() == list(range(len(rows)))
    assert collection.docids(np.arange(len(rows))) == list(rows)


def test_docids_and_rows_are_inverse_and_unknown_docids_give_minus_one(tmp_path):
    docids = [f"{i * 7919 % 1000}#{i}" for i in range(1000)]
    corpus.ingest("xx", make(tmp_path, [{"docid": docid, "text": ""} for docid in docids]), tmp_path / "out")
    collection = corpus.Collection(tmp_path / "out")
    order = np.random.default_rng(0).permutation(1000)
    assert collection.docids(order) == [docids[i] for i in order]
    rows = collection.rows(["nothing", *collection.docids(order), "", "\ud800"])
    assert rows.dtype == np.int64 and rows.tolist() == [-1, *order, -1, -1]
    assert collection.rows([]).shape == (0,) and collection.docids([]) == []
    assert collection.docid(5) == docids[5] and len(collection) == 1000


def test_docids_that_share_a_hash_are_told_apart(ingest):
    _, out = ingest([{"docid": docid, "text": ""} for docid in "abc"])
    hash_of_c = np.load(out / "docid_hash.npy")[np.load(out / "docid_rows.npy") == 2]
    np.save(out / "docid_hash.npy", hash_of_c.repeat(3))
    np.save(out / "docid_rows.npy", np.array([0, 1, 2]))
    assert corpus.Collection(out).rows(["c"]).tolist() == [2]
    np.save(out / "docid_rows.npy", np.array([0, 1, 1]))
    assert corpus.Collection(out).rows(["c", "c"]).tolist() == [-1, -1]


@pytest.mark.parametrize("row", [-1, 2])
def test_a_row_outside_the_collection_is_an_index_error(ingest, row):
    collection = corpus.Collection(ingest()[1])
    for read in (collection.passage, collection.docid, lambda row: collection.docids([0, row])):
        with pytest.raises(IndexError):
            read(row)


def test_a_used_collection_can_be_pickled(ingest):
    collection = corpus.Collection(ingest()[1])
    collection.passage(1), collection.rows(["a#0"])
    again = pickle.loads(pickle.dumps(collection))
    assert again.passage(1) == Passage(**AB[1]) and again.rows(["b#0"]).tolist() == [1]


@pytest.mark.parametrize("docid, name", [("a#1", "a"), ("a#b#1", "a#b"), ("a", "a"), ("#1", "#1"), ("a#", "a")])
def test_the_article_is_what_stands_before_the_last_hash_sign(docid, name):
    assert corpus.article(docid) == name


def test_write_jsonl_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "rows.jsonl"
    corpus.write_jsonl(path, [{"text": "à\u2028"}, {"text": "\ud800"}])
    assert path.read_bytes().decode() == '{"text": "à\u2028"}\n{"text": "\ufffd"}\n'

    def rows():
        yield {"text": "new"}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        corpus.write_jsonl(path, rows())
    assert len(list(reading.lines(path))) == 2


# --------------------------------------------------------------------------------------------------------- real data


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_equal_input_gives_equal_bytes_gzipped_or_in_shards(tmp_path):
    files = discover(TINYPEDIA, "th")["th"]
    corpus.ingest("th", files, tmp_path / "1")
    lines = files.corpus[0].read_bytes().splitlines(keepends=True)
    shards = [tmp_path / "docs-0.jsonl.gz", tmp_path / "docs-1.jsonl"]
    shards[0].write_bytes(gzip.compress(b"".join(lines[:100])))
    shards[1].write_bytes(b"".join(lines[100:]))
    corpus.ingest("th", files._replace(corpus=shards), tmp_path / "2")
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


@pytest.mark.parametrize("lang, files", discover(TINYPEDIA).items())
def test_tinypedia_is_read_whole(tmp_path, lang, files):
    report = corpus.ingest(lang, files, tmp_path)
    counts = {"dev": 384, "test": 192, "train": 384}
    assert (report.passages, report.queries, report.positives) == (240, counts, counts)
    assert not report.warnings and corpus.topics(tmp_path) == ["dev", "test", "train"]
    assert all_passages(tmp_path) == [
        Passage(**json.loads(line)) for line in files.corpus[0].read_bytes().split(b"\n") if line
    ]
    collection = corpus.Collection(tmp_path)
    assert all((collection.rows(docids) >= 0).all() for docids in corpus.read_qrels(tmp_path, "train").values())


@pytest.mark.skipif(not (SHARED / "miracl-dev").is_dir(), reason="needs the MIRACL topics and qrels")
def test_miracl_topics_and_qrels_are_read_whole(tmp_path):
    for kind in ("topics", "qrels"):
        (tmp_path / kind).symlink_to(SHARED / "miracl-dev" / kind)
    qrels = reading.qrels(tmp_path / "qrels" / "qrels.miracl-v1.0-sw-dev.tsv")[0]
    docids = {docid for of_query in qrels.values() for docid in of_query}
    shard = tmp_path / "miracl-corpus-v1.0-sw" / "docs-0.jsonl.gz"
    corpus.write_jsonl(shard, ({"docid": docid, "title": "", "text": "x"} for docid in sorted(docids)))
    (files,) = discover(tmp_path).values()
    report = corpus.ingest("sw", files, tmp_path / "out")
    assert (report.queries["dev"], report.positives["dev"], report.unknown_docids["dev"]) == (482, 910, 0)
    assert sum(map(len, corpus.read_qrels(tmp_path / "out", "dev").values())) == 5092
    assert report.queries["train"] + report.dropped["train"] - report.unknown_docids["train"] == 1901


@pytest.mark.parametrize("name, lang, passages, dev", [("nano-miracl", "te", 280, 60), ("mini-miracl", "bn", 105, 63)])
def test_gzipped_collections_are_read_whole(tmp_path, name, lang, passages, dev):
    if not (SHARED / name).is_dir():
        pytest.skip(f"needs {name}")
    report = corpus.ingest(lang, discover(SHARED / name, lang)[lang], tmp_path)
    assert (report.passages, report.queries["dev"], report.warnings) == (passages, dev, [])


def test_memory_grows_with_the_ids_and_not_with_the_texts(tmp_path):
    count, text = 20_000, "many words " * 300
    path = tmp_path / "corpus.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as handle:
        handle.writelines(b'{"docid": "%d", "text": "%s"}\n' % (i, text.encode()) for i in range(count))
    tracemalloc.start()
    corpus.ingest("xx", LanguageFiles([path], {}, {}, None), tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "out" / "passages.jsonl").stat().st_size > 66e6
    assert peak < 8e6 + 64 * count


def test_a_separator_is_the_tokenizers_own_token_and_the_title_stays_apart(tmp_path):
    """DPR's input, [CLS] title [SEP] text [SEP]; the text alone where there is no title."""
    path = tmp_path / "c.jsonl"
    path.write_text(
        '{"docid": "1", "title": "nile river", "text": "flows north"}\n{"docid": "2", "title": "", "text": "north"}\n'
    )
    report = corpus.write_passages("en", LanguageFiles([path], {}, {}, None), tmp_path / "en", separator="[SEP]")
    collection = Collection(tmp_path / "en")
    assert report.passages == 2 and collection.passage(0) == Passage("1", "nile river", "flows north", "[SEP]")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "nile", "river", "flows", "north"]
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    backend.add_special_tokens(words[:4])
    backend.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    backend.save(str(tmp_path / "tokenizer.json"))
    encoded = Tokenizer(tmp_path, 6).encode([corpus.passage_text(collection.passage(row)) for row in (0, 1)])
    assert [ids.tolist() for ids in encoded] == [[2, 4, 5, 3, 6, 3], [2, 7, 3]]
