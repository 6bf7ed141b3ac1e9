"""Tasks of mteb by name: found, scored through its encoder protocol, kept in its own format.

In: names of benchmarks and tasks, and an ``Encoder``; out: ``TaskResult`` by task, and under
``<folder>/results/<model>/<revision>/`` the files that mteb loads and its leaderboard takes.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, get_args

import mteb
from huggingface_hub.errors import HfHubHTTPError
from mteb.abstasks import AbsTask
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.cache import ResultCache
from mteb.models import ModelMeta
from mteb.types import Licenses

from nvembed.core.errors import ConfigError, UserError
from nvembed.core.files import write_text
from nvembed.core.runs import RunFolder
from nvembed.data.instructions import Side, find_instruction
from nvembed.evaluation.mteb_adapter import MtebEncoder, finite_or_none, quiet, run_mteb
from nvembed.evaluation.reference import InstructionSource, instruction_for, near_names
from nvembed.evaluation.results import TaskResult, UnreachableTaskError
from nvembed.interop.model_folder import find_gguf
from nvembed.model.card import read_card
from nvembed.model.encoder import Encoder

_ONE_SIDED = ("Retrieval", "Reranking", "InstructionRetrieval", "InstructionReranking")


class HubTasks(NamedTuple):
    """Tasks that a text model can do, and of the others the reason why not."""

    tasks: tuple[AbsTask, ...]
    refused: dict[str, str]


def find_hub_tasks(
    benchmarks: Sequence[str] = (), names: Sequence[str] = (), types: Sequence[str] | None = None
) -> HubTasks:
    """Look up benchmarks and single tasks, of certain types or of all; each task once."""
    found: dict[str, AbsTask] = {}
    with quiet():
        for name in benchmarks:
            known = [k for one in mteb.get_benchmarks() for k in (one.name, *(one.aliases or ()))]
            _check_known("benchmark", name, known)
            found |= {task.metadata.name: task for task in mteb.get_benchmark(name).tasks}
        for name in names:
            try:
                task = mteb.get_task(name)
            except KeyError:
                every = [cls.metadata.name for cls in mteb.get_tasks(exclude_superseded=False)]
                _check_known("task", name, every)
                raise
            found.setdefault(task.metadata.name, task)
    if types is not None:
        known = sorted({task.metadata.type for task in found.values()})
        for kind in types:
            _check_known("task type among these tasks", kind, known)
        found = {name: task for name, task in found.items() if task.metadata.type in types}
    refused = {
        name: f"needs {' and '.join(others)}; the model reads text alone"
        for name, task in found.items()
        if (others := sorted(set(task.metadata.modalities) - {"text"}))
    }
    return HubTasks(tuple(task for name, task in found.items() if name not in refused), refused)


def _check_known(what: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        expected = near_names(name, known, "a name of mteb")
        raise ConfigError(f"no {what} called {name!r}", expected=expected)


def hub_instruction(metadata: TaskMetadata, source: InstructionSource) -> str | None:
    """Return the instruction of a task in plain words, or ``None``; see ``instruction_for``."""
    prompt = metadata.prompt
    text = prompt.get("query") if isinstance(prompt, dict) else prompt
    return instruction_for(metadata.name, source, mteb_prompt=text or None)


def hub_encoder(encoder: Encoder, meta: ModelMeta, source: InstructionSource) -> MtebEncoder:
    """Make an encoder for any of mteb's text tasks; documents are bare but in symmetric tasks."""

    def instruction_of(metadata: TaskMetadata, side: Side) -> str | None:
        row = find_instruction(metadata.name)
        symmetric = row.symmetric if row is not None else metadata.type not in _ONE_SIDED
        return hub_instruction(metadata, source) if side == "query" or symmetric else None

    return MtebEncoder(encoder, meta, instruction_of)


