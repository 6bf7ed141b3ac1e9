"""The ``nvembed`` command: collects the commands and turns errors into one line and an exit code.

Exit codes: 0 done, 1 the doctor found a problem, 2 something in the input is wrong (one line on
stderr), 130 stopped by Ctrl-C. A traceback is a bug. Only typer is imported here; each command
imports what it needs when it runs.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated

import typer
from typer.exceptions import Abort, TyperException

from nvembed.cli.data import data
from nvembed.cli.folders import compress, export, merge
from nvembed.cli.models import compare, doctor, evaluate, serve
from nvembed.cli.options import OLD_OPTIONS
from nvembed.cli.start import init
from nvembed.cli.train import ablate, mine, train
from nvembed.cli.vectors import encode, index, search
from nvembed.core import __version__
from nvembed.core.errors import UserError
from nvembed.core.reporting import announce, release_notes, show_notes, withdraw

# Which extra brings a library that the base install lacks.
_EXTRAS = {
    **dict.fromkeys(("fastapi", "orjson", "prometheus_client", "starlette", "uvicorn"), "serve"),
    **dict.fromkeys(("mteb", "scipy", "sklearn"), "eval"),
    **dict.fromkeys(("onnx", "onnxruntime", "onnxscript"), "onnx"),
    "httpx2": "synth",
    "lancedb": "index",
    "matplotlib": "plots",
    "mcp": "mcp",
    "pyarrow": "data",
}

# Installed by the extra quantization, they warn whenever adapters are read, whatever is asked for.
_TALKATIVE = ("bitsandbytes", "torchao", "torch.utils._pytree")

app = typer.Typer(
    name="nvembed",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_COMMANDS: tuple[Callable[..., None], ...] = (
    *(init, train, mine, evaluate, compare, ablate, encode),
    *(index, search, serve, doctor, export, merge, compress),
)
for _command in _COMMANDS:
    app.command()(_command)
app.add_typer(data, name="data")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"nvembed {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", "-V", callback=_show_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Train, mine, evaluate and search with text-embedding models made from language models.

    Start with make demo in a checkout, or nvembed train RECIPE --dry-run
    """


def main() -> None:
    """Run the command of ``sys.argv`` and exit."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str], program: typer.Typer = app, name: str = "nvembed") -> int:
    """Run one command of a program and return its exit code."""
    show_notes()
    # Reports and bars of the model libraries would bury our own lines; the user's setting wins.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for library in _TALKATIVE:
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        given = list(arguments) or (["--help"] if program is app else [])
        announce("loading libraries")
        result = program(given, prog_name=name, standalone_mode=False)
        release_notes()
    except UserError as error:
        return _fail(str(error), error.exit_code)
    except TyperException as error:
        message = error.format_message().replace("Value error, ", "")
        option = str(getattr(error, "option_name", ""))
        if option in OLD_OPTIONS:
            return _fail(f"No such option: {option}. It is {OLD_OPTIONS[option]} now", 2)
        return _fail(f"{message.rstrip('.')}. See {name} --help", 2)
    except (KeyboardInterrupt, Abort):
        return _fail("stopped by Ctrl-C", 130)
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        told = f"this needs {error.name}, which is not installed."
        return _fail(f"{told} Install it with: pip install 'nvembed[{extra}]'", 2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        place = f"{error.filename}: " if error.filename else ""
        return _fail(f"{place}no space left on the disk. Free some and run the command again", 2)
    finally:
        withdraw()
    # Typer itself turns Ctrl-C into this exit code, without a word.
    return _fail("stopped by Ctrl-C", 130) if result == 130 else int(result or 0)


def _fail(message: str, code: int) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return code
