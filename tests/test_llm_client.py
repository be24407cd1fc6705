import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from configs import default
from jdmdr import llm
from jdmdr.types import UserError
from tests.llm_servers import MODEL, Reply, completion, error, faults, serve

PARAMS = {"temperature": 0.4, "max_tokens": 50}
SCHEMA = {"type": "object", "properties": {"score": {"type": "integer"}}, "required": ["score"]}


def settings(url, **values):
    config = default.get_config().llm
    with config.ignore_type():
        config.update({"base_url": url, "model": MODEL, "retries": 2, **values})
    return config


def question(text, vote=0, version="test-1", schema=None):
    return llm.Request("test", text, version, [{"role": "user", "content": text}], PARAMS, vote, schema)


def ask(config, directory, requests):
    with llm.open_client(config, directory) as client:
        return client.map(client.complete, requests)


def texts(replies):
    return [reply.text for reply in replies]


# ------------------------------------------------------------------------------------------------------------- the log


def test_a_second_run_sends_nothing_and_gets_the_same(tmp_path):
    requests = [question(f"q{i}", vote) for i in range(5) for vote in (0, 1)]
    with serve(lambda request, number: f"reply {number}") as server:
        first = ask(settings(server.base_url), tmp_path, requests)
        assert len(server.requests) == 10
        assert ask(settings(server.base_url), tmp_path, requests) == first
        assert len(server.requests) == 10
    offline = settings("http://127.0.0.1:9/v1", max_calls=0)
    assert ask(offline, tmp_path, requests) == first


def test_model_prompt_version_text_parameters_and_vote_each_make_another_call(tmp_path):
    asked = question("q")
    others = [
        question("other"), question("q", 1), question("q", version="test-2"), asked._replace(params={**PARAMS, "top_p": 0.5}),
    ]  # fmt: skip
    with serve(lambda request, number: str(number)) as server:
        config = settings(server.base_url)
        assert len({*texts(ask(config, tmp_path, [asked, *others, asked]))}) == 5
        ask(config, tmp_path, [asked._replace(about="elsewhere", purpose="other", schema=SCHEMA)])
        assert len(server.requests) == 5
        ask(settings(server.base_url, model="another"), tmp_path, [asked])
        ask(settings(server.base_url, extra_body='{"seed": 3}'), tmp_path, [asked])
        assert len(server.requests) == 7 and server.requests[-1].body["seed"] == 3


def test_equal_requests_on_their_way_are_sent_once(tmp_path):
    with serve(lambda request, number: Reply(body=completion(request, "yes"), delay=0.2)) as server:
        assert texts(ask(settings(server.base_url), tmp_path, [question("q")] * 8)) == ["yes"] * 8
        assert len(server.requests) == 1


def test_the_log_counts_tokens_and_cost_and_never_holds_the_key(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with serve(faults(text="one two")) as server:
        ask(settings(server.base_url, price_in=1e6, price_out=2e6), tmp_path, [question("a b c"), question("d e f")])
        assert server.requests[0].authorization == "Bearer sk-secret"
    with llm.open_client(settings(server.base_url), tmp_path) as client:
        totals = client.log.totals
    assert totals[:5] == (2, 2, 10, 6, 4) and totals.cost == 2 * 3 + 2 * 4
    for path in (tmp_path / "llm").iterdir():
        assert b"sk-secret" not in path.read_bytes()


@pytest.mark.parametrize("damage", ["cut line", "no index", "index of another log", "garbage in the index", "bad line"])
def test_a_damaged_cache_keeps_every_whole_answer(tmp_path, damage):
    log, index = tmp_path / "llm" / "calls.jsonl", tmp_path / "llm" / "index.sqlite"
    requests = [question(f"q{i}") for i in range(20)]
    with serve(lambda request, number: request.messages[0]["content"].upper()) as server:
        config = settings(server.base_url, concurrency=1)
        first = ask(config, tmp_path, requests)
        whole = log.read_bytes()
        lines = whole.splitlines(keepends=True)
        lost = 0
        if damage == "cut line":
            log.write_bytes(whole[:-30])
            lost = 1
        elif damage == "no index":
            index.unlink()
        elif damage == "index of another log":
            log.write_bytes(b"".join(reversed(lines)))
        elif damage == "garbage in the index":
            index.write_bytes(b"SQLite format 3\0" + b"\xff" * 5000)
        else:
            log.write_bytes(b"".join([*lines[:7], b'{"key": 1}\n\xff\xfe\n', *lines[8:]]))
            index.unlink()
            lost = 1
        assert ask(config, tmp_path, requests) == first
        assert len(server.requests) == 20 + lost
        assert [json.loads(line)["text"] for line in log.read_bytes().splitlines() if b'"text"' in line].count(
            "Q3"
        ) == 1


def test_a_second_run_on_one_cache_is_refused(tmp_path):
    config = settings("http://127.0.0.1:9/v1", cache=str(tmp_path / "shared"))
    with (
        llm.open_client(config, tmp_path),
        pytest.raises(UserError, match="llm.cache .*shared is in use by the process"),
    ):
        ask(config, tmp_path, [])


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="llm.cache .*file/sub"):
        ask(settings("http://x/v1", cache=str(tmp_path / "file" / "sub")), tmp_path, [])


