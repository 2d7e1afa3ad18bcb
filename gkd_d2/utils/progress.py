"""How far a long loop of a tool is, on the standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

# Where there is no terminal: until the first line, and between two lines.
FIRST_SECONDS = 5.0
LINE_SECONDS = 30.0

T = TypeVar("T")


def track(items: Iterable[T], *, total: int, title: str) -> Iterator[T]:
    """Give the items of a loop, and say how many are done and how much time is left.

    On a terminal that is a bar. Elsewhere, as in a log file, it is a line after ``FIRST_SECONDS``, one every
    ``LINE_SECONDS``, and one after the last item; none of a loop that ends before the first.

    Args:
        items: what the loop is over.
        total: their number.
        title: what they are, such as "images".
    """
    if sys.stderr.isatty():
        yield from tqdm(items, total=total, desc=title, dynamic_ncols=True)
        return
    begin = time.monotonic()
    due = begin + FIRST_SECONDS
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now >= due or (done == total and now - begin >= FIRST_SECONDS):
            left = (now - begin) / done * (total - done)
            end = f"{duration(left)} left" if done < total else f"in {duration(now - begin)}"
            print(f"{title}: {done} of {total}, {end}", file=sys.stderr, flush=True)
            due = now + LINE_SECONDS


def duration(seconds: float) -> str:
    """A time in words, such as "40 s", "12 min" or "3 h 20 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
