"""Exports give the same vectors in the hands of others, or are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize
from transformers import AutoConfig

from families import FAMILIES, make_family
from gguf_tokenizers import trained
from nvembed.cli.main import run
from nvembed.core.errors import ConfigError, ModelError
from nvembed.core.files import write_json
from nvembed.core.runs import RunFolder
from nvembed.encoding.doctor.examine import DoctorOptions, examine_model
from nvembed.encoding.export import stock as export_stock
from nvembed.encoding.export.folders import export_folder
from nvembed.model.backbone import Backbone
from nvembed.model.embedder import NVEmbed
from nvembed.model.pooling import MeanPooling
from official_folders import write_official

ROOT = Path(__file__).resolve().parents[3]
# More characters (and tokens) than the windows of families.py.
TEXTS = ["one", "two words", "rather a longer text, with commas and so on", "one"]
TASK = "find it"
PROMPT = "Instruct: find it\nQuery: "
# modernbert: its own window; qwen2: transformers rebuilds its tokenizer, which loses BOS and EOS.
REFUSED = ("modernbert", "qwen2")


def save_mean(name: str, folder: Path, tokenizer) -> Path:
    make_family(name, folder / "lm", tokenizer)
    model = NVEmbed.from_pretrained(folder / "lm", device="cpu", max_tokens=64)
    model.prompts = {"query": PROMPT, "document": ""}
    model.save_pretrained(str(folder / "model"))
    return folder / "model"


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in REFUSED])
def test_stock_modules_give_the_same_vectors(tmp_path: Path, tiny_tokenizer, name: str) -> None:
    folder = save_mean(name, tmp_path, tiny_tokenizer)
    ours = NVEmbed.from_pretrained(folder, device="cpu")
    export_folder(str(folder), tmp_path / "out", "sentence-transformers")
    plain = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert not any(type(module).__module__.startswith("nvembed") for module in plain)
    for prompt in ("", PROMPT):
        expected = ours.encode(TEXTS, prompt=prompt)
        np.testing.assert_allclose(plain.encode(TEXTS, prompt=prompt), expected, atol=1e-5)
        alone = np.stack([plain.encode(text, prompt=prompt) for text in TEXTS])
        np.testing.assert_allclose(alone, expected, atol=1e-5)
    np.testing.assert_allclose(plain.encode_query(TEXTS), ours.encode_query(TEXTS), atol=1e-5)
    # The vacuity guard: the prompt matters, and pooling it would matter too.
    plain[1].include_prompt = True
    pooled = plain.encode(TEXTS, prompt=PROMPT)
    assert np.abs(pooled - ours.encode(TEXTS, prompt=PROMPT)).max() > 1e-3


def test_a_model_of_whole_texts_needs_nothing_but_mean_pooling(tmp_path: Path) -> None:
    """A byte-level BPE, and a stock model that was never told to leave a prompt out."""
    start = NVEmbed.from_pretrained(ROOT / "assets" / "decoder-6m", device="cpu", max_tokens=24)
    backbone = Backbone(
        start.backbone.model, start.backbone.tokenizer, max_tokens=24, text_style="whole"
    )
    ours = NVEmbed(modules=[backbone, MeanPooling(backbone.width), Normalize()], device="cpu")
    ours.save_pretrained(str(tmp_path / "model"))
    export_folder(str(tmp_path / "model"), tmp_path / "out", "sentence-transformers")
    plain = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    texts = [*TEXTS, "many more words than the limit allows " * 5]
    for prompt in ("", PROMPT):
        expected = ours.encode(texts, prompt=prompt)
        np.testing.assert_allclose(plain.encode(texts, prompt=prompt), expected, atol=1e-5)
        together = [prompt + text for text in texts]
        np.testing.assert_allclose(plain.encode(together), expected, atol=1e-5)
    assert (
        np.abs(start.encode(TEXTS, prompt=PROMPT) - ours.encode(TEXTS, prompt=PROMPT)).max() > 0.01
    )
    diagnosis = examine_model(str(tmp_path / "model"), DoctorOptions(TASK, None, None, 2, 24))
    pooled = next(one for one in diagnosis.findings if "instruction's" in one.message)
    assert pooled.status == "ok"


def test_texts_are_cut_alike_and_a_space_of_the_prompt_is_counted_alike(tmp_path: Path) -> None:
    # A byte-level BPE, whose last space of the prompt joins the first word of the text.
    ours = NVEmbed.from_pretrained(ROOT / "assets" / "decoder-6m", device="cpu", max_tokens=24)
    ours.save_pretrained(str(tmp_path / "model"))
    export_folder(str(tmp_path / "model"), tmp_path / "out", "sentence-transformers")
    plain = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    long = [*TEXTS, "many more words than the limit allows " * 5, "query: x", "ends in Query: "]
    for prompt in ("", PROMPT):
        np.testing.assert_allclose(
            plain.encode(long, prompt=prompt), ours.encode(long, prompt=prompt), atol=1e-5
        )


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_rotary_positions_are_there_for_readers_of_the_older_names(
    tmp_path: Path, tiny_tokenizer, monkeypatch, name: str
) -> None:
    kinds = {
        "llama": {**LLAMA3, "rope_theta": 5e5, "original_max_position_embeddings": 32},
        "gemma3_text": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 3e4},
        },
    }
    monkeypatch.setitem(FAMILIES[name][1], "rope_parameters", kinds[name])
    folder = save_mean(name, tmp_path, tiny_tokenizer)
    export_folder(str(folder), tmp_path / "out", "sentence-transformers")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    everywhere = kinds[name].get("full_attention", kinds[name])
    assert config["rope_theta"] == everywhere["rope_theta"]  # where TEI looks for it
    assert "rope_theta" not in config["rope_scaling"]
    # The name of transformers 5 taken away, the others say the same.
    expected = config.pop("rope_parameters")
    write_json(path, config)
    assert AutoConfig.from_pretrained(tmp_path / "out").rope_parameters == expected
    plain = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    np.testing.assert_allclose(
        plain.encode(TEXTS), NVEmbed.from_pretrained(folder, device="cpu").encode(TEXTS), atol=1e-5
    )


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_that_goes_its_own_way_is_refused(tmp_path, tiny_tokenizer, name: str) -> None:
    folder = save_mean(name, tmp_path, tiny_tokenizer)
    with pytest.raises(ModelError, match=rf"stock modules .* reads the {name} family's files"):
        export_folder(str(folder), tmp_path / "out", "sentence-transformers")
    assert not (tmp_path / "out").exists()


def test_deep_models_may_round_more(tmp_path: Path, tiny_tokenizer) -> None:
    model = NVEmbed.from_pretrained(save_mean("llama", tmp_path, tiny_tokenizer), device="cpu")
    limits = []
    for layers in (2, 30):
        model.backbone.model.config.num_hidden_layers = layers
        limits.append(export_stock.rounding(model))
    assert limits == pytest.approx([1e-5, 6e-5])


def test_a_prompt_that_stock_modules_count_otherwise_is_refused(tmp_path: Path) -> None:
    """Its last space joins some words and not others; a model of whole texts counts none."""
    folder = save_mean("llama", tmp_path, trained("gpt-2"))
    with pytest.raises(ModelError, match=r"queries with a prompt.*nvembed compress --head-free"):
        export_folder(str(folder), tmp_path / "out", "sentence-transformers")


def test_a_family_that_stays_causal_is_refused(tmp_path, tiny_tokenizer, monkeypatch) -> None:
    folder = save_mean("llama", tmp_path, tiny_tokenizer)
    original = export_stock.open_attention

    def causal(path: Path, backbone) -> None:
        original(path, backbone)
        config = json.loads(path.read_text())
        write_json(path, {**config, "is_causal": True, "use_bidirectional_attention": False})

    monkeypatch.setattr(export_stock, "open_attention", causal)
    with pytest.raises(ModelError, match=r"stock modules give other vectors for texts \(by up to"):
        export_folder(str(folder), tmp_path / "out", "sentence-transformers")


def test_what_a_format_cannot_hold_is_refused(
    tmp_path: Path, tiny_decoder_dir: Path, tiny_tokenizer
) -> None:
    official = str(write_official(tmp_path / "official", tiny_tokenizer))
    said = r"LatentAttentionPooling with official token rules.*nvembed compress --head-free"
    with pytest.raises(ModelError, match=said):
        export_folder(official, tmp_path / "out", "sentence-transformers")
    mean = save_mean("llama", tmp_path, tiny_tokenizer)
    with pytest.raises(ModelError, match="MeanPooling on a llama backbone; expected LatentAtt"):
        export_folder(str(mean), tmp_path / "out", "nv-embed")
    # Bytes are tokens here: the last space of the prompt never joins the text, and the official
    # rules would pool it; there is no BOS in the tokenizer's own template either.
    model = NVEmbed.from_pretrained(tiny_decoder_dir, pooling="latent", device="cpu")
    model.save_pretrained(str(tmp_path / "latent"))
    with pytest.raises(ModelError, match="official code would read other token ids"):
        export_folder(str(tmp_path / "latent"), tmp_path / "out", "nv-embed")
    with pytest.raises(ModelError, match="a language model, not an embedding model"):
        export_folder(str(tiny_decoder_dir), tmp_path / "out", "nvembed")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(ConfigError, match="something is there already"):
        export_folder(official, tmp_path / "full", "nvembed")
    assert (tmp_path / "full" / "file").read_text() == "mine"


def test_the_command(tmp_path: Path, tiny_tokenizer, capsys) -> None:
    official = write_official(tmp_path / "official", tiny_tokenizer)
    out = tmp_path / "out"
    command = ["export", str(official), "--to", str(out), "--format", "nvembed"]
    assert run([*command, "--dtype", "bfloat16"]) == 0
    assert capsys.readouterr().out.endswith(f"written: {out} (nvembed)\n")
    model = NVEmbed.from_pretrained(out, device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    expected = NVEmbed.from_pretrained(official, device="cpu", dtype="bfloat16").encode(TEXTS)
    np.testing.assert_array_equal(model.encode(TEXTS), expected)
    assert "Not recorded: the model lay in no run folder." in (out / "README.md").read_text()
    assert run(command) == 2
    assert "something is there already; expected a new folder" in capsys.readouterr().err


def test_scores_of_the_run_are_in_the_card(tmp_path: Path, tiny_tokenizer) -> None:
    run_folder = RunFolder(tmp_path / "run")
    write_official(run_folder.model, tiny_tokenizer)
    score = {"main_score": 0.51234, "main_score_name": "ndcg_at_10"}
    write_json(run_folder.eval / "held-out.json", {"docs": score, "broken": 1})
    export_folder(str(run_folder.model), tmp_path / "out", "nvembed")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| held-out | docs | ndcg_at_10 | 0.5123 |" in card
    assert "broken" not in card
