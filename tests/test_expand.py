"""The stages with a language model over a working directory whose other stages are done, against a server of planted labels."""

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import REPO
from llm_servers import MODEL, faults, oracle, parts, serve

from jdmdr import corpus, expand, llm, negatives, pipeline
from jdmdr.expand import read_rows
from jdmdr.recipe import Recipe
from jdmdr.types import UserError

N, DEPTH = 5, 3
KEYS = {
    "mine.negatives": N, "judge.depth": DEPTH, "judge.calibrate": 0, "judge.queries": 6, "expand.rounds": 2,
    "expand.depths": (12, 18),
}  # fmt: skip


def grade(question, candidate):
    """Every third candidate answers the question, for all the server says."""
    return 2 if len(candidate) % 3 == 0 else 0


def ask(summary):
    """A query of the summary's last words, so that it is not the old one and finds other passages."""
    return " ".join(summary.split()[-5:])


def copied(finished, directory, server, **keys):
    """A recipe over a copy of the finished stages, with a language model."""
    shutil.copytree(finished.directory, directory)
    config = finished.config.copy_and_resolve_references().unlock()
    found = {**KEYS, "llm.base_url": server.base_url, "llm.model": MODEL, "llm.retries": 0, **keys}
    config.update_from_flattened_dict(found)
    return Recipe(config, directory)


def bring(recipe, target="negatives"):
    return pipeline.run(recipe.config, recipe.directory, target)


@pytest.fixture(scope="module")
def expanded(finished, tmp_path_factory):
    """(recipe, the server's requests) of a run against planted labels."""
    with serve(oracle(grade, ask=ask)) as server:
        recipe = copied(finished, tmp_path_factory.mktemp("expanded") / "w", server)
        bring(recipe)
        yield recipe, list(server.requests)


def rows_of(recipe, stage, lang):
    return read_rows(recipe.directory / stage / f"{lang}.jsonl")


def training_rows(recipe, lang):
    return read_rows(recipe.directory / "negatives" / "train_aug" / f"{lang}.jsonl")


def test_judged_queries_end_with_exactly_n_negatives_and_none_of_them_answers(expanded):
    recipe, _ = expanded
    sources = set()
    for lang in recipe.library.langs:
        judged = {row["query_id"] for row in rows_of(recipe, "judge", lang)}
        assert len(judged) == 6
        for row in training_rows(recipe, lang):
            docids = [p["docid"] for p in row["negative_passages"]]
            assert len(docids) == len(set(docids)) == N
            assert not set(docids) & {p["docid"] for p in row["positive_passages"]}
            if row["query_id"] in judged:
                told = [p for p in row["negative_passages"] if p["source"] in ("retrieval", "llm")]
                assert all(grade(row["query"], text(p)) == 0 and p["label"] == 0 and p["votes"] for p in told)
                sources |= {p["source"] for p in row["negative_passages"]}
            else:  # left to the rule filters
                assert not any("votes" in p for p in row["negative_passages"])
    assert {"retrieval", "llm"} <= sources


def text(passage):
    return corpus.passage_text(corpus.Passage(passage["docid"], passage["title"], passage["text"]))


def test_a_query_without_a_survivor_is_topped_up_like_any_other(finished, tmp_path):
    with serve(oracle(lambda question, candidate: 2, ask=ask)) as server:
        recipe = copied(finished, tmp_path / "w", server)
        bring(recipe, "judge")
        server.answer = oracle(lambda question, candidate: 0, ask=ask)
        bring(recipe)
    for lang in recipe.library.langs:
        relevant = {(row["query_id"], row["docid"]) for row in rows_of(recipe, "judge", lang)}
        short = rows_of(recipe, "expand", lang)
        assert len(short) == 6 and all(row["missing"] == N and not row["rounds"][0]["fault"] for row in short)
        of_query = {row["query_id"]: row["negative_passages"] for row in training_rows(recipe, lang)}
        for row in short:
            sources = [p["source"] for p in of_query[row["query_id"]]]
            assert len(sources) == N and "llm" in sources and set(sources) <= {"llm", "retrieval"}
            assert not relevant & {(row["query_id"], p["docid"]) for p in of_query[row["query_id"]]}


