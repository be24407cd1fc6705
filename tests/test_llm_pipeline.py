"""All stages by one command, with a real server behind the judge and the writer of queries."""

import json
import os
import signal
import subprocess
import sys

import pytest
from conftest import REPO
from llm_servers import MODEL, make_tiny_qwen, oracle, parts, serve, transformers_serve

from jdmdr import workdir
from jdmdr.expand import read_rows

PYTHON = os.environ.get("JDMDR_TORCH_PYTHON")
MOST_CALLS = 300
N = 7  # negatives a query in configs/dmdr.py:smoke

pytestmark = pytest.mark.slow


def start(directory, base_url, model, *more, module="jdmdr.pipeline"):
    words = ["--config", "configs/dmdr.py:smoke", "--workdir", str(directory), f"--config.llm.base_url={base_url}",
             f"--config.llm.model={model}", "--config.llm.concurrency=2", *more]  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-m", module, *words], cwd=REPO, env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process):
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err[-3000:]
    return out


def check_whole(directory, model):
    """What a finished run has whatever the model said."""
    report = (directory / "report.md").read_text(encoding="utf-8")
    assert f"`{model}` judged the candidates." in report and f"`{model}` wrote new queries" in report
    assert model in (directory / "report.html").read_text(encoding="utf-8")
    assert json.loads((directory / "metrics.json").read_text())
    judged, short = (workdir.counts_of(directory, stage)["languages"] for stage in ("judge", "expand"))
    assert sorted(judged) == sorted(short) == ["en", "sw"]
    for lang in judged:
        assert judged[lang]["queries"] == 3
        for row in read_rows(directory / "negatives" / "train_aug" / f"{lang}.jsonl"):
            assert len(row["negative_passages"]) == N
    return judged, short


def test_planted_labels_with_a_kill_while_judging_and_one_while_expanding(tmp_path):
    """At most 300 calls, none of those that reached the log twice."""
    good = oracle(lambda question, candidate: 2 * (len(candidate) % 3 == 0), ask=lambda s: " ".join(s.split()[-5:]))
    sent = []

    def killing(purpose, count):
        """Answers, and kills the run at the count-th request of a purpose."""

        def answer(request, number):
            sent.append("judge" if "candidate" in parts(request) else "write")
            if sent.count(purpose) == count:
                os.kill(process.pid, signal.SIGKILL)
            return good(request, number)

        return answer

    with serve(good) as server:
        for kill in (("judge", 25), ("write", 4)):
            server.answer = killing(*kill)
            process = start(tmp_path, server.base_url, MODEL)
            _, err = process.communicate(timeout=900)
            assert process.returncode == -signal.SIGKILL, err[-3000:]
        server.answer = good
        finish(start(tmp_path, server.base_url, MODEL))
        assert len(server.requests) <= MOST_CALLS
        # at each kill two calls may have been answered and not yet logged
        assert len(server.repeats()) <= 4
        calls = len(server.requests)
        out = finish(start(tmp_path, server.base_url, MODEL))
        assert len(server.requests) == calls and "metrics:" in out
    judged, short = check_whole(tmp_path, MODEL)
    assert all(of["unjudged"] == 0 < of["dropped"] for of in judged.values())
    assert sum(of["from new queries"] for of in short.values()) > 0
    logged = [json.loads(line)["key"] for line in (tmp_path / "llm" / "calls.jsonl").read_text().splitlines()]
    assert len(logged) == len(set(logged)) == calls - len(server.repeats())


@pytest.mark.skipif(
    not PYTHON, reason="set JDMDR_TORCH_PYTHON; `make torch-env` makes an environment with a server in it"
)
def test_a_random_model_behind_transformers_serve(tmp_path):
    """Most pairs end unjudged, since it writes no grades; filling does the rest."""
    model = str(make_tiny_qwen(PYTHON, tmp_path / "qwen"))
    with transformers_serve(PYTHON, tmp_path / "serve.log") as base_url:
        finish(start(tmp_path / "w", base_url, model))
    judged, _ = check_whole(tmp_path / "w", model)
    assert all(of["votes"] > 0 for of in judged.values())
    log = [json.loads(line) for line in (tmp_path / "w" / "llm" / "calls.jsonl").read_text().splitlines()]
    assert 0 < sum(of["requests"] for of in log) <= MOST_CALLS and {of["model"] for of in log} == {model}
