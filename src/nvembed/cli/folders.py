"""Commands that make a model of a model: ``export``, ``merge`` and ``compress``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import typer

from nvembed.cli import options as opt
from nvembed.core.errors import ConfigError


@opt.described(
    model="Folder or hub id: saved by nvembed, or NVIDIA's layout.",
    to="The new folder; with gguf a file.",
    format="NVIDIA's layout, our own folder, stock sentence-transformers modules "
    "(mean pooling only), an ONNX graph, or a GGUF file for llama.cpp and Ollama.",
    dtype="Of the weights. Default: as they are stored.",
    quantize="Of a GGUF file's matrices. Default: f16.",
)
def export(
    model: str,
    *,
    to: Path,
    format: Literal["nv-embed", "nvembed", "sentence-transformers", "onnx", "gguf"],
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    quantize: Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"] | None = None,
) -> None:
    """Write an embedding model in another format.

    Folders have a model card.

    Examples:

    \b
      nvembed export runs/mine/model --to out --format nv-embed --dtype float16
      nvembed export nvidia/NV-Embed-v2 --to v2 --format nvembed --dtype bfloat16
      nvembed export runs/mean/model --to plain --format sentence-transformers
      nvembed export runs/mine/model --to graph --format onnx
      nvembed export runs/mean/model --to model.gguf --format gguf --quantize q8_0
    """
    if format == "gguf":
        if dtype is not None:
            raise ConfigError("--dtype is of folders", expected="--quantize with --format gguf")
        from nvembed.encoding.export.gguf import export_gguf

        export_gguf(model, to, quantize or "f16")
        typer.echo(f"written: {to} ({quantize or 'f16'})")
        return
    if quantize is not None:
        raise ConfigError("--quantize is of GGUF files", expected="--format gguf with it")
    from nvembed.encoding.export.folders import export_folder

    export_folder(model, to, format, dtype=dtype)
    typer.echo(f"written: {to} ({format})")


@opt.described(
    model="Folder or hub id: saved by nvembed, or NVIDIA's layout.",
    texts=typer.Option(metavar="FILE", help="Texts that decide what goes; JSONL, CSV, TXT …"),
    to="The new folder.",
    layers=typer.Option(min=1, help="Layers that stay. Default: all."),
    mlp=typer.Option(min=1, help="Channels that stay in each MLP. Default: all."),
    vocabulary=typer.Option(min=1, help="Most tokens that stay. Default: all."),
    head_free="Pool all tokens by their mean, the prompt's too, as servers do that know no head.",
    sample=typer.Option(min=1, help="Texts that layers and channels are chosen by."),
    fit=typer.Option(min=1, help="Texts that the layers that stay are fitted by."),
)
def compress(
    model: str,
    *,
    texts: Path,
    to: Path,
    layers: int | None = None,
    mlp: int | None = None,
    vocabulary: int | None = None,
    head_free: bool = False,
    sample: int = 64,
    fit: int = 512,
) -> None:
    """Make a model smaller, by what your texts can do without.

    Layers, channels of MLPs and tokens are left out. What goes is chosen by what it changes in the
    vectors, and the layers that stay are fitted to the states of the whole model. The new folder
    holds the model, compression.json (what went; size, time and cosine after each step, on texts
    held out) and recover.yaml, a recipe for `nvembed train` that learns back from the whole model.
    With --head-free the model that recovers needs no latent attention and no pool mask: it can be
    exported for llama.cpp, vLLM and any other server (--format gguf,
    sentence-transformers).

    Examples:

    \b
      nvembed compress runs/mine/model --texts texts.jsonl --layers 15 --to small
      nvembed compress MODEL --texts texts.jsonl --vocabulary 20000 --to small
      nvembed train small/recover.yaml
      nvembed compress runs/mine/model --texts texts.jsonl --head-free --to plain
    """
    from nvembed.encoding.compression import compress as compression
    from nvembed.encoding.compression.recovery import RECIPE

    found = compression.compress(
        model,
        texts,
        to,
        layers=layers,
        mlp=mlp,
        vocabulary=vocabulary,
        head_free=head_free,
        sample=sample,
        fit=fit,
    )
    typer.echo(f"{'':<46}{'cosine of':>11}")
    names = f"{'parameters':>14}{'MB':>10}{'seconds':>10}{'documents':>11}{'queries':>9}"
    typer.echo(f"{'':<12}{names}")
    for step in found.steps:
        size = f"{step.parameters:>14,}{step.bytes / 1e6:>10,.1f}"
        cosines = f"{step.cosine:>11.4f}{step.queries:>9.4f}"
        typer.echo(f"{step.step:<12}{size}{step.seconds:>10.2f}{cosines}")
    for name, rows in found.fitted.items():
        if not rows:
            typer.echo(f"{name}: nothing was fitted: this family's MLPs do not add to states as is")
    typer.echo(f"written: {to}; to recover: nvembed train {to / RECIPE}")


@opt.described(
    models=typer.Argument(metavar="MODEL...", help="Folders: saved models, or adapters (peft)."),
    to="The new folder.",
    weights=typer.Option(metavar="NUMBERS", help="Such as 2,1. Default: equal weights."),
    method="slerp takes the arc between two models in place of the line.",
    tasks=typer.Option(
        metavar="FOLDER",
        help="Task folder that decides the weights: a greedy soup. May be repeated.",
    ),
    rank=typer.Option(
        metavar="RANK",
        help="Of adapters: the most that the merged one may have, the nearest of that rank.",
    ),
)
def merge(
    models: list[Path],
    *,
    to: Path,
    weights: str | None = None,
    method: Literal["linear", "slerp"] = "linear",
    tasks: list[Path] | None = None,
    rank: int | None = None,
) -> None:
    """Merge models that were tuned from one base.

    Their weights are averaged, those of heads too. With --tasks, a greedy soup: from the best model
    on, the others join in the order of their scores where the mean score of the tasks does not
    fall. Adapters are merged as what they add to the weights, so their ranks add up; --rank
    cuts them.

    Examples:

    \b
      nvembed merge seed-0/model seed-1/model seed-2/model --to soup
      nvembed merge runs/a/model runs/b/model --to mixed --weights 0.7,0.3
      nvembed merge runs/a/model runs/b/model --to arc --method slerp
      nvembed merge runs/a/model runs/b/model --to best --tasks FOLDER
      nvembed merge runs/a/adapter runs/b/adapter --to mixed --rank 20
    """
    from nvembed.evaluation import soup

    try:
        numbers = None if weights is None else [float(one) for one in weights.split(",")]
    except ValueError as error:
        expected = "numbers with commas between them"
        raise ConfigError(f"{weights!r}", where="--weights", expected=expected) from error
    merged = soup.merge(models, to, weights=numbers, method=method, tasks=tasks, rank=rank)
    for part in merged.parts:
        alone = "" if part.score is None else f", {100 * part.score:.2f} alone"
        typer.echo(f"{part.share:.3f}  {part.model}{alone}")
    reached = "" if merged.score is None else f" ({100 * merged.score:.2f})"
    typer.echo(f"written: {to}{reached}")