def test_what_the_judge_finds_relevant_is_no_random_negative_either(finished, tmp_path):
    with serve(oracle(lambda question, candidate: 2 * (len(candidate) % 7 > 0), ask=ask)) as server:
        keys = {"expand.rounds": 1, "expand.depths": (4,)}
        recipe = copied(finished, tmp_path / "w", server, **keys)
        bring(recipe)
    sources = set()
    for lang in recipe.library.langs:
        judged = [(row["query_id"], row) for row in rows_of(recipe, "judge", lang)]
        judged += [(row["query_id"], j) for row in rows_of(recipe, "expand", lang) for j in row["judged"]]
        relevant = {(qid, row["docid"]) for qid, row in judged if row["label"] == 2}
        rows = [row for row in training_rows(recipe, lang) if row["query_id"] in {qid for qid, _ in judged}]
        negative = {(row["query_id"], p["docid"]) for row in rows for p in row["negative_passages"]}
        sources |= {p["source"] for row in rows for p in row["negative_passages"]}
        assert len(relevant) > 15 and not relevant & negative
    assert "random" in sources


def test_an_added_negative_tells_its_query_round_rank_and_votes(expanded):
    recipe, _ = expanded
    for lang in recipe.library.langs:
        short = {row["query_id"]: row for row in rows_of(recipe, "expand", lang)}
        qids, store = negatives.read(negatives.version_dir(recipe.directory / "negatives", 0), lang)
        for row in training_rows(recipe, lang):
            for place, negative in enumerate(row["negative_passages"]):
                if negative["source"] == "llm":
                    told = short[row["query_id"]]
                    (written,) = [r for r in told["rounds"] if r["round"] == negative["round"]]
                    assert negative["generated_query"] == written["generated_query"] != row["query"]
                    assert negative["rank"] >= 1 and np.isfinite(negative["score"])
                    q = qids.index(row["query_id"])
                    assert store.rank_QxN[q, place] == negative["rank"]
                    assert negatives.SOURCES[store.source_QxN[q, place]] == "llm"


def test_the_judge_is_asked_about_the_old_query_and_never_twice(expanded):
    recipe, requests = expanded
    old = {t for lang in recipe.library.langs for t in recipe.library.queries(lang, "train")[1]}
    asked = [parts(request) for request in requests]
    assert {found["question"] for found in asked if "candidate" in found} <= old
    assert len({request.key + json.dumps(parts(request)) for request in requests}) == len(requests)


def test_a_second_run_asks_nothing_and_a_lost_stage_is_made_again_from_the_log(expanded, tmp_path):
    recipe, requests = expanded
    shutil.copytree(recipe.directory, tmp_path / "w")
    again = Recipe(recipe.config, tmp_path / "w")
    before = (tmp_path / "w" / "expand" / "manifest.json").read_bytes()
    for stage in ("judge", "expand"):
        shutil.rmtree(tmp_path / "w" / stage)
    with serve(oracle(grade, ask=ask)) as server:
        again.config.llm.base_url = server.base_url
        bring(again)
        assert not server.requests
    assert (tmp_path / "w" / "expand" / "manifest.json").read_bytes() == before