CHILD = """
    import pathlib, sys
    from tests import test_llm_client as t
    requests = [t.question(f"q{i}") for i in range(60)]
    t.ask(t.settings(sys.argv[1], concurrency=4), pathlib.Path(sys.argv[2]), requests)
"""


@pytest.mark.parametrize(
    "sent",
    [signal.SIGKILL, *(pytest.param(other, marks=pytest.mark.slow) for other in (signal.SIGTERM, signal.SIGINT))],
)
def test_no_answered_call_is_sent_again_after_a_kill(tmp_path, sent):
    requests = [question(f"q{i}") for i in range(60)]
    slow = lambda request, number: Reply(body=completion(request, request.messages[0]["content"]), delay=0.03)
    with serve(slow) as server:
        child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(CHILD), server.base_url, str(tmp_path)],
                                 env={**os.environ, "PYTHONPATH": os.getcwd()}, stderr=subprocess.DEVNULL)  # fmt: skip
        while len(server.requests) < 30:
            time.sleep(0.01)
        child.send_signal(sent)
        assert child.wait(20) != 0
        before = len(server.requests)
        assert 30 <= before < 60
        logged = (tmp_path / "llm" / "calls.jsonl").read_bytes().count(b"\n")
        assert texts(ask(settings(server.base_url), tmp_path, requests)) == [f"q{i}" for i in range(60)]
        assert len(server.requests) - before == 60 - logged
        assert len(server.requests) - 60 <= 4  # those on their way, one a slot


# ---------------------------------------------------------------------------------------------------------- the server


@pytest.mark.parametrize("fault", ["500", "503", "429", "drop", "half", "malformed", "no choices", "html", "slow"])
def test_what_may_pass_is_repeated(tmp_path, fault):
    with serve(faults(fault, retry_after=0.01, delay=1.0)) as server:
        config = settings(server.base_url, timeout=0.4)
        assert texts(ask(config, tmp_path, [question("q")])) == ["ok"]
        assert len(server.requests) == 2
    with llm.open_client(config, tmp_path) as client:
        assert client.log.totals.requests == 2


@pytest.mark.parametrize("fault, finish", [("refusal", llm.REFUSED), ("filtered", "content_filter"), ("empty", "stop"),
                                           ("length", "length")])  # fmt: skip
def test_refusals_and_cut_replies_are_answers(tmp_path, fault, finish):
    with serve(faults(*[fault] * 9)) as server:
        for _ in range(2):
            (reply,) = ask(settings(server.base_url), tmp_path, [question("q")])
            assert reply.finish == finish
        assert len(server.requests) == 1


