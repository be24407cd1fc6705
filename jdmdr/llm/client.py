"""Calls to an OpenAI-compatible server: each is answered once, logged, and from then on read from the log."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import json
import os
import pathlib
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import aiolimiter
import httpx2
import openai
from ml_collections import ConfigDict

from jdmdr import progress, workdir
from jdmdr.llm import estimate
from jdmdr.llm.budget import Budget, Spending
from jdmdr.llm.log import Log
from jdmdr.types import UserError

Item, Result = TypeVar("Item"), TypeVar("Result")
REJECTED = "rejected"  # finish of a call that the server does not take as it is, such as one longer than its context
FAILED = "failed"  # finish of a call that was given up after its repetitions
GIVEN_UP = (REJECTED, FAILED)  # these are asked again by the next run
REFUSED = "refusal"  # finish of a reply that is a refusal; its text is the model's words for it
_REJECTIONS = (400, 413, 422)  # statuses
_CONNECT_SECONDS = 10.0
NO_KEY = "none"  # what a server without keys is sent, since the openai package wants one


class Request(NamedTuple):
    """One call. All of it but `purpose`, `about` and `schema` is the key that its answer is found by."""

    purpose: str  # the stage, for the log
    about: str  # what it asks about in a word or two, for the log: no key, no text
    version: str  # of the prompt: a changed prompt gets another one
    messages: Sequence[Mapping[str, str]]  # {"role", "content"}
    params: Mapping[str, Any]  # temperature, top_p, max_tokens, ...
    vote: int = 0  # tells apart calls that are to be sampled more than once
    schema: Mapping[str, Any] | None = None  # JSON schema of the reply, sent where the server takes one
    model: str = ""  # as the server names it; empty: llm.model

    @property
    def content(self) -> str:
        return "".join(message["content"] for message in self.messages)

    @property
    def bytes(self) -> int:
        """UTF-8 of its prompt."""
        return len(self.content.encode("utf-8", "replace"))


class Reply(NamedTuple):
    text: str  # "" for a refusal without words, and for what was given up
    finish: str  # stop, length, ... as the server says; REFUSED, REJECTED or FAILED
    tokens_in: int = 0
    tokens_out: int = 0


class _Counter:
    def __init__(self):
        self.requests = 0


_sent: contextvars.ContextVar[_Counter] = contextvars.ContextVar("requests of this call")


class Client:
    """Answers requests from the log, and from the server what is not there. Made by `open_client`.

    `complete` and `map` belong together: a stage hands `map` a coroutine function that awaits `complete` as often as it
    likes.
    """

    def __init__(self, config: ConfigDict, log: Log, loop: asyncio.Runner):
        self._config, self.log, self._loop = config, log, loop
        self.extra_body = json.loads(config.extra_body or "{}")
        totals = log.totals
        self.budget = Budget(config, Spending(totals.requests, totals.tokens_in + totals.tokens_out, totals.cost))
        self._secret = os.environ.get(config.api_key_from, "")
        self._slots = asyncio.Semaphore(config.concurrency)
        rate = config.requests_per_minute
        self._limiter = aiolimiter.AsyncLimiter(max(1, rate / 60), max(1, rate / 60) * 60 / rate) if rate else None
        self._server = openai.AsyncOpenAI(
            base_url=config.base_url, api_key=self._secret or NO_KEY, max_retries=config.retries,
            timeout=openai.Timeout(config.timeout, connect=_CONNECT_SECONDS),
            http_client=openai.DefaultAsyncHttpxClient(
                event_hooks={"request": [self._before_request], "response": [self._after_response]}
            ),
        )  # fmt: skip
        self._takes_schemas: bool | None = None  # not known before the first call with one
        self._on_their_way: dict[str, asyncio.Task[Reply]] = {}
        self._failures_in_a_row = self._answered = 0
        self._given_up: dict[
            str, tuple[int, str]
        ] = {}  # finish: how many since this was last told, and why the last one

    # ------------------------------------------------------------------------------------------------ for the stages

    def key(self, request: Request) -> str:
        """SHA-256 of what an answer depends on."""
        params = {**request.params, "extra_body": self.extra_body}
        return workdir.digest(
            self._model(request), request.version, [dict(m) for m in request.messages], params, request.vote
        )

    def known(self, key: str) -> Reply | None:
        """The answer that the log holds. In a replay what was given up then is given up again."""
        record = self.log.get(key)
        if record is None or "error" in record and self._config.max_calls != 0:
            return None
        return Reply(*(record.get(field, "") for field in Reply._fields))

    async def complete(self, request: Request) -> Reply:
        """The answer to a request; the same request on its way is waited for, not sent twice.

        Raises:
          UserError: the server cannot be used (it is down, refuses the key, does not know the model), or the budget is spent.
        """
        key = self.key(request)
        if reply := self.known(key):
            return reply
        if key not in self._on_their_way:
            task = asyncio.ensure_future(self._ask(request, key))
            self._on_their_way[key] = task
            task.add_done_callback(lambda _: self._on_their_way.pop(key))
        return await self._on_their_way[key]

    def map(
        self, work: Callable[[Item], Awaitable[Result]], items: Sequence[Item], what: str = "  asking", unit: str = "queries"
    ) -> list[Result]:  # fmt: skip
        """`work` of every item, several at a time, with a progress bar; results in the order of the items.

        The first error stops all of it; answers that came until then are in the log.
        """
        return self._run(self._map(work, items, what, unit))

    # ------------------------------------------------------------------------------------------------------- one call

    async def _ask(self, request: Request, key: str) -> Reply:
        most = self._most(request)
        async with self._slots:
            await self.budget.hold(most)
            taken, counter = Spending(0, 0, 0.0), _Counter()
            _sent.set(counter)
            try:
                start = time.monotonic()
                reply = await self._send(request)
                tokens = reply.tokens_in + reply.tokens_out
                taken = Spending(counter.requests, tokens, self.budget.cost(reply.tokens_in, reply.tokens_out))
                record = {
                    "key": key, "purpose": request.purpose, "about": request.about, "version": request.version,
                    "vote": request.vote, "model": self._model(request), "requests": counter.requests, "cost": taken.cost,
                    "seconds": round(time.monotonic() - start, 3), "bytes": request.bytes,
                    **reply._asdict(),
                }  # fmt: skip
                if reply.finish in GIVEN_UP:
                    record["error"] = record.pop("text")
                self.log.add(record)
            finally:
                await self.budget.settle(most._replace(calls=max(1, counter.requests)), taken)
        self._count(reply)
        return reply._replace(text="") if reply.finish in GIVEN_UP else reply

    async def _send(self, request: Request) -> Reply:
        schema = request.schema if self._takes_schemas is not False else None
        try:
            reply = await self._post(request, schema)
        except openai.APIStatusError as error:
            if error.status_code in _REJECTIONS and schema and self._takes_schemas is None:
                reply = await self._send_without_schema(request, error)
            else:
                reply = self._told(error, request)
        except openai.APIConnectionError as error:
            if isinstance(error.__cause__, (httpx2.ConnectError, httpx2.ConnectTimeout)):
                raise UserError(self._unreachable(error.__cause__)) from error
            if isinstance(error, openai.APITimeoutError):
                return Reply(f"no answer within llm.timeout={self._config.timeout:g} seconds", FAILED)
            return Reply(f"the connection broke ({error.__cause__ or error})", FAILED)
        else:
            if schema and reply.finish != FAILED:
                self._takes_schemas = True
        return reply

    async def _send_without_schema(self, request: Request, first: Exception) -> Reply:
        """Whether it was the schema that the server did not take."""
        try:
            reply = await self._post(request, None)
        except openai.APIStatusError:
            return self._told(first, request)
        if self._takes_schemas is None:
            progress.say("  the server takes no JSON schema; replies are read as text")
        self._takes_schemas = False
        return reply

    async def _post(self, request: Request, schema: Mapping[str, Any] | None) -> Reply:
        form = {}
        if schema:
            body = {"name": request.purpose, "schema": schema, "strict": True}
            form["response_format"] = {"type": "json_schema", "json_schema": body}
        found = await self._server.chat.completions.create(
            model=self._model(request), messages=list(request.messages), extra_body=self.extra_body or None,
            **request.params, **form,
        )  # fmt: skip
        choice = found.choices[0]
        refusal = getattr(choice.message, "refusal", None)
        text = choice.message.content or refusal or ""
        usage = found.usage
        tokens_in = usage.prompt_tokens if usage else estimate.tokens(request.content)
        tokens_out = usage.completion_tokens if usage else estimate.tokens(text)
        finish = REFUSED if refusal else str(choice.finish_reason)
        return Reply(text, finish, int(tokens_in), int(tokens_out))

    async def _before_request(self, http_request: httpx2.Request) -> None:
        """Of every request, repetitions included: they wait for the rate limit and count to the budget."""
        counter = _sent.get()
        if counter.requests:
            self.budget.hold_repetition()
        if self._limiter:
            await self._limiter.acquire()
        counter.requests += 1

    async def _after_response(self, response: httpx2.Response) -> None:
        """Turns a body that is no chat completion into a broken connection, which the openai package tries again."""
        if response.status_code == 200:
            try:
                message = json.loads(await response.aread())["choices"][0]["message"]
            except (ValueError, LookupError, TypeError):
                message = None
            if not isinstance(message, dict):
                raise httpx2.DecodingError("the reply is no chat completion", request=response.request)

    def _model(self, request: Request) -> str:
        return request.model or self._config.model

    def _most(self, request: Request) -> Spending:
        tokens_in, tokens_out = estimate.most_tokens(request.content), request.params.get("max_tokens", 0)
        return Spending(1, tokens_in + tokens_out, self.budget.cost(tokens_in, tokens_out))

    # ---------------------------------------------------------------------------------------------- what goes wrong

    def _told(self, error: openai.APIStatusError, request: Request) -> Reply:
        """What a status of the server means: an answer to this call, a failure, or the end of the run."""
        status, said = error.status_code, self._said(error)
        c = self._config
        model = f"the model {request.model!r}" if request.model else f"llm.model {c.model!r}"
        if status in (401, 403):
            found = f"is not one that {c.base_url} takes" if self._secret else "is not set"
            raise UserError(
                f"{c.base_url} answered {status}: the key in the environment variable {c.api_key_from} {found}; "
                f"set it, or name another variable with llm.api_key_from ({said})"
            ) from error
        if error.code == "insufficient_quota":
            raise UserError(
                f"llm.base_url {c.base_url}: the account has nothing left ({said}); what was answered is kept, and the same "
                "command goes on once it is topped up"
            ) from error
        if status == 404:
            raise UserError(
                f"{model} is not known to the server at llm.base_url {c.base_url}, or the address lacks "
                f"its path, mostly /v1 ({said})"
            ) from error
        return Reply(f"the server answered {status} ({said})", REJECTED if status in _REJECTIONS else FAILED)

    def _count(self, reply: Reply) -> None:
        """Stops the run after too many calls in a row that came to nothing; single ones may well be rejected."""
        if reply.finish not in GIVEN_UP:
            self._failures_in_a_row, self._answered = 0, self._answered + 1
            return
        self._given_up[reply.finish] = self._given_up.get(reply.finish, (0, ""))[0] + 1, reply.text
        self._failures_in_a_row += reply.finish == FAILED or not self._answered
        if self._failures_in_a_row >= self._config.max_failures:
            raise UserError(
                f"llm.base_url {self._config.base_url}: {self._failures_in_a_row} calls in a row failed, the last because "
                f"{reply.text}; what was answered is kept, and the same command goes on from here"
            )

    def _tell_given_up(self) -> None:
        for finish, (count, reason) in self._given_up.items():
            progress.say(
                f"  warning: {count:,} calls {finish}, the last because {reason}; the next run asks them again"
            )
        self._given_up = {}

    def _unreachable(self, error: BaseException) -> str:
        kept = (
            "what was answered is kept, and the same command goes on" if self._answered else "start it, or correct it"
        )
        return f"llm.base_url {self._config.base_url}: no server can be reached there ({error or type(error).__name__}); {kept}"

    def _said(self, error: openai.APIStatusError) -> str:
        """The server's own words in a line, without the key."""
        body = error.body if isinstance(error.body, Mapping) else {}
        said = " ".join(str(body.get("message") or error.message).split())[:300]
        return said.replace(self._secret, "***") if self._secret else said

    # ------------------------------------------------------------------------------------------------- many at a time

    async def _map(self, work: Callable[[Item], Awaitable[Result]], items: Sequence[Item], what: str, unit: str):
        results: list[Any] = [None] * len(items)
        waiting = iter(range(len(items)))
        bar = progress.bar(None, what, unit, total=len(items))

        async def worker() -> None:
            for index in waiting:  # neighbours in time share their prompt's beginning
                results[index] = await work(items[index])
                bar.set_postfix_str(self._spent(), refresh=False)
                bar.update()

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self._config.concurrency, len(items))):
                    group.create_task(worker())
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            bar.close()
        self._tell_given_up()
        return results

    def _spent(self) -> str:
        spent = self.budget.spent
        money = f", cost {spent.cost:,.2f}" if any(self.budget.prices) else ""
        return f"{spent.calls:,} calls, {spent.tokens:,} tokens{money}"

    def _run(self, work: Awaitable[Result]) -> Result:
        """Runs on the client's loop; SIGTERM ends the calls first and is then handled as it was before."""
        main = threading.current_thread() is threading.main_thread()
        before, terminated = signal.getsignal(signal.SIGTERM), []

        async def interruptible() -> Result:
            task = asyncio.current_task()
            if main:
                stop = lambda: (terminated.append(True), task.cancel())
                asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop)
            try:
                return await work
            finally:
                if main:
                    asyncio.get_running_loop().remove_signal_handler(signal.SIGTERM)
                    signal.signal(signal.SIGTERM, before)

        try:
            return self._loop.run(interruptible())
        except asyncio.CancelledError:
            if terminated and callable(before):
                before(signal.SIGTERM, None)
            raise

    async def _close(self) -> None:
        await self._server.close()


@contextlib.contextmanager
def open_client(config: ConfigDict, directory: pathlib.Path) -> Iterator[Client]:
    """A client of the recipe's `llm` keys, whose log lies in `llm.cache` or else in `directory`, for this process alone."""
    home = pathlib.Path(config.cache) if config.cache else directory / "llm"
    with workdir.locked(home, "llm.cache"), contextlib.closing(Log(home)) as log, asyncio.Runner() as loop:
        client = loop.run(_made(config, log, loop))
        try:
            yield client
        finally:
            loop.run(client._close())


async def _made(config: ConfigDict, log: Log, loop: asyncio.Runner) -> Client:
    return Client(config, log, loop)
