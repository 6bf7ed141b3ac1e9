"""A thread beside the one that computes: prefetch, write-behind, or watching the parent process.

Memory holds few items. It pays where both let go of Python's lock, as tokenizers, torch and files
do.
"""

from __future__ import annotations

import multiprocessing
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")

_END = object()


def prefetch(items: Iterable[Item], count: int = 1) -> Iterator[Item]:
    """Take items in a thread, before they are asked for.

    Args:
        items: are made one after the other; what they raise is raised here, in its place.
        count: how many are made before the first of them is asked for, at least 1.
    """
    source = iter(items)

    def take() -> object:
        return next(source, _END)

    with ThreadPoolExecutor(1, "nvembed-prefetch") as thread:
        waiting = deque(thread.submit(take) for _ in range(count))
        while (item := waiting.popleft().result()) is not _END:
            waiting.append(thread.submit(take))
            yield item  # type: ignore[misc]  # mypy cannot tell the end from an item


def write_behind(items: Iterable[Item], use: Callable[[Item], object]) -> None:
    """Use each item in a thread while the next one is made.

    Raises:
        Exception: whatever ``use`` raises; no further item is used then.
    """
    with ThreadPoolExecutor(1, "nvembed-write-behind") as thread:
        last: Future[object] | None = None
        for item in items:
            if last is not None:
                last.result()
            last = thread.submit(use, item)
        if last is not None:
            last.result()


def end_with_parent(end: Callable[[], object]) -> None:
    """Call ``end`` from a thread once the process that started this one is gone, killed or not."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        end()

    threading.Thread(target=watch, daemon=True).start()
