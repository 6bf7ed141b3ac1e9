"""Evaluates models on local tasks, and keeps every finished task on disk.

In: an encoder or its name, and task folders. Out: ``TaskResult`` by task name, and ``results.json``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from nvembed.core.errors import ConfigError, DataError, UserError
from nvembed.core.files import read_json_object, write_json
from nvembed.core.runs import describe_environment
from nvembed.evaluation.results import TaskResult, read_results, write_results
from nvembed.evaluation.task_files import RetrievalData
from nvembed.evaluation.tasks import LocalTask, load_tasks
from nvembed.inference.protocol import Encoder

BM25_NAME = "bm25"

OnResult = Callable[[str, TaskResult], None]
