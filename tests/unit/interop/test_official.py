"""NVIDIA's layout: loaded by value, refused by name, written back to the bit."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from nvembed.cli.main import run
from nvembed.core.errors import ConfigError, ModelError
from nvembed.data.instructions import task_instruction
from nvembed.encoding.export.folders import export_folder
from nvembed.interop import hub as source
from nvembed.interop.official import NAMES, official_name, read_config
from nvembed.model.embedder import NVEmbed
from nvembed.model.encoder import load_encoder
from nvembed.model.official_load import empty_modules, official_shapes
from nvembed.model.pooling import LatentAttentionPooling
from official_folders import FULL, official_config, official_tensors, write_official
from oracles.golden import load_official

TEXTS = ["one", "two words", "rather a longer text, with commas and a </s> in it", ""]
PROMPT = "Instruct: find it\nQuery: "


@pytest.fixture(autouse=True)
def _hub_never_failed_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "_gave_no_answer", set())


@pytest.fixture(scope="module")
def golden(shared) -> Path:
    return shared("golden/nv-embed-tiny")


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer) -> Path:
    return write_official(tmp_path_factory.mktemp("official"), tiny_tokenizer)


def assert_golden(model: Any, golden: Path) -> None:
    groups = json.loads((golden / "expected.json").read_text())["groups"]
    assert len(groups) >= 5
    for group in groups:
        model.max_seq_length = group["max_length"]
        texts, prompt = group["texts"], group["instruction"]
        expected = np.array(group["embeddings"])
        for order in (range(len(texts)), reversed(range(len(texts)))):
            rows = list(order)
            together = model.encode([texts[row] for row in rows], prompt=prompt)
            np.testing.assert_allclose(together, expected[rows], atol=1e-5, err_msg=group["name"])
        alone = np.stack([model.encode(text, prompt=prompt) for text in texts])
        np.testing.assert_allclose(alone, expected, atol=1e-5, err_msg=group["name"])


def test_golden_embeddings_through_the_public_call(golden: Path) -> None:
    assert_golden(NVEmbed.from_pretrained(golden, device="cpu"), golden)


@pytest.mark.parametrize("way", ["saved", "sentence-transformers", "nvembed", "nv-embed"])
def test_golden_embeddings_survive_every_way_round(golden: Path, tmp_path: Path, way: str) -> None:
    if way in ("saved", "sentence-transformers"):
        NVEmbed.from_pretrained(golden, device="cpu").save_pretrained(str(tmp_path / "out"))
    else:
        # The golden weights are float16, so float32 would hide nothing: kept as they are stored.
        export_folder(str(golden), tmp_path / "out", way, max_shard_bytes=500_000)
    if way == "sentence-transformers":
        model: Any = SentenceTransformer(
            str(tmp_path / "out"), trust_remote_code=True, device="cpu"
        )
    else:
        model = NVEmbed.from_pretrained(tmp_path / "out", device="cpu", dtype="float32")
    assert_golden(model, golden)


def test_exported_weights_are_bit_identical(golden: Path, tmp_path: Path) -> None:
    export_folder(str(golden), tmp_path / "out", "nv-embed", max_shard_bytes=500_000)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 1
    written = {name: value for shard in shards for name, value in load_file(shard).items()}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    stored = load_file(golden / "model.safetensors")
    assert written.keys() == stored.keys() == index["weight_map"].keys()
    assert all(torch.equal(written[name], stored[name]) for name in stored)
    assert index["metadata"]["total_size"] == sum(2 * v.numel() for v in stored.values())
    ours, theirs = (
        json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", golden)
    )
    for key in set(ours) - {"_name_or_path", "auto_map", "text_config", "latent_attention_config"}:
        assert ours[key] == theirs[key], key
    assert {k: v for k, v in ours["text_config"].items() if k != "_name_or_path"}.items() <= {
        **theirs["text_config"],
        "torch_dtype": "float16",
    }.items()
    assert theirs["latent_attention_config"].items() <= ours["latent_attention_config"].items()


def test_the_loader_equals_the_hand_written_one(official: Path) -> None:
    # The configuration has a window of 4, which would show if it were applied.
    expected = load_official(official, 64)
    model = NVEmbed.from_pretrained(official, device="cpu", max_tokens=64)
    for prompt in ("", PROMPT):
        found = model.encode(TEXTS, prompt=prompt)
        np.testing.assert_allclose(found, expected.encode(TEXTS, prompt=prompt), atol=1e-6)
    np.testing.assert_array_equal(
        model.encode_query(TEXTS, task="find it"), model.encode(TEXTS, prompt=PROMPT)
    )
    assert np.abs(model.encode(TEXTS) - model.encode(TEXTS, prompt=PROMPT)).max() > 1e-3
    encoder = load_encoder(str(official))
    assert isinstance(encoder, NVEmbed)
    assert encoder.max_seq_length == 4096  # the folder does not say
    encoder.max_seq_length = 64
    np.testing.assert_array_equal(
        encoder.encode_query(TEXTS, task="find it"), model.encode(TEXTS, prompt=PROMPT)
    )


def test_folded_equals_plain_latent_attention(official: Path) -> None:
    pooling = NVEmbed.from_pretrained(official, device="cpu").pooling
    assert isinstance(pooling, LatentAttentionPooling)
    hidden_TD = torch.randn(7, 32)
    plain, folded = pooling.layer.attend_plain(hidden_TD), pooling.layer.attend_folded(hidden_TD)
    assert plain.abs().max() > 0.1
    torch.testing.assert_close(folded, plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        (None, torch.float32),
        ("auto", torch.float16),
        ("bfloat16", torch.bfloat16),
        (torch.float16, torch.float16),
    ],
)
def test_dtype(official: Path, asked: Any, found: torch.dtype) -> None:
    model = NVEmbed.from_pretrained(official, device="cpu", dtype=asked)
    assert {p.dtype for p in model.parameters()} == {found}
    stored = load_file(official / "model.safetensors")
    for name, value in model.state_dict().items():
        assert torch.equal(value, stored[official_name(name)].to(found)), name
    assert model.backbone.model.rotary_emb.inv_freq.dtype == torch.float32
    with pytest.raises(ConfigError, match=r'dtype: "bf61" given, expected .*float32'):
        NVEmbed.from_pretrained(official, device="cpu", dtype="bf61")


def test_the_model_does_not_depend_on_its_files(official: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(official, tmp_path / "copy")
    model = NVEmbed.from_pretrained(folder, device="cpu", dtype="auto")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with open(folder / "model.safetensors", "r+b") as file:
        file.seek(8192)
        file.write(b"\0" * 8192)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_whole_layout_without_its_weights() -> None:
    """7.85 B parameters on the meta device: every name, every shape, the count of bytes."""
    decoder, latent = read_config(official_config(FULL, {}), where="config.json")
    found = official_shapes(*empty_modules(decoder, latent))
    assert found == official_tensors(FULL)
    assert len(found) == 304
    assert sum(math.prod(shape) for shape in found.values()) == 7_851_016_192
    assert decoder.sliding_window is None
    assert decoder.rope_parameters["rope_theta"] == 10000
    own = [name for module in empty_modules(decoder, latent) for name in module.state_dict()]
    assert len(own) == len(found)  # no two have one official name
    assert official_name("1.layer.unknown") is None
    assert len({ours for _, ours in NAMES}) == len(NAMES)


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_weights(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


Q = "embedding_model.layers.1.self_attn.q_proj.weight"
BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        r"model\.safetensors is missing\. Official weights are safetensors",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), r"tokenizer\.json is missing"),
    "broken tokenizer": (
        lambda f: (f / "tokenizer.json").write_text("{}"),
        r"tokenizer\.json: cannot be loaded \(.*expected a tokenizer",
    ),
    "no text_config": (
        lambda f: edit_json(f / "config.json", lambda c: c.pop("text_config")),
        r"config\.json: text_config is missing; expected text_config and latent_attention_config",
    ),
    "no latent part": (
        lambda f: edit_json(f / "config.json", lambda c: c.pop("latent_attention_config")),
        r"latent_attention_config is missing",
    ),
    "other backbone": (
        lambda f: edit_json(f / "config.json", lambda c: c["text_config"].update(model_type="x")),
        r"unknown model_type 'x' in text_config; expected bidir_mistral or mistral",
    ),
    "other pooling": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(is_mask_instruction=False)),
        r"is_mask_instruction is False; expected True",
    ),
    "latent width": (
        lambda f: edit_json(
            f / "config.json", lambda c: c["latent_attention_config"].pop("hidden_dim")
        ),
        r"latent_attention_config\.hidden_dim is 4096; expected the hidden size of text_config, 32",
    ),
    "half a download": (
        lambda f: (f / "model.safetensors").write_bytes(
            (f / "model.safetensors").read_bytes()[:5000]
        ),
        r"model\.safetensors: cannot be read .*expected a complete safetensors file",
    ),
    "missing tensor": (
        lambda f: edit_weights(f, lambda w: w.pop(Q)),
        rf"1 tensor is missing: {Q}; expected the tensors that the configuration asks for",
    ),
    "unexpected tensor": (
        lambda f: edit_weights(f, lambda w: w.update({"lm_head.weight": torch.zeros(2)})),
        r"1 tensor is unexpected: lm_head\.weight; expected",
    ),
    "wrong shape": (
        lambda f: edit_weights(f, lambda w: w.update({Q: torch.zeros(16, 32)})),
        rf"1 tensor is of another shape: {Q} \(\[16, 32\] instead of \[32, 32\]\)",
    ),
    "unknown type": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(model_type="nvembad")),
        r"unknown model_type 'nvembad' in config\.json; expected nvembed or a type that",
    ),
    "no JSON": (
        lambda f: (f / "config.json").write_text("{"),
        r"config\.json:1: not valid JSON",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders_are_one_line(official: Path, tmp_path: Path, case: str, capsys) -> None:
    folder = shutil.copytree(official, tmp_path / "broken")
    change, message = BROKEN[case]
    change(folder)
    with pytest.raises(ModelError, match=message) as caught:
        NVEmbed.from_pretrained(folder, device="cpu")
    assert "\n" not in str(caught.value)
    (tmp_path / "docs.jsonl").write_text('{"text": "x"}\n')
    command = ["encode", str(folder), "--input", str(tmp_path / "docs.jsonl")]
    assert run([*command, "--output", str(tmp_path / "out.npy")]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"error: {folder}")
    assert line.count("\n") == 1


def test_shards(official: Path, tmp_path: Path, tiny_tokenizer) -> None:
    folder = write_official(tmp_path / "sharded", tiny_tokenizer, shards=3)
    whole = NVEmbed.from_pretrained(official, device="cpu").state_dict()
    parts = NVEmbed.from_pretrained(folder, device="cpu").state_dict()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(
        ModelError, match=r"model-00002-of-00003\.safetensors is missing\. .*index\.json names it"
    ):
        NVEmbed.from_pretrained(folder, device="cpu")
    shutil.copy(
        folder / "model-00001-of-00003.safetensors", folder / "model-00002-of-00003.safetensors"
    )
    with pytest.raises(ModelError, match=r"is not in model-00002-of-00003\.safetensors \(1"):
        NVEmbed.from_pretrained(folder, device="cpu")
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ModelError, match="not an index of shards"):
        NVEmbed.from_pretrained(folder, device="cpu")


def test_the_instructions_of_the_tasks_are_prompts(official: Path) -> None:
    model = NVEmbed.from_pretrained(official, device="cpu")
    instruction = task_instruction("FiQA2018").instruction
    by_name = model.encode(TEXTS, prompt_name="FiQA2018")
    np.testing.assert_array_equal(by_name, model.encode_query(TEXTS, task=instruction))
    assert np.abs(by_name - model.encode(TEXTS)).max() > 1e-3


def test_options_of_an_official_model_are_refused(official: Path) -> None:
    with pytest.raises(ModelError, match="pooling: pooling and attention are fixed"):
        NVEmbed.from_pretrained(official, pooling="mean")


def hub_cache(folder: Path, cache: Path, commit: str, repository: str) -> Path:
    """A local cache of the hub that holds a folder as a commit, in the hub library's layout."""
    home = cache / f"models--{repository.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    shutil.copytree(folder, home / "snapshots" / commit)
    return cache


