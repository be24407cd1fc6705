import concurrent.futures
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import REPO
from llm_servers import MODEL, oracle, serve
from test_processes import together

from configs import ance
from jdmdr import encode, encoders, follow, heartbeat, negatives, page, parallel, refresh, status, versions, workdir
from jdmdr.batches import Ragged
from jdmdr.recipe import Recipe
from jdmdr.refresh import Refresh, Version
from jdmdr.train import LOG
from jdmdr.types import NO_HIT, UserError

EVERY, STEPS = 4, 12


def section(**changes):
    c = ance.get_config("smoke").refresh
    c.update({"mode": "async", "poll": 2, "start": False, **changes})
    return c


def opened(home, mesh=None, **changes):
    """A `Refresh` over versions whose every list of negatives holds their number."""
    read = lambda directory: Ragged.of(np.load(directory / "rows.npy").tolist())
    first = Version(0, 0, Ragged.of([[0]]))
    return Refresh(section(**changes), EVERY, first, home, read, "ours", mesh or parallel.own_mesh())


def publish(home, version, source_step):
    write = lambda out: np.save(out / "rows.npy", np.array([[version]]))
    versions.publish(home, version, write, {"source_step": source_step, "fingerprint": "ours", "seconds": 1.0})


def steps_of(run, first, last, happening=lambda step: None, stopping=lambda: False, steps=100):
    """{step: version} of a run from `first` to `last`; `happening(step)` comes after each step, and what the last look found is
    read before the next."""
    found = {}
    for step, version in enumerate(
        run.batches(lambda step: int(run.negatives().values[0]), first, steps, stopping), first
    ):
        found[step] = version
        happening(step)
        concurrent.futures.wait([run._loading[1]] if run._loading else [])
        if step + 1 == last:
            break
    return found


def test_a_version_is_taken_whole_at_a_look_and_never_between(tmp_path):
    run = opened(tmp_path)

    def happening(step):
        if step == 4:
            publish(tmp_path, 1, 4)

    found = steps_of(run, 0, 20, happening)
    first = next(step for step, version in found.items() if version == 1)
    assert first % 2 == 0 and first > 4
    assert all(version == (step >= first) for step, version in found.items())
    assert run.figures(19) == {"negatives_version": 1, "negatives_age": 15}


def test_what_a_killed_run_took_is_taken_again_and_then_what_is_new(tmp_path):
    run = opened(tmp_path, max_age=1000)
    killed = steps_of(run, 0, 15, lambda step: publish(tmp_path, 1, 4) if step == 4 else None)
    assert set(killed.values()) == {0, 1}
    publish(tmp_path, 2, 8)
    with open(tmp_path / refresh.TAKEN, "a") as log:
        log.write('{"step": 16, "vers')  # cut by the kill
    again = opened(tmp_path, max_age=1000)
    found = steps_of(again, 5, 30)
    assert {step: found[step] for step in range(5, 15)} == {step: killed[step] for step in range(5, 15)}
    assert found[29] == 2
    assert refresh.read_taken(tmp_path / refresh.TAKEN)[28] == 2


def test_a_collected_version_gives_way_to_the_newest_and_that_is_told(tmp_path):
    heartbeat.start(tmp_path, heartbeat.RUN)
    publish(tmp_path, 1, 4)
    steps_of(opened(tmp_path), 0, 9)
    publish(tmp_path, 2, 8)
    versions.remove(tmp_path, 1)
    assert set(steps_of(opened(tmp_path), 8, 10).values()) == {2}
    assert [e["version"] for e in heartbeat.events(tmp_path, heartbeat.RUN) if e["event"] == "gone"][0] == 1


