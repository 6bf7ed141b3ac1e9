"""Where a model runs besides this process: other processes of this machine, or a Ray cluster."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal, TypeVar, cast

from nvembed.core.arguments import Precision, PrecisionChoice, is_settled
from nvembed.core.background import end_with_parent
from nvembed.core.errors import UserError
from nvembed.core.reporting import hold_note
from nvembed.model.encoder import (
    Encoder,
    EndpointEncoder,
    is_endpoint,
    load_encoder,
    settle_dtype,
)

Engine = Literal["local", "ray"]
T = TypeVar("T")


@dataclass(frozen=True)
class Loader:
    """A model that any process can load."""

    name: str  # folder, hub id or address of an endpoint
    dtype: Precision | None = None  # of the weights, settled; None is what was saved
    endpoint_model: str | None = None  # what an endpoint knows it by

    @cached_property
    def encoder(self) -> Encoder:
        """The model, loaded when it is first asked for."""
        if is_endpoint(self.name):
            return cast(Encoder, EndpointEncoder(self.name, self.endpoint_model or ""))
        return load_encoder(self.name, self.dtype)


@dataclass(frozen=True)
class Pool:
    """``size`` workers that have a model each: one calls ``function(encoder, *given)``."""

    size: int
    submit: Callable[..., Future[Any]]


class _Worker:
    """A model in another process: of this machine, or an actor of Ray."""

    def __init__(self, loader: Loader) -> None:
        os.environ["NVEMBED_PROGRESS"] = "0"
        self._loader = loader

    def call(self, function: Callable[..., T], *given: Any) -> T:
        return function(self._loader.encoder, *given)


@contextmanager
def process_pool(count: int, loader: Loader) -> Iterator[Pool]:
    """Processes that share the machine, ended with the block; what waits then is dropped.

    Each has a GPU of its own where there are some, and loads the model for its first call. One that
    died is a UserError.
    """
    context = multiprocessing.get_context("spawn")
    ranks = context.Queue()
    for rank in range(count):
        ranks.put(rank)
    executor = ProcessPoolExecutor(count, context, _start, (ranks, count, loader))

    def send(*call: Any) -> Future[Any]:
        with _death_told():
            return executor.submit(_call, *call)

    try:
        with _death_told():
            yield Pool(count, send)
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


@contextmanager
def _death_told() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool as error:
        raise UserError(
            "a process died, perhaps for lack of memory",
            hint="What is finished is kept: run it again, with fewer --processes",
        ) from error


def result_of(future: Future[T]) -> T:
    """Wait for a call, outside the block of its pool; a process that died is a ``UserError``."""
    with _death_told():
        return future.result()


_this_worker: _Worker


def _start(ranks: multiprocessing.Queue[int], count: int, loader: Loader) -> None:
    import torch

    global _this_worker
    end_with_parent(lambda: os._exit(1))
    rank = ranks.get()
    if (gpus := torch.cuda.device_count()) > 0:
        torch.cuda.set_device(rank % gpus)
    else:
        torch.set_num_threads(max(torch.get_num_threads() // count, 1))
    _this_worker = _Worker(loader)


def _call(*call: Any) -> Any:
    return _this_worker.call(*call)


def join_cluster() -> tuple[Any, str, int]:
    """Find the Ray cluster, or start one: ray, what a worker takes one of, and their number."""
    try:
        import ray
    except ModuleNotFoundError as error:
        raise UserError(
            "ray is not installed", where="--engine ray", hint="pip install 'nvembed[ray]'"
        ) from error
    if not ray.is_initialized():
        # Workers find the package where this process found it.
        source = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
        environment = {"env_vars": {"PYTHONPATH": path}}
        ray.init(log_to_driver=False, include_dashboard=False, runtime_env=environment)
    resources = ray.cluster_resources()
    kind = "GPU" if resources.get("GPU") else "CPU"
    return ray, kind, max(int(resources.get(kind, 1)), 1)


def settle_for(
    engine: Engine, model: str, dtype: PrecisionChoice | None, begun: Precision | None = None
) -> Precision | None:
    """Settle the type that a model computes in, by where it will run; see ``settle_dtype``.

    ``auto`` on a cluster is what a worker is fastest in.
    """
    if engine != "ray" or begun is not None:
        return settle_dtype(model, dtype, begun=begun)
    if is_settled(dtype):
        return dtype
    ray, kind, _ = join_cluster()
    from nvembed.kernels.machine import settle_precision

    ask: Any = ray.remote(settle_precision).options(**{f"num_{kind.lower()}s": 1})
    settled: Precision = ray.get(ask.remote(dtype))
    hold_note(f"computing in {settled} (what a worker is fastest in; fix with --dtype)")
    return settled


@contextmanager
def ray_pool(loader: Loader) -> Iterator[Pool]:
    """Workers of the cluster that is found, or of one started here: one GPU each, else one CPU.

    They need the model, but no common folder: texts and vectors go through Ray. Each of the first
    calls starts a worker, so few calls take few; two calls are on the way to each.
    """
    ray, kind, count = join_cluster()
    worker: Any = ray.remote(_Worker).options(**{f"num_{kind.lower()}s": 1})
    actors: list[Any] = []
    free: SimpleQueue[Any] = SimpleQueue()
    threads = ThreadPoolExecutor(2 * count, "nvembed-ray")

    def call(*given: Any) -> Any:
        actor = free.get()
        try:
            return ray.get(actor.call.remote(*given))
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, UserError) else error) from None
        finally:
            free.put(actor)

    def send(*given: Any) -> Future[Any]:
        if len(actors) < count:
            actors.append(worker.remote(loader))
            for _ in range(2):
                free.put(actors[-1])
        return threads.submit(call, *given)

    try:
        yield Pool(count, send)
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        for actor in actors:
            ray.kill(actor)
