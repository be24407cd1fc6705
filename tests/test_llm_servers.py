"""The servers that other tests talk to do what those tests believe of them."""

import concurrent.futures
import http.client
import json
import os
import urllib.error
import urllib.request

import pytest
from llm_servers import MODEL, faults, make_tiny_qwen, serve, transformers_serve

PYTHON = os.environ.get("JDMDR_TORCH_PYTHON")


def ask(base_url, text="hello", model=MODEL, timeout=60, **more):
    """(status, parsed body)"""
    body = {"model": model, "messages": [{"role": "user", "content": text}], **more}
    request = urllib.request.Request(
        f"{base_url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def said(reply):
    return reply[1]["choices"][0]["message"]["content"]


def test_fault_server_follows_its_script_and_then_answers():
    with serve(faults("429", "500", "refusal", "wrong language", text="fine", retry_after=1)) as server:
        assert ask(server.base_url)[0] == 429 and ask(server.base_url)[0] == 500
        refused = ask(server.base_url)[1]["choices"][0]["message"]
        assert refused["content"] is None and refused["refusal"]
        assert "α" in said(ask(server.base_url))
        assert said(ask(server.base_url)) == said(ask(server.base_url, "again")) == "fine"
    assert [request.answered for request in server.requests] == [False, False, True, True, True, True]
    with pytest.raises(urllib.error.URLError):
        ask(server.base_url)


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("drop", http.client.RemoteDisconnected),
        ("half", http.client.IncompleteRead),
        ("malformed", json.JSONDecodeError),
        ("slow", TimeoutError),
    ],
)
def test_broken_replies_are_broken_on_the_wire(name, error):
    with serve(faults(name, delay=1)) as server:
        with pytest.raises(error):
            ask(server.base_url, timeout=0.2 if name == "slow" else 60)
        assert said(ask(server.base_url)) == "ok"


def test_requests_are_counted_with_their_concurrency_and_repeats_are_found():
    with serve(faults(*["slow"] * 4, delay=0.2)) as server:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda i: ask(server.base_url, f"question {i}"), range(4)))
        assert server.most_in_flight == 4 and not server.repeats()
        ask(server.base_url, "question 2", seed=7)
        ask(server.base_url, "question 2")
    assert [request.messages[0]["content"] for request in server.repeats()] == ["question 2"]


@pytest.mark.slow
@pytest.mark.skipif(
    not PYTHON, reason="set JDMDR_TORCH_PYTHON; `make torch-env` makes an environment with a server in it"
)
def test_transformers_serves_a_tiny_random_qwen(tmp_path):
    model = str(make_tiny_qwen(PYTHON, tmp_path / "qwen"))
    with transformers_serve(PYTHON, tmp_path / "serve.log") as base_url:
        status, reply = ask(base_url, "Say it in Swahili.", model, max_tokens=32, temperature=0.7, top_p=0.9)
    assert status == 200 and 1 <= reply["usage"]["completion_tokens"] <= 32
