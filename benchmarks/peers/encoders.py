"""Encoders that are measured: each a function of texts and options, opened in its own process."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peers.job import child_main

Encode = Callable[[list[str], dict[str, Any]], Any]


def open_ours(models: Path, dtype: str, threads: int) -> Encode:
    from nvembed.model.embedder import NVEmbed

    model = NVEmbed.from_pretrained(models / "ours", dtype=dtype, device="cpu")
    return lambda texts, _: model.encode(texts)


def open_sentence_transformers(models: Path, dtype: str, threads: int) -> Encode:
    from sentence_transformers import SentenceTransformer

    options = {"dtype": dtype}
    model = SentenceTransformer(str(models / "stock"), device="cpu", model_kwargs=options)
    return lambda texts, options: model.encode(texts, show_progress_bar=False, **options)


def open_onnxruntime(models: Path, dtype: str, threads: int) -> Encode:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    path = str(next((models / "onnx").rglob("*.onnx")))
    session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    return of_graph(models, lambda inputs: session.run(None, inputs)[0])


def open_openvino(models: Path, dtype: str, threads: int) -> Encode:
    import openvino

    short = {"float32": "f32", "bfloat16": "bf16"}[dtype]
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": short}
    settings["PERFORMANCE_HINT"] = "LATENCY"  # one call at a time, on all threads
    path = next((models / "onnx").rglob("*.onnx"))
    graph = openvino.Core().compile_model(path, "CPU", settings)
    # A copy: the answer lies in memory that the next call writes into.
    return of_graph(models, lambda inputs: graph(inputs)[0].copy())


def of_graph(models: Path, compute: Callable[[dict[str, Any]], Any]) -> Encode:
    """Batches of texts of about equal length, padded."""
    from transformers import AutoTokenizer

    from nvembed.model.encoder import padded_inputs
    from nvembed.model.tokens import TextTokenizer

    tokenize = TextTokenizer(AutoTokenizer.from_pretrained(models / "ours"))

    def encode(texts: list[str], options: dict[str, Any]) -> list[Any]:
        size = options.get("batch_size", 8)
        order = sorted(range(len(texts)), key=lambda row: -len(texts[row]))
        found: list[Any] = [None] * len(texts)
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            inputs = padded_inputs(tokenize([texts[row] for row in rows]))
            for row, vector in zip(rows, compute(dict(inputs)), strict=True):
                found[row] = vector
        return found

    return encode


def open_vllm(models: Path, dtype: str, threads: int) -> Encode:
    import vllm

    engine = vllm.LLM(str(models / "stock"), runner="pooling", dtype=dtype, max_model_len=512)
    return lambda texts, _: [one.outputs.embedding for one in engine.embed(texts, use_tqdm=False)]


OPEN = {
    "nvembed": open_ours,
    "sentence-transformers": open_sentence_transformers,
    "onnxruntime": open_onnxruntime,
    "openvino": open_openvino,
    "vllm": open_vllm,
}


def run(given: dict[str, Any]) -> dict[str, Any]:
    """Seconds of every case, each after a short warm-up, and vectors of the checks."""
    started = time.perf_counter()
    import torch

    torch.set_num_threads(given["threads"])
    encode = OPEN[given["side"]](Path(given["models"]), given["dtype"], given["threads"])
    checks = [[float(x) for x in vector] for vector in encode(given["checks"], {})]
    load_seconds, seconds = time.perf_counter() - started, []
    texts = json.loads(Path(given["texts"]).read_text())
    for part, options in given["cases"]:
        encode(texts[part][:4], options)
        started = time.perf_counter()
        encode(texts[part], options)
        seconds.append(time.perf_counter() - started)
    return {"seconds": seconds, "checks": checks, "load_seconds": load_seconds}


if __name__ == "__main__":
    child_main(run)