@pytest.mark.parametrize("fault, finish, told", [
    ("500", llm.FAILED, "1 calls failed, the last because the server answered 500"),
    ("too long", llm.REJECTED, "1 calls rejected, the last because the server answered 400 (This model's maximum context length"),
    ("slow", llm.FAILED, "because no answer within llm.timeout=0.3 seconds"), ("drop", llm.FAILED, "because the connection broke"),
    ("malformed", llm.FAILED, "because the connection broke (the reply is no chat completion)"),
])  # fmt: skip
def test_a_call_given_up_is_told_counted_replayed_and_asked_again_by_the_next_run(
    tmp_path, capsys, fault, finish, told
):
    with serve(faults(fault, delay=1.0)) as server:
        config = settings(server.base_url, retries=0, timeout=0.3)
        (reply,) = ask(config, tmp_path, [question("q")])
        assert reply == llm.Reply("", finish) and told in capsys.readouterr().err
        replay = settings(server.base_url, max_calls=0)
        assert ask(replay, tmp_path, [question("q")]) == [reply] and len(server.requests) == 1
        assert texts(ask(config, tmp_path, [question("q")])) == texts(ask(replay, tmp_path, [question("q")])) == ["ok"]
        assert len(server.requests) == 2
    with llm.open_client(config, tmp_path) as client:
        assert client.log.totals[:2] == (1, 2)


def test_a_parameter_that_the_server_never_takes_stops_the_run_and_single_rejections_do_not(tmp_path):
    with serve(lambda request, number: error(400, "unknown parameter")) as server:
        config = settings(server.base_url, max_failures=3, concurrency=1)
        with pytest.raises(
            UserError, match=r"3 calls in a row failed, the last because the server answered 400 \(unknown"
        ):
            ask(config, tmp_path, [question(f"q{i}") for i in range(9)])
        assert len(server.requests) == 3
    with serve(lambda request, number: error(400, "too long") if number else "ok") as server:
        config = settings(server.base_url, max_failures=3, concurrency=1)
        assert len(ask(config, tmp_path, [question(f"q{i}") for i in range(9)])) == 9


def test_failures_in_a_row_stop_the_run_with_the_servers_words(tmp_path):
    with serve(lambda request, number: error(500, "cannot\nload the model")) as server:
        config = settings(server.base_url, retries=0, max_failures=3, concurrency=1)
        with pytest.raises(UserError, match=r"3 calls in a row failed.*500 \(cannot load the model\)"):
            ask(config, tmp_path, [question(f"q{i}") for i in range(9)])
        assert len(server.requests) == 3


@pytest.mark.parametrize("fault, key, told", [
    ("401", None, "OPENAI_API_KEY is not set"), ("401", "sk-wrong", "is not one that"),
    ("404", None, "llm.model 'planted' is not known"), ("quota", None, "the account has nothing left"),
])  # fmt: skip
def test_what_no_repetition_helps_stops_at_once_with_one_sentence(tmp_path, monkeypatch, fault, key, told):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    if key:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    with serve(faults(*[fault] * 99)) as server, pytest.raises(UserError, match=told) as raised:
        ask(settings(server.base_url, concurrency=1, retries=0), tmp_path, [question(f"q{i}") for i in range(9)])
    assert len(server.requests) == 1 and "sk-wrong" not in str(raised.value)


def test_a_server_that_is_down_is_told_at_the_start_and_in_the_middle(tmp_path):
    with serve(faults()) as server:
        config = settings(server.base_url, retries=0)
        ask(config, tmp_path, [question("before")])
    with pytest.raises(UserError, match="no server can be reached there .*start it, or correct it"):
        ask(config, tmp_path / "fresh", [question("q")])

    def die(request, number):
        if number == 3:
            server.close()
        return "ok" if number < 3 else Reply(drop=True)

    with serve(die) as server:
        config = settings(server.base_url, retries=1, concurrency=1)
        with pytest.raises(UserError, match="no server can be reached there .*what was answered is kept"):
            ask(config, tmp_path, [question(f"q{i}") for i in range(9)])
    with serve(faults()) as server:
        ask(settings(server.base_url), tmp_path, [question(f"q{i}") for i in range(9)])
        assert len(server.requests) == 9 - 3


def test_calls_at_a_time_are_bounded_and_results_keep_their_order(tmp_path):
    slow = lambda request, number: Reply(body=completion(request, request.messages[0]["content"]), delay=0.02)
    with serve(slow) as server:
        replies = ask(settings(server.base_url, concurrency=3), tmp_path, [question(f"q{i}") for i in range(30)])
        assert texts(replies) == [f"q{i}" for i in range(30)]
        assert server.most_in_flight == 3


