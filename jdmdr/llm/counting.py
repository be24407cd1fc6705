"""What a stage would send, found out by running it with something that only counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from jdmdr.llm.client import Client, Reply, Request
from jdmdr.llm.estimate import Ask


class Counter:
    """Stands in for a client: answers from the log what is there and counts the rest, each call once, as if it were answered
    by `assumed(request)`."""

    def __init__(self, client: Client, assumed: Callable[[Request], str]):
        self._client, self.assumed = client, assumed
        self.missing: dict[str, int] = {}  # key: bytes of the prompt

    async def complete(self, request: Request) -> Reply:
        key = self._client.key(request)
        if reply := self._client.known(key):
            return reply
        self.missing[key] = request.bytes
        return Reply(self.assumed(request), "stop")


def missing(client: Client, requests: Iterable[Request]) -> dict[str, int]:
    """Those that the log has no answer to: bytes of the prompt by key."""
    keys = ((client.key(request), request) for request in requests)
    return {key: request.bytes for key, request in keys if client.known(key) is None}


def ask(missing: dict[str, int], most_reply_tokens: int) -> Ask:
    return Ask(len(missing), sum(missing.values()), most_reply_tokens)
