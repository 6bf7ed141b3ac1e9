"""Is latent attention useful on other embedding models? The article's first question, in miniature.

    python benchmarks/latent_on_other_models.py --encoder MINILM --output runs/other-models

trains every arm below with three seeds, scores each on a few local tasks, and prints (and writes to
`OUTPUT/table.md`) one Markdown table: mean and standard deviation over seeds, and the difference to
the group's first trained arm, seed by seed. `--cost` prints what heads cost instead. Finished arms
are skipped, an interrupted one goes on. `MINILM` is the folder of a sentence-transformers model of
stock modules, such as all-MiniLM-L6-v2; the decoder and the data lie in `shared/` beside the
checkout. All texts are bare in training and evaluation: a ready model was not trained to read
instructions.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nvembed.core.files import write_text
from nvembed.evaluation.results import TaskResult, read_results, write_results
from nvembed.evaluation.session import evaluate
from nvembed.evaluation.tasks import LocalTask, load_tasks
from nvembed.kernels.machine import settle_precision
from nvembed.model.embedder import NVEmbed
from nvembed.model.encoder import Encoder
from nvembed.model.packs import embed_pack
from nvembed.model.pooling import LatentAttention
from nvembed.model.settings import PoolingKind
from nvembed.model.tokens import TokenizedText
from nvembed.training.config import TrainConfig
from nvembed.training.trainer import train

TASKS = ("sts13", "stackfaq", "covid_q", "trecqa", "cr")  # one of each type, small
DATA = {
    "squad_train": "retrieval",
    "nfcorpus_dev": "retrieval",
    "covid_faq": "retrieval",
    "mediqa_train": "retrieval",
    "snli_devtest": "nli",
    "stsb": "sts",
}
MAX_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Arm:
    """One row of the table.

    Args:
        group: arms that are compared with each other.
        name: of the arm.
        base: ``encoder`` or ``decoder``.
        pooling: settings of the head.
        changes: keys of the recipe beside it; ``None`` is the untrained model.
    """

    group: str
    name: str
    base: str
    pooling: dict[str, Any]
    changes: dict[str, Any] | None = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return f"{self.group}-{self.name}".replace(" ", "_")


def latent(num_latents: int, num_heads: int) -> dict[str, Any]:
    """Settings of a latent head."""
    return {"kind": "latent", "num_latents": num_latents, "num_heads": num_heads}


MEAN, LAST, SELF = {"kind": "mean"}, {"kind": "last"}, {"kind": "self_attention", "num_heads": 4}
FROZEN = {"backbone": "freeze"}
ARMS = (
    Arm("frozen", "untrained mean", "encoder", MEAN, None),
    Arm("frozen", "self-attention", "encoder", SELF, FROZEN),
    Arm("frozen", "latent 64x4", "encoder", latent(64, 4), FROZEN),
    Arm("causal", "untrained mean", "decoder", MEAN, None),
    Arm("causal", "mean", "decoder", MEAN),
    Arm("causal", "last", "decoder", LAST),
    Arm("causal", "latent 64x4", "decoder", latent(64, 4)),
    Arm("tuned", "mean", "encoder", MEAN),
    Arm("tuned", "latent 64x4", "encoder", latent(64, 4)),
    Arm("size", "latent 8x4", "encoder", latent(8, 4), FROZEN),
    Arm("size", "latent 512x4", "encoder", latent(512, 4), FROZEN),
    Arm("size", "latent 64x1", "encoder", latent(64, 1), FROZEN),
    Arm("size", "latent 64x8", "encoder", latent(64, 8), FROZEN),
)
# Peak rates: a fresh head on a frozen model, a small decoder as in recipes/small.yaml, and a ready
# encoder, which larger rates would only destroy.
RATES = {"frozen": 1e-3, "size": 1e-3, "causal": 1e-3, "tuned": 5e-5}


class BareTexts:
    """An encoder that never sees the instruction of a task."""

    def __init__(self, model: NVEmbed) -> None:
        self._model = model

    @property
    def dimension(self) -> int:
        """Width of the vectors."""
        return self._model.dimension

    def encode_query(self, texts: Sequence[str], *, task: str | None = None) -> NDArray[np.float32]:
        """Embed queries as they are."""
        return self._encode(texts)

    def encode_document(
        self, texts: Sequence[str], *, task: str | None = None
    ) -> NDArray[np.float32]:
        """Embed documents as they are."""
        return self._encode(texts)

    def _encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return np.asarray(
            self._model.encode(list(texts), prompt="", show_progress_bar=False), np.float32
        )


def recipe(arm: Arm, seed: int, backbone: str, output: Path, shared: Path, steps: int) -> Any:
    """The run of an arm."""
    rate = RATES[arm.group]
    stage = {
        "name": "one",
        "steps": steps,
        "batch_size": 32,
        "learning_rate": rate,
        "head_learning_rate": max(rate, 2e-4),
        "warmup_steps": steps // 10,
        "in_batch_negatives": True,
        "num_negatives": 1,
        "temperature": 0.05,
    }
    data = {
        "output": str(output / "runs" / f"{arm.folder}-{seed}"),
        "seed": seed,
        "model": {
            "backbone": backbone,
            "attention": "causal" if arm.base == "decoder" else "bidirectional",
            "max_tokens": MAX_TOKENS,
            "pooling": arm.pooling,
        },
        "lora": None,
        "optimizer": {"weight_decay": 0.03, "beta2": 0.99},
        "datasets": [
            {
                "name": name,
                "path": str(shared / "data" / "train" / f"{name}.jsonl.gz"),
                "kind": kind,
                "instruction": None,
                "stages": [1],
            }
            for name, kind in DATA.items()
        ],
        "stages": [stage],
    }
    return TrainConfig.model_validate({**data, **(arm.changes or {})})


def score_arm(
    arm: Arm,
    seed: int,
    backbone: str,
    tasks: Sequence[LocalTask],
    arguments: argparse.Namespace,
) -> dict[str, TaskResult]:
    """Train and evaluate, or read what is there."""
    path: Path = arguments.output / "scores" / f"{arm.folder}-{seed}.json"
    if path.exists():
        return read_results(path)
    started = time.monotonic()
    dtype = settle_precision("auto")
    if arm.changes is None:
        model = NVEmbed.from_pretrained(
            backbone,
            pooling=arm.pooling["kind"],
            attention="causal" if arm.base == "decoder" else None,
            max_tokens=MAX_TOKENS,
            dtype=dtype,
        )
    else:
        config = recipe(arm, seed, backbone, arguments.output, arguments.shared, arguments.steps)
        folder = train(config, base_dir=Path.cwd())
        model = NVEmbed.from_pretrained(folder, dtype=dtype)
    trained = time.monotonic()
    encoder: Encoder = BareTexts(model)
    results = evaluate(encoder, tasks)
    write_results(path, results)
    spent = f"{trained - started:.0f} + {time.monotonic() - trained:.0f} s"
    print(f"{arm.folder} seed {seed}: {average(results):.2f} ({spent})", flush=True)
    return results


def average(results: dict[str, TaskResult]) -> float:
    """Mean of the main scores, in points of 100."""
    return 100 * statistics.fmean(result.main_score for result in results.values())


def table(found: dict[tuple[str, str], list[dict[str, TaskResult]]]) -> str:
    """Rows of arms: mean ± standard deviation over seeds, and the paired difference.

    Groups ``frozen`` and ``size`` share their first trained arm, self-attention.
    """
    lines = [
        f"| arm | seeds | mean | against the first trained arm | {' | '.join(TASKS)} |",
        "|" + "---|" * (4 + len(TASKS)),
    ]
    first: dict[str, list[float]] = {}
    for arm in ARMS:
        runs = found.get((arm.group, arm.name))
        if not runs:
            continue
        means = [average(run) for run in runs]
        difference = ""
        if arm.changes is not None:
            group = "frozen" if arm.group == "size" else arm.group
            base = first.setdefault(group, means)
            pairs = [own - other for own, other in zip(means, base, strict=False)]
            difference = "–" if base is means else _spread(pairs, "+.2f")
        cells = [_spread([100 * run[task].main_score for run in runs], ".1f") for task in TASKS]
        row = [f"{arm.group}: {arm.name}", str(len(runs)), _spread(means, ".2f"), difference]
        lines.append("| " + " | ".join([*row, *cells]) + " |")
    return "\n".join(lines)


def _spread(values: Sequence[float], form: str) -> str:
    mean = format(statistics.fmean(values), form)
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):{form.lstrip('+')}}"


@torch.inference_mode()
def costs(backbones: dict[str, str]) -> str:
    """Parameters and time of heads, folded and as written, against their backbone."""
    lines = [
        "| model | head | parameters | of the backbone | multiplications per token, plain | folded "
        "| ms, plain | ms, folded | encode, tokens/s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    heads: list[tuple[PoolingKind, int, int]] = [("mean", 1, 1), ("self_attention", 1, 4)]
    heads += [("latent", r, h) for r, h in ((8, 4), (64, 1), (64, 4), (64, 8), (512, 4), (512, 8))]
    for name, backbone in backbones.items():
        for kind, num_latents, num_heads in heads:
            model = NVEmbed.from_pretrained(
                backbone,
                pooling=kind,
                num_latents=num_latents,
                num_heads=num_heads,
                max_tokens=MAX_TOKENS,
                dtype="float32",
            ).eval()
            own = sum(p.numel() for p in model.pooling.parameters())
            body = sum(p.numel() for p in model.backbone.parameters())
            label = f"latent {num_latents}x{num_heads}" if kind == "latent" else kind
            layer = getattr(model.pooling, "layer", None)
            counts = _multiplications(layer) if isinstance(layer, LatentAttention) else [""] * 4
            shown = [label, f"{own / 1e6:.2f} M", f"{own / body:.0%}", *counts]
            lines.append(f"| {name} | {' | '.join(shown)} | {_speed(model):,.0f} |")
    return "\n".join(lines)


def _multiplications(layer: LatentAttention) -> list[str]:
    """Of the cross attention alone, and its time for 2,048 tokens.

    The MLP behind it takes 12 D² in both forms.
    """
    num_latents, width = layer.latents_RD.shape
    inner = layer.num_heads * layer.head_width
    plain = 2 * inner * (width + num_latents)
    folded = 2 * layer.num_heads * num_latents * width
    hidden_TD = torch.randn(2048, width)
    seconds = [_best(lambda: layer.attend_plain(hidden_TD))]
    with layer.fixed_weights():
        seconds.append(_best(lambda: layer.attend_folded(hidden_TD)))
    counts = [f"{count / 1e6:.2f} M" for count in (plain, folded)]
    return counts + [f"{1e3 * each:.1f}" for each in seconds]


def _speed(model: NVEmbed) -> float:
    """Tokens per second of packs of 2,048 in texts of 64."""
    texts = [TokenizedText(tuple(range(1000, 1064)), 0)] * 32
    with model.pooling.fixed_weights():
        return 64 * len(texts) / _best(lambda: embed_pack(model, texts))


def _best(work: Callable[[], object]) -> float:
    """Seconds of the fastest of eight runs."""
    found = []
    for _ in range(8):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return min(found)


def main() -> None:
    """Run the arms, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--encoder", required=True, help="folder of a stock model")
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--output", type=Path, default=Path("runs/other-models"))
    parser.add_argument("--groups", nargs="+", default=["causal", "tuned", "frozen", "size"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--cost", action="store_true", help="only print what heads cost")
    arguments = parser.parse_args()
    arguments.shared = arguments.shared.resolve()
    decoder = str(arguments.shared / "models" / "base-8m")
    backbones = {"encoder": str(Path(arguments.encoder).resolve()), "decoder": decoder}
    if arguments.cost:
        print(costs(backbones))
        return
    tasks = load_tasks([arguments.shared / "data" / "tasks" / name for name in TASKS])
    found: dict[tuple[str, str], list[dict[str, TaskResult]]] = {}
    for seed in range(arguments.seeds):
        for arm in (arm for group in arguments.groups for arm in ARMS if arm.group == group):
            if seed and arm.changes is None:
                continue  # nothing in it is random
            run = score_arm(arm, seed, backbones[arm.base], tasks, arguments)
            found.setdefault((arm.group, arm.name), []).append(run)
            text = table(found)
            write_text(arguments.output / "table.md", text + "\n")
    print(text)


if __name__ == "__main__":
    main()
