"""The pool over Ray, with a stand-in for Ray: what it gives, and what it raises."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from hash_encoder import HashEncoder
from nvembed.core.errors import ConfigError
from nvembed.model import workers
from nvembed.model.workers import Loader, ray_pool


class TaskError(Exception):
    """What Ray raises in place of the worker's own error, which it carries."""

    def __init__(self, cause: Exception) -> None:
        super().__init__("a long traceback")
        self.cause = cause


class Ray:
    exceptions = SimpleNamespace(RayTaskError=TaskError)

    def __init__(self) -> None:
        self.killed = 0

    def remote(self, made: Any) -> Any:
        return SimpleNamespace(options=lambda **needs: SimpleNamespace(remote=self._actor(made)))

    def _actor(self, made: Any) -> Any:
        def start(*given: Any) -> Any:
            actor = made(*given)
            return SimpleNamespace(call=SimpleNamespace(remote=lambda *job: (actor, job)))

        return start

    def get(self, asked: Any) -> Any:
        actor, job = asked
        try:
            return actor.call(*job)
        except Exception as error:
            raise TaskError(error) from error

    def kill(self, _: Any) -> None:
        self.killed += 1


def width(encoder: Any, factor: int) -> int:
    return int(encoder.dimension) * factor


def fail(encoder: Any, error: Exception) -> None:
    raise error


def test_workers_of_a_cluster_answer_and_their_errors_are_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray = Ray()
    monkeypatch.setenv("NVEMBED_PROGRESS", "0")
    monkeypatch.setattr(workers, "join_cluster", lambda: (ray, "CPU", 2))
    monkeypatch.setattr(workers, "load_encoder", lambda name, dtype: HashEncoder(8))
    with ray_pool(Loader("m", "float32")) as pool:
        assert pool.size == 2
        futures = [pool.submit(width, factor) for factor in range(9)]
        assert [future.result() for future in futures] == [8 * factor for factor in range(9)]
        with pytest.raises(ConfigError, match="too wide"):
            pool.submit(fail, ConfigError("too wide")).result()
        with pytest.raises(TaskError, match="a long traceback"):
            pool.submit(fail, ValueError("a bug")).result()
    assert ray.killed == 2


def test_one_call_takes_one_worker_of_a_large_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = Ray()
    monkeypatch.setenv("NVEMBED_PROGRESS", "0")
    monkeypatch.setattr(workers, "join_cluster", lambda: (ray, "CPU", 100))
    monkeypatch.setattr(workers, "load_encoder", lambda name, dtype: HashEncoder(8))
    with ray_pool(Loader("m", "float32")) as pool:
        assert pool.submit(width, 3).result() == 24
    assert ray.killed == 1
