"""Runs ranked afresh by a cross-encoder: the right texts, each pair once, and sentences for what cannot be meant."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import REPO
from test_cross_encoder import make_classifier

from jdmdr import corpus, datasets, encoders, metrics, pairs, parallel, rerank, score
from jdmdr.tokenizer import Tokenizer
from jdmdr.types import Tokens, UserError

LENGTH, DEPTH = 20, 12
LANGS = ("aa", "bb")


def words(random, least, most):
    return " ".join(f"w{i}" for i in random.integers(0, 195, random.integers(least, most)))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two languages of 30 passages, whose docids they share, 5 queries each, and their runs of 20 hits."""
    root, random = tmp_path_factory.mktemp("root"), np.random.default_rng(0)
    for home in ("corpus", "topics", "qrels", "runs"):
        (root / home).mkdir()
    for lang in LANGS:
        rows = [{"docid": f"d{i}", "title": f"w{i}", "text": words(random, 0, 25)} for i in range(30)]
        (root / "corpus" / f"{lang}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        qids = [f"q{i}" for i in range(5)]
        (root / "topics" / f"{lang}.test.tsv").write_text("".join(f"{q}\t{words(random, 1, 8)}\n" for q in qids))
        (root / "topics" / f"{lang}.dev.tsv").write_text("".join(f"{q}\tw1 w1\n" for q in [*qids[:1], "z"]))
        (root / "qrels" / f"{lang}.test.tsv").write_text("".join(f"{q} 0 d{i} 1\n" for i, q in enumerate(qids)))
        hits = {q: random.permutation(30)[:20] for q in qids}
        lines = [f"{q} Q0 d{d} {n} {50 - n} x\n" for q, of in hits.items() for n, d in enumerate(of)]
        (root / "runs" / f"{lang}.trec").write_text("".join(lines))
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_classifier("bert", 1, tmp_path_factory.mktemp("model") / "bert")


@pytest.fixture(scope="module")
def scorer(model):
    section = SimpleNamespace(name=str(model), label="", length=LENGTH)
    return pairs.Scorer(section, "float32", parallel.data_mesh())


def oracle(root, scorer, lang, docid_langs):
    """Every query's first hits in the order of their scores, by scoring one pair at a time."""
    sets = {}
    for code in LANGS:
        rows = map(json.loads, (root / "corpus" / f"{code}.jsonl").read_text().splitlines())
        sets[code] = {row["docid"]: f"{row['title']} {row['text']}" for row in rows}
    texts = dict(line.split("\t") for line in (root / "topics" / f"{lang}.test.tsv").read_text().splitlines())
    out = {}
    for qid, hits in metrics.read_run(root / "runs" / f"{lang}.trec").items():
        one, scores = np.zeros(1, int), {}
        for docid in list(hits)[:DEPTH]:
            scores[docid] = scorer.score(scorer.queries([texts[qid]]), one, [sets[docid_langs][docid]], one)[0]
        out[qid] = sorted(scores, key=scores.get, reverse=True)
    return out


def run(root, scorer, out, lang="aa", searched=("aa",), topics="test", path=None, sources=None):
    sources = sources or rerank.open_data(root, ("title", "text"))
    return rerank.rerank(
        path or root / "runs" / f"{lang}.trec", lang, sources, searched, topics, DEPTH, scorer, out / f"{lang}.trec"
    )


@pytest.mark.parametrize("searched", LANGS)
def test_hits_stand_in_the_order_of_their_own_scores(root, scorer, tmp_path, searched):
    assert run(root, scorer, tmp_path, searched=[searched]) == 5 * DEPTH
    found = metrics.read_run(tmp_path / "aa.trec")
    assert {qid: list(hits) for qid, hits in found.items()} == oracle(root, scorer, "aa", searched)
    assert [path.name for path in tmp_path.iterdir()] == ["aa.trec"]


def test_a_working_directory_gives_what_its_data_root_gives(root, scorer, tmp_path):
    for lang, files in datasets.discover(root).items():
        corpus.ingest(lang, files, tmp_path / "corpus" / lang)
    (tmp_path / "corpus" / "manifest.json").write_text("{}")
    (tmp_path / "out").mkdir()
    run(root, scorer, tmp_path)
    run(root, scorer, tmp_path / "out", sources=rerank.open_data(tmp_path, ()))
    assert (tmp_path / "aa.trec").read_bytes() == (tmp_path / "out" / "aa.trec").read_bytes()


def test_a_run_over_a_pool_names_passages_with_their_language(root, scorer, tmp_path):
    path = tmp_path / "pool.trec"
    path.write_text("q0 Q0 aa:d1 1 2 x\nq0 Q0 bb:d1 2 1 x\n")
    assert run(root, scorer, tmp_path, searched=LANGS, path=path) == 2
    both = metrics.read_run(tmp_path / "aa.trec")["q0"]
    one = {}
    for lang in LANGS:
        path.write_text("q0 Q0 d1 1 2 x\n")
        run(root, scorer, tmp_path, searched=[lang], path=path)
        one[f"{lang}:d1"] = metrics.read_run(tmp_path / "aa.trec")["q0"]["d1"]
    assert both == pytest.approx(one, abs=1e-5)
    path.write_text("q0 Q0 d1 1 2 x\n")
    with pytest.raises(UserError, match="the docid 'd1' is in several languages; a run over a pool writes LANG:docid"):
        run(root, scorer, tmp_path, searched=LANGS, path=path)


@pytest.mark.parametrize("text, topics, sentence", [
    ("", "test", "holds no hit"),
    ("q0 Q0 d1 1 2 x\nq9 Q0 d1 1 2 x\n", "test", r"1 of 2 queries, the first 'q9', are not among the queries .*\(test\)"),
    ("q0 Q0 d1 1 2 x\nq0 Q0 e1 1 2 x\n", "test", "1 of 2 passages, the first 'e1', are not in the corpus of aa"),
    ("q0 Q0 d1 1 2 x\n", "", "the query 'q0' has several texts in the sets dev, test; name .* --topics"),
    ("q0 Q0 d1 1 2 x\n", "train", "--topics=train: there are no such queries; there are: dev, test"),
    ("q0 d1 1 2\n", "test", "line 1: found 4 fields instead of the 6"),
])  # fmt: skip
def test_what_cannot_be_meant_is_told(root, scorer, tmp_path, text, topics, sentence):
    path = tmp_path / "run.trec"
    path.write_text(text)
    with pytest.raises(UserError, match=sentence):
        run(root, scorer, tmp_path, topics=topics, path=path)


def test_the_language_of_a_single_run_is_asked_for(root):
    sources = rerank.open_data(root, ("title", "text"))
    path = str(root / "runs" / "aa.trec")
    with pytest.raises(UserError, match="--data has the languages aa, bb; say by --lang"):
        rerank.runs_of(path, "", sources)
    assert list(rerank.runs_of(path, "bb", sources)) == ["bb"]
    with pytest.raises(UserError, match="--data has no language cc; there are: aa, bb"):
        rerank.runs_of(path, "cc", sources)


def arguments(root, model, out, *more):
    return [str(root / "runs" / "{lang}.trec"), f"--model={model}", f"--data={root}", f"--out={out}", "--topics=test",
            f"--length={LENGTH}", f"--depth={DEPTH}", *more]  # fmt: skip


def test_the_command_writes_runs_that_score_reads_and_does_nothing_twice(root, model, scorer, tmp_path, command):
    out = tmp_path / "reranked"
    done = command("jdmdr.rerank", *arguments(root, model, out))
    assert done.returncode == 0, done.stderr
    for lang in LANGS:
        found = metrics.read_run(out / f"{lang}.trec")
        assert {qid: list(hits) for qid, hits in found.items()} == oracle(root, scorer, lang, lang)
    assert score.read({"x": f"{out}/{{lang}}.trec"}, f"{root}/qrels/{{lang}}.test.tsv")[0].qids.keys() == {*LANGS}
    again = command("jdmdr.rerank", *arguments(root, model, out))
    assert again.returncode == 0 and again.stderr.split("\n")[:2] == ["aa: up to date", "bb: up to date"]


def test_a_directory_holds_the_work_of_one_command(tmp_path):
    promise = {"settings": {"depth": 10}, "inputs": {"run": {"aa": "0"}}}
    rerank.promise(tmp_path, {"settings": {"depth": 9}, "inputs": {}})
    rerank.promise(tmp_path, promise)  # nothing was scored for the first
    (tmp_path / ".aa.trec.scores").write_text("")
    rerank.promise(tmp_path, promise)
    with pytest.raises(
        UserError, match="work of another command .run.aa changed; depth was 10, now 20.; choose another"
    ):
        rerank.promise(tmp_path, {"settings": {"depth": 20}, "inputs": {"run": {"aa": "1"}}})
    (tmp_path / "plan.json").unlink()
    with pytest.raises(UserError, match="holds runs made elsewhere"):
        rerank.promise(tmp_path, promise)


def test_eight_devices_rank_as_one_does(root, model, scorer, tmp_path, on_devices):
    program = """
        import pathlib, sys
        import jax
        from types import SimpleNamespace
        from jdmdr import pairs, parallel
        from test_rerank import LENGTH, run
        root, model, out = map(pathlib.Path, sys.argv[1:])
        section = SimpleNamespace(name=str(model), label="", length=LENGTH)
        run(root, pairs.Scorer(section, "float32", parallel.data_mesh()), out)
        print(jax.device_count())
    """
    (tmp_path / "eight").mkdir()
    assert on_devices(8, program, root, model, tmp_path / "eight").split() == ["8"]
    run(root, scorer, tmp_path)
    eight, one = (metrics.read_run(home / "aa.trec") for home in (tmp_path / "eight", tmp_path))
    assert {qid: list(hits) for qid, hits in eight.items()} == {qid: list(hits) for qid, hits in one.items()}
    for qid, hits in one.items():
        assert eight[qid] == pytest.approx(hits, abs=1e-5)


@pytest.mark.slow
def test_killed_half_way_it_goes_on_and_ends_the_same(model, tmp_path):
    random, root = np.random.default_rng(1), tmp_path / "root"
    for home in ("corpus", "topics", "runs"):
        (root / home).mkdir(parents=True)
    rows = [{"docid": f"d{i}", "text": words(random, 5, 15)} for i in range(500)]
    (root / "corpus" / "aa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "topics" / "aa.test.tsv").write_text("".join(f"q{i}\t{words(random, 1, 5)}\n" for i in range(200)))
    lines = [f"q{q} Q0 d{d} {d} {500 - d} x\n" for q in range(200) for d in range(300)]
    (root / "runs" / "aa.trec").write_text("".join(lines))

    def start(out):
        words_ = arguments(root, model, out, "--depth=300")
        env = {**os.environ, "JAX_PLATFORMS": "cpu"}
        return subprocess.Popen([sys.executable, "-m", "jdmdr.rerank", *words_], cwd=REPO, env=env, stderr=subprocess.PIPE, text=True)  # fmt: skip

    process, partial = start(tmp_path / "killed"), tmp_path / "killed" / ".aa.trec.scores"
    while not (partial.exists() and partial.stat().st_size >= 4 * 5 * 256):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    size = partial.stat().st_size
    assert 0 < size < 4 * 60_000 and not (tmp_path / "killed" / "aa.trec").exists()
    for out in ("killed", "whole"):
        process = start(tmp_path / out)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    assert (tmp_path / "killed" / "aa.trec").read_bytes() == (tmp_path / "whole" / "aa.trec").read_bytes()


def test_candidates_stand_in_the_order_of_a_bi_encoders_inner_products(root, model, tmp_path, command):
    """MS MARCO's candidates, by mean-pooled BERT; against one text at a time."""
    rows = [json.loads(line) for line in (root / "corpus" / "aa.jsonl").read_text().splitlines()]
    texts = {row["docid"]: f"{row['title']} {row['text']}" for row in rows}
    queries = dict(line.split("\t") for line in (root / "topics" / "aa.test.tsv").read_text().splitlines())
    random = np.random.default_rng(2)
    candidates = {qid: [f"d{d}" for d in random.permutation(30)[:9]] for qid in queries}
    lines = [f"{qid}\t{docid}\t{queries[qid]}\t{texts[docid]}\n" for qid, of in candidates.items() for docid in of]
    (tmp_path / "top1000.dev").write_text("".join(random.permutation(lines)))
    done = command("jdmdr.rerank", tmp_path / "top1000.dev", f"--encoder={model}", f"--data={root}", f"--out={tmp_path / 'out'}",
                   "--topics=test", "--lang=aa", f"--length={LENGTH}", "--query_length=6", "--depth=9")  # fmt: skip
    assert done.returncode == 0, done.stderr
    config, params = encoders.load_pretrained(model)
    encoder = encoders.build(config)

    def vector(text, length):
        (ids,) = Tokenizer(model, length).encode([text])
        tokens = Tokens(ids[None], np.ones((1, len(ids)), np.int32))
        return np.asarray(encoder.apply(params, tokens))[0].astype(np.float64)

    for qid, hits in metrics.read_run(tmp_path / "out" / "aa.trec").items():
        expected = {d: vector(queries[qid], 6) @ vector(texts[d], LENGTH) for d in candidates[qid]}
        assert hits == pytest.approx(expected, rel=1e-4)
        assert list(hits) == sorted(hits, key=hits.get, reverse=True)
    wrong = command("jdmdr.rerank", "x", f"--encoder={model}", f"--model={model}", "--data=d", "--out=o")
    assert wrong.returncode == 2 and "--model or --encoder" in wrong.stderr


def test_a_passage_beyond_the_length_counts_by_its_best_window(model, scorer):
    section = SimpleNamespace(name=str(model), label="", length=LENGTH)
    in_windows = pairs.Scorer(section, "float32", parallel.data_mesh(), overlap=3)
    random = np.random.default_rng(1)
    texts = [words(random, count, count + 1) for count in (5, 30, 60)]
    query, room = "w1 w2", scorer.tokenizer.room - 2
    expected = []
    for text in texts:
        tokens = text.split()
        assert len(scorer.tokenizer.ids([text], whole=True)[0]) == len(tokens)
        windows = [" ".join(tokens[first : first + room]) for first in range(0, max(len(tokens) - room, 0), room - 3)]
        windows.append(" ".join(tokens[-room:]))
        asked = np.zeros(len(windows), int)
        expected.append(scorer.score(scorer.queries([query]), asked, windows, np.arange(len(windows))).max())
    found = in_windows.score(in_windows.queries([query]), np.zeros(3, int), texts, np.arange(3))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    cut = scorer.score(scorer.queries([query]), np.zeros(3, int), texts, np.arange(3))
    assert cut[0] == pytest.approx(found[0]) and (cut[1:] <= found[1:] + 1e-6).all() and (cut[1:] < found[1:]).any()
