"""Tasks of mteb by name: found, scored through its encoder protocol, kept in its own format.

In: names of benchmarks and tasks, and an ``Encoder``; out: ``TaskResult`` by task, and under
``<folder>/results/<model>/<revision>/`` the files that mteb loads and its leaderboard takes.
"""

from __future__ import annotations

import difflib
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import mteb
import numpy as np
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from mteb.abstasks import AbsTask
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.cache import ResultCache
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.types import Licenses, PromptType
from numpy.typing import NDArray

from nvembed.core.errors import ConfigError, DataError, UserError
from nvembed.core.files import write_text
from nvembed.core.runs import RunFolder
from nvembed.core.strict_yaml import parse_yaml
from nvembed.encoding.encoder import Encoder
from nvembed.evaluation.local_scores import encode_distinct
from nvembed.evaluation.mteb_adapter import finite_or_none, quiet, run_mteb
from nvembed.evaluation.reference import InstructionSource, instruction_for
from nvembed.evaluation.results import TaskResult
from nvembed.text.instructions import Side, find_instruction

# What mteb raises where a data set cannot be fetched.
_OUT_OF_REACH = (OSError, HfHubHTTPError)
_ONE_SIDED = ("Retrieval", "Reranking", "InstructionRetrieval", "InstructionReranking")


class UnreachableTaskError(DataError):
    """The data of one task could not be loaded; others may be."""


@dataclass(frozen=True)
class HubTasks:
    """What was asked for.

    Attributes:
        tasks: that a text model can do.
        refused: the others, with the reason.
    """

    tasks: tuple[AbsTask, ...]
    refused: dict[str, str]


def find_hub_tasks(
    benchmarks: Sequence[str] = (), names: Sequence[str] = (), types: Sequence[str] | None = None
) -> HubTasks:
    """Look up benchmarks and single tasks; a task that two of them hold is done once.

    Args:
        benchmarks: such as ``MTEB(eng, v1)``.
        names: of tasks, such as ``STS12``.
        types: keep only tasks of these types, such as ``Retrieval``; ``None`` keeps all.

    Raises:
        ConfigError: an unknown name or type, with near matches.
    """
    found: dict[str, AbsTask] = {}
    with quiet():
        for name in benchmarks:
            known = [known for one in mteb.get_benchmarks() for known in _names(one)]
            if name not in known:
                raise _unknown("benchmark", name, known)
            found |= {task.metadata.name: task for task in mteb.get_benchmark(name).tasks}
        for name in names:
            try:
                task = mteb.get_task(name)
            except KeyError as error:
                every = [cls.metadata.name for cls in mteb.get_tasks(exclude_superseded=False)]
                raise _unknown("task", name, every) from error
            found.setdefault(task.metadata.name, task)
    if types is not None:
        known = sorted({task.metadata.type for task in found.values()})
        if missing := [kind for kind in types if kind not in known]:
            raise _unknown("task type among these tasks", missing[0], known)
        found = {name: task for name, task in found.items() if task.metadata.type in types}
    refused = {
        name: f"needs {' and '.join(others)}; the model reads text alone"
        for name, task in found.items()
        if (others := sorted(set(task.metadata.modalities) - {"text"}))
    }
    return HubTasks(tuple(task for name, task in found.items() if name not in refused), refused)


def _names(benchmark: Any) -> list[str]:
    return [benchmark.name, *(benchmark.aliases or ())]


def _unknown(what: str, name: str, known: Sequence[str]) -> ConfigError:
    folded = {other.lower(): other for other in known}
    near = difflib.get_close_matches(name.lower(), folded, n=3, cutoff=0.5)
    matches = " or ".join(folded[one] for one in near)
    return ConfigError(
        f"no {what} called {name!r}", expected=f"perhaps {matches}" if near else "a name of mteb"
    )


def hub_instruction(metadata: TaskMetadata, source: InstructionSource) -> str | None:
    """Return the instruction of a task in plain words, or ``None``; see ``instruction_for``."""
    prompt = metadata.prompt
    text = prompt.get("query") if isinstance(prompt, dict) else prompt
    return instruction_for(metadata.name, source, mteb_prompt=text or None)


def _is_symmetric(metadata: TaskMetadata) -> bool:
    row = find_instruction(metadata.name)
    return row.symmetric if row is not None else metadata.type not in _ONE_SIDED


class HubEncoder(AbsEncoder):
    """mteb's encoder protocol over ours, for any of its text tasks."""

    mteb_model_meta: ModelMeta

    def __init__(self, encoder: Encoder, meta: ModelMeta, source: InstructionSource) -> None:
        self.mteb_model_meta = meta
        self._encoder = encoder
        self._source = source

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: TaskMetadata,
        prompt_type: PromptType | None = None,
        **_: Any,
    ) -> NDArray[np.float32]:
        """Encode the texts of a dataloader, one row each; equal texts once."""
        is_document = prompt_type == PromptType.document
        bare = is_document and not _is_symmetric(task_metadata)
        texts = [text for batch in inputs for text in batch["text"]]
        instruction = None if bare else hub_instruction(task_metadata, self._source)
        side: Side = "document" if is_document else "query"
        return encode_distinct(self._encoder, texts, side, instruction, task_metadata.name)


