"""``nvembed data``: training files from sources or a language model, and a look into them."""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Literal

import typer

from nvembed.cli import options as opt
from nvembed.core.errors import DataError

data = typer.Typer(
    help="Build, check and look into training data.",
    no_args_is_help=True,
)
Kind = Literal["retrieval", "nli", "sts", "classification", "clustering", "text"]


@data.command()
@opt.described(
    changes=opt.overrides("Changes to the recipe: a key path such as build.max_refused=0.1."),
    keep_going="Go on with the other sets where one fails.",
)
def build(recipe: Path, changes: list[str] | None = None, *, keep_going: bool = False) -> None:
    """Build the data sets of a recipe.

    Records are read, checked, de-duplicated, decontaminated and mined. Parquet files and a manifest
    per set go to the folder `build.folder` of the recipe, else to data/<recipe> beside it. What is
    built already from the same settings and inputs is left alone; a build that was stopped goes on.
    A set of the hub is fetched once: to fetch it anew, delete its folder or name another revision.

    Examples:

    \b
      nvembed data build recipes/small-built.yaml
      nvembed data build recipes/small-built.yaml --keep-going
      nvembed data build recipes/small-built.yaml build.mine=null
    """
    from nvembed.building.build import build_recipe, default_folder, print_outcomes
    from nvembed.core.config import load_config
    from nvembed.training.config import TrainConfig

    config = load_config(TrainConfig, recipe, changes or ())
    folder = default_folder(recipe)
    outcomes = build_recipe(
        config,
        base_dir=recipe.parent,
        folder=folder,
        recipe=recipe,
        keep_going=keep_going,
        log=opt.echo_error,
    )
    print_outcomes(outcomes, opt.console())
    failed = [f"{one.name}: {one.error}" for one in outcomes if one.state == "failed"]
    if failed:
        told = f"{len(failed)} of {len(outcomes)} data sets failed: {' | '.join(failed)}"
        raise DataError(told, where=str(recipe))
    place = os.path.normpath(recipe.parent / (config.build.folder if config.build else folder))
    if all(outcome.state == "unchanged" for outcome in outcomes):
        typer.echo(f"nothing to do: all sets were built before, in {place}")
        return
    typer.echo(f"written: {place}")
    if config.build is None:
        typer.echo(f"for training on it, add to the recipe: build: {{folder: {folder}}}")


@data.command()
@opt.described(
    path="A recipe, a built set, a folder of them, or a file.",
    kind="What the records of the file are.",
    tokenizer="Model folder whose tokens are counted too.",
    samples=typer.Option(min=0, help="Records to show of each set."),
    as_json=typer.Option("--json", help="Print JSON, for machines."),
    keep_going="Go on with the other sets where one fails.",
)
def inspect(
    path: Path,
    *,
    kind: Kind | None = None,
    layout: str = "records",
    columns: list[str] | None = None,
    tokenizer: Path | None = None,
    samples: int = 2,
    as_json: bool = False,
    keep_going: bool = False,
) -> None:
    """Look into training data.

    Samples, lengths, classes, duplicates and negatives are shown. The sets of a recipe are taken as
    built where they are, else from their sources.

    Examples:

    \b
      nvembed data inspect recipes/small-built.yaml
      nvembed data inspect pairs.jsonl --kind retrieval --tokenizer MODEL
      nvembed data inspect built/squad --json
    """
    from nvembed.building import inspection
    from nvembed.building.inspection import open_sets, print_inspection
    from nvembed.core.config import load_config
    from nvembed.data.config import file_dataset
    from nvembed.training.config import TrainConfig

    given = None
    if kind is not None:
        given = file_dataset(path, kind, layout=layout, columns=opt.read_columns(columns))
    counter = None if tokenizer is None else inspection.load_token_counter(tokenizer)
    look = partial(inspection.inspect, num_samples=samples, count_tokens=counter)
    found, failed = [], []
    for opened in open_sets(path, given, partial(load_config, TrainConfig)):
        name = opened.name
        try:
            found.append(look(name, opened.kind, opened.rows))
        except DataError as error:
            if not keep_going:
                raise
            failed.append(name)
            opt.echo_error(f"not done: {name}: {error}")
            continue
        if not as_json:
            print_inspection(found[-1], opt.console())
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in found], indent=2, ensure_ascii=False))
    if failed:
        raise DataError("could not be read", where=", ".join(failed))


