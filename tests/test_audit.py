"""`python -m jdmdr.corpus check` counts what is there, tells what is wrong with it, and refuses what ingestion refuses."""

import collections
import gzip
import json

import numpy as np
import pytest

from jdmdr import corpus, reading
from jdmdr.datasets import discover, find
from jdmdr.datasets.audit import _repeated, audit, quantiles
from jdmdr.datasets.audit_report import KINDS, as_dict, lines
from jdmdr.datasets.scripts import in_script, main_script, scripts
from jdmdr.types import UserError
from tests.conftest import TINYPEDIA


def edit(path, change):
    """Rewrites a file by a function of its lines."""
    path.write_text("".join(change(path.read_text("utf-8").splitlines(keepends=True))), "utf-8")


def add(line):
    return lambda lines: [*lines, line + "\n"]


def passage(docid, text="more", **fields):
    return json.dumps({"docid": docid, "title": "T", "text": text, **fields}, ensure_ascii=False)


def found_in(root, langs=""):
    found = audit(find(root, langs))
    return found, "\n".join(lines(root, ["plain"], [], found))


def test_the_counts_of_tinypedia_are_those_of_its_files():
    found, text = found_in(TINYPEDIA)
    assert {lang: c.passages for lang, c in found.passages.items()} == dict.fromkeys(find(TINYPEDIA), 240)
    for (lang, split), counts in found.splits.items():
        topics = dict(reading.topics(TINYPEDIA / "topics" / f"{lang}.{split}.tsv"))
        assert counts.queries == counts.judgments == counts.positives == counts.with_positive == len(topics)
        assert counts.lengths == collections.Counter(map(len, topics.values()))
    assert len(found.splits) == 30 and not found.errors
    # the split's own design: dev asks about passages of train, test does not
    overlap = {(f.lang, f.split): f.count for f in found.findings if f.kind == "positives of train"}
    assert overlap == {(lang, "dev"): 384 for lang in find(TINYPEDIA)}
    assert {f.kind for f in found.findings} == {"positives of train"}
    assert text.endswith("every record can be used; 1 warning to look at")


def test_quantiles_are_those_of_numpy():
    values = np.random.default_rng(0).integers(0, 50, 333)
    expected = np.quantile(values, [0.05, 0.5, 0.95, 1.0], method="inverted_cdf")
    assert quantiles(collections.Counter(values.tolist())) == expected.tolist()
    assert quantiles({}) == []


def test_repetitions_are_pairs_of_each_row_with_the_one_before():
    assert _repeated(np.array([5, 1, 5, 2, 1, 5], "u8")).tolist() == [[0, 2], [1, 4], [2, 5]]
    assert _repeated(np.array([], "u8")).tolist() == []


FINDINGS = {
    "an empty text": ("corpus/en.jsonl", add(passage("x#0", " ")), ("empty passages", "en", "", 1, 25)),
    "a copy": ("corpus/en.jsonl", add(passage("x#0") + "\n" + passage("x#1") + "\n" + passage("x#2")),
               ("duplicates", "en", "", 2, 27)),
    "a lost title": ("corpus/sw.jsonl", add(passage("x#0", title=None)), ("no title", "sw", "", 1, 25)),
    "another script": ("corpus/sw.jsonl", add(passage("x#0", "Нил — река в Африке")), ("other script", "sw", "", 1, 25)),
    "an empty query": ("topics/en.dev.tsv", add("q9\t"), ("empty queries", "en", "dev", 1, None)),
    "an unjudged query": ("topics/en.dev.tsv", add("q9\twho?"), ("unjudged", "en", "dev", 1, None)),
    "a question in another script": ("topics/en.dev.tsv", add("q9\tкто?"), ("other script", "en", "dev", 1, None)),
    "a question of train": ("topics/en.dev.tsv", lambda ls: [*ls, ls[0].replace("\t", "9\t").upper()],
                            ("repeated questions", "en", "dev", 1, None)),
    "a stranger": ("qrels/en.dev.tsv", add("q9 Q0 0#0 1"), ("no topic", "en", "dev", 1, None)),
    "an unknown passage": ("qrels/en.dev.tsv", lambda ls: [ls[0].replace("0#0", "z#9"), *ls[1:]],
                           ("not in the corpus", "en", "dev", 1, None)),
    "no positive": ("qrels/en.dev.tsv", lambda ls: [ls[0].replace(" 1", " 0").replace("\t1", "\t0"), *ls[1:]],
                    ("no positive", "en", "dev", 1, None)),
    "a contradiction": ("qrels/en.dev.tsv", lambda ls: [*ls, ls[0].replace(" 1", " 0").replace("\t1", "\t0")],
                        ("contradictions", "en", "dev", 1, None)),
}  # fmt: skip