def test_the_dry_run_tells_what_valid_and_unanimous_replies_will_take(finished, tmp_path):
    with serve(oracle(lambda question, candidate: 0, ask=ask)) as server:
        recipe = copied(finished, tmp_path / "w", server)
        bring(recipe, "judge")
        judged = len(server.requests)
        with llm.open_client(recipe.config.llm, recipe.directory) as client:
            plan = planned(recipe, client)
            assert len(server.requests) == judged
        bring(recipe, "expand")
        sent = len(server.requests) - judged
        (expected,) = plan.expected.values()
        assert plan.lower.calls <= sent == expected.calls <= plan.upper.calls and sent > 0
        with llm.open_client(recipe.config.llm, recipe.directory) as client:
            assert (
                planned(recipe, client).upper.calls >= 0 == next(iter(planned(recipe, client).expected.values())).calls
            )


def test_the_dry_run_wants_the_judge_done_and_asks_nothing_itself(finished, tmp_path):
    with serve(oracle(grade, ask=ask)) as server:
        recipe = copied(finished, tmp_path / "w", server)
        with pytest.raises(
            UserError, match="the stage judge, and that is not done; .* python -m jdmdr.judge --dry_run"
        ):
            pipeline.run(recipe.config, recipe.directory, "expand", itself=False)
        assert not server.requests and not (recipe.directory / "judge").exists()


def planned(recipe, client):
    return expand.plan(
        list(recipe._judged_languages()),
        recipe._searching(recipe.directory),
        recipe._query_tokens,
        client,
        recipe.config,
    )


def test_refusals_and_other_languages_leave_the_filling_to_do(finished, tmp_path):
    """What the model says of candidates is sound, but no query of it is usable."""
    script = ["refusal", "wrong language", "empty", "prose"] * 300

    def answer(request, number):
        good = oracle(grade)(request, number)
        return good if "candidate" in parts(request) else faults(*script, text=good)(request, number)

    with serve(answer) as server:
        recipe = copied(finished, tmp_path / "w", server)
        bring(recipe)
    rounds = [r for lang in recipe.library.langs for s in rows_of(recipe, "expand", lang) for r in s["rounds"]]
    assert rounds and sum(bool(r["fault"]) for r in rounds) >= len(rounds) / 2
    for lang in recipe.library.langs:
        assert all(len(row["negative_passages"]) == N for row in training_rows(recipe, lang))


def words(recipe, *more):
    c = recipe.config
    return [
        "--config", "configs/quickstart.py:smoke", "--workdir", str(recipe.directory), f"--config.data.root={c.data.root}",
        "--config.data.langs=", "--config.tokenizer.vocab_size=600", f"--config.llm.base_url={c.llm.base_url}",
        f"--config.llm.model={MODEL}", "--config.llm.retries=0", "--config.llm.concurrency=2",
        *(f"--config.{key}={value}" for key, value in KEYS.items()), *more,
    ]  # fmt: skip


def test_a_run_killed_while_expanding_repeats_no_answered_call(expanded, finished, tmp_path):
    undisturbed, _ = expanded
    good = oracle(grade, ask=ask)
    with serve(good) as server:
        recipe = copied(finished, tmp_path / "w", server)
        bring(recipe, "judge")
        judged = len(server.requests)

        def slowly(request, number):
            if number == judged + 9:
                os.kill(process.pid, signal.SIGKILL)
            return good(request, number)

        server.answer = slowly
        process = subprocess.Popen(
            [sys.executable, "-m", "jdmdr.expand", *words(recipe)], cwd=REPO, env={**os.environ, "JAX_PLATFORMS": "cpu"},
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        _, err = process.communicate(timeout=120)
        assert process.returncode == -signal.SIGKILL, err
        assert not (recipe.directory / "expand" / "manifest.json").exists()
        logged = (recipe.directory / "llm" / "calls.jsonl").read_text().count("\n")
        server.answer, killed = good, len(server.requests)
        bring(recipe, "expand")
        assert len(server.requests) > killed > logged - 2
        # what was answered and not yet logged when the kill came is all that may be sent again
        assert len(server.repeats()) <= killed - logged <= recipe.config.llm.concurrency
    name = "expand/manifest.json"
    assert (recipe.directory / name).read_bytes() == (undisturbed.directory / name).read_bytes()
