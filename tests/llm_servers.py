"""Real OpenAI-compatible servers on loopback: one that misbehaves by a script, one that answers from planted labels, and
`transformers serve` with a tiny random Qwen3.

    with serve(faults("500", "text", retry_after=0)) as server:
        client = ...(base_url=server.base_url)
    server.requests      every request in the order of arrival
    server.repeats()     requests that were sent again although they had been answered
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import json
import pathlib
import re
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

HERE = pathlib.Path(__file__).parent
MODEL = "planted"


@dataclasses.dataclass(frozen=True)
class Reply:
    """What the server does with one request.

    `cut` sends so much of the body and then closes the connection, which the header promised in full; `drop` closes it
    without a byte; `delay` is slept before anything is sent, in seconds.
    """

    status: int = 200
    body: Any = None  # JSON, or bytes sent as they are
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    delay: float = 0.0
    cut: float = 1.0
    drop: bool = False


@dataclasses.dataclass
class Request:
    path: str
    body: dict[str, Any]
    authorization: str | None
    answered: bool = False  # with status 200, in full
    in_flight: int = 0  # requests under way when it came, itself included

    @property
    def messages(self) -> list[dict[str, str]]:
        return self.body["messages"]

    @property
    def key(self) -> str:
        return json.dumps(self.body, sort_keys=True)


# request, its number from 0 -> what is done with it; a string is the text of a good reply
Answer = Callable[[Request, int], Reply | str]


class Server:
    """Listens on a free port of loopback until it is closed; counts and keeps every request."""

    def __init__(self, answer: Answer, port: int = 0):
        self.answer, self.requests = answer, []
        self._lock, self._in_flight = threading.Lock(), 0
        self._http = _Http(("127.0.0.1", port), _Handler)
        self._http.owner = self
        self.port = self._http.server_address[1]
        self.base_url = f"http://127.0.0.1:{self.port}/v1"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def repeats(self) -> list[Request]:
        """Requests equal to one that had been answered before they came."""
        answered, found = set(), []
        for request in self.requests:
            if request.key in answered:
                found.append(request)
            if request.answered:
                answered.add(request.key)
        return found

    @property
    def most_in_flight(self) -> int:
        return max((request.in_flight for request in self.requests), default=0)

    def arrived(self, path: str, body: dict[str, Any], authorization: str | None) -> tuple[Request, int]:
        with self._lock:
            self._in_flight += 1
            request = Request(path, body, authorization, in_flight=self._in_flight)
            self.requests.append(request)
            return request, len(self.requests) - 1

    def left(self, request: Request, whole: bool) -> None:
        with self._lock:
            self._in_flight -= 1
            request.answered = whole


@contextlib.contextmanager
def serve(answer: Answer, port: int = 0) -> Iterator[Server]:
    server = Server(answer, port)
    try:
        yield server
    finally:
        server.close()


class _Http(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, client_address):
        """A client that went away (killed, timed out) is what these tests are about."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self):
        server = self.server.owner
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        request, number = server.arrived(self.path, body, self.headers["Authorization"])
        whole = False
        try:
            whole = self._send(request, server.answer(request, number))
        finally:
            server.left(request, whole)

    def _send(self, request: Request, reply: Reply | str) -> bool:
        reply = Reply(body=completion(request, reply)) if isinstance(reply, str) else reply
        time.sleep(reply.delay)
        if reply.drop:
            self.close_connection = True
            return False
        payload = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        self.send_response(reply.status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": len(payload),
            **reply.headers,
        }.items():
            self.send_header(name, str(value))
        self.end_headers()
        sent = payload[: int(len(payload) * reply.cut)]
        self.wfile.write(sent)
        self.close_connection = self.close_connection or len(sent) < len(payload)
        return reply.status == 200 and len(sent) == len(payload)

    def log_message(self, *_):
        pass


# ------------------------------------------------------------------------------------------------------ single replies


def completion(request: Request, text: str | None, finish: str = "stop", refusal: str | None = None) -> dict[str, Any]:
    """The body of a chat completion; a token is a word."""
    sent = sum(len(str(message["content"]).split()) for message in request.messages)
    written = len((text or "").split())
    return {
        "id": f"chatcmpl-{time.monotonic_ns()}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": request.body["model"],
        "choices": [
            {
                "index": 0,
                "finish_reason": finish,
                "message": {"role": "assistant", "content": text, "refusal": refusal},
            }
        ],
        "usage": {"prompt_tokens": sent, "completion_tokens": written, "total_tokens": sent + written},
    }


def error(status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None) -> Reply:
    body = {"error": {"message": message, "type": "error", "param": None, "code": code}}
    return Reply(status, body, headers or {})