def score_hub(
    task: AbsTask, encoder: HubEncoder, folder: Path, made_by: str | None = None
) -> TaskResult:
    """Score one task and write mteb's own files of it anew.

    mteb writes into a folder for the moment; from there its files come to their places.

    Raises:
        UnreachableTaskError: its data set cannot be loaded.
        ModelError: the encoder gives vectors of another shape or that are not finite.
    """
    started = time.perf_counter()
    name = task.metadata.name
    try:
        with TemporaryDirectory() as place:
            # Always anew: its files do not tell instructions apart.
            cache = ResultCache(place)
            done = run_mteb(encoder, task, cache=cache, overwrite_strategy="always")
            for made in sorted(Path(place).rglob("*.json")):
                text = made.read_text(encoding="utf-8")
                write_text(folder / made.relative_to(place), text, made_by)
    except _OUT_OF_REACH as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UnreachableTaskError(
            f"cannot be loaded ({reason})",
            where=name,
            hint="It needs the network, or an earlier download",
        ) from error
    if done.exceptions:
        reason = done.exceptions[0].exception.strip().splitlines()[0]
        raise UnreachableTaskError(f"cannot be loaded ({reason})", where=name)
    result = done.task_results[0]
    parts = {
        f"{split}/{entry['hf_subset']}": finite_or_none(entry["main_score"])
        for split, entries in result.scores.items()
        for entry in entries
    }
    main = finite_or_none(result.get_score())
    return TaskResult(
        type=task.metadata.type,
        main_score_name=task.metadata.main_score,
        main_score=main,
        seconds=round(time.perf_counter() - started, 2),
        scores={task.metadata.main_score: main, **parts},
    )


def describe_model(name: str, encoder: Encoder, revision: str) -> ModelMeta:
    """Describe a model as the leaderboard wants it; ``None`` where nothing says.

    Licence and data sets come from the model card, data sets also from the run folder that the
    model lies in. Those are named as tasks of mteb, so that it knows what was trained on.

    Args:
        name: folder or hub id. A folder is called ``nvembed/<its name>``.
        encoder: the model as it was loaded.
        revision: commit or fingerprint.
    """
    path = Path(name)
    inner: Any = getattr(encoder, "model", encoder)
    parameters = list(inner.parameters()) if hasattr(inner, "parameters") else None
    count = None if parameters is None else sum(p.numel() for p in parameters)
    memory = None if parameters is None else sum(p.numel() * p.element_size() for p in parameters)
    card = _card(name)
    datasets = [*_texts(card.get("datasets")), *(_trained_on(path) if path.is_dir() else ())]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ModelMeta(
            loader=None,
            name=_folder_name(path) if path.is_dir() else _with_owner(name),
            revision=revision,
            release_date=None,
            languages=["eng-Latn"],
            n_parameters=count,
            memory_usage_mb=None if memory is None else round(memory / 2**20, 1),
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


def _card(name: str) -> dict[str, Any]:
    """Read the YAML at the head of a model's card; empty where there is none here."""
    path = Path(name) / "README.md"
    if not Path(name).is_dir():
        found = None
        with suppress(ValueError):  # not the form of a hub id
            found = try_to_load_from_cache(name, "README.md")
        path = Path(found) if isinstance(found, str) else path
    try:
        head = path.read_text(encoding="utf-8").removeprefix("---\n").partition("\n---")[0]
        values = parse_yaml(head).value
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _licence(card: Mapping[str, Any]) -> Any:
    """One of the names that mteb knows, or a link, or ``None``."""
    for said in (card.get("license"), card.get("license_link")):
        if isinstance(said, str) and said.lower() in get_args(Licenses):
            return said.lower()
        if isinstance(said, str) and said.startswith(("https://", "http://")):
            return said
    return None


def _trained_on(model: Path) -> list[str]:
    run = RunFolder(model.parent)
    if not run.exists:
        return []
    try:
        return [str(row["name"]) for row in run.read_recipe().get("datasets", ())]
    except (UserError, KeyError, TypeError):  # not a run of ours
        return []


def _tasks_of(datasets: Sequence[str]) -> set[str]:
    """Name the tasks of mteb whose name, hub set or end of that is one of these."""
    if not datasets:
        return set()
    wanted = {_plain(part) for name in datasets for part in (name, name.rpartition("/")[2])}
    with quiet():
        tasks = mteb.get_tasks(languages=["eng"], exclude_superseded=False)
    return {
        task.metadata.name
        for task in tasks
        for path in (task.metadata.dataset["path"],)
        if wanted & {_plain(task.metadata.name), _plain(path), _plain(path.rpartition("/")[2])}
    }


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def _texts(value: object) -> list[str]:
    return [one for one in value if isinstance(one, str)] if isinstance(value, list) else []


def _folder_name(path: Path) -> str:
    # runs/demo/model says nothing by its last part alone.
    parts = [part for part in path.resolve().parts[-2:] if part != "/"]
    return f"nvembed/{'-'.join(parts)}"


def _with_owner(name: str) -> str:
    return name if "/" in name else f"sentence-transformers/{name}"
