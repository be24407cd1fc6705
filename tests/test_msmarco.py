"""MS MARCO's and the TREC 2019 Deep Learning track's published files, and ids that come back as they were."""

import gzip
import json

import pytest

from jdmdr import corpus, metrics, reading, splits
from jdmdr.convert_run import convert
from jdmdr.datasets import audit, discover
from jdmdr.library import Library
from jdmdr.types import Passage, Query, UserError

PASSAGES = {
    "collection.tsv": '0\tThe presence of communication.\n07\t \n7\tÉtat \u2028 of "it" <sep>  \r\n',
    "queries.train.tsv": "121352\tdefine extreme\n5\tno positive\n",
    "qrels.train.tsv": "121352\t0\t07\t1\n",
    "queries.dev.small.tsv": "2\tAndrogen receptor define \n",
    "qrels.dev.small.tsv": "2\t0\t0\t1\n",
    "queries.eval.small.tsv": "57\tx\n58\ty\n",
    "msmarco-test2019-queries.tsv": "19335\tanthropological definition\n47923\tunjudged\n",
    "2019qrels-pass.txt": "19335 Q0 0 0\n19335 Q0 7 3\n",
    "queries.dev.tsv": "2\tnot read\n",
}
DOCUMENTS = {
    "msmarco-docs.tsv": "D1555982\thttp://a.b/?c=d e\tThe title \tbody with  blanks\nD007\thttp://x\t\t\nD7\t\t\tonly body\n",
    "msmarco-doctrain-queries.tsv": "3\twhat\n",
    "msmarco-doctrain-qrels.tsv": "3 0 D007 1\n",
    "msmarco-docdev-queries.tsv": "2\twho\n",
    "msmarco-docdev-qrels.tsv": "2 0 D1555982 1\n",
    "docleaderboard-queries.tsv": "57\tx\n",
    "msmarco-test2019-queries.tsv": "19335\tanthropological definition\n",
    "2019qrels-docs.txt": "19335 Q0 D7 2\n19335 Q0 D007 0\n",
}


@pytest.fixture(params=["plain", "gz"])
def root(request, tmp_path):
    """Writes files, every second one gzipped where it is asked for."""

    def write(files):
        for i, (name, text) in enumerate(files.items()):
            packed = request.param == "gz" and i % 2 == 0
            content = text.encode()
            (tmp_path / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(content) if packed else content)
        return tmp_path

    return write


def ingest(found, out, **how):
    report = corpus.write_passages("en", found["en"], out / "en", **how)
    corpus.write_queries("en", found["en"], out / "en", report)
    return Library(out), report


def test_passages_and_their_named_splits_are_read(root, tmp_path):
    found = discover(root(PASSAGES))
    assert list(found) == ["en"]
    assert sorted(found["en"].topics) == ["dev", "lead", "test", "train"] and sorted(found["en"].qrels) == [
        "dev",
        "test",
        "train",
    ]
    library, report = ingest(found, tmp_path / "out")
    collection = library.collections[0]
    assert [collection.passage(row) for row in range(len(collection))] == [
        Passage("0", "", "The presence of communication."), Passage("07", "", ""), Passage("7", "", 'État \u2028 of "it" <sep>'),
    ]  # fmt: skip
    assert corpus.read_queries(tmp_path / "out/en", "dev") == [Query("2", "Androgen receptor define")]
    assert library.queries("en", "train")[0] == ["121352"] and library.qrels("en", "train") == {"121352": {"07": 1}}
    assert library.qrels("en", "test") == {"19335": {"0": 0, "7": 3}}
    assert report.queries == {"train": 1, "dev": 1, "lead": 2, "test": 2} and report.empty_texts == 1


def test_documents_are_url_title_and_body_joined_by_the_separator(root, tmp_path):
    found = discover(root(DOCUMENTS))
    library, _ = ingest(found, tmp_path / "out", fields=("url", "title", "text"), separator="<sep>")
    texts = [corpus.passage_text(library.collections[0].passage(row)) for row in range(3)]
    assert texts == [
        "http://a.b/?c=d e<sep>The title<sep>body with  blanks",
        "http://x<sep><sep>",
        "<sep><sep>only body",
    ]
    assert list(reading.passages(found["en"].corpus[0]))[0] == Passage("D1555982", "The title", "body with  blanks")


def test_ids_come_back_as_they_were(root, tmp_path):
    library, _ = ingest(discover(root(DOCUMENTS)), tmp_path / "out")
    collection = library.collections[0]
    assert collection.docids(range(3)) == ["D1555982", "D007", "D7"]
    assert collection.rows(["D7", "D007", "7", "D1555982"]).tolist() == [2, 1, -1, 0]
    target = splits.Target(library, "en", splits.Split("dev", "dev", "dev"))
    assert target.qrels == {"2": {"D1555982": 1}} and target.docids([1, 2]) == ["D007", "D7"]
    run = {"2": ["D007", "D1555982"], "0": ["D7"]}
    trec = "".join(f"{q} Q0 {d} {r} {-r} t\n" for q, of in run.items() for r, d in enumerate(of, 1))
    (tmp_path / "run.trec").write_text(trec)
    convert(tmp_path / "run.trec", tmp_path / "run.tsv", 0, "t")
    assert (tmp_path / "run.tsv").read_text() == "2\tD007\t1\n2\tD1555982\t2\n0\tD7\t1\n"
    values = metrics.evaluate_run(target.qrels, metrics.read_run(tmp_path / "run.tsv"), ["msmarco_mrr@100"])
    assert values == {"msmarco_mrr@100": {"2": 0.5}}


def test_the_lead_split_has_runs_and_no_judgments(root, tmp_path):
    found = discover(root(PASSAGES))
    library, _ = ingest(found, tmp_path / "out")
    assert [s.name for s in splits.resolve("", found)] == ["dev", "test"]
    [lead] = splits.resolve("lead=lead:none:own", found)
    assert splits.Target(library, "en", lead).qrels == {"57": {}, "58": {}}
    with pytest.raises(UserError, match="names the qrels 'lead'; there are: dev, none, test, train"):
        splits.resolve("lead", found)


def test_both_collections_in_one_root_are_refused_by_name(tmp_path):
    for name, text in {**PASSAGES, **DOCUMENTS}.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match="is there twice, .*docs.*pass.*keep one"):
        discover(tmp_path)


def test_a_line_with_other_fields_is_told_and_the_check_reads_on(root):
    where = root({**PASSAGES, "collection.tsv": "0\ta\n1\ta\tb\n2\tc\n"})
    found = discover(where)
    with pytest.raises(
        UserError, match=r"line 2: 3 TAB-separated fields where docid TAB text or docid TAB url TAB title TAB"
    ):
        list(reading.passages(found["en"].corpus[0]))
    report = audit.audit(found)
    assert report.passages["en"].passages == 2 and report.error_counts[str(found["en"].corpus[0])] == 1
    with pytest.raises(UserError, match="line 1: the field 'url' is missing"):
        list(reading.passages(found["en"].corpus[0], ("url", "text")))


def test_the_check_command_reads_the_published_files(root, command):
    done = command("jdmdr.corpus", "check", root(PASSAGES), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["passages"]["en"]["passages"] == 3