def test_requests_keep_the_rate_repetitions_included(tmp_path):
    with serve(faults(*["500"] * 3, retry_after=0.001)) as server:
        start = time.monotonic()
        ask(settings(server.base_url, requests_per_minute=600), tmp_path, [question(f"q{i}") for i in range(12)])
        assert len(server.requests) == 15
        assert time.monotonic() - start > (15 - 10) / 10 * 0.9  # the first ten go at once


# ---------------------------------------------------------------------------------------------------------- JSON schema


def test_a_schema_is_sent_where_the_server_takes_it(tmp_path):
    with serve(faults()) as server:
        ask(settings(server.base_url), tmp_path, [question("q", schema=SCHEMA)])
        sent = server.requests[0].body["response_format"]
        assert sent["type"] == "json_schema" and sent["json_schema"]["schema"] == SCHEMA


@pytest.mark.parametrize("status", [400, 422])
def test_a_server_without_schemas_is_asked_in_words_and_found_out_once(tmp_path, status):
    def answer(request, number):
        return error(status, "unknown field response_format") if "response_format" in request.body else "words"

    with serve(answer) as server:
        requests = [question(f"q{i}", schema=SCHEMA) for i in range(6)]
        assert texts(ask(settings(server.base_url, concurrency=1), tmp_path, requests)) == ["words"] * 6
        assert len(server.requests) == 7


def test_what_is_too_long_is_not_taken_for_a_server_without_schemas(tmp_path):
    def answer(request, number):
        return error(400, "maximum context length is 16 tokens") if "long" in request.messages[0]["content"] else "ok"

    with serve(answer) as server:
        requests = [question("long", schema=SCHEMA), question("q", schema=SCHEMA)]
        replies = ask(settings(server.base_url, concurrency=1), tmp_path, requests)
        assert [reply.finish for reply in replies] == [llm.REJECTED, "stop"]
        assert "response_format" in server.requests[-1].body


@pytest.mark.parametrize("text, found", [
    ('{"a": 1}', {"a": 1}), ('```json\n{"a": 1}\n```', {"a": 1}), ('<think>{"a": 0} or</think> It is {"a": 1}.', {"a": 1}),
    ('Not {x} but {"a": {"b": 1}} is it', {"a": {"b": 1}}), ('{"a": 0} no, {"a": 1}', {"a": 1}), ("[1]", None), ("", None),
    ('{"a": 1', None), ("<think>{}", None),
])  # fmt: skip
def test_json_is_found_in_whatever_stands_around_it(text, found):
    assert llm.json_object(text) == found


# -------------------------------------------------------------------------------------------------------------- budget


@pytest.mark.parametrize(
    "limit, spent", [({"max_calls": 7}, 7), ({"max_tokens": 7 * 8 + 6}, 7), ({"max_cost": 7 * 8 + 6}, 7)]
)
def test_a_budget_stops_cleanly_is_never_passed_and_goes_on_when_raised(tmp_path, monkeypatch, limit, spent):
    # a call takes 3 + 5 tokens
    monkeypatch.setattr("jdmdr.llm.estimate.most_tokens", lambda text: 3)
    asked = [question(f"a b q{i}")._replace(params={"max_tokens": 5}) for i in range(20)]
    slow = lambda request, number: Reply(body=completion(request, "a b c d e"), delay=0.02)
    with serve(slow) as server:
        config = settings(server.base_url, price_in=1e6, price_out=1e6, **limit)
        for _ in range(2):
            with pytest.raises(llm.BudgetSpent, match=rf"llm.{[*limit][0]}=\d+ is spent .*every answer is kept"):
                ask(config, tmp_path, asked)
            assert len(server.requests) == spent and all(request.answered for request in server.requests)
        ask(settings(server.base_url), tmp_path, asked)
        assert len(server.requests) == 20


def test_repetitions_count_to_the_budget(tmp_path):
    with serve(faults(*["500"] * 9, retry_after=0.01)) as server:
        with pytest.raises(llm.BudgetSpent, match="llm.max_calls=2"):
            ask(settings(server.base_url, max_calls=2), tmp_path, [question("q")])
        assert len(server.requests) == 2


def test_a_budget_of_nothing_sends_nothing(tmp_path):
    with serve(faults()) as server, pytest.raises(llm.BudgetSpent, match="llm.max_calls=0 is spent"):
        ask(settings(server.base_url, max_calls=0), tmp_path, [question("q")])
    assert not server.requests
