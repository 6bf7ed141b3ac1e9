"""``nvembed doctor``."""

from __future__ import annotations

from typing import Annotated

import typer


def doctor(
    model: Annotated[
        str,
        typer.Argument(
            help="Folder or hub id of any sentence-transformers model or language model.",
            show_default=False,
        ),
    ],
    *,
    task: Annotated[
        str | None,
        typer.Option(
            help="Instruction of the sample query, or an MTEB task such as SciFact. Default: NQ's."
        ),
    ] = None,
    query: Annotated[
        str | None, typer.Option(help='Sample query, such as "how do I sort a list?".')
    ] = None,
    document: Annotated[
        str | None, typer.Option(help='Sample document, such as "sorted() returns a new list.".')
    ] = None,
    batch: Annotated[
        int, typer.Option(min=1, help="Texts of the memory forecast, such as 256.")
    ] = 32,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of each of them, such as 512. Default: the limit."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Examine a model by running it: direction, pooled tokens, truncation, memory, drift.

    Exit code 0: no problem; 1: a problem was found; 2: it cannot be loaded at all.

    Examples:

    \b
      nvembed doctor runs/demo/model
      nvembed doctor runs/demo/model --task SciFact --query "zinc shortens colds"
      nvembed doctor runs/demo/model --batch 256 --max-tokens 128
      nvembed doctor sentence-transformers/all-MiniLM-L6-v2 --json
    """
    from nvembed.encoding.doctor.examine import DoctorOptions, examine_model
    from nvembed.encoding.doctor.report import print_diagnosis

    diagnosis = examine_model(model, DoctorOptions(task, query, document, batch, max_tokens))
    print_diagnosis(diagnosis, as_json=json)
    if not diagnosis.healthy:
        raise typer.Exit(1)
