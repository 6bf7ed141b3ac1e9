"""A thread beside the one that computes: prefetch, write-behind, or watching the parent process."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")

_END = object()


def prefetch(items: Iterable[Item]) -> Iterator[Item]:
    """Take items in a thread, one before it is asked for; its errors are raised here."""
    source = iter(items)
    with ThreadPoolExecutor(1, "nvembed-prefetch") as thread:
        waiting = thread.submit(next, source, _END)
        while (item := waiting.result()) is not _END:
            waiting = thread.submit(next, source, _END)
            yield item  # type: ignore[misc]  # mypy cannot tell the end from an item


def write_behind(items: Iterable[Item], use: Callable[[Item], object]) -> None:
    """Use each item in a thread while the next one is made; what ``use`` raises ends it."""
    with ThreadPoolExecutor(1, "nvembed-write-behind") as thread:
        last: Future[object] = thread.submit(object)
        for item in items:
            last.result()
            last = thread.submit(use, item)
        last.result()


def end_with_parent(end: Callable[[], object]) -> None:
    """Call ``end`` from a thread once the process that started this one is gone, killed or not."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        end()

    threading.Thread(target=watch, daemon=True).start()
