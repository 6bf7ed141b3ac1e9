"""``nvembed data synthesize``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def synthesize(
    output: Annotated[Path, typer.Argument(help="Folder for the examples.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Settings, such as tasks=20000 or concurrency=64.",
            show_default=False,
        ),
    ] = None,
    *,
    endpoint: Annotated[
        str,
        typer.Option(
            help="Base URL of an OpenAI-compatible API, such as http://localhost:8000/v1.",
            show_default=False,
        ),
    ],
    model: Annotated[str, typer.Option(help="Name of the model there.", show_default=False)],
    key_variable: Annotated[
        str, typer.Option(help="Environment variable that holds the key, if one is needed.")
    ] = "OPENAI_API_KEY",
) -> None:
    """Let a language model write training examples: first tasks, then examples of each.

    Examples are pairs of a short query and a long document, of a long text and a short label, and
    of two short texts, each with a wrong document and the task as its instruction. Run the same
    command again to go on after it was stopped.

    Examples:

    \b
      nvembed data synthesize data/synthetic --endpoint http://localhost:8000/v1 \\
        --model mistralai/Mixtral-8x22B-Instruct-v0.1 tasks=20000 concurrency=64
      nvembed data synthesize data/synthetic --endpoint https://api.example.com/v1 \\
        --model large --key-variable EXAMPLE_KEY requests_per_minute=60
      nvembed data synthesize data/labels --endpoint http://localhost:8000/v1 \\
        --model local 'kinds=["long-short"]' tasks=50 examples_per_task=4
    """
    from rich.console import Console

    from nvembed.building.synthesis.config import SynthesisConfig, check_secrets
    from nvembed.building.synthesis.report import print_summary
    from nvembed.building.synthesis.run import synthesize as run
    from nvembed.core.config import load_config

    check_secrets(endpoint, key_variable)
    given = {"endpoint": endpoint, "model": model, "key_variable": key_variable}
    settings = [f"{name}={json.dumps(value)}" for name, value in given.items()]
    config = load_config(SynthesisConfig, None, [*settings, *(overrides or ())])
    summary = run(config, output)
    console = Console()
    print_summary(summary, output, console if console.is_terminal else Console(width=120))
