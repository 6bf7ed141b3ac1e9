"""``--engine ray``: the files of vectors, made by the workers of a ray cluster.

Every worker loads the teacher once and writes the same files that a single process would, so the
work folder must be seen by all of them under the same path. What follows (search, choice) is done
by the process that asked.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nvembed.core.errors import UserError
from nvembed.core.progress import progress
from nvembed.inference.encoding import Side
from nvembed.mining.vectors import Batch, Teacher, shard_texts, write_shard
from nvembed.mining.work import make_missing

_SOURCE = Path(__file__).resolve().parents[2]


class EmbeddingWorker:
    """An actor of ray that holds a teacher."""

    def __init__(self, teacher: Teacher, side: Side, task: str | None) -> None:
        self._teacher, self._side, self._task = teacher, side, task

    def write(self, path: Path, texts: Sequence[str]) -> int:
        """Write the file of some texts, and return how many they are."""

        def make(_: int) -> None:
            encoder = self._teacher.encoder
            write_shard(path, texts, self._side, self._task, encoder, done=lambda _: None)

        make_missing([path], make)
        return len(texts)


def embed_by_ray(batch: Batch, paths: Sequence[Path], teacher: Teacher) -> None:
    """Embed what no file holds yet on the cluster that ray finds, or on one started here.

    A worker takes one GPU where the cluster has any, else one CPU.

    Raises:
        UserError: ray is not installed.
        ModelError: the teacher cannot be used.
    """
    missing = [number for number, path in enumerate(paths) if not path.is_file()]
    if not missing:
        return
    try:
        import ray
        from ray.util import ActorPool
    except ModuleNotFoundError as error:
        raise UserError(
            "ray is not installed", where="--engine ray", hint="pip install 'nvembed[ray]'"
        ) from error
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False, runtime_env=_environment())
    resources = ray.cluster_resources()
    kind = "GPU" if resources.get("GPU") else "CPU"
    count = max(1, min(int(resources.get(kind, 1)), len(missing)))
    worker: Any = ray.remote(EmbeddingWorker).options(**{f"num_{kind.lower()}s": 1})
    pool = ActorPool([worker.remote(teacher, batch.side, batch.task) for _ in range(count)])
    jobs = iter(missing)

    def submit_next() -> None:
        if (number := next(jobs, None)) is not None:
            path, texts = paths[number].resolve(), shard_texts(batch, number)
            pool.submit(lambda actor, job: actor.write.remote(*job), (path, texts))

    with progress(len(batch.texts), f"{batch.description} (ray, {count} workers)") as bar:
        try:
            # As many files as workers are on their way: texts are not sent ahead of need.
            for _ in range(count):
                submit_next()
            while pool.has_next():
                bar.advance(pool.get_next_unordered())
                submit_next()
        except ray.exceptions.RayTaskError as error:
            cause = error.as_instanceof_cause()
            raise (cause if isinstance(cause, UserError) else error) from None


def _environment() -> dict[str, Any]:
    """Let workers find the package where this process found it."""
    path = os.pathsep.join(filter(None, [str(_SOURCE), os.environ.get("PYTHONPATH")]))
    return {"env_vars": {"PYTHONPATH": path}}