@pytest.mark.parametrize("revision", [None, "main", "c50d55f" + "0" * 33])
def test_a_hub_id_is_read_from_the_cache(official: Path, tmp_path: Path, revision) -> None:
    commit = "c50d55f" + "0" * 33
    cache = hub_cache(official, tmp_path, commit, "nvidia/NV-Embed-v2")
    options: dict[str, Any] = {"cache_folder": str(cache), "device": "cpu"}
    model = NVEmbed.from_pretrained("nvidia/NV-Embed-v2", revision=revision, **options)
    expected = NVEmbed.from_pretrained(official, device="cpu").encode(TEXTS)
    np.testing.assert_array_equal(model.encode(TEXTS), expected)
    with pytest.raises(ModelError, match=r"\(revision other\): config\.json is not in the local"):
        NVEmbed.from_pretrained("nvidia/NV-Embed-v2", revision="other", **options)


def test_no_network_and_no_cache_is_one_line(tmp_path: Path, capsys) -> None:
    with pytest.raises(
        ModelError,
        match=r"nvidia/NV-Embed-v2: config\.json is not in the local cache and the hub cannot be "
        r"reached; expected a network connection, an earlier download or a local folder",
    ):
        NVEmbed.from_pretrained("nvidia/NV-Embed-v2", cache_folder=str(tmp_path))
    command = ["export", "nvidia/NV-Embed-v1", "--to", str(tmp_path / "out"), "--format", "nvembed"]
    assert run(command) == 2
    assert capsys.readouterr().err.startswith("error: nvidia/NV-Embed-v1: config.json is not in")


