"""The diagnosis of ``nvembed doctor``: checks of a model, its memory, and how they are printed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from nvembed.core.arguments import PrecisionChoice
from nvembed.core.errors import ConfigError, ModelError
from nvembed.core.reporting import byte_size
from nvembed.data.instructions import resolve_prompt, task_instruction
from nvembed.encoding.doctor.checks import (
    CHECKS,
    DOCUMENTS,
    QUERIES,
    Examined,
    Placement,
    Sample,
    Status,
    Subject,
    model_of,
)
from nvembed.interop.gguf import read_gguf
from nvembed.interop.model_folder import find_gguf
from nvembed.model import memory, packs
from nvembed.model.attention import short_tokens
from nvembed.model.embedder import NVEmbed
from nvembed.model.encoder import Encoder, check_task, load_encoder, prompts_of, settle_dtype


@dataclass(frozen=True, slots=True)
class DoctorOptions:
    """What to examine a model with; ``None`` is what is built in."""

    task: str | None = None  # of the sample query; the built-in one is that of MTEB's NQ
    query: str | None = None
    document: str | None = None
    batch: int = 32  # texts of the memory forecast
    max_tokens: int | None = None  # of each of them; the model's limit

    def __post_init__(self) -> None:
        """Refuse an empty sample, before a model is loaded."""
        for what, text in (("query", self.query), ("document", self.document)):
            if text is not None and not text.strip():
                raise ConfigError("the sample is empty", where=f"--{what}", expected="a text")


@dataclass(frozen=True, slots=True)
class Finding:
    """One checked property; ``problem``: vectors are wrong or not what NV-Embed means."""

    name: str
    status: Status
    message: str
    advice: str | None = None  # one line on what to do


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Everything that ``nvembed doctor`` has to say about a model."""

    model: str
    description: str
    findings: tuple[Finding, ...]
    samples: tuple[Sample, ...]
    placement: tuple[Placement, ...]
    memory: tuple[memory.MemoryForecast, ...]
    memory_formula: str

    @property
    def healthy(self) -> bool:
        """No finding is a problem; warnings may be there."""
        return all(finding.status != "problem" for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """Plain data, with ``healthy`` in it."""
        memory = [{**asdict(each), "total": each.total} for each in self.memory]
        return {"healthy": self.healthy, **asdict(self), "memory": memory}


def examine_model(
    name: str, options: DoctorOptions, dtype: PrecisionChoice | None = None
) -> Diagnosis:
    """Load a model by folder, GGUF file or hub id and examine it.

    What a GGUF file is is told too where it cannot be loaded, as a problem.
    """
    check_task(name, options.task)
    shown, settled = Path(name).name or name, settle_dtype(name, dtype)
    if (path := find_gguf(name)) is None:
        return examine(load_encoder(name, settled), shown, options)
    said = Finding("GGUF file", "ok", read_gguf(path).described())
    try:
        found = examine(load_encoder(name, settled), shown, options)
    except ModelError as error:
        refused = Finding("loading", "problem", error.message, error.hint)
        return Diagnosis(shown, "a GGUF file", (said, refused), (), (), (), memory.FORMULA)
    return replace(found, findings=(said, *found.findings))


def examine(encoder: Encoder, name: str, options: DoctorOptions) -> Diagnosis:
    """Examine a loaded model; it is left as it was."""
    query, document = options.query or QUERIES[0], options.document or DOCUMENTS[0]
    if not isinstance(encoder, Examined):
        raise ModelError(f"{type(encoder).__name__} cannot be examined", where=name)
    task = options.task or task_instruction("NQ").instruction
    takes_task = isinstance(encoder, NVEmbed) or encoder.follows_instructions
    prompt = (resolve_prompt(task, prompts_of(encoder)) or "") if takes_task else ""
    model = model_of(encoder).eval()
    subject = Subject(encoder, prompt, query, document, task)
    inner, limit = subject.transformer, model.max_seq_length
    kind = "sentence-transformers" if subject.ours is None else "ours"
    family = type(model[0]).__name__ if inner is None else inner.config.model_type
    texts = "any length" if limit is None or math.isinf(limit) else f"at most {limit} tokens"
    return Diagnosis(
        name,
        f"{kind}: {family}, {subject.elements / 1e6:.1f} M weights, {subject.pooling}, "
        f"width {encoder.dimension}, {texts}",
        tuple(Finding(title, *check(subject)) for title, check in CHECKS.items()),
        subject.samples,
        subject.placement,
        _memory(subject, options),
        memory.FORMULA,
    )


def _memory(subject: Subject, options: DoctorOptions) -> tuple[memory.MemoryForecast, ...]:
    """Forecast encoding; nothing for a model without a transformer inside."""
    if subject.transformer is None:
        return ()
    each = options.max_tokens or subject.model.max_seq_length or 512
    tokens, pooling = options.batch * each, None
    longest_scored = dict.fromkeys(memory.BYTES, 0)
    if subject.ours is not None:
        pooling, on_gpu = subject.ours.pooling, subject.device.type == "cuda"
        if not on_gpu:
            longest_scored = {name: short_tokens(getattr(torch, name)) for name in memory.BYTES}
        # encode packs: a forward has no more than its budget, or one longer text.
        budget = packs.CUDA_PACK_TOKENS if on_gpu else packs.CPU_PACK_TOKENS
        tokens = min(tokens, max(budget, each))
    shape = memory.Shape.of_config(
        subject.transformer.config.get_text_config(),
        pooling_heads=int(getattr(pooling, "num_heads", 0)),
        pooling_latents=int(getattr(pooling, "num_latents", 0)),
    )
    return tuple(
        memory.forecast(shape, name, tokens, subject.elements, score_tokens=min(each, longest))
        for name, longest in longest_scored.items()
    )


# --- Printing -------------------------------------------------------------------------------------

_MARKS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "problem": ("✗", "bold red")}
_POOLED = {True: Text("✓", "green"), False: Text("–", "dim"), None: Text("?")}
_LETTERS = (
    ". T: tokens at once (encode packs texts up to a budget), D: hidden width, Q and K: of queries "
    "and keys over all heads, I: of the MLP. Python and its libraries come on top."
)
_Rows = Iterable[Sequence[str | Text]]