SAMPLES = {  # a sentence in another language and writing than most queries of the test data
    "el": "Αυτή είναι μια πρόταση στα ελληνικά που δεν ζήτησε κανείς.",
    "ja": "これは誰も頼んでいない日本語の文です。",
}


def fault(name: str, request: Request, text: str, *, delay: float, retry_after: float | None) -> Reply | str:
    """One behaviour by its name; `text` is what a good reply says."""
    again = {} if retry_after is None else {"Retry-After": str(retry_after)}
    match name:
        case "text":
            return text
        case "slow":
            return Reply(body=completion(request, text), delay=delay)
        case "drop":
            return Reply(drop=True)
        case "429":
            return error(429, "Rate limit reached", "rate_limit_exceeded", again)
        case "500" | "502" | "503":
            return error(int(name), "the server had an error", headers=again)
        case "quota":
            return error(429, "You exceeded your current quota", "insufficient_quota")
        case "401":
            return error(401, "Incorrect API key provided", "invalid_api_key")
        case "404":
            return error(404, f"The model `{request.body['model']}` does not exist.", "model_not_found")
        case "too long":
            return error(
                400,
                "This model's maximum context length is 16 tokens. However, you requested 99 tokens.",
                "context_length_exceeded",
            )
        case "malformed":
            return Reply(body=b'{"id": "chatcmpl-1", "choices": [{"index": 0, "message": {"role"')
        case "no choices":
            return Reply(body={**completion(request, text), "choices": []})
        case "html":
            return Reply(body=b"<html><body>502 Bad Gateway</body></html>", headers={"Content-Type": "text/html"})
        case "half":
            return Reply(body=completion(request, text), cut=0.5)
        case "refusal":
            return Reply(body=completion(request, None, refusal="I cannot help with that."))
        case "filtered":
            return Reply(body=completion(request, "", finish="content_filter"))
        case "length":
            return Reply(body=completion(request, text[: len(text) // 2], finish="length"))
        case "empty":
            return ""
        case "prose":
            return "The candidate seems fine to me, though I would not swear to it."
        case "wrong language":
            return SAMPLES["el"]
    raise ValueError(name)


def faults(
    *script: str, text: str | Callable[[Request], str] = "ok", delay: float = 5.0, retry_after: float | None = None
) -> Answer:
    """The behaviours of `script` (see `fault`) in turn, one a request; then good replies for ever."""

    def answer(request: Request, number: int) -> Reply | str:
        good = text if isinstance(text, str) else text(request)
        name = script[number] if number < len(script) else "text"
        return fault(name, request, good, delay=delay, retry_after=retry_after)

    return answer


# ------------------------------------------------------------------------------------------------------ planted labels


def parts(request: Request) -> dict[str, str]:
    """What stands between the tags of the last message."""
    return dict(re.findall(r"<(\w+)>\n(.*?)\n</\1>", request.messages[-1]["content"], re.S))


def oracle(
    grade: Callable[[str, str], int],
    summarise: Callable[[str, str], str] = lambda question, passage: " ".join(passage.split()[:20]),
    ask: Callable[[str], str] = lambda summary: " ".join(summary.split()[:6]),
) -> Answer:
    """Answers every prompt of the LLM stages.

    `grade(question, candidate)` is both criteria of the judge; a summary is made of (question, passage), a query of the summary.
    """

    def answer(request: Request, number: int) -> str:
        found = parts(request)
        if "candidate" in found:
            label = grade(found["question"], found["candidate"])
            return json.dumps({"accuracy": label, "completeness": label})
        return ask(found["summary"]) if "summary" in found else summarise(found["question"], found["passage"])

    return answer


# ------------------------------------------------------------------------------------------- transformers, a real model


def make_tiny_qwen(python: str, directory: pathlib.Path) -> pathlib.Path:
    """A random Qwen3 of two layers with a tokenizer and a chat template of its own, by the transformers of `python`."""
    _checked([python, HERE / "parity" / "make_tiny_qwen.py", directory])
    return directory


def _checked(command: Sequence[Any]) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


@contextlib.contextmanager
def transformers_serve(python: str, log: pathlib.Path, seconds: float = 120) -> Iterator[str]:
    """The base URL of `transformers serve`; it loads any model by the path that a request names."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [pathlib.Path(python).with_name("transformers"), "serve", "--device", "cpu", "--port", port]
    with open(log, "w") as out:
        process = subprocess.Popen(list(map(str, command)), stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + seconds
        while not _healthy(f"http://localhost:{port}/health"):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.2)
        yield f"http://localhost:{port}/v1"
    finally:
        process.terminate()
        process.wait(30)


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as reply:
            return reply.status == 200
    except (OSError, urllib.error.URLError):
        return False
