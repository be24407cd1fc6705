"""Progress bars with rate and ETA, and the lines printed between them."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable

import tqdm

from jdmdr import heartbeat, processes


class _Bar(tqdm.tqdm):
    """A bar that the heartbeat tells of too."""

    def update(self, n: float | None = 1) -> bool | None:
        shown = super().update(n)
        if not self.disable:
            heartbeat.beat(doing=self.desc.strip(), unit=self.unit.strip(), done=self.n, first=self.initial,
                           total=self.total, began=self.start_t)  # fmt: skip
        return shown


def bar(iterable: Iterable | None, what: str, unit: str, total: int | None = None, initial: int = 0) -> tqdm.tqdm:
    """A bar on stderr; in a log file it prints a line every 30 seconds at most."""
    interactive = sys.stderr.isatty()
    return _Bar(iterable, desc=f"{what:<18}", unit=f" {unit}", total=total, initial=initial, dynamic_ncols=interactive,
                mininterval=0.2 if interactive else 30, maxinterval=1 if interactive else 60,
                ascii=None if interactive else True, leave=True, disable=not processes.leads())  # fmt: skip


def say(line: str) -> None:
    """Prints a line without breaking a bar; of several processes the first speaks."""
    if processes.leads():
        tqdm.tqdm.write(line, file=sys.stderr)


def size(number: float) -> str:
    """Bytes in the largest unit that leaves a figure of 1 or more."""
    power = min(int(math.log10(max(number, 1)) / 3), 5)
    return f"{number / 1000**power:,.1f} {('B', 'kB', 'MB', 'GB', 'TB', 'PB')[power]}" if power else f"{number:.0f} B"


def close_bars() -> None:
    """Ends the line of every open bar, so that what is printed next stands on its own."""
    for open_bar in list(tqdm.tqdm._instances):
        open_bar.close()