def print_diagnosis(diagnosis: Diagnosis, *, as_json: bool = False) -> None:
    """Print it to stdout: tables with the verdict last, or one JSON object."""
    if as_json:
        print(json.dumps(diagnosis.as_json(), ensure_ascii=False, indent=2))
        return
    parts = [Text.assemble((diagnosis.model, "bold"), "  ", diagnosis.description), ""]
    columns = [Column(width=1), Column("property", no_wrap=True), Column("found", ratio=1)]
    parts += [_table(columns, map(_finding_row, diagnosis.findings)), ""]
    if samples := [sample for sample in diagnosis.samples if sample.tokens]:
        columns = [Column(name, no_wrap=True) for name in ("sample", "part")]
        columns += [Column("tokens", ratio=1), Column("pooled", justify="center")]
        parts += [_table(columns, _sample_rows(samples)), ""]
    if diagnosis.memory:
        headings = ("tokens at once", "weights", "activations", "total")
        columns = [Column("memory to encode", no_wrap=True)]
        columns += [Column(heading, justify="right") for heading in headings]
        formula = Text(diagnosis.memory_formula + _LETTERS, style="dim")
        parts += [_table(columns, _memory_rows(diagnosis)), formula, ""]
    console = Console(highlight=False)
    for part in [*parts, _verdict(diagnosis)]:
        console.print(part)


def _table(columns: Sequence[Column], rows: _Rows) -> Table:
    table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False, expand=True, show_edge=False)
    for row in rows:
        table.add_row(*row)
    return table


def _finding_row(finding: Finding) -> Sequence[str | Text]:
    mark, style = _MARKS[finding.status]
    found = Text(finding.message)
    if finding.advice and finding.status != "ok":
        found.append(f"\n→ {finding.advice}", style=style)
    return Text(mark, style=style), finding.name, found


def _sample_rows(samples: Sequence[Sample]) -> _Rows:
    """One row per run of tokens with the same role and mark."""
    for sample in samples:
        side = f"{sample.side} ({len(sample.tokens)} tokens)"
        for (role, pooled), run in groupby(sample.tokens, key=lambda t: (t.role, t.pooled)):
            tokens = Text(" ".join(token.text for token in run), "green" if pooled else "dim")
            yield side, role, tokens, _POOLED[pooled]
            side = ""


def _memory_rows(diagnosis: Diagnosis) -> _Rows:
    for row in diagnosis.memory:
        sizes = (row.weights, row.activations, row.total)
        yield f"in {row.dtype}", f"{row.tokens:,}", *map(byte_size, sizes)
    for part in diagnosis.placement:
        name = f"now: {part.module}, {part.dtype} on {part.device}"
        yield Text(name, "dim"), "", Text(byte_size(part.bytes), "dim")


def _verdict(diagnosis: Diagnosis) -> Text:
    found = [finding.status for finding in diagnosis.findings]
    problems, warnings = (
        f"{found.count(status)} {status}{'' if found.count(status) == 1 else 's'}"
        for status in ("problem", "warning")
    )
    if not diagnosis.healthy:
        return Text(f"✗ {problems}, {warnings}", "bold red")
    return Text(f"✓ no problem, {warnings}" if "warning" in found else "✓ healthy", "bold green")