def score_hub(
    task: AbsTask, encoder: MtebEncoder, folder: Path, made_by: str | None = None
) -> TaskResult:
    """Score one task and write mteb's own files of it anew, through a folder for the moment."""
    started = time.perf_counter()
    name, score_name = task.metadata.name, task.metadata.main_score
    try:
        with TemporaryDirectory() as place:
            # Always anew: its files do not tell instructions apart.
            cache = ResultCache(place)
            done = run_mteb(encoder, task, cache=cache, overwrite_strategy="always")
            for made in sorted(Path(place).rglob("*.json")):
                text = made.read_text(encoding="utf-8")
                write_text(folder / made.relative_to(place), text, made_by)
    except (OSError, HfHubHTTPError) as error:  # what mteb raises where data cannot be fetched
        hint = "It needs the network, or an earlier download"
        raise _unreachable(name, str(error).strip() or type(error).__name__, hint) from error
    if done.exceptions:
        raise _unreachable(name, done.exceptions[0].exception.strip())
    result = done.task_results[0]
    parts = {
        f"{split}/{entry['hf_subset']}": finite_or_none(entry["main_score"])
        for split, entries in result.scores.items()
        for entry in entries
    }
    main = finite_or_none(result.get_score())
    seconds = round(time.perf_counter() - started, 2)
    return TaskResult(task.metadata.type, score_name, main, seconds, {score_name: main, **parts})


def _unreachable(name: str, reason: str, hint: str | None = None) -> UnreachableTaskError:
    told = f"cannot be loaded ({reason.splitlines()[0]})"
    return UnreachableTaskError(told, where=name, hint=hint)


# --- What the leaderboard is told of a model ------------------------------------------------------


def describe_model(name: str, encoder: Encoder, revision: str) -> ModelMeta:
    """Describe a model as the leaderboard wants it; ``None`` where nothing says.

    Data sets, from the model card and the run folder, are named as tasks of mteb, so that it knows
    what was trained on. (mteb's own ``ModelMeta.from_hub`` asks the network.)
    """
    path = Path(name)
    inner: Any = getattr(encoder, "model", encoder)
    parameters = list(inner.parameters()) if hasattr(inner, "parameters") else []
    memory = sum(p.numel() * p.element_size() for p in parameters) / 2**20
    card = read_card(name)[0]
    trained = card.get("datasets")
    datasets = [one for one in trained if isinstance(one, str)] if isinstance(trained, list) else []
    full_name = name if "/" in name else f"sentence-transformers/{name}"
    if path.is_dir():
        run = RunFolder(path.parent)
        with suppress(UserError, KeyError, TypeError):  # not a run of ours
            rows = run.read_recipe()["datasets"] if run.exists else []
            datasets += [str(row["name"]) for row in rows]
        # runs/demo/model says nothing by its last part alone.
        full_name = f"nvembed/{'-'.join(p for p in path.resolve().parts[-2:] if p != '/')}"
    elif (file := find_gguf(name)) is not None:
        full_name = f"nvembed/{file.stem}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ModelMeta(
            loader=None,
            name=full_name,
            revision=revision,
            release_date=None,
            languages=["eng-Latn"],
            n_parameters=sum(p.numel() for p in parameters) if parameters else None,
            memory_usage_mb=round(memory, 1) if parameters else None,
            max_tokens=getattr(inner, "max_seq_length", None),
            embed_dim=encoder.dimension,
            license=_licence(card),
            open_weights=True,
            public_training_code=None,
            public_training_data=None,
            framework=["Sentence Transformers", "PyTorch", "safetensors"],
            similarity_fn_name="cosine",
            use_instructions=bool(getattr(encoder, "follows_instructions", True)),
            training_datasets=_tasks_of(datasets) or None,
        )


def _licence(card: Mapping[str, Any]) -> Any:
    """One of the names that mteb knows, or a link, or ``None``."""
    for said in (str(card.get("license")), str(card.get("license_link"))):
        if said.lower() in get_args(Licenses):
            return said.lower()
        if said.startswith(("https://", "http://")):
            return said
    return None


def _tasks_of(datasets: Sequence[str]) -> set[str]:
    """Name the tasks of mteb whose name, hub set or end of that is one of these."""

    def plain(*names: str) -> set[str]:
        ends = [name.rpartition("/")[2] for name in names]
        return {"".join(filter(str.isalnum, name.lower())) for name in (*names, *ends)}

    if not datasets:
        return set()
    wanted = plain(*datasets)
    with quiet():
        tasks = [
            task.metadata for task in mteb.get_tasks(languages=["eng"], exclude_superseded=False)
        ]
    return {task.name for task in tasks if wanted & plain(task.name, task.dataset["path"])}
