"""Where a model runs besides this process: other processes of this machine, or a Ray cluster.

Both kinds of pool take ``submit(function, *given)`` and call ``function(encoder, *given)`` in a
worker that has loaded the model. In processes each has a GPU of its own where there are some.
"""

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
from typing import Any, Literal, Protocol, TypeVar, cast

from nvembed.core.background import end_with_parent
from nvembed.core.dtypes import Precision, PrecisionChoice
from nvembed.core.errors import UserError
from nvembed.core.reporting import hold_note
from nvembed.encoding.encoder import Encoder, load_encoder, settle_dtype
from nvembed.encoding.endpoint import EndpointEncoder, is_endpoint

Engine = Literal["local", "ray"]
T = TypeVar("T")

_SOURCE = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Loader:
    """A model that any process can load.

    Args:
        name: folder, hub id or address of an endpoint.
        dtype: of the weights; settled, or ``None`` for what was saved.
        endpoint_model: what an endpoint knows it by.
    """

    name: str
    dtype: Precision | None = None
    endpoint_model: str | None = None

    @cached_property
    def encoder(self) -> Encoder:
        """The model, loaded when it is first asked for."""
        if is_endpoint(self.name):
            return cast(Encoder, EndpointEncoder(self.name, self.endpoint_model or ""))
        return load_encoder(self.name, self.dtype)


class Pool(Protocol):
    """Workers that have a model each."""

    @property
    def size(self) -> int:
        """How many they are."""
        ...

    def submit(self, function: Callable[..., T], /, *given: Any) -> Future[T]:
        """Call ``function(encoder, *given)`` in a worker."""
        ...


# --- Processes ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProcessPool:
    """Processes of this machine, see ``process_pool``."""

    size: int
    executor: ProcessPoolExecutor

    def submit(self, function: Callable[..., T], /, *given: Any) -> Future[T]:
        """See ``Pool``."""
        with _death_told():
            return self.executor.submit(_call, function, *given)


@contextmanager
def process_pool(count: int, loader: Loader) -> Iterator[ProcessPool]:
    """Processes that share the machine, ended with the block; what waits then is dropped.

    A process loads the model for its first call, which raises what is wrong with it.

    Raises:
        UserError: a process died.
    """
    context = multiprocessing.get_context("spawn")
    ranks = context.Queue()
    for rank in range(count):
        ranks.put(rank)
    executor = ProcessPoolExecutor(count, context, _start, (ranks, count, loader))
    try:
        with _death_told():
            yield ProcessPool(count, executor)
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
    """Wait for a call; a process that died is a ``UserError``."""
    with _death_told():
        return future.result()


_loader: Loader | None = None


def _start(ranks: multiprocessing.Queue[int], count: int, loader: Loader) -> None:
    import torch

    global _loader
    end_with_parent(lambda: os._exit(1))
    rank = ranks.get()
    if (gpus := torch.cuda.device_count()) > 0:
        torch.cuda.set_device(rank % gpus)
    else:
        torch.set_num_threads(max(torch.get_num_threads() // count, 1))
    os.environ["NVEMBED_PROGRESS"] = "0"
    _loader = loader


def _call(function: Callable[..., T], *given: Any) -> T:
    assert _loader is not None
    return function(_loader.encoder, *given)


# --- Ray ------------------------------------------------------------------------------------------


def join_cluster() -> tuple[Any, str, int]:
    """Find the Ray cluster, or start one here.

    Returns:
        ray; what a worker takes one of: ``"GPU"`` where the cluster has any, else ``"CPU"``; how
        many of these there are.

    Raises:
        UserError: ray is not installed.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        raise UserError(
            "ray is not installed", where="--engine ray", hint="pip install 'nvembed[ray]'"
        ) from error
    if not ray.is_initialized():
        # Workers find the package where this process found it.
        path = os.pathsep.join(filter(None, [str(_SOURCE), os.environ.get("PYTHONPATH")]))
        environment = {"env_vars": {"PYTHONPATH": path}}
        ray.init(log_to_driver=False, include_dashboard=False, runtime_env=environment)
    resources = ray.cluster_resources()
    kind = "GPU" if resources.get("GPU") else "CPU"
    return ray, kind, max(int(resources.get(kind, 1)), 1)


def settle_for(
    engine: Engine, model: str, dtype: PrecisionChoice | None, begun: Precision | None = None
) -> Precision | None:
    """Settle the type that a model computes in, by where it will run; see ``settle_dtype``."""
    if engine == "ray" and begun is None:
        return settle_by_ray(dtype)
    return settle_dtype(model, dtype, begun=begun)


def settle_by_ray(dtype: PrecisionChoice | None) -> Precision | None:
    """Replace ``auto`` by what a worker of the cluster is fastest in; see ``settle_precision``."""
    if dtype != "auto":
        return dtype
    ray, kind, _ = join_cluster()
    from nvembed.kernels.precision import settle_precision

    ask: Any = ray.remote(settle_precision).options(**{f"num_{kind.lower()}s": 1})
    settled: Precision = ray.get(ask.remote("auto"))
    hold_note(f"computing in {settled} (what a worker is fastest in; fix with --dtype)")
    return settled


class _RayWorker:
    """An actor of Ray with a model."""

    def __init__(self, loader: Loader) -> None:
        os.environ["NVEMBED_PROGRESS"] = "0"
        self._loader = loader

    def call(self, function: Callable[..., T], *given: Any) -> T:
        return function(self._loader.encoder, *given)


class RayPool:
    """Actors of a Ray cluster, two calls on the way to each; see ``ray_pool``.

    Each of the first ``size`` calls starts one, so few calls take few workers.
    """

    def __init__(self, ray: Any, start: Callable[[], Any], size: int) -> None:
        self.size = size
        self.actors: list[Any] = []
        self._ray = ray
        self._start = start
        self._free: SimpleQueue[Any] = SimpleQueue()
        self.threads = ThreadPoolExecutor(2 * size, "nvembed-ray")

    def submit(self, function: Callable[..., T], /, *given: Any) -> Future[T]:
        """See ``Pool``."""
        if len(self.actors) < self.size:
            self.actors.append(self._start())
            for _ in range(2):
                self._free.put(self.actors[-1])
        return self.threads.submit(self._call, function, *given)

    def _call(self, function: Callable[..., Any], *given: Any) -> Any:
        actor = self._free.get()
        try:
            return self._ray.get(actor.call.remote(function, *given))
        except self._ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, UserError) else error) from None
        finally:
            self._free.put(actor)


@contextmanager
def ray_pool(loader: Loader) -> Iterator[RayPool]:
    """Workers of the cluster that is found, or of one started here: one GPU each, else one CPU.

    They need the model, but no common folder: texts and vectors go through Ray.

    Raises:
        UserError: ray is not installed.
    """
    ray, kind, count = join_cluster()
    worker: Any = ray.remote(_RayWorker).options(**{f"num_{kind.lower()}s": 1})
    pool = RayPool(ray, lambda: worker.remote(loader), count)
    try:
        yield pool
    finally:
        pool.threads.shutdown(wait=False, cancel_futures=True)
        for actor in pool.actors:
            ray.kill(actor)
