"""Runs change their form and keep their ids and their order."""

import pytest

from jdmdr import metrics
from jdmdr.convert_run import convert
from jdmdr.types import UserError

TREC = "07 Q0 D0012 1 5.5 t\n07 Q0 0 2 5.5 t\n07 Q0 D12 3 7 t\nq-1 Q0 é#1 1 -1 t\n"
MSMARCO = "07\tD12\t1\n07\tD0012\t2\n07\t0\t3\nq-1\té#1\t1\n"


@pytest.fixture
def run(tmp_path):
    def write(name, text):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def test_ids_are_strings_and_stand_as_they_were_after_both_ways(run, tmp_path):
    convert(run("a.trec", TREC), tmp_path / "b.tsv", 0, "t")
    assert (tmp_path / "b.tsv").read_text() == MSMARCO
    convert(tmp_path / "b.tsv", tmp_path / "c.trec", 0, "tag")
    first = (tmp_path / "c.trec").read_text().splitlines()[1]
    assert first == "07 Q0 D0012 2 0.5 tag"
    convert(tmp_path / "c.trec", tmp_path / "d.tsv", 0, "t")
    assert (tmp_path / "d.tsv").read_text() == MSMARCO


def test_a_thousand_ranks_keep_their_order_in_float32_scores(run, tmp_path):
    lines = [f"q\tp{(i * 37) % 1000}\t{i + 1}\n" for i in range(1000)]
    convert(run("a.tsv", "".join(lines)), tmp_path / "b.trec", 0, "t")
    ranked = metrics.ranked(metrics.read_run(tmp_path / "b.trec")["q"], 1000)
    assert ranked == [line.split("\t")[1] for line in lines]


def test_depth_keeps_the_first_ranks_and_more_than_the_script_reads_is_refused(run, tmp_path):
    long = run("a.trec", "".join(f"q Q0 p{i} {i} {-i} t\n" for i in range(1001)))
    for depth in (0, 1001):
        with pytest.raises(UserError, match="1001 passages for query 'q'.* --depth=1000"):
            convert(long, tmp_path / "b.tsv", depth, "t")
    assert convert(long, tmp_path / "b.tsv", 3, "t")[1:] == (1, 3)
    assert (tmp_path / "b.tsv").read_text() == "q\tp0\t1\nq\tp1\t2\nq\tp2\t3\n"


def test_the_command_says_what_it_wrote_and_never_overwrites(command, run, tmp_path):
    source = run("a.trec", TREC)
    done = command("jdmdr.convert_run", source, tmp_path / "new" / "b.tsv")
    assert done.returncode == 0 and "2 queries, 4 lines in MS MARCO's form" in done.stdout
    again = command("jdmdr.convert_run", source, tmp_path / "new" / "b.tsv")
    assert again.returncode == 2 and "exists and is not overwritten" in again.stderr
    assert (tmp_path / "new" / "b.tsv").read_text() == MSMARCO
    for words, says in (((source,), "1 files given"), (("nope", tmp_path / "c"), "nope: cannot be read"),
                        ((source, tmp_path / "c", "--tag=a b"), "is one word")):  # fmt: skip
        done = command("jdmdr.convert_run", *words)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and says in done.stderr