@data.command()
@opt.described(
    file="The file.",
    kind="What its records are.",
    conversion="What classes are turned into.",
)
def check(
    file: Path,
    *,
    kind: Kind,
    layout: str = "records",
    columns: list[str] | None = None,
    conversion: Literal["example", "label"] = "example",
) -> None:
    """Check a file of training data to its end.

    Told are bad lines, and records that contradict each other: a positive that is a negative too,
    here or in another record of its query. Each kind of problem is told once, with its lines.
    Warnings (a text given twice, one text with two labels) do not change the exit code, which is 2
    where something has to be mended.

    Examples:

    \b
      nvembed data check pairs.jsonl --kind retrieval
      nvembed data check intents.csv --kind classification --column label=intent
      nvembed data check beir/fiqa --kind retrieval --layout beir
    """
    from nvembed.building.check import check_file
    from nvembed.data.config import file_dataset

    names = opt.read_columns(columns)
    config = file_dataset(file, kind, layout=layout, columns=names, conversion=conversion)
    found = check_file(config)
    for problem in found.problems.kinds:
        typer.echo(str(problem))
    for warning in found.warnings.kinds:
        typer.echo(f"warning: {warning}")
    good, bad, warnings = found.records, found.problems.count, found.warnings.count
    if bad or not good:
        told = f"{bad:,} problems, {good:,} good records" if bad else "the file holds no records"
        raise DataError(told, where=str(file))
    told = f"{warnings:,} warning{'s' if warnings > 1 else ''}" if warnings else "all good"
    typer.echo(f"{file}: {good:,} records, {told}")


@data.command()
@opt.described(
    pairs="CSV, TSV, JSON, JSONL or Parquet file, a BEIR folder, or a folder of documents.",
    to="Folder of the task, new or empty.",
    instruction="Task that is put before queries, or the name of an MTEB task.",
)
def task(
    pairs: Path, *, to: Path, columns: list[str] | None = None, instruction: str | None = None
) -> None:
    """Make an evaluation task of a file, or of a folder of documents.

    Queries with answers become Retrieval, texts with labels Classification, scored pairs STS.

    Examples:

    \b
      nvembed data task faq.csv --to tasks/faq
      nvembed data task intents.csv --to tasks/intents \\
        --column label=intent --column text=message
    """
    from nvembed.building.held_out import make_task
    from nvembed.building.own_documents import read_own
    from nvembed.core.outputs import check_new_folder

    check_new_folder(to, [pairs])
    given = opt.read_columns(columns)
    found = read_own(pairs, given, instruction=instruction, ask=opt.asker())
    opt.echo_error(*found.notes)
    typer.echo(
        f"{to}: {found.config.kind}, {make_task(found, to):,} of {len(found.records):,} asked"
    )
    typer.echo(f"next: nvembed evaluate MODEL --tasks {shlex.quote(str(to))} --bm25")


@data.command()
@opt.described(
    output="Folder for the examples.",
    settings=opt.overrides("Settings, such as tasks=20000 or concurrency=64."),
    endpoint="Base URL of an OpenAI-compatible API, such as http://localhost:8000/v1.",
    model="Name of the model there.",
    key_variable="Environment variable that holds the key, if one is needed.",
)
def synthesize(
    output: Path,
    settings: list[str] | None = None,
    *,
    endpoint: str,
    model: str,
    key_variable: str = "OPENAI_API_KEY",
) -> None:
    """Let a language model write training examples.

    First come tasks, then examples of each. These are pairs of a short query and a long document,
    of a long text and a short label, and of two short texts, each with a wrong document and the
    task as its instruction. Run the same command again to go on after it was stopped.

    Examples:

    \b
      nvembed data synthesize data/synthetic --endpoint http://localhost:8000/v1 \\
        --model mistralai/Mixtral-8x22B-Instruct-v0.1 tasks=20000 concurrency=64
      nvembed data synthesize synthetic --endpoint https://api.example.com/v1 \\
        --model large --key-variable EXAMPLE_KEY requests_per_minute=60
      nvembed data synthesize data/labels --endpoint http://localhost:8000/v1 \\
        --model local 'kinds=["long-short"]' tasks=50 examples_per_task=4
    """
    from nvembed.building.synthesis.prompts import SynthesisConfig, check_secrets
    from nvembed.building.synthesis.run import print_summary
    from nvembed.building.synthesis.run import synthesize as run
    from nvembed.core.config import load_config

    check_secrets(endpoint, key_variable)
    given = {"endpoint": endpoint, "model": model, "key_variable": key_variable}
    first = [f"{key}={json.dumps(text)}" for key, text in given.items()]
    config = load_config(SynthesisConfig, None, [*first, *(settings or ())])
    print_summary(run(config, output), output, opt.console())
