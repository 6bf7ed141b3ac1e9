"""The models of a server by name: loaded when asked for, unloaded where another needs the place."""

from __future__ import annotations

import asyncio
import gc
import itertools
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from nvembed.core.errors import UserError
from nvembed.serving.config import ServerConfig
from nvembed.serving.engines import EncoderEngine
from nvembed.serving.errors import RequestError
from nvembed.serving.service import QUERY, Service
from nvembed.serving.telemetry import Metrics, log_event


@dataclass(frozen=True)
class Source:
    """A model that can be loaded."""

    names: tuple[str, ...]  # the first for answers
    load: Callable[[], EncoderEngine]  # takes its time; called in any thread


@dataclass(eq=False)
class _Hosted:
    source: Source
    service: Service | None = None  # while it is loaded
    users: int = 0  # requests that need it, also those that wait for it
    used: int = 0  # when the last of them ended; more is later
    loading: asyncio.Task[None] | None = None


class Models:
    """At most ``loaded_models`` in memory; who had no request for longest makes room for another.

    A model with requests under way stays. Where all have some, whoever asks for another waits.
    """

    def __init__(
        self,
        first: EncoderEngine,
        sources: Sequence[Source],
        config: ServerConfig,
        metrics: Metrics,
    ) -> None:
        self._config = config
        self._metrics = metrics
        self._hosted = [_Hosted(source) for source in sources]
        own = {name: one for one in self._hosted for name in one.source.names}
        self._by_name = own | {name + QUERY: one for name, one in own.items()} | own
        self.names = tuple(self._by_name)
        # Where it is the only one, for the OpenAPI document.
        self.width = first.dimension if len(sources) == 1 else None
        self._hosted[0].service = self._service(first, sources[0])
        self._clock = itertools.count(1)
        self._one_load = asyncio.Lock()
        self._freed = asyncio.Event()
        self._closing = False
        metrics.loaded_models.set_function(lambda: len(self._loaded()))
        metrics.queued_tokens.set_function(
            lambda: sum(one.batcher.scheduler.waiting_tokens for one in self._services())
        )
        metrics.queued_requests.set_function(
            lambda: sum(one.batcher.scheduler.waiting_jobs for one in self._services())
        )

    def start(self) -> None:
        """Start the threads of the first model."""
        for service in self._services():
            service.batcher.start()

    def close(self) -> None:
        """Finish what was accepted and stop all threads."""
        self._closing = True
        for one in self._hosted:
            if one.loading is not None:
                one.loading.cancel()
        for service in self._services():
            service.close()

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return not self._closing and all(one.batcher.ready for one in self._services())

    def find(self, name: str | None) -> _Hosted:
        """Return a model by any of its names, the first where none is asked for; or 404."""
        if name is None:
            return self._hosted[0]
        if name not in self._by_name:
            message = f"no model of that name here; ask for {' or '.join(map(repr, self.names))}"
            raise RequestError(404, message, "model_not_found", param="model")
        return self._by_name[name]

    @asynccontextmanager
    async def using(self, name: str | None) -> AsyncIterator[Service]:
        """Hold a model, which is loaded before; a RequestError where it is unknown or cannot be."""
        hosted = self.find(name)
        hosted.users += 1
        try:
            if hosted.service is None:
                hosted.loading = hosted.loading or asyncio.create_task(self._load(hosted))
                await asyncio.shield(hosted.loading)  # others wait for it, or will ask again
            if hosted.service is None:
                message = "this model cannot be loaded; ask who runs the server"
                raise RequestError(503, message, "model_fault", retry_seconds=60)
            as_queries = name is not None and name not in hosted.source.names
            yield hosted.service.of_queries() if as_queries else hosted.service
        finally:
            hosted.users -= 1
            hosted.used = next(self._clock)
            self._freed.set()

    async def _load(self, hosted: _Hosted) -> None:
        source, start = hosted.source, time.perf_counter()
        try:
            async with self._one_load:
                await self._make_room()
                engine = await asyncio.to_thread(source.load)
                service = self._service(engine, source)
                service.batcher.start()
                hosted.service = service
            seconds = round(time.perf_counter() - start, 1)
            log_event("loaded", model=source.names[0], seconds=seconds)
        except Exception as error:  # whatever a library can raise; the server goes on
            told = str(error) if isinstance(error, UserError) else type(error).__name__
            log_event("load_fault", model=source.names[0], error=told)
        finally:
            hosted.loading = None

    async def _make_room(self) -> None:
        while len(loaded := self._loaded()) >= self._config.loaded_models:
            idle = [one for one in loaded if not one.users]
            if not idle:
                self._freed.clear()
                await self._freed.wait()
                continue
            oldest = min(idle, key=lambda one: one.used)
            service, oldest.service = oldest.service, None
            assert service is not None
            await asyncio.to_thread(service.close)
            del service
            await asyncio.to_thread(gc.collect)
            log_event("unloaded", model=oldest.source.names[0])

    def _service(self, engine: EncoderEngine, source: Source) -> Service:
        return Service(engine, source.names[0], self._config, self._metrics)

    def _loaded(self) -> list[_Hosted]:
        return [one for one in self._hosted if one.service is not None]

    def _services(self) -> list[Service]:
        return [one.service for one in self._hosted if one.service is not None]