class _Refusing(BaseHTTPRequestHandler):
    """A hub that answers every request with one error code."""

    code = ""

    def do_HEAD(self) -> None:
        self.send_response(401 if self.code == "GatedRepo" else 404)
        self.send_header("X-Error-Code", self.code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "GatedRepo",
            r"the repository is gated and this machine has no access; expected the token",
        ),
        ("RepoNotFound", r"no such folder here and no such repository on the hub"),
        ("RevisionNotFound", r"the repository has no such revision"),
    ],
)
def test_a_hub_that_refuses_is_one_line(tmp_path: Path, monkeypatch, code, message, capsys) -> None:
    monkeypatch.setattr(_Refusing, "code", code)
    server = HTTPServer(("127.0.0.1", 0), _Refusing)
    Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        endpoint + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    try:
        with pytest.raises(ModelError, match=message) as caught:
            NVEmbed.from_pretrained("nvidia/NV-Embed-v2", cache_folder=str(tmp_path))
        assert "\n" not in str(caught.value)
        command = ["encode", "nvidia/NV-Embed-v2", "--input", str(tmp_path / "x.jsonl")]
        (tmp_path / "x.jsonl").write_text('{"text": "x"}\n')
        assert run([*command, "--output", str(tmp_path / "x.npy")]) == 2
        assert capsys.readouterr().err.startswith("error: nvidia/NV-Embed-v2: ")
    finally:
        server.shutdown()
        server.server_close()