def test_a_damaged_version_is_skipped_by_name_and_training_goes_on(tmp_path):
    heartbeat.start(tmp_path, heartbeat.RUN)

    def happening(step):
        if step == 1:
            publish(tmp_path, 1, 4)
            publish(tmp_path, 2, 8)
            os.truncate(versions.version_dir(tmp_path, 2) / "rows.npy", 100)

    found = steps_of(opened(tmp_path), 0, 14, happening)
    assert set(found.values()) == {0, 1}
    (skip,) = [e for e in heartbeat.events(tmp_path, heartbeat.RUN) if e["event"] == "skip"]
    assert skip["version"] == 2 and "rows.npy" in skip["reason"]
    assert (tmp_path / "v00002.damaged").is_dir() and versions.next_number(tmp_path) == 3


def test_versions_that_are_still_needed_stay(tmp_path):
    run = opened(tmp_path, keep=2)
    for version in range(1, 6):
        publish(tmp_path, version, version)
    (tmp_path / refresh.TAKEN).write_text('{"step": 0, "version": 1}\n{"step": 6, "version": 3}\n')
    run = opened(tmp_path, keep=2)
    run.saved(8, 100, lambda: None, [3])
    # 4 and 5 are the newest, 1 is what step 3 goes on from, 3 what step 8 does
    assert versions.numbers(tmp_path) == [1, 3, 4, 5]


# --- staleness -------------------------------------------------------------------------------------------------------


def test_stale_negatives_are_told_once_and_training_goes_on(tmp_path, capsys):
    heartbeat.start(tmp_path, heartbeat.RUN)
    steps_of(opened(tmp_path, max_age=5), 0, 20)
    (event,) = [e for e in heartbeat.events(tmp_path, heartbeat.RUN) if e["event"] == "stale"]
    assert event["step"] == event["age"] == 6
    assert capsys.readouterr().err.count("refresh.max_age is 5") == 1


def test_stale_negatives_end_a_run_that_should_fail(tmp_path):
    with pytest.raises(
        UserError, match="6 steps old at step 6, and refresh.max_age is 5; see whether the refresher runs"
    ):
        steps_of(opened(tmp_path, max_age=5, on_stale="fail"), 0, 20)


def test_a_run_that_should_wait_waits_and_goes_on_with_the_new_version(tmp_path, monkeypatch):
    pauses = []

    def pause(seconds):
        pauses.append(seconds)
        if len(pauses) == 3:
            publish(tmp_path, 1, 6)
        real(seconds / 20)

    real = time.sleep
    monkeypatch.setattr(refresh.time, "sleep", pause)
    found = steps_of(opened(tmp_path, max_age=5, on_stale="wait"), 0, 10)
    assert len(pauses) >= 3
    assert found[5] == 0 and found[6] == 1
    ages = [step - {0: 0, 1: 6}[version] for step, version in found.items()]
    assert max(ages) <= 5


@pytest.mark.parametrize("mining, every", [(3, 4), (10, 4), (3, 12), (25, 12)])
def test_negatives_get_no_older_than_the_bound_that_is_warned_of(tmp_path, mining, every):
    run, ages = opened(tmp_path, max_age=1000), []
    busy, source, version = None, 0, 0

    def happening(step):
        """A miner that takes `mining` steps for the newest checkpoint, which are `every` steps apart."""
        nonlocal busy, source, version
        ages.append(run.figures(step)["negatives_age"])
        if busy and step + 1 >= busy[0]:
            version, source, busy = version + 1, busy[1], None
            publish(tmp_path, version, source)
        newest = (step + 1) // every * every
        if not busy and newest > source:
            busy = step + 1 + mining, newest

    steps_of(run, 0, 150, happening, steps=200)
    bound = mining + (mining if mining > every else 0) + every + 2
    assert bound - every < max(ages) <= bound and version > 2


def test_a_waiting_run_that_is_told_to_stop_stops(tmp_path):
    asked = []

    def stopping():
        asked.append(0)
        return len(asked) > 3

    assert len(steps_of(opened(tmp_path, max_age=5, on_stale="wait"), 0, 8, stopping=stopping)) == 8


