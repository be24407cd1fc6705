"""Calls to a language model behind any OpenAI-compatible server: cached, logged, bounded, resumable.

    with llm.open_client(config.llm, workdir) as client:

        async def summarise(passage: str) -> str | None:
            request = llm.Request(
                purpose="summary", about="en 12#0", version="summary-1", params={"temperature": 0.4, "max_tokens": 200},
                messages=[{"role": "user", "content": f"Summarise: {passage}"}],
            )
            reply = await client.complete(request)
            return reply.text if reply.finish == "stop" else None

        summaries = client.map(summarise, passages, "  summarising", "passages")

An answer that reached the log under `llm.cache` is never asked for again, so that a killed run goes on where it was, and with
`llm.max_calls=0` a log is replayed without a server. A refusal and a reply cut at max_tokens are answers too, and stay. What the
server does not take (finish "rejected", e.g. longer than its context) and what was given up after its repetitions (finish
"failed") comes back without text, and is asked again by the next run. What makes going on pointless is a `UserError`: no server, no such model, no
key, `llm.max_failures` failures in a row, or the budget (`BudgetSpent`). docs/llm.md has the keys.
"""

from jdmdr.llm.budget import BudgetSpent
from jdmdr.llm.client import FAILED, REFUSED, REJECTED, Client, Reply, Request, open_client
from jdmdr.llm.estimate import Ask, Plan
from jdmdr.llm.parse import json_object

__all__ = [
    "FAILED", "REFUSED", "REJECTED", "Ask", "BudgetSpent", "Client", "Plan", "Reply", "Request", "json_object", "open_client",
]  # fmt: skip
