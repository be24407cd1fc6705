"""What a stage will ask for, in numbers, before anything is sent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from ml_collections import ConfigDict
from tabulate import tabulate

from jdmdr.llm.log import Totals

BYTES_PER_TOKEN = 4  # of UTF-8, where the log has measured nothing
FEW_BYTES_PER_TOKEN, MANY_BYTES_PER_TOKEN = 1, 8  # byte-level vocabularies never take more tokens than bytes
FRAME_TOKENS = 64  # that a chat template puts around the messages, at most
REPLY_TOKENS = 20  # of a reply, where the log has measured nothing
SECONDS_PER_CALL = 1.0  # the same
MEASURED = 20  # answers from which on the log's own means are taken


class Ask(NamedTuple):
    """Calls of one kind that are not answered yet."""

    calls: float
    bytes: float  # UTF-8 of their prompts, all together
    most_reply_tokens: int  # of one reply


class Plan(NamedTuple):
    """Fewest, expected under stated assumptions, and most."""

    lower: Ask
    expected: Mapping[str, Ask]  # assumption in words: what is asked then
    upper: Ask


def tokens(text: str) -> int:
    return math.ceil(len(text.encode("utf-8", "replace")) / BYTES_PER_TOKEN)


def most_tokens(text: str) -> int:
    """No server counts more for a prompt of this text."""
    return len(text.encode("utf-8", "replace")) // FEW_BYTES_PER_TOKEN + FRAME_TOKENS


def numbers(plan: Plan, config: ConfigDict, log: Totals) -> dict[str, dict[str, float]]:
    """{column: {"calls", "tokens", "cost", "seconds"}}, the columns from the least to the most."""
    known = log.answers >= MEASURED and log.bytes > 0
    per_byte = log.tokens_in / log.bytes if known else 1 / BYTES_PER_TOKEN
    reply = log.tokens_out / log.answers if known else REPLY_TOKENS
    seconds = log.seconds / log.answers if known else SECONDS_PER_CALL

    def column(ask: Ask, per_byte: float, frame: float, reply: float) -> dict[str, float]:
        tokens_in, tokens_out = ask.bytes * per_byte + ask.calls * frame, ask.calls * reply
        cost = (tokens_in * config.price_in + tokens_out * config.price_out) / 1e6
        waits = ask.calls * seconds / config.concurrency
        if config.requests_per_minute:
            waits = max(waits, ask.calls * 60 / config.requests_per_minute)
        return {"calls": ask.calls, "tokens": tokens_in + tokens_out, "cost": cost, "seconds": waits}

    columns = {"lower bound": column(plan.lower, 1 / MANY_BYTES_PER_TOKEN, 0, 1)}
    columns |= {f"expected if {words}": column(ask, per_byte, 0, reply) for words, ask in plan.expected.items()}
    columns["upper bound"] = column(plan.upper, 1 / FEW_BYTES_PER_TOKEN, FRAME_TOKENS, plan.upper.most_reply_tokens)
    return columns


def table(plan: Plan, config: ConfigDict, log: Totals) -> str:
    """`numbers` for the terminal, with what they rest on."""
    found = numbers(plan, config, log)
    rows = [
        [name, f"{of['calls']:,.0f}", f"{of['tokens']:,.0f}", f"{of['cost']:,.2f}", _duration(of["seconds"])]
        for name, of in found.items()
    ]
    source = (
        f"as the {log.answers:,} answers of the log had them on average"
        if log.answers >= MEASURED
        else f"a token per {BYTES_PER_TOKEN} bytes, {REPLY_TOKENS} tokens a reply, {SECONDS_PER_CALL:g} s a call"
    )
    prices = "" if config.price_in or config.price_out else " llm.price_in and llm.price_out are 0: no cost is counted."
    return (
        tabulate(
            rows, ["", "calls", "tokens", "cost", "time"], disable_numparse=True, colalign=["left"] + ["right"] * 4
        )
        + f"\n\nExpected tokens and time: {source}; bounds: a token per {MANY_BYTES_PER_TOKEN} bytes and one a reply, "
        f"or a token per byte and the longest reply. {config.concurrency} calls at a time.{prices}\n"
        f"A request that fails is repeated up to {config.retries} times; llm.max_calls counts that too. "
        f"In the log already: {log.answers:,} answers for {log.requests:,} requests."
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
