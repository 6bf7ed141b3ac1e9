from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from nvembed.core.background import prefetch, write_behind


def test_items_come_in_order_and_no_more_than_one_is_waiting() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(6):
            made.append(number)
            yield number

    found = []
    for item in prefetch(items()):
        found.append(item)
        assert len(made) <= item + 3  # this one, the one that is ready, the one in the making
    assert found == made == list(range(6))
    assert list(prefetch(())) == []


def test_the_next_item_is_made_while_this_one_is_used() -> None:
    begun = [threading.Event() for _ in range(3)]

    def items() -> Iterator[int]:
        for number in range(3):
            begun[number].set()
            yield number

    for number in prefetch(items()):
        # Would wait for ever if the next item was made when it is asked for.
        assert all(event.wait(10) for event in begun[: number + 2])
        assert threading.current_thread() is threading.main_thread()


def test_an_error_comes_in_its_place() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise KeyError("two")

    found: list[int] = []
    with pytest.raises(KeyError, match="two"):
        found.extend(prefetch(items()))
    assert found == [1]


def test_used_behind_in_order_while_the_next_is_made() -> None:
    used: list[int] = []
    release = [threading.Event() for _ in range(3)]

    def items() -> Iterator[int]:
        for number in range(3):
            if number:
                release[number - 1].set()  # the item before may be used from now on only
            yield number
        release[2].set()

    def use(item: int) -> None:
        assert release[item].wait(10)
        used.append(item)

    write_behind(items(), use)
    assert used == [0, 1, 2]


def test_what_using_raises_stops_the_making() -> None:
    made = []

    def items() -> Iterator[int]:
        for number in range(9):
            made.append(number)
            yield number

    def use(item: int) -> None:
        raise OSError(f"disk {item}")

    with pytest.raises(OSError, match="disk 0"):
        write_behind(items(), use)
    assert made == [0, 1]