def test_two_processes_take_the_same_version_at_the_same_step(tmp_path):
    """The version appears after process 1 has looked for itself and before process 0 has."""
    publish(tmp_path / "home", 1, 4)
    found = together(
        2,
        """
        import json, pathlib, sys, time
        from jdmdr import processes
        processes.start()
        from jdmdr import parallel, refresh, versions
        from test_refresh import opened, publish, steps_of
        home = pathlib.Path(sys.argv[1])
        if not processes.leads():  # which must not see what the other one has taken meanwhile
            read_taken = refresh.read_taken
            refresh.read_taken = lambda path: time.sleep(1) or read_taken(path)
        run = opened(home, parallel.data_mesh(), max_age=1000)
        def happening(step):
            if step == 11 and processes.leads():
                publish(home, 2, 10)
            if step == 21 and not processes.leads():  # the one process that reads a damaged file
                run._read = lambda directory: 1 / 0
            if step == 23 and processes.leads():
                publish(home, 3, 20)
        found = steps_of(run, 0, 40, happening)
        print(json.dumps(found))
        """,
        str(tmp_path / "home"),
    )
    assert found[0] == found[1]
    assert {2} < set(found[0].values()) <= {0, 1, 2} and found[0]["39"] == 2


# --- what is mined ---------------------------------------------------------------------------------------------------


def test_sampled_ranks_are_uniform_and_the_same_for_the_same_draw():
    qids = [f"q{i}" for i in range(3000)]
    there = np.ones((len(qids), 20), bool)
    there[:, 16:] = False
    first, again, other = (negatives._sample(there, 4, qids, 0, draw) for draw in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first[:, :4] != other[:, :4]).any()
    assert (np.sort(first, axis=1) == np.arange(20)).all() and (np.diff(first[:, :4], axis=1) > 0).all()
    counts = np.bincount(first[:, :4].ravel(), minlength=20)
    assert (counts[16:] == 0).all()
    expected = 3000 * 4 / 16
    # without replacement the variance is (1 - 4/16) of independent draws; 37.7 is the 0.999 quantile of chi-square, 15 d.o.f.
    assert ((counts[:16] - expected) ** 2 / expected).sum() / (1 - 4 / 16) < 37.7


@pytest.mark.parametrize("chunks", [1, 3, 5])
def test_consecutive_versions_cover_every_query_once(finished, chunks):
    used = [q.qid for q in finished.training if not q.held_out]
    for start in (1, 4):
        met = [q.qid for v in range(start, start + chunks) for q in follow.turn(finished.training, v, chunks)]
        assert sorted(met) == sorted(used)


# --- the whole, inline -----------------------------------------------------------------------------------------------


def recipe_over(finished, directory, **changes):
    """ANCE on the articles of `finished`, whose stages before mining it shares."""
    c = ance.get_config("smoke")
    with c.unlocked():
        c.data.root, c.data.langs, c.tokenizer.vocab_size = finished.config.data.root, "", 600
        c.train.steps, c.train.checkpoint_every = STEPS, EVERY
        c.mine.depth, c.mine.negatives = 10, 5
        c.refresh.update({"mode": "inline", "keep": 0, **changes})
    directory.mkdir(parents=True, exist_ok=True)
    for stage in ("corpus", "tokenizer", "tokens", "cloze", "warmup", "bm25", "embeddings-warmup", "topics"):
        if not (directory / stage).exists():
            (directory / stage).symlink_to(finished.directory / stage)
    return Recipe(c, directory)


def run(recipe):
    """Mines, selects, trains; returns the counts of the training."""
    for stage in recipe.stages():
        if stage.name in (*follow.REDONE[1:], "train"):
            workdir.bring_up_to_date(stage, recipe.directory, False, lambda line: None)
    return workdir.counts_of(recipe.directory, "train")


def curve(recipe):
    lines = [json.loads(line) for line in (recipe.directory / "train" / LOG).read_text().splitlines()]
    keys = ("step", "loss", "valid_ndcg@10", "negatives_version", "negatives_age", "epoch")
    return [{key: line[key] for key in keys if key in line} for line in lines]


