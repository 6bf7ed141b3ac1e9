"""``nvembed mine``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from nvembed.cli.options import DtypeOption


def mine(
    input: Annotated[
        Path, typer.Argument(help='JSONL of {"query", "positive"}.', show_default=False)
    ],
    output: Annotated[
        Path, typer.Argument(help="The same records with negatives.", show_default=False)
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Mining settings, such as num_negatives=7 or strategy=margin.",
            show_default=False,
        ),
    ] = None,
    *,
    teacher: Annotated[
        str,
        typer.Option(
            help="Model that scores the candidates: folder or hub id of any "
            "sentence-transformers model.",
            show_default=False,
        ),
    ],
    kind: Annotated[
        Literal["retrieval", "nli", "sts"], typer.Option(help="What the records are.")
    ] = "retrieval",
    instruction: Annotated[
        str | None, typer.Option(help="Task that is put before the queries.")
    ] = None,
    documents: Annotated[
        Path | None,
        typer.Option(
            help='JSONL of {"text"} to search. Default: the input\'s own documents.',
            show_default=False,
        ),
    ] = None,
    dtype: DtypeOption = "auto",
) -> None:
    """Find hard negatives: near the query, yet clearly below its positive.

    Examples:

    \b
      nvembed mine pairs.jsonl mined.jsonl --teacher runs/demo/model
      nvembed mine pairs.jsonl mined.jsonl --teacher intfloat/e5-base-v2 \\
        --documents docs.jsonl --instruction "Find the answer"
      nvembed mine pairs.jsonl mined.jsonl --teacher runs/demo/model \\
        num_negatives=15 threshold=0.9
    """
    from nvembed.core.config import load_config
    from nvembed.mining.config import MiningConfig
    from nvembed.mining.miner import mine_file

    config = load_config(MiningConfig, None, overrides or ())
    report = mine_file(
        input,
        output,
        teacher,
        config,
        kind=kind,
        instruction=instruction,
        documents=documents,
        dtype=dtype,
    )
    typer.echo(
        f"{report.records} records, {report.negatives} negatives among {report.documents} documents"
        f", {report.share_with_fewer:.1%} of the records got fewer than asked for"
    )
    typer.echo(f"written: {output}")
