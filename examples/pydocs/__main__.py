"""``python examples/pydocs``: the whole recipe on the documentation of this machine's packages."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


program = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@program.command()
def demo(
    minutes: Annotated[
        float, typer.Option(min=0.5, help="Time to take on 2 CPU cores; more trains longer.")
    ] = 10.0,
    backbone: Annotated[
        str | None,
        typer.Option(help="Model to start from: folder or hub id. Default: the best at hand."),
    ] = None,
    output: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/demo"),
) -> None:
    """Run the whole recipe on the documentation of the Python packages on this machine.

    It builds the data set, trains stage 1, mines hard negatives, trains stage 2,
    evaluates on held-out modules and searches. No download, no GPU.

    Examples:

    \b
      python examples/pydocs
      python examples/pydocs --minutes 3 --output runs/short
      python examples/pydocs --backbone HuggingFaceTB/SmolLM2-135M --minutes 60
    """
    # Its models load in a moment; the libraries' bars for that would only get between the lines.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from pydocs.run import run_demo

    run_demo(minutes, backbone, output)


if __name__ == "__main__":
    from nvembed.cli.main import run

    sys.exit(run(sys.argv[1:], program, "python examples/pydocs"))
