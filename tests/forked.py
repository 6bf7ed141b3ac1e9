"""Run a function in several processes that see each other, as a launcher would start them.

Forked, because starting Python and importing torch again costs seconds per process.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import socket
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState


def in_processes(function: Callable[..., Any], *arguments: Any, count: int = 2) -> list[Any]:
    """Results of ``function(*arguments)`` in every process, in the order of their ranks."""
    outcomes = outcomes_in_processes(function, *arguments, count=count)
    errors = [str(value) for kind, value in outcomes if kind == "error"]
    assert not errors, "\n".join(errors)
    return [value for _, value in outcomes]


def outcomes_in_processes(
    function: Callable[..., Any], *arguments: Any, count: int = 2
) -> list[tuple[str, Any]]:
    """The same, as ``("result", value)`` or ``("error", traceback or "died")``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    places = [{"RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port} for rank in range(count)]
    started = [_start(function, arguments, place) for place in places]
    outcomes = []
    for _, pipe in started:
        try:
            answered = pipe.poll(60)
            outcomes.append(
                pickle.loads(pipe.recv_bytes()) if answered else ("error", "no answer in 60 s")
            )
        except EOFError:
            outcomes.append(("error", "died"))
    for process, _ in started:
        process.kill()
        process.join()
    return outcomes


def _start(
    function: Callable[..., Any], arguments: Any, place: dict[str, int]
) -> tuple[Any, Connection]:
    receiver, sender = multiprocessing.Pipe(duplex=False)
    with warnings.catch_warnings():
        # Python 3.12 warns of forks beside threads; the child runs on one thread of its own.
        warnings.simplefilter("ignore", DeprecationWarning)
        process = multiprocessing.get_context("fork").Process(
            target=_child, args=(sender, function, arguments, place), daemon=True
        )
        process.start()
    sender.close()
    return process, receiver


def _child(
    sender: Connection, function: Callable[..., Any], arguments: Any, place: dict[str, int]
) -> None:
    torch.set_num_threads(1)
    # torch 2.13 marks collectives that its own FSDP2 calls as deprecated.
    warnings.filterwarnings("ignore", message=".*is deprecated. Please use", category=FutureWarning)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ["LOCAL_RANK"] = os.environ["RANK"]
    os.environ["LOCAL_WORLD_SIZE"] = os.environ["WORLD_SIZE"]
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    os.environ["OMP_NUM_THREADS"] = "1"  # accelerate warns where it is not set
    try:
        outcome = ("result", function(*arguments))
    except BaseException:
        outcome = ("error", f"rank {place['RANK']}:\n{traceback.format_exc()}")
    # By value: multiprocessing would keep tensors in files of this process.
    sender.send_bytes(pickle.dumps(outcome))
    # Until it is killed: the first process keeps the store that the others may still ask.
    signal.pause()
