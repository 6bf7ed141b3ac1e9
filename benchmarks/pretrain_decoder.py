"""Pretrain the project's own small causal decoder (`assets/decoder-6m`).

    python benchmarks/pretrain_decoder.py --tokens 24e6 --out assets/decoder-6m

reads the documentation and source of the standard library and of the permissively licensed
packages installed beside this Python (and `shared/data/train`, class A, where `--train-texts`
names it), trains a byte-level BPE of 8192 tokens and a Mistral decoder of 6.0 M parameters, and
writes a Hugging Face folder of about 13 MB. See `pretrain_corpus.py` for what is read.

The learning rate follows the tokens read, so the same command gives the same run on a slow machine
and on a fast one, only later. An interrupted run goes on from its checkpoint when started again;
the newest weights also lie in `WORK/latest`, and `WORK/metrics.jsonl` holds the losses. CPU or
GPU, one process, in the floating-point type that the machine is fastest in.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pretrain_corpus import Document, collect
from pretrain_model import DecoderShape, PretrainDecoder, export_folder
from pretrain_muon import StackedMuon
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from nvembed.core.arguments import Precision
from nvembed.core.files import atomic_folder, atomic_path, write_json
from nvembed.kernels.machine import fastest_precision

BOS, EOS = 1, 2
TOKENIZER_CHARACTERS = 40_000_000
VALIDATION_SHARE = 0.006


@dataclass(frozen=True)
class Schedule:
    """Learning-rate factor over the share of the tokens read: warm up, hold, decay to 0."""

    warmup: float = 0.015
    decay: float = 0.4

    def factor(self, progress: float) -> float:
        """Return the factor in (0, 1] at a share of the tokens in [0, 1]."""
        warm = min(1.0, (progress + 1e-3) / self.warmup)
        cool = max(0.02, min(1.0, (1.0 - progress) / self.decay))
        return min(warm, cool)


def train_tokenizer(documents: list[Document], vocab_size: int) -> Tokenizer:
    """Train the byte-level BPE: `<s>` in front of every text, nothing behind."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts: list[str] = []
    characters = 0
    for document in documents:
        if characters < TOKENIZER_CHARACTERS and document.kind != "source":
            texts.append(document.text)
            characters += len(document.text)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
    )
    return tokenizer


def build_corpus(work: Path, documents: list[Document], vocab_size: int) -> None:
    """Write tokenizer, token arrays (uint16) and manifest into `work/corpus`, all or nothing."""
    tokenizer = train_tokenizer(documents, vocab_size)
    tokens = Counter[tuple[str, str, str]]()
    rows: list[NDArray[np.uint16]] = []
    for start in range(0, len(documents), 1000):
        part = documents[start : start + 1000]
        for document, encoding in zip(
            part, tokenizer.encode_batch([item.text for item in part]), strict=True
        ):
            rows.append(np.array([*encoding.ids, EOS], dtype=np.uint16))
            tokens[document.source, document.license, document.kind] += len(encoding.ids) + 1
    held_aside = max(1, int(len(rows) * VALIDATION_SHARE))
    with atomic_folder(work / "corpus") as folder:
        np.concatenate(rows[:held_aside]).tofile(folder / "validation.bin")
        np.concatenate(rows[held_aside:]).tofile(folder / "train.bin")
        tokenizer.save(str(folder / "tokenizer.json"))
        manifest = [
            {"source": source, "license": license_name, "kind": kind, "tokens": count}
            for (source, license_name, kind), count in tokens.most_common()
        ]
        write_json(folder / "manifest.json", manifest)
    for entry in manifest:
        print(
            f"{entry['tokens']:>10,}  {entry['kind']:<6}  {entry['source']}  ({entry['license']})"
        )
    print(f"{sum(tokens.values()):>10,}  tokens in {len(rows):,} documents", flush=True)


def windows(tokens: NDArray[np.uint16], length: int, epoch: int, seed: int) -> NDArray[np.int64]:
    """Return the start of every window of one epoch, shuffled, with a fresh offset per epoch."""
    rng = np.random.default_rng([seed, epoch])
    offset = int(rng.integers(0, length))
    starts = np.arange(offset, len(tokens) - length - 1, length, dtype=np.int64)
    return rng.permutation(starts)


