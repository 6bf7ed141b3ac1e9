"""``nvembed merge``: one model of several, with given shares or those that local tasks ask for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, NamedTuple

import yaml
from pydantic import Field

from nvembed.core import __version__
from nvembed.core.arguments import checked
from nvembed.core.errors import ConfigError
from nvembed.core.files import atomic_folder, write_json, write_text
from nvembed.core.outputs import check_new_folder
from nvembed.evaluation.session import evaluate
from nvembed.evaluation.tasks import load_tasks
from nvembed.interop.merging import RECORD, MergeMethod, Mix, merge_folders
from nvembed.model.card import CARD, read_card, shown_place
from nvembed.model.encoder import load_encoder

MERGE = "merge"


class Part(NamedTuple):
    """What one model has in a merged one."""

    model: str
    share: float  # 0 where a greedy soup left it out
    score: float | None = None  # mean of the tasks' main scores, alone (cut to the rank, if any)


class Merged(NamedTuple):
    """What a merged model is made of."""

    parts: tuple[Part, ...]
    score: float | None = None  # of the merged model, where tasks were given


@checked
def merge(
    models: Annotated[Sequence[str | Path], Field(min_length=1)],
    to: str | Path,
    *,
    weights: Sequence[float] | None = None,
    method: MergeMethod = "linear",
    tasks: Sequence[str | Path] | None = None,
    rank: Annotated[int, Field(ge=1)] | None = None,
) -> Merged:
    """Merge models of one architecture and base into a new folder.

    Whole models are averaged tensor by tensor, heads among them. Adapters (folders of peft) are
    merged as what they add to the weights: exactly, in an adapter whose rank is the sum of theirs.

    Args:
        models: folders; everything but weights (prompts, tokenizer) is the first one's.
        to: the new folder; it appears when it is complete.
        weights: one for each model, divided by their sum. ``None`` is equal weights (a model soup).
        method: ``linear``, or ``slerp`` of two models: on the arc between each two tensors.
        tasks: folders of evaluation tasks, for a greedy soup (Wortsman et al., arXiv 2203.05482):
            from the best model on, the others join in the order of their scores where the mean
            score does not fall; those kept have equal weights.
        rank: the most that a merged adapter may have; each product of its matrices is
            then the nearest one of that rank. What is left out is told.

    Raises:
        ConfigError: weights that do not fit the models, or ``to`` holds something.
        ModelError: models of different architectures, tokenizers, poolings, shapes or bases.
        DataError: a task that cannot be read.
    """
    folders, to = [Path(model) for model in models], Path(to)
    check_new_folder(to, [*folders, *(tasks or ())])
    if tasks is None:
        shares = _shares(weights, len(folders), method)
        merged = Merged(tuple(map(Part, map(str, folders), shares)))
    else:
        if weights is not None or method != "linear":
            raise ConfigError("tasks decide the weights", expected="no weights and no method")
        merged = _greedy(folders, to, [Path(task) for task in tasks], rank)
    used = [part for part in merged.parts if part.share or tasks is None]
    mix = Mix(tuple(part.share for part in used), method, rank)
    with atomic_folder(to, MERGE) as temporary:
        merge_folders([Path(part.model) for part in used], temporary, mix)
        parts = [part._asdict() for part in merged.parts]
        record = {"method": method, "rank": rank, "score": merged.score, "models": parts}
        write_json(temporary / RECORD, record)
        card = merged_card(to, [(part.model, part.share) for part in used], method)
        write_text(temporary / CARD, card)
    return merged


def _shares(weights: Sequence[float] | None, count: int, method: MergeMethod) -> list[float]:
    """Weights that sum to 1."""
    given = [1.0] * count if weights is None else list(weights)
    if len(given) != count or not math.isfinite(sum(given)) or abs(sum(given)) < 1e-6:
        expected = f"{count} numbers, one for each model, whose sum is not 0"
        raise ConfigError(f"{', '.join(map(str, given))} given", where="weights", expected=expected)
    if method == "slerp" and count != 2:
        raise ConfigError(f"slerp of {count} models", expected="two, or method linear")
    return [weight / sum(given) for weight in given]


def _greedy(folders: Sequence[Path], to: Path, tasks: Sequence[Path], rank: int | None) -> Merged:
    """Find the models that a greedy soup keeps."""
    found = load_tasks(tasks)
    beside = to.absolute().parent  # where there is room for a model
    beside.mkdir(parents=True, exist_ok=True)

    def score(chosen: Sequence[int]) -> float:
        with TemporaryDirectory(prefix=".merge-", dir=beside) as folder:
            place = Path(folder)
            if len(chosen) == 1 and rank is None:
                place = folders[chosen[0]]
            else:
                parts = [folders[number] for number in chosen]
                merge_folders(parts, place, Mix((1 / len(chosen),) * len(chosen), rank=rank))
            results = evaluate(load_encoder(str(place)), found).values()
        return sum(result.main_score or 0.0 for result in results) / len(found)

    kept, best, alone = greedy_soup(len(folders), score)
    shares = [1 / len(kept) if number in kept else 0.0 for number in range(len(folders))]
    return Merged(tuple(map(Part, map(str, folders), shares, alone)), best)


def greedy_soup(
    count: int, score: Callable[[Sequence[int]], float]
) -> tuple[list[int], float, list[float]]:
    """The members of a greedy soup of ``count`` models, its score, and the score of each alone."""
    alone = [score([number]) for number in range(count)]
    order = sorted(range(count), key=lambda number: -alone[number])
    kept, best = order[:1], alone[order[0]]
    for number in order[1:]:
        if (found := score([*kept, number])) >= best:
            kept, best = [*kept, number], found
    return kept, best, alone


def merged_card(place: Path, parts: Sequence[tuple[str, float]], method: str) -> str:
    """Render the card of a model merged of others, by their folders and shares.

    Licence and base are said where the cards of all parts say the same.
    """
    heads = [read_card(name)[0] for name, _ in parts]
    head: dict[str, Any] = {
        key: heads[0][key]
        for key in ("license", "base_model", "language")
        if heads[0].get(key) and all(other.get(key) == heads[0][key] for other in heads)
    }
    rows = [f"| `{shown_place(name)}` | {share:.4g} |" for name, share in parts]
    return "\n".join(
        (
            f"---\n{yaml.safe_dump(head | {'tags': ['merge', 'nvembed']}, sort_keys=False)}---\n",
            f"# {place.name}\n",
            f"Merged by nvembed {__version__} ({method}), tensor by tensor; what is not weights is",
            "that of the first. Each part has a card of its own.\n",
            "| part | share |\n|---|---|",
            *rows,
            "",
        )
    )
