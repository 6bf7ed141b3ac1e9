"""``nvembed mine``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from nvembed.cli.data import LayoutOption
from nvembed.cli.options import ColumnOption, DtypeOption, read_columns

if TYPE_CHECKING:
    from nvembed.mining.report import MiningReport, MiningSample, ScoredText


def mine(
    input: Annotated[
        Path,
        typer.Argument(
            help='Records {"query", "positive"}: any file that training reads, or a BEIR folder.',
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Argument(help="The same records with negatives, as JSONL.", show_default=False),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Mining settings, such as num_negatives=7, strategy=margin or rerank=MODEL.",
            show_default=False,
        ),
    ] = None,
    *,
    teacher: Annotated[
        str,
        typer.Option(
            help="Who scores the candidates: folder or hub id of any sentence-transformers model, "
            "bm25, or the address of an OpenAI-compatible endpoint (http://…/v1; its key in "
            "$NVEMBED_API_KEY).",
            show_default=False,
        ),
    ],
    teacher_model: Annotated[
        str | None, typer.Option(help="Name of the model at an endpoint.", show_default=False)
    ] = None,
    kind: Annotated[
        Literal["retrieval", "nli", "sts"], typer.Option(help="What the records are.")
    ] = "retrieval",
    layout: LayoutOption = "records",
    columns: ColumnOption = None,
    instruction: Annotated[
        str | None,
        typer.Option(
            help="Task that is put before queries whose record brings none, or the name of an MTEB "
            "task."
        ),
    ] = None,
    documents: Annotated[
        Path | None,
        typer.Option(
            help="File or folder of texts to search. Default: the input's own documents.",
            show_default=False,
        ),
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(
            help="Folder for vectors and search results, kept for the next run and shared by "
            "processes. Default: a hidden one beside the output until that is written.",
            show_default=False,
        ),
    ] = None,
    engine: Annotated[
        Literal["local", "ray"], typer.Option(help="Who embeds: ray is a cluster's workers.")
    ] = "local",
    samples: Annotated[int, typer.Option(min=0, help="Records to show at the end.")] = 2,
    dtype: DtypeOption = "auto",
) -> None:
    """Find hard negatives: near the query, yet clearly below its positive.

    A run that was killed goes on where it was when it is started again. With --work, several
    processes share the work: start the command several times, or with torchrun.

    Examples:

    \b
      nvembed mine pairs.jsonl mined.jsonl --teacher runs/demo/model
      nvembed mine pairs.jsonl mined.jsonl --teacher intfloat/e5-base-v2 \\
        --documents docs.jsonl --instruction "Find the answer"
      nvembed mine pairs.jsonl mined.jsonl --teacher bm25 num_negatives=15 threshold=0.9
      nvembed mine faq.csv mined.jsonl --teacher bm25 --column query=question \\
        --column positive=answer
      nvembed mine pairs.jsonl mined.jsonl --teacher http://localhost:8000/v1 \\
        --teacher-model my-embedder rerank=BAAI/bge-reranker-base write_scores=true
      torchrun --nproc-per-node=8 -m nvembed mine pairs.jsonl mined.jsonl \\
        --teacher nvidia/NV-Embed-v2 --documents docs.jsonl --work mining
    """
    from nvembed.core.config import load_config
    from nvembed.core.errors import ConfigError
    from nvembed.data.mining_config import MiningConfig
    from nvembed.mining.miner import help_mining, mine_file

    config = load_config(MiningConfig, None, overrides or ())
    names = read_columns(columns)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and work is None:
        raise ConfigError("several processes share it", where="--work", expected="a folder")
    if work is not None and int(os.environ.get("RANK", "0")):
        # The first process of the launcher is the one that writes.
        help_mining(
            input,
            teacher,
            config,
            work=work,
            kind=kind,
            layout=layout,
            columns=names,
            instruction=instruction,
            documents=documents,
            dtype=dtype,
            teacher_model=teacher_model,
        )
        return
    report = mine_file(
        input,
        output,
        teacher,
        config,
        kind=kind,
        layout=layout,
        columns=names,
        instruction=instruction,
        documents=documents,
        dtype=dtype,
        teacher_model=teacher_model,
        work=work,
        engine=engine,
    )
    typer.echo(
        f"{report.records} records, {report.negatives} negatives among {report.documents} documents"
        f", {report.share_with_fewer:.1%} of the records got fewer than asked for"
    )
    _show_near_positive(report)
    for sample in report.samples[:samples]:
        _show_sample(sample)
    typer.echo(f"written: {output}")


def _show_near_positive(report: MiningReport) -> None:
    """Print how many negatives may be positives that nobody labelled."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Negatives that may be positives: score at least …")
    table.add_column("of the positive's", justify="right")
    table.add_column("mined", justify="right")
    table.add_column("nearest, without a rule", justify="right")
    for row in report.near_positive:
        shares = ("-" if share is None else f"{share:.1%}" for share in (row.mined, row.nearest))
        table.add_row(f"{row.of_positive:.0%}", *shares)
    Console().print(table)


def _show_sample(sample: MiningSample) -> None:
    typer.echo(f"\nquery             {_line(sample.query)}")
    _show_texts("positive", [sample.positive])
    _show_texts("negative", sample.negatives[:3])
    _show_texts("refused", sample.refused[:3])


def _show_texts(label: str, texts: list[ScoredText] | tuple[ScoredText, ...]) -> None:
    for scored in texts:
        typer.echo(f"  {label:<8} {scored.score:6.3f} {_line(scored.text)}")


def _line(text: str) -> str:
    return " ".join(text.split())[:100]
