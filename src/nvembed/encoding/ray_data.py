"""``--engine ray``: the parts of an output, made by the workers of a Ray cluster (Ray Data).

Texts go to the workers as rows of a Ray Data set, a window each, and vectors come back to the
process that asked, which writes the parts: workers need the model, but no common folder.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from nvembed.core import errors
from nvembed.core.dtypes import Precision, PrecisionChoice
from nvembed.core.errors import UserError
from nvembed.core.reporting import hold_note, release_notes
from nvembed.encoding.parts import Part, Tally, Window, save_part
from nvembed.encoding.processes import Worker

_SOURCE = Path(__file__).resolve().parents[2]
_OF_ERRORS = ("message", "where", "expected", "hint")
_NOTHING = Part(np.empty((0, 0), np.float32), np.empty((0, 2), np.int64), np.empty(0, np.int64))


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


class RayWorker:
    """An actor of Ray Data with a model; makes the part of one window per call."""

    def __init__(self, worker: Worker) -> None:
        os.environ["NVEMBED_PROGRESS"] = "0"
        self._worker = worker

    def __call__(self, rows: Any) -> Any:
        """Turn a table ``(window, texts)`` of one row into one of its vectors."""
        import pyarrow

        part, tokens, error = _NOTHING, None, None
        try:
            part, tokens = self._worker.embed(rows["texts"][0].as_py())
        except UserError as raised:  # Ray Data would keep its text alone
            error = [type(raised).__name__, *(getattr(raised, name) for name in _OF_ERRORS)]
        columns = {name: [getattr(part, name).tobytes()] for name in ("vectors", "spans", "counts")}
        return pyarrow.table(
            {
                "window": rows["window"],
                "tokens": pyarrow.array([tokens], pyarrow.int64()),
                "error": pyarrow.array([error], pyarrow.list_(pyarrow.string())),
                **columns,
            }
        )


def make_by_ray(missing: Iterable[Window], worker: Worker, tally: Tally) -> None:
    """Make parts on a cluster.

    Args:
        missing: windows whose part is not there. All are put into the cluster's object store, which
            moves to disk what memory does not hold.
        worker: what each actor has.
        tally: is told what has been written.

    Raises:
        UserError: ray is not installed, or what a worker raised.
    """
    ray, kind, count = join_cluster()
    import pyarrow
    from ray.data import ActorPoolStrategy, DataContext, from_arrow_refs

    DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    paths: list[Path] = []
    rows: list[Any] = []
    for window in missing:
        rows.append(ray.put(pyarrow.table({"window": [len(paths)], "texts": [window.texts]})))
        paths.append(window.path)
    if not rows:
        return
    resources: dict[str, Any] = {f"num_{kind.lower()}s": 1}
    made = from_arrow_refs(rows).map_batches(
        RayWorker,
        fn_constructor_args=(worker,),
        batch_size=1,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(min_size=1, max_size=min(count, len(rows))),
        **resources,
    )
    error: list[str | None] | None = None
    for row in made.iter_rows():
        error = row["error"]
        if error is not None:
            break  # and raised when the loop has ended, and with it Ray Data's threads
        counts = np.frombuffer(row["counts"], np.int64)
        part = Part(
            np.frombuffer(row["vectors"], np.float32).reshape(int(counts.sum()), -1),
            np.frombuffer(row["spans"], np.int64).reshape(-1, 2),
            counts,
        )
        save_part(paths[row["window"]], part)
        release_notes()
        tally.made(len(counts), row["tokens"])
    if error is not None:
        told = dict(zip(("kind", *_OF_ERRORS), error, strict=True))
        raise getattr(errors, str(told.pop("kind")))(told.pop("message"), **told)