@pytest.fixture(scope="module")
def inline(finished, tmp_path_factory):
    """(recipe, counts) of a run that mined at steps 4 and 8 of 12."""
    recipe = recipe_over(finished, tmp_path_factory.mktemp("inline"))
    return recipe, run(recipe)


def test_inline_takes_the_negatives_of_each_checkpoint_at_its_step(inline):
    recipe, counts = inline
    found = {
        line["step"]: (line["negatives_version"], line["negatives_age"]) for line in curve(recipe) if "loss" in line
    }
    # a line is logged under the number of steps done: line 5 is step 4
    assert found == {step + 1: (step // EVERY, step % EVERY) for step in range(STEPS)}
    assert versions.numbers(recipe.directory / "train" / "refresh") == [1, 2]
    assert not (recipe.directory / "train" / "refresh" / "work").exists()
    assert counts["steps"] == STEPS


def test_every_negative_is_in_the_top_of_its_model_none_is_a_positive_and_none_stands_twice(inline):
    recipe, _ = inline
    home = recipe.directory / "train" / "refresh"
    checked = 0
    for version, step in ((1, 4), (2, 8)):
        manifest = versions.verify(home, version, refresh.fingerprint(recipe.directory))
        assert manifest["source_step"] == step and 0 < manifest["changed"] <= 1
        config, params = follow.read_checkpoint(recipe.config, recipe.directory, step)
        embedders = [
            encode.Embedder(encoders.build(config), recipe.mesh, n, side)
            for n, side in ((32, "query"), (96, "passage"))
        ]
        for index, lang in enumerate(recipe.library.langs):
            qids, stored = negatives.read(versions.version_dir(home, version), lang)
            used = [q for q in recipe.training if q.lang == index and not q.held_out]
            assert qids == [q.qid for q in used]
            base, stop = recipe.library.bases[index : index + 2]
            q_QxD = embedders[0].embed(params, recipe.stores.queries, np.array([q.row for q in used]))
            p_CxD = embedders[1].embed(params, recipe.stores.passages, np.arange(base, stop))
            scores_QxC = q_QxD.astype(np.float16).astype(np.float32) @ p_CxD.astype(np.float16).astype(np.float32).T
            for q, query in enumerate(used):
                known = set((query.positives - base).tolist())
                ranked = [row for row in np.argsort(-scores_QxC[q], kind="stable").tolist() if row not in known][:10]
                edge = scores_QxC[q, ranked[-1]]
                rows = [int(row) for row in stored.rows_QxN[q] if row != NO_HIT]
                assert len(set(rows)) == len(rows) == 5 and not known & set(rows)
                assert all(scores_QxC[q, row] >= edge - 1e-5 for row in rows)
                checked += len(rows)
    assert checked > 100


def test_a_replay_of_the_recorded_versions_gives_the_same_losses_and_parameters(inline, finished, tmp_path):
    recipe, counts = inline
    again = recipe_over(finished, tmp_path, mode="replay", replay=str(recipe.directory))
    assert run(again)["parameters_sha256"] == counts["parameters_sha256"]
    assert curve(again) == curve(recipe)


def test_a_killed_inline_run_ends_as_if_it_had_never_stopped(inline, finished, tmp_path):
    """Killed while it mines for the second time, and again in the middle of the steps behind it."""
    recipe, counts = inline
    again = recipe_over(finished, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(again.config.to_dict()))
    for moment in ("publish", "step"):
        result = subprocess.run(
            [sys.executable, "-c", KILLED, str(tmp_path), moment], cwd=REPO, capture_output=True, text=True, timeout=240,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{REPO}{os.pathsep}{REPO / 'tests'}"},
        )  # fmt: skip
        assert result.returncode == -signal.SIGKILL, result.stderr
    assert run(again)["parameters_sha256"] == counts["parameters_sha256"]
    assert curve(again) == curve(recipe)


@pytest.mark.slow
def test_negatives_by_rank_hold_no_answer_and_questions_with_fewer_than_two_are_not_trained_on(finished, tmp_path):
    """The variant for DPR's questions, on the articles of `finished`."""
    recipe = recipe_over(finished, tmp_path / "run")
    with recipe.config.unlocked():
        c = recipe.config
        c.mine.sample, c.mine.negatives, c.mine.least = "best", 10, 2
        c.filters.answers = str(tmp_path / "{lang}.jsonl")
        c.train.objective.name, c.train.objective.mode, c.train.passages_per_query = "contrastive", "none", 2
    wanted = {}
    for index, lang in enumerate(recipe.library.langs):
        used = [q for q in recipe.training if q.lang == index]
        known = {q.qid: ["", "river", {"en": "the", "sw": "ya"}[lang]][i % 3] for i, q in enumerate(used)}
        wanted |= {(index, qid): answer for qid, answer in known.items()}
        rows = [json.dumps({"qid": qid, "answers": [answer] if answer else []}) + "\n" for qid, answer in known.items()]
        (tmp_path / f"{lang}.jsonl").write_text("".join(rows))
    counts = run(recipe)
    home = recipe.directory / "train" / "refresh"
    assert versions.numbers(home) == [1, 2]
    trained = short = dropped = 0
    for index, lang in enumerate(recipe.library.langs):
        first = negatives.read(versions.version_dir(recipe.directory / "negatives", 0), lang)
        short += int(((first[1].rows_QxN != NO_HIT).sum(axis=1) < 2).sum())
        for directory in (recipe.directory / "negatives", home, home):
            qids, stored = negatives.read(
                versions.version_dir(directory, 0 if directory.name == "negatives" else 2), lang
            )
            for qid, rows in zip(qids, stored.rows_QxN, strict=True):
                answer, rows = wanted[index, qid], rows[rows != NO_HIT]
                texts = [recipe.library.collections[index].passage(int(row)).text.lower() for row in rows]
                assert not answer or not any(answer in re.findall(r"\w+", text) for text in texts)
                dropped += len(rows) < 10
                trained += len(rows) >= 2
    assert counts["short_queries"] == short > 0 and trained > 0 and dropped > 0


KILLED = """
import json, os, pathlib, signal, sys
from ml_collections import ConfigDict
from jdmdr import refresh, versions, workdir
from jdmdr.recipe import Recipe

directory, moment = pathlib.Path(sys.argv[1]), sys.argv[2]
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if moment == "publish":
    real = versions.publish
    versions.publish = lambda home, version, *more: die() if version == 2 else real(home, version, *more)
else:
    real_figures = refresh.Refresh.figures
    refresh.Refresh.figures = lambda self, step: die() if step == 10 else real_figures(self, step)
recipe = Recipe(ConfigDict(json.loads((directory / "config.json").read_text())), directory)
for stage in recipe.stages():
    if stage.name in ("mine", "negatives", "train"):
        workdir.bring_up_to_date(stage, directory, False, print)
"""


def test_a_version_mined_for_a_part_of_the_queries_keeps_the_others(inline, finished, tmp_path):
    recipe = recipe_over(finished, tmp_path, chunks=2)
    run(recipe)
    home = tmp_path / "train" / "refresh"
    turn = {q.qid for q in follow.turn(recipe.training, 1, 2)}
    same = different = 0
    for lang in recipe.library.langs:
        qids, before = negatives.read(versions.version_dir(tmp_path / "negatives", 0), lang)
        _, after = negatives.read(versions.version_dir(home, 1), lang)
        for q, qid in enumerate(qids):
            equal = np.array_equal(before.rows_QxN[q], after.rows_QxN[q])
            assert equal or qid in turn
            same, different = same + equal, different + (not equal)
    assert same >= len(turn) - 1 and different > 0


def test_the_judge_is_asked_about_new_pairs_alone(finished, tmp_path):
    with serve(oracle(lambda question, candidate: 2 * (len(candidate) % 3 == 0))) as server:
        recipe = recipe_over(finished, tmp_path)
        with recipe.config.unlocked():
            recipe.config.llm.base_url, recipe.config.llm.model, recipe.config.expand.rounds = server.base_url, MODEL, 0
        run(recipe)
        assert server.repeats() == []
    assert versions.numbers(tmp_path / "train" / "refresh") == [1, 2]
    calls = [json.loads(line)["key"] for line in (tmp_path / "llm" / "calls.jsonl").read_text().splitlines()]
    asked = workdir.counts_of(tmp_path, "judge")["languages"]
    # three queries a language, four votes a candidate; a refresh that asked again would have sent as many a version
    first = sum(of["votes"] for of in asked.values())
    assert first <= len(calls) < 3 * first and len(set(calls)) == len(calls)


def test_the_report_has_the_picture_of_the_refreshes(inline):
    svg = page._refreshes(inline[0].directory / "train" / "refresh" / refresh.TAKEN)
    assert "MRR@10 on dev" in svg and "share of the negatives that were new" in svg
    assert page._refreshes(inline[0].directory / "nothing") == ""


def test_the_status_tells_stage_step_version_and_age(inline, tmp_path):
    recipe, _ = inline
    text = "\n".join(status.lines(recipe.directory, time.time()))
    assert "done       " in text and "v1       by the model of step 4; dev_mrr@10 " in text
    with pytest.raises(UserError, match="nothing has run there"):
        status.lines(tmp_path, time.time())


def test_only_whole_checkpoints_are_followed(inline, tmp_path):
    recipe, _ = inline
    home = tmp_path / "train" / "checkpoints"
    for name in ("99", "100.orbax-checkpoint-tmp-1", "new"):
        (home / name).mkdir(parents=True)
    (home / "8").symlink_to(recipe.directory / "train" / "checkpoints" / "8")
    assert follow.checkpoints(tmp_path) == [8]
    assert follow.checkpoints(tmp_path / "nowhere") == []


# --- the second process ----------------------------------------------------------------------------------------------


@pytest.fixture
def stopped(inline, finished, tmp_path):
    """The working directory of a run whose trainer is gone: checkpoints, no version."""
    recipe, _ = inline
    recipe_over(finished, tmp_path, mode="async")
    for stage in ("mine", "negatives"):
        (tmp_path / stage).symlink_to(recipe.directory / stage)
    shutil.copytree(recipe.directory / "train" / "checkpoints", tmp_path / "train" / "checkpoints")
    config = recipe.config.to_dict()
    workdir.write_json(tmp_path / "train" / "refresh" / refresh.CONFIG, config)
    return tmp_path


GONE = os.getpid()  # nobody is his own parent


def test_the_refresher_of_a_run_that_is_gone_mines_its_newest_checkpoint_once_and_ends(stopped):
    home = stopped / "train" / "refresh"
    (home / ".v00007.5.partial").mkdir()
    follow.follow(stopped, GONE)
    follow.follow(stopped, GONE)
    assert versions.numbers(home) == [1] and versions.manifest(home, 1)["source_step"] == STEPS
    assert not list(home.glob(".v*"))
    told = [event["event"] for event in heartbeat.events(stopped, heartbeat.REFRESH)]
    assert told == ["start", "mine", "publish", "end", "start", "end"]


def test_a_refresh_that_was_cut_off_goes_on_without_encoding_again(stopped, monkeypatch):
    publish_ = versions.publish
    monkeypatch.setattr(versions, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        follow.follow(stopped, GONE)
    monkeypatch.setattr(versions, "publish", publish_)
    monkeypatch.setattr(follow.Snapshot, "embed_first", lambda *_: pytest.fail("encoded again"))
    follow.follow(stopped, GONE)
    assert versions.numbers(stopped / "train" / "refresh") == [1]


def test_a_checkpoint_that_vanishes_while_it_is_read_gives_way_to_another(stopped, monkeypatch):
    monkeypatch.setattr(follow, "PAUSE", 0.01)
    real, asked = follow.read_checkpoint, []

    def read(config, directory, step):
        asked.append(step)
        if len(asked) == 1:
            shutil.rmtree(directory / "train" / "checkpoints" / str(step))
        return real(config, directory, step)

    monkeypatch.setattr(follow, "read_checkpoint", read)
    (stopped / "train" / "checkpoints" / "99").mkdir()
    follow.follow(stopped, GONE)
    assert asked == [12, 8]
    assert versions.manifest(stopped / "train" / "refresh", 1)["source_step"] == 8


def test_a_refresher_that_can_read_no_checkpoint_says_so_and_ends(stopped, monkeypatch):
    monkeypatch.setattr(follow, "PAUSE", 0.01)
    for path in (stopped / "train" / "checkpoints").iterdir():
        shutil.rmtree(path / "state")
        (path / "state").mkdir()
    with pytest.raises(UserError, match="5 times in a row no checkpoint could be read, at last that of step 12"):
        follow.follow(stopped, GONE)


def test_a_second_refresher_is_refused_with_the_pid_of_the_first(stopped):
    with (
        workdir.locked(stopped / "train" / "refresh"),
        pytest.raises(UserError, match=f"--follow .* pid {os.getpid()}"),
    ):
        follow.follow(stopped, GONE)
    with pytest.raises(UserError, match="there is no such directory; name the --workdir of a run"):
        follow.follow(stopped / "nowhere", GONE)


@pytest.mark.slow
def test_one_command_trains_and_mines_and_survives_kill_9_of_either(finished, tmp_path):
    words = [
        "--config", "configs/ance.py:smoke", "--workdir", str(tmp_path), f"--config.data.root={finished.config.data.root}",
        "--config.data.langs=", "--config.tokenizer.vocab_size=600", "--config.train.steps=120",
        "--config.train.checkpoint_every=10", "--config.refresh.max_age=30", "--config.refresh.on_stale=wait",
        "--config.refresh.keep=0",
    ]  # fmt: skip

    def start():
        return subprocess.Popen(
            [sys.executable, "-m", "jdmdr.train", *words], cwd=REPO, env={**os.environ, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    home = tmp_path / "train" / "refresh"

    def wait_for(condition, process):
        deadline = time.monotonic() + 200
        while not condition():
            assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
            time.sleep(0.05)

    def taken():
        return max(refresh.read_taken(home / refresh.TAKEN).values(), default=0)

    trainer = start()
    wait_for(lambda: taken() >= 1, trainer)
    before = taken()
    os.kill(heartbeat.read(tmp_path, heartbeat.REFRESH)["pid"], signal.SIGKILL)
    wait_for(lambda: taken() > before, trainer)
    trainer.kill()
    trainer.wait()
    steps = refresh.read_taken(home / refresh.TAKEN)
    trainer = start()
    out, _ = trainer.communicate(timeout=240)
    assert trainer.returncode == 0, out
    assert not refresh.held(home / refresh.LOCK)
    found = refresh.read_taken(home / refresh.TAKEN)
    assert steps.items() <= found.items()
    order = list(dict.fromkeys(found[step] for step in sorted(found)))
    sources = [versions.manifest(home, version)["source_step"] for version in order if version]
    assert len(sources) >= 3 and sources == sorted(set(sources))
    lines = [json.loads(line) for line in (tmp_path / "train" / LOG).read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 121))
    assert all(line["negatives_version"] == found[line["step"] - 1] for line in lines)
    assert all(line["negatives_age"] <= 30 for line in lines)


@pytest.mark.parametrize(
    "key, value, sentence",
    [
        ("mode", "sometimes", "refresh.mode is 'sometimes'; it is one of"),
        ("every", 5, "refresh.every is 5, no multiple of train.checkpoint_every .4.: a refresh takes the model of a"),
        ("replay", "x", "refresh.replay is 'x' and refresh.mode 'inline'; a replay needs the one to name"),
        ("max_age", 0, "refresh.max_age is 0; it is at least 1"),
    ],
)
def test_wrong_settings_are_told_by_key(finished, tmp_path, key, value, sentence):
    with pytest.raises(UserError, match=sentence):
        recipe_over(finished, tmp_path, **{key: value}).stages()
