"""``nvembed mine``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from nvembed.cli.options import (
    Columns,
    Dtype,
    Engine,
    Layout,
    argument,
    option,
    overrides,
    read_columns,
)

if TYPE_CHECKING:
    from nvembed.mining.report import MiningReport

Input = Annotated[
    Path,
    argument('Records {"query", "positive"}: any file that training reads, or a BEIR folder.'),
]
Teacher = Annotated[
    str,
    option(
        "Who scores the candidates: folder or hub id of any sentence-transformers model, "
        "bm25, or the address of an OpenAI-compatible endpoint (http://…/v1; its key in "
        "$NVEMBED_API_KEY)."
    ),
]
Kind = Annotated[Literal["retrieval", "nli", "sts"], typer.Option(help="What the records are.")]
Instruction = Annotated[
    str | None,
    option(
        "Task that is put before queries whose record brings none, or the name of an MTEB task."
    ),
]
Documents = Annotated[
    Path | None,
    option("File or folder of texts to search. Default: the input's own documents."),
]
Work = Annotated[
    Path | None,
    option(
        "Folder for vectors and search results, kept for the next run and shared by "
        "processes. Default: a hidden one beside the output until that is written."
    ),
]
Settings = Annotated[
    list[str] | None,
    overrides("Mining settings, such as num_negatives=7, strategy=margin or rerank=MODEL."),
]


def mine(
    input: Input,
    output: Annotated[Path, argument("The same records with negatives, as JSONL.")],
    settings: Settings = None,
    *,
    teacher: Teacher,
    teacher_model: Annotated[str | None, option("Name of the model at an endpoint.")] = None,
    kind: Kind = "retrieval",
    layout: Layout = "records",
    columns: Columns = None,
    instruction: Instruction = None,
    documents: Documents = None,
    work: Work = None,
    engine: Engine = "local",
    samples: Annotated[int, typer.Option(min=0, help="Records to show at the end.")] = 2,
    dtype: Dtype = "auto",
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
    from nvembed.data.build_config import MiningConfig
    from nvembed.mining.miner import help_mining, mine_file

    given: dict[str, Any] = {"kind": kind, "layout": layout, "columns": read_columns(columns)}
    given |= {"instruction": instruction, "documents": documents, "work": work}
    given |= {"dtype": dtype, "teacher_model": teacher_model}
    config = load_config(MiningConfig, None, settings or ())
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and work is None:
        raise ConfigError("several processes share it", where="--work", expected="a folder")
    if work is not None and int(os.environ.get("RANK", "0")):  # the first process writes
        help_mining(input, teacher, config, **given)
        return
    _show(mine_file(input, output, teacher, config, engine=engine, **given), samples)
    typer.echo(f"written: {output}")


def _show(report: MiningReport, samples: int) -> None:
    """Print the counts, how many negatives may be positives that nobody labelled, and samples."""
    from rich.console import Console
    from rich.table import Table

    typer.echo(
        f"{report.records} records, {report.negatives} negatives among {report.documents} documents"
        f", {report.share_with_fewer:.1%} of the records got fewer than asked for"
    )
    table = Table(title="Negatives that may be positives: score at least …")
    for heading in ("of the positive's", "mined", "nearest, without a rule"):
        table.add_column(heading, justify="right")
    for row in report.near_positive:
        shares = ("-" if share is None else f"{share:.1%}" for share in (row.mined, row.nearest))
        table.add_row(f"{row.of_positive:.0%}", *shares)
    Console().print(table)
    for sample in report.samples[:samples]:
        typer.echo(f"\nquery             {' '.join(sample.query.split())[:100]}")
        rows = [("positive", sample.positive)]
        rows += [("negative", scored) for scored in sample.negatives[:3]]
        rows += [("refused", scored) for scored in sample.refused[:3]]
        for label, scored in rows:
            typer.echo(f"  {label:<8} {scored.score:6.3f} {' '.join(scored.text.split())[:100]}")
