"""Several models in one server: by name, on demand, in bounded memory."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient

import nvembed.serving.server as serving_run
from hash_encoder import HashEncoder
from nvembed.cli.main import run
from nvembed.core.errors import ConfigError, ModelError
from nvembed.serving.config import ServerConfig
from nvembed.serving.engines import EmbedOptions, EncoderEngine, build_engine
from nvembed.serving.errors import RequestError
from nvembed.serving.models import Models, Source
from nvembed.serving.server import create_app, model_sources
from nvembed.serving.telemetry import Metrics
from serving_fakes import WIDTH, HeldEngine, make_config

WIDTHS = {"a": 16, "b": 24, "c": 32}


class Shelf:
    """Models that can be loaded, and a record of it."""

    def __init__(self, *names: str, limit: int = 2) -> None:
        self.loads: list[str] = []
        self.open = threading.Event()  # loading goes on
        self.open.set()
        self.broken: Exception | None = None
        self.sources = [Source((name, f"owner/{name}"), self._loader(name)) for name in names]
        self.config = make_config(loaded_models=limit)
        self.first = self.sources[0].load()

    def _loader(self, name: str) -> Callable[[], EncoderEngine]:
        def load() -> EncoderEngine:
            assert self.open.wait(10)
            self.loads.append(name)
            if self.broken is not None:
                raise self.broken
            return EncoderEngine(HashEncoder(WIDTHS[name]))

        return load

    def models(self) -> Models:
        made = Models(self.first, self.sources, self.config, Metrics())
        made.start()
        return made


def in_loop(models: Models, work: Callable[[], Any]) -> None:
    async def main() -> None:
        await asyncio.wait_for(work(), 20)

    try:
        asyncio.run(main())
    finally:
        models.close()


async def width(models: Models, name: str | None) -> int:
    async with models.using(name) as service:
        return service.engine.dimension


def loaded(models: Models) -> list[str]:
    return [one.source.names[0] for one in models._loaded()]


def test_the_longest_unused_is_unloaded() -> None:
    shelf = Shelf("a", "b", "c")
    models = shelf.models()

    async def work() -> None:
        assert await width(models, None) == await width(models, "owner/a") == 16
        assert await width(models, "b") == 24
        assert loaded(models) == ["a", "b"]
        assert await width(models, "a") == 16
        assert await width(models, "c") == 32  # in place of b
        assert loaded(models) == ["a", "c"]
        assert await width(models, "b") == 24
        assert loaded(models) == ["b", "c"]
        assert await width(models, None) == 16
        assert loaded(models) == ["a", "b"]

    in_loop(models, work)
    assert shelf.loads == ["a", "b", "c", "b", "a"]


def test_a_model_in_use_stays() -> None:
    shelf = Shelf("a", "b", limit=1)
    models = shelf.models()

    async def work() -> None:
        async with models.using("a") as service:
            other = asyncio.create_task(width(models, "b"))
            await asyncio.sleep(0.05)
            assert loaded(models) == ["a"]
            assert service.batcher.ready
        assert await other == 24
        assert loaded(models) == ["b"]
        assert not service.batcher.ready  # its threads have ended

    in_loop(models, work)


def test_many_ask_and_it_is_loaded_once() -> None:
    shelf = Shelf("a", "b", "c", limit=1)
    models = shelf.models()

    async def work() -> None:
        shelf.open.clear()
        tasks = [asyncio.create_task(width(models, name)) for name in "bcbcb"]
        await asyncio.sleep(0.05)
        tasks[0].cancel()  # whoever asked first leaves
        shelf.open.set()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert found[1:] == [32, 24, 32, 24]
        assert isinstance(found[0], asyncio.CancelledError)

    in_loop(models, work)
    assert shelf.loads == ["a", "b", "c"]


@pytest.mark.parametrize(
    "error", [ModelError("is gone", where="/home/me/model"), RuntimeError("secret"), MemoryError()]
)
def test_a_model_that_cannot_be_loaded(error: Exception) -> None:
    shelf = Shelf("a", "b", limit=1)
    models = shelf.models()

    async def work() -> None:
        shelf.broken = error
        for _ in range(2):
            with pytest.raises(RequestError) as caught:
                await width(models, "b")
            assert (caught.value.status, caught.value.code) == (503, "model_fault")
            assert not {"me", "secret"} & set(caught.value.message.replace("/", " ").split())
        shelf.broken = None
        assert await width(models, "b") == 24
        assert await width(models, "a") == 16

    in_loop(models, work)


def test_an_unloaded_model_is_gone() -> None:
    shelf = Shelf("a", "b", limit=1)
    models = shelf.models()
    first = weakref.ref(shelf.first)
    del shelf.first

    async def work() -> None:
        await width(models, "b")
        assert first() is None

    in_loop(models, work)


def test_closing_while_a_model_is_loaded() -> None:
    shelf = Shelf("a", "b")
    models = shelf.models()

    async def work() -> None:
        shelf.open.clear()
        task = asyncio.create_task(width(models, "b"))
        await asyncio.sleep(0.05)
        assert models.ready
        models.close()
        assert not models.ready
        shelf.open.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    in_loop(models, work)


# --- behind the routes ----------------------------------------------------------------------------

BODIES: dict[str, tuple[dict[str, Any], Callable[[Any], Sequence[float]]]] = {
    "/v1/embeddings": ({"input": "x y"}, lambda answer: answer["data"][0]["embedding"]),
    "/v2/embed": (
        {"texts": ["x y"], "input_type": "search_document"},
        lambda answer: answer["embeddings"]["float"][0],
    ),
    "/api/embed": ({"input": "x y"}, lambda answer: answer["embeddings"][0]),
    "/api/embeddings": ({"prompt": "x y"}, lambda answer: answer["embedding"]),
}


def test_every_route_takes_the_name_of_a_model() -> None:
    shelf = Shelf("a", "b", "c", limit=3)
    with TestClient(create_app(shelf.first, shelf.config, sources=shelf.sources)) as client:
        names = ["a", "owner/a", "b", "owner/b", "c", "owner/c"]
        listed = [*names, *(f"{name}:query" for name in names)]
        assert [row["id"] for row in client.get("/v1/models").json()["data"]] == listed
        assert [row["name"] for row in client.get("/api/tags").json()["models"]] == listed
        assert client.get("/v1/models/owner/b").json()["id"] == "owner/b"
        assert client.get("/v1/models/d").status_code == 404
        assert shelf.loads == ["a"]  # a list loads nothing
        for path, (body, vector) in BODIES.items():
            for name in ("c", None, "owner/b"):
                answer = client.post(path, json={**body, "model": name})
                assert answer.status_code == 200, answer.text
                oracle = HashEncoder(WIDTHS[(name or "a")[-1]]).encode_document(["x y"])[0]
                found = np.array(vector(answer.json()), dtype=np.float32)
                np.testing.assert_array_equal(found, oracle)
            assert client.post(path, json={**body, "model": "d"}).status_code == 404
        assert client.post("/v1/embeddings", json={"input": "x"}).json()["model"] == "a"
        short = {"input": "x", "model": "c", "dimensions": 32}
        assert client.post("/v1/embeddings", json=short).status_code == 200
        assert client.post("/v1/embeddings", json=short | {"model": "b"}).status_code == 400
        ranked = {"query": "x", "documents": ["x"], "model": "c"}
        assert client.post("/v1/rerank", json=ranked).json()["model"] == "c"
        shown = client.post("/api/show", json={"model": "b"}).json()["model_info"]
        assert shown["nvembed.embedding_length"] == 24
        assert client.get("/info").json()["model_id"] == "a"
        assert "nvembed_loaded_models 3.0" in client.get("/metrics").text
        assert client.get("/ready").status_code == 200
        paths = client.get("/openapi.json").json()["paths"]
        schema = paths["/v1/embeddings"]["post"]["requestBody"]["content"]["application/json"]
        fields = schema["schema"]["properties"]
        assert fields["model"]["anyOf"][0]["enum"] == listed
        assert "maximum" not in fields["dimensions"]["anyOf"][0]  # they differ


def test_loading_that_takes_longer_than_a_request() -> None:
    shelf = Shelf("a", "b")
    config = shelf.config.model_copy(
        update={"limits": shelf.config.limits.model_copy(update={"request_seconds": 0.1})}
    )
    with TestClient(create_app(shelf.first, config, sources=shelf.sources)) as client:
        shelf.open.clear()
        late = client.post("/v1/embeddings", json={"input": "x", "model": "b"})
        assert (late.status_code, late.json()["error"]["code"]) == (503, "timeout")
        assert client.post("/v1/embeddings", json={"input": "x"}).status_code == 200
        shelf.open.set()
        for _ in range(100):
            if client.post("/v1/embeddings", json={"input": "x", "model": "b"}).status_code == 200:
                break
        assert shelf.loads == ["a", "b"]


def test_queues_are_counted_together() -> None:
    engines = {"a": HeldEngine(), "b": HeldEngine()}
    sources = [Source((name,), lambda name=name: engines[name]) for name in engines]
    metrics = Metrics()
    models = Models(engines["a"], sources, make_config(), metrics)
    models.start()

    async def embed(name: str, text: str) -> None:
        async with models.using(name) as service:
            items = service.engine.prepare([text], EmbedOptions())
            await service.batcher.embed(items, name)

    async def work() -> None:
        tasks = []
        for name, engine in engines.items():
            engine.open.clear()
            tasks.append(asyncio.create_task(embed(name, "held")))
            await asyncio.to_thread(engine.began.wait, 10)
            tasks.append(asyncio.create_task(embed(name, "one two three")))
            await asyncio.sleep(0.01)
        page = metrics.render().decode()
        assert "nvembed_queued_tokens 6.0" in page
        assert "nvembed_queued_requests 2.0" in page
        for engine in engines.values():
            engine.open.set()
        await asyncio.gather(*tasks)

    in_loop(models, work)
    assert engines["a"].dimension == WIDTH


# --- from settings --------------------------------------------------------------------------------


def test_models_of_settings(tiny_decoder_dir: Path, tmp_path: Path) -> None:
    place = str(tiny_decoder_dir)
    config = ServerConfig(models={"other": place, "more": place})
    sources = model_sources(place, config, "float32")
    assert [source.names for source in sources] == [(tiny_decoder_dir.name,), ("other",), ("more",)]
    for twice in ({tiny_decoder_dir.name: place}, {"other": place, "docs": place}):
        with pytest.raises(ConfigError, match="the name of two models"):
            model_sources(place, ServerConfig(model_aliases=("docs",), models=twice), "float32")
    with pytest.raises(ModelError, match="no such model folder"):
        model_sources(place, ServerConfig(models={"other": str(tmp_path / "none")}), "float32")


def test_real_models_come_and_go(tiny_decoder_dir: Path) -> None:
    place = str(tiny_decoder_dir)
    config = make_config(models={"b": place}, loaded_models=1)
    sources = model_sources(place, config, "float32")
    first = sources[0].load()
    with TestClient(create_app(first, config, sources=sources)) as client:
        gone = weakref.ref(first._model)
        del first
        vectors = []
        for name in ("m", "b", "m"):
            answer = client.post("/v1/embeddings", json={"input": "a text", "model": name})
            vectors.append(answer.json()["data"][0]["embedding"])
        assert vectors[0] == vectors[1] == vectors[2]
        gc.collect()
        assert gone() is None


def test_every_model_has_all_cores(tiny_decoder_dir: Path) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        config = ServerConfig(models={"b": str(tiny_decoder_dir)}, batching={"forwards": 2})
        sources = model_sources(str(tiny_decoder_dir), config, "float32")
        with ThreadPoolExecutor(1) as pool:
            engines = [sources[0].load(), pool.submit(sources[1].load).result()]
        items = engines[1].prepare(["text"], EmbedOptions())
        for engine in engines:
            torch.set_num_threads(1)
            engine.embed(items)
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_serve_hands_the_models_on(
    tiny_decoder_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: dict[str, Any] = {}

    def served(engine: object, config: object, place: object, **rest: object) -> None:
        seen.update(rest, config=config)

    monkeypatch.setattr(serving_run, "run_server", served)
    place = str(tiny_decoder_dir)
    command = ["serve", place, "model_name=docs", f"models.other={place}", "--dtype", "float32"]
    command += ["--port", "0"]
    assert run([*command, "loaded_models=1"]) == 0
    assert [source.names[0] for source in seen["sources"]] == ["docs", "other"]
    assert seen["config"].loaded_models == 1
    assert run([*command, "models.docs=x/y"]) == 2
    assert "models.docs: the name of two models" in capsys.readouterr().err
    assert isinstance(seen["sources"][1].load(), type(build_engine(load(place))))


def load(place: str) -> Any:
    from nvembed import NVEmbed

    return NVEmbed.from_pretrained(place)
