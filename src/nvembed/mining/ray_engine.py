"""``--engine ray``: the files of vectors, made by the workers of a ray cluster.

Every worker loads the teacher once and writes the same files that a single process would, so the
work folder must be seen by all of them under the same path. What follows (search, choice) is done
by the process that asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nvembed.core.errors import UserError
from nvembed.core.reporting import progress
from nvembed.core.store import make_missing
from nvembed.encoding.ray_data import join_cluster
from nvembed.mining.vectors import Batch, Teacher, shard_of, write_shard


class EmbeddingWorker:
    """An actor of ray that holds a teacher."""

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher

    def write(self, path: Path, shard: Batch) -> int:
        """Write the file of some texts, and return how many they are."""

        def make(_: int) -> None:
            write_shard(path, shard, self._teacher.encoder, done=lambda _: None)

        make_missing([path], make)
        return len(shard.texts)


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
    ray, kind, available = join_cluster()
    from ray.util import ActorPool

    count = min(available, len(missing))
    worker: Any = ray.remote(EmbeddingWorker).options(**{f"num_{kind.lower()}s": 1})
    pool = ActorPool([worker.remote(teacher) for _ in range(count)])
    jobs = iter(missing)

    def submit_next() -> None:
        if (number := next(jobs, None)) is not None:
            job = paths[number].resolve(), shard_of(batch, number)
            pool.submit(lambda actor, job: actor.write.remote(*job), job)

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
