"""A hard budget in calls, tokens and money over everything that one log holds."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from ml_collections import ConfigDict

from jdmdr.types import UserError

TOKENS = "tokens"
MILLION = 1_000_000


class Spending(NamedTuple):
    calls: int  # requests to the server, repetitions included
    tokens: int  # of prompts and replies
    cost: float  # in the currency of llm.price_in and llm.price_out


class BudgetSpent(UserError):
    """What the next call may take does not fit into the budget any more."""


class Budget:
    """Holds back, for every call on its way, the most that it can take, so that no limit is ever passed.

    A call that does not fit waits for those on their way, which mostly take less than was held back for them.

    Args:
      config: the recipe's `llm` keys.
      spent: what the log holds already.
    """

    def __init__(self, config: ConfigDict, spent: Spending):
        self.limits = {"calls": config.max_calls, TOKENS: config.max_tokens, "cost": config.max_cost}
        self.prices = config.price_in, config.price_out
        self.spent = spent
        self.held = Spending(0, 0, 0.0)
        self._on_their_way = 0
        self._changed = asyncio.Condition()

    def cost(self, tokens_in: int, tokens_out: int) -> float:
        return (tokens_in * self.prices[0] + tokens_out * self.prices[1]) / MILLION

    async def hold(self, most: Spending) -> None:
        """Holds back what a call takes at most.

        Raises:
          BudgetSpent: it does not fit, and no call is on its way that could leave some of its share.
        """
        async with self._changed:
            while too_small := self._too_small(most):
                if not self._on_their_way:
                    raise BudgetSpent(self._sentence(too_small))
                await self._changed.wait()
            self._on_their_way += 1
            self.held = _added(self.held, most)

    async def settle(self, most: Spending, taken: Spending) -> None:
        """Gives back what was held for a call and counts what it took."""
        async with self._changed:
            self._on_their_way -= 1
            self.held = _added(self.held, most, -1)
            self.spent = _added(self.spent, taken)
            self._changed.notify_all()

    def hold_repetition(self) -> None:
        """Holds back one more request of a call on its way; raises BudgetSpent where it does not fit."""
        more = Spending(1, 0, 0.0)
        if too_small := self._too_small(more):
            raise BudgetSpent(self._sentence(too_small))
        self.held = _added(self.held, more)

    def _too_small(self, most: Spending) -> str | None:
        wanted = _added(_added(self.spent, self.held), most)._asdict()
        return next(
            (name for name, limit in self.limits.items() if limit is not None and wanted[name] > limit + 1e-9), None
        )

    def _sentence(self, name: str) -> str:
        limit, spent = self.limits[name], getattr(self.spent, name)
        amount = f"{spent:,.2f}" if name == "cost" else f"{spent:,}"
        return (
            f"llm.max_{name}={limit:g} is spent ({amount} so far, and the next call may not fit); "
            "raise it and run the same command: every answer is kept"
        )


def _added(one: Spending, other: Spending, sign: int = 1) -> Spending:
    return Spending(*(a + sign * b for a, b in zip(one, other, strict=True)))