@pytest.mark.parametrize("case", FINDINGS)
def test_what_looks_wrong_is_found_and_told_and_ingestion_still_reads_it(data_root, tmp_path, case):
    name, change, (kind, lang, split, count, total) = FINDINGS[case]
    edit(data_root / name, change)
    found, text = found_in(data_root)
    (finding,) = [f for f in found.findings if f.kind == kind]
    assert finding[1:4] == (lang, split, count) and total in (None, finding.total)
    assert not found.errors and KINDS[kind] in text and f"{count} of {finding.total}" in text
    corpus.ingest(lang, discover(data_root)[lang], tmp_path / "out")


ERRORS = {
    "broken JSON": ("corpus/en.jsonl", add('{"docid": '), "en.jsonl, line 25: not valid JSON"),
    "a number as id": ("corpus/en.jsonl", add('{"docid": 7, "text": ""}'), "line 25: 'docid' is 7, and ids are strings"),
    "a repeated docid": ("corpus/sw.jsonl", add(passage("0#1")), "line 25: the docid '0#1' was used before, in .*line 2"),
    "no passages": ("corpus/en.jsonl", lambda ls: [], "the corpus of en holds no passage"),
    "three fields": ("topics/en.dev.tsv", add("q9\twho?\tme"), "3 TAB-separated fields"),
    "a repeated qid": ("topics/en.dev.tsv", lambda ls: [*ls, ls[0]], r"the qid .* was used before, in line 1"),
    "a fraction": ("qrels/en.dev.tsv", add("q1 Q0 0#0 0.5"), "the relevance .0.5. is not a whole number"),
    "foreign qrels": ("qrels/en.dev.tsv", lambda ls: [line.replace("#", "_") for line in ls], "judges no passage"),
    "a bad training row": ("train/en.jsonl", add('{"query_id": "q9"}'), r"train/en\.jsonl, line \d+: .*'query' is missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_what_ingestion_refuses_is_an_error_with_file_and_line(data_root, tmp_path, case):
    name, change, says = ERRORS[case]
    edit(data_root / name, change)
    found, text = found_in(data_root)
    assert list(found.errors) == [str(data_root / name)]
    assert text.endswith("errors in 1 file: mend them first")
    ((sentence,),) = found.errors.values()
    with pytest.raises(UserError, match=says):
        raise UserError(sentence)
    with pytest.raises(UserError):
        corpus.ingest(name[-5:].split(".")[0], discover(data_root)["sw" if "/sw" in name else "en"], tmp_path / "out")


def test_all_bad_files_are_told_and_the_many_errors_of_one_are_cut(data_root):
    edit(data_root / "corpus/en.jsonl", lambda ls: [*ls[:3], *["no JSON\n"] * 9, *ls[3:]])
    edit(data_root / "topics/sw.dev.tsv", add("no topic"))
    (data_root / "train/sw.jsonl").write_bytes(gzip.compress(b"x" * 999)[:-9])
    (data_root / "qrels/en.dev.tsv").write_bytes(b"q Q0 \xff 1\n")
    found, text = found_in(data_root)
    assert sorted(path[len(str(data_root)) + 1 :] for path in found.errors) == [
        "corpus/en.jsonl",
        "qrels/en.dev.tsv",
        "topics/sw.dev.tsv",
        "train/sw.jsonl",
    ]
    assert text.count("not valid JSON") == 5 and "corpus/en.jsonl: 4 more of its records cannot be used" in text
    assert found.passages["en"].passages == 24  # what stands behind a bad line is read


def test_of_a_root_without_corpora_the_queries_are_checked(data_root):
    for lang in ("en", "sw"):
        (data_root / "corpus" / f"{lang}.jsonl").unlink()
    edit(data_root / "topics/en.dev.tsv", add("q9\twho?"))
    found, text = found_in(data_root)
    assert {f.kind for f in found.findings} == {"no corpus", "unjudged", "positives of train"}
    assert not found.errors and "languages without a corpus" in text and "  en, sw\n" in text


def test_judged_passages_of_another_language_are_told_apart_from_missing_ones(data_root):
    edit(data_root / "corpus/sw.jsonl", lambda ls: [line.replace('"docid": "', '"docid": "sw') for line in ls])
    for kind in ("train", "topics", "qrels"):
        for path in (data_root / kind).glob("sw.*"):
            path.unlink()
    edit(data_root / "qrels/en.dev.tsv", lambda ls: [ls[0].replace("0#0", "sw0#0"), ls[1].replace("#", "_"), *ls[2:]])
    found, _ = found_in(data_root)
    kinds = {f.kind: (f.count, f.example) for f in found.findings}
    assert kinds["in another corpus"] == (1, "sw0#0") and kinds["not in the corpus"][0] == 1


def test_topics_that_qrels_of_another_name_judge_are_told_apart_from_unjudged_ones(data_root):
    (data_root / "topics/en.dev.tsv").rename(data_root / "topics/en.clean.tsv")
    kinds = {f.kind: f.split for f in found_in(data_root)[0].findings}
    assert kinds["judged elsewhere"] == "clean" and not {"unjudged", "no topic"} & kinds.keys()


def test_the_report_as_json_holds_what_the_tables_do(data_root):
    found, _ = found_in(data_root)
    report = json.loads(json.dumps(as_dict(data_root, ["plain"], [], found)))
    assert report["passages"]["en"]["passages"] == 24
    assert report["passages"]["en"]["lengths"] == quantiles(found.passages["en"].lengths)
    assert {(s["lang"], s["split"], s["queries"]) for s in report["splits"]} == {
        (*key, counts.queries) for key, counts in found.splits.items()
    }


def test_the_command_tells_its_findings_and_exits_by_whether_all_records_can_be_used(command, data_root):
    (data_root / "topics/en-dev.tsv").write_text("q\tnamed wrongly\n")
    result = command("jdmdr.corpus", "check", data_root)
    assert result.returncode == 0, result.stderr
    assert "2 languages (en, sw), layout plain" in result.stdout and "topics/en-dev.tsv" in result.stdout
    edit(data_root / "corpus/en.jsonl", add("{}"))
    result = command("jdmdr.corpus", "check", data_root, "--json", "--langs=en")
    assert result.returncode == 2
    report = json.loads(result.stdout)
    assert [(error["file"], error["count"]) for error in report["errors"]] == [(str(data_root / "corpus/en.jsonl"), 1)]
    assert list(report["passages"]) == ["en"]


@pytest.mark.parametrize("words, says", [
    ([], "write python -m jdmdr.corpus check DIR"),
    (["check"], "write python -m jdmdr.corpus check DIR"),
    (["check", "/none"], "the data root /none is not a directory"),
    (["check", str(TINYPEDIA), "--langs=xx"], "holds no files of xx; there are: ar, en"),
    (["check", str(TINYPEDIA), "--lang=en"], "Unknown command line flag 'lang'"),
])  # fmt: skip
def test_a_wrong_command_line_gets_one_sentence(command, words, says):
    result = command("jdmdr.corpus", *words)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and says in result.stderr


@pytest.mark.parametrize("lang, own", [
    ("en", ("Latn",)), ("te", ("Telu",)), ("ja", ("Han", "Hiragana", "Katakana")), ("ko", ("Hangul", "Han")),
    ("zh", ("Han",)), ("zh-hant", ("Han",)), ("am", ("Ethi",)), ("all", ()), ("nfcorpus", ()), ("xx", ()),
])  # fmt: skip
def test_the_scripts_of_any_language_are_known_and_of_other_names_none(lang, own):
    assert scripts(lang) == own


@pytest.mark.parametrize("lang, text, right", [
    ("th", "แม่น้ำไนล์ (Nile)", True), ("th", "The Nile", False), ("hi", "नील नदी", True), ("en", "नील नदी", False),
    ("ja", "ナイル川はアフリカの川", True), ("zh", "尼罗河 Nile", True), ("ru", "1999", True), ("ru", "", True),
    ("zh", "尼 Nile", False), ("xx", "नील", True), ("sw", "Mto Nile ni ¿", True),
])  # fmt: skip
def test_a_text_is_in_its_script_by_a_third_of_its_letters(lang, text, right):
    assert in_script(text, lang) is right


def test_the_script_of_a_text_has_a_name():
    assert [main_script(t) for t in ("Nile", "Нил", "尼罗河", "12")] == ["Latin", "Cyrillic", "CJK", "none"]


def test_where_a_corpus_cannot_be_read_its_judged_passages_are_not_called_missing(data_root):
    (data_root / "corpus/en.jsonl").write_text("no JSON\n")
    found, _ = found_in(data_root)
    assert list(found.errors) == [str(data_root / "corpus/en.jsonl")]
    assert {(f.kind, f.lang) for f in found.findings} == {("positives of train", lang) for lang in ("en", "sw")}