def batch_at(
    tokens: NDArray[np.uint16], step: int, batch: int, length: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return inputs and targets of a step, and the epochs seen: a pure function of the step."""
    per_epoch = max(1, (len(tokens) - 2 * length - 1) // length // batch)
    epoch, index = divmod(step, per_epoch)
    starts = windows(tokens, length, epoch, seed)[index * batch : (index + 1) * batch]
    rows = np.stack([tokens[start : start + length + 1] for start in starts]).astype(np.int64)
    block = torch.from_numpy(rows)
    return block[:, :-1], block[:, 1:], step / per_epoch


def optimizers(
    model: PretrainDecoder, muon_rate: float, adam_rate: float
) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for the embeddings and the norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        StackedMuon(matrices, lr=muon_rate, weight_decay=0.02, dtype=model.dtype),
        torch.optim.AdamW(others, lr=adam_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


@dataclass
class Progress:
    """Where a run is: what a checkpoint keeps beside weights and optimizer state."""

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0


def validation_loss(
    model: PretrainDecoder, tokens: NDArray[np.uint16], length: int, device: torch.device
) -> float:
    """Return the mean loss in nats per token over at most 64 windows that are never trained on."""
    count = min(64, (len(tokens) - 1) // length)
    losses = []
    with torch.no_grad():
        for start in range(0, count, 16):
            rows = [
                tokens[i * length : (i + 1) * length + 1]
                for i in range(start, min(count, start + 16))
            ]
            block = torch.from_numpy(np.stack(rows).astype(np.int64)).to(device)
            losses.append(float(model.loss(block[:, :-1], block[:, 1:])) * len(rows))
    return sum(losses) / count


@dataclass(frozen=True)
class Options:
    """What a run is started with."""

    work: Path
    tokens: int
    batch: int = 24
    length: int = 256
    muon_rate: float = 0.02
    adam_rate: float = 4e-3
    checkpoint_seconds: float = 240.0
    seed: int = 0
    compile: bool = False
    max_steps: int | None = None
    precision: Precision | None = None


def train(options: Options, shape: DecoderShape, device: torch.device) -> PretrainDecoder:
    """Train until the tokens are read, from the newest checkpoint if there is one."""
    corpus = options.work / "corpus"
    tokens = np.memmap(corpus / "train.bin", dtype=np.uint16, mode="r")
    validation = np.memmap(corpus / "validation.bin", dtype=np.uint16, mode="r")
    torch.manual_seed(options.seed)
    dtype = getattr(torch, options.precision or fastest_precision(device.type))
    model = PretrainDecoder(shape, dtype).to(device)
    chosen = optimizers(model, options.muon_rate, options.adam_rate)
    progress = Progress()
    checkpoint = options.work / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(chosen, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        progress = Progress(**state["progress"])
        print(f"resumed at step {progress.step}, {progress.seconds / 60:.1f} minutes", flush=True)
    step_loss = torch.compile(model.loss) if options.compile else model.loss
    schedule = Schedule()
    base_rates = [options.muon_rate, options.adam_rate]
    metrics = (options.work / "metrics.jsonl").open("a", encoding="utf-8")
    last, saved_at, recent = time.monotonic(), time.monotonic(), []
    while progress.tokens < options.tokens and progress.step != options.max_steps:
        factor = schedule.factor(progress.tokens / options.tokens)
        for optimizer, rate in zip(chosen, base_rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * factor
        inputs, targets, epochs = batch_at(
            tokens, progress.step, options.batch, options.length, options.seed
        )
        loss = step_loss(inputs.to(device), targets.to(device))
        loss.backward()
        for optimizer in chosen:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise RuntimeError(f"loss is {value} at step {progress.step}; last checkpoint kept")
        recent.append(value)
        now = time.monotonic()
        progress.seconds += now - last
        last = now
        progress.step += 1
        progress.tokens += inputs.numel()
        if progress.step % 50 == 0:
            row = {**asdict(progress), "epochs": round(epochs, 4), "rate_factor": round(factor, 4),
                   "train_loss": round(sum(recent) / len(recent), 4)}  # fmt: skip
            recent = []
            if progress.step % 250 == 0:
                row["validation_loss"] = round(
                    validation_loss(model, validation, options.length, device), 4
                )
            print(json.dumps(row), file=metrics, flush=True)
            print(row, f"{progress.tokens / progress.seconds:.0f} tokens/s", flush=True)
        if time.monotonic() - saved_at > options.checkpoint_seconds:
            save(options.work, model, chosen, progress)
            saved_at = time.monotonic()
    left = validation_loss(model, validation, options.length, device)
    final = {**asdict(progress), "final": True, "validation_loss": left}
    print(json.dumps(final), file=metrics, flush=True)
    print(final, flush=True)
    metrics.close()
    save(options.work, model, chosen, progress)
    return model


def save(
    work: Path, model: PretrainDecoder, chosen: list[torch.optim.Optimizer], progress: Progress
) -> None:
    """Write the checkpoint and `work/latest`, each all or nothing."""
    with atomic_path(work / "checkpoint.pt") as temporary:
        torch.save(
            {
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in chosen],
                "progress": asdict(progress),
            },
            temporary,
        )
    export_folder(model, work / "corpus" / "tokenizer.json", work / "latest")


def main() -> None:
    """Build the corpus where missing, train, export."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=float, default=24e6, help="tokens to read in all")
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished decoder")
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache/nvembed/pretrain")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--train-texts", type=Path, help="folder of shared/data/train")
    parser.add_argument("--site-packages", type=Path, action="append", help="may be repeated")
    parser.add_argument("--source-share", type=float, default=0.2)
    parser.add_argument("--batch", type=int, default=Options.batch)
    parser.add_argument("--compile", action="store_true", help="torch.compile the step")
    parser.add_argument("--max-steps", type=int, help="stop early, for measurements")
    arguments = parser.parse_args()
    name = arguments.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    shape = DecoderShape()
    if not (arguments.work / "corpus").exists():
        arguments.work.mkdir(parents=True, exist_ok=True)
        folders = arguments.site_packages or [Path(os.path.dirname(np.__path__[0]))]
        documents = collect(
            folders, arguments.train_texts, source_share=arguments.source_share, seed=0
        )
        build_corpus(arguments.work, documents, shape.vocab_size)
    options = Options(
        work=arguments.work,
        tokens=int(arguments.tokens),
        batch=arguments.batch,
        compile=arguments.compile,
        max_steps=arguments.max_steps,
    )
    model = train(options, shape, torch.device(name))
    if arguments.max_steps is None:
        export_folder(model, arguments.work / "corpus" / "tokenizer.json", arguments.out)


if __name__ == "__main__":
    main()
