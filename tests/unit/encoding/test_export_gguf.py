"""GGUF files of embedding models: read back they are the model, and what has no place is refused.

That llama.cpp reads the same from them is shown by tests/integration/test_llama_cpp.py; the way in
is compared with an independent converter by tests/unit/model/test_gguf.py.
"""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, models
from tokenizers import pre_tokenizers as rules
from transformers import PreTrainedTokenizerFast

from families import make_family
from gguf_tokenizers import TRICKY, sentencepiece, trained
from nvembed import NVEmbed
from nvembed.cli.main import run
from nvembed.core.errors import ConfigError, ModelError
from nvembed.encoding.export import gguf as export
from nvembed.encoding.export import gguf_tokenizer as export_tokenizer
from nvembed.encoding.export.gguf import export_gguf
from nvembed.interop.gguf import read_gguf
from nvembed.model.backbone import Backbone

gguf = pytest.importorskip("gguf", reason="needs the extra gguf")

# By family of tests/families.py: the architecture in the file, and how its tokenizer splits.
FAMILIES = {
    "llama": ("llama", "smollm"),
    "mistral": ("llama", "sentencepiece"),
    "qwen2": ("qwen2", "qwen2"),
    "qwen3": ("qwen3", "qwen2"),
    "gemma3_text": ("gemma3", "gpt-2"),
}
TEXTS = ["a", "some text of 12 words or so", "Größe: 3,14 · é ü"]
PROMPT = "Instruct: find it\nQuery: "


def tokenizer_of(pre: str) -> PreTrainedTokenizerFast:
    return sentencepiece() if pre == "sentencepiece" else trained(pre)


def save(
    family: str,
    folder: Path,
    tokenizer: Any,
    config: dict[str, Any] | None = None,
    **settings: Any,
) -> Path:
    """A saved embedding model whose vectors (norms, biases) are no constants."""
    make_family(family, folder / "lm", tokenizer)
    path = folder / "lm" / "config.json"
    settled = {"query_pre_attn_scalar": 8} if family == "gemma3_text" else {}
    path.write_text(json.dumps(json.loads(path.read_text()) | settled | (config or {})))
    model = NVEmbed.from_pretrained(folder / "lm", device="cpu", max_tokens=64, **settings)
    with torch.no_grad():
        for weight in model.backbone.model.parameters():
            if weight.ndim == 1:
                weight += 0.2 * torch.randn_like(weight)
    model.save_pretrained(str(folder / "model"), create_model_card=False)
    return folder / "model"


def states(backbone: Backbone, texts: list[str] = TEXTS) -> list[torch.Tensor]:
    backbone.eval()
    with torch.no_grad():
        return [backbone.states([text.ids]) for text in backbone.tokenize_texts(texts, PROMPT)]


@pytest.mark.parametrize("family", list(FAMILIES))
def test_an_unquantised_file_is_the_model(tmp_path: Path, family: str) -> None:
    architecture, pre = FAMILIES[family]
    folder = save(family, tmp_path, tokenizer_of(pre))
    export_gguf(str(folder), tmp_path / "m.gguf", "f32")
    mine = NVEmbed.from_pretrained(folder, device="cpu").backbone
    back = NVEmbed.from_pretrained(tmp_path / "m.gguf", device="cpu", max_tokens=64).backbone
    assert back.tokenize_texts(TRICKY, PROMPT) == mine.tokenize_texts(TRICKY, PROMPT)
    assert back.tokenize_texts(TRICKY)[0].ids[:: len(mine.tokenize_texts(TRICKY)[0]) - 1] == (1, 2)
    for state, expected in zip(states(back), states(mine), strict=True):
        # To Gemma's norms 1 is added, which rounds.
        atol = 1e-5 if family == "gemma3_text" else 0
        torch.testing.assert_close(state, expected, atol=atol, rtol=atol)
    file = read_gguf(tmp_path / "m.gguf")
    said = {
        "attention.causal": False,
        "pooling_type": 1,
        "context_length": 128,
        "rope.dimension_count": 8,
        "attention.value_length": 8,
        "attention.sliding_window": 512 if architecture == "gemma3" else None,
    }
    assert file.architecture == architecture
    assert {key: file.of_model(key) for key in said} == said
    ours = {"add_bos_token": True, "add_eos_token": True, "bos_token_id": 1, "eos_token_id": 2}
    assert {key: file.settings[f"tokenizer.ggml.{key}"] for key in ours} == ours
    assert file.settings["tokenizer.ggml.pre"] == ("default" if pre == "sentencepiece" else pre)


# What half a step is, as a part of the largest value of a block (of the range of both signs).
HALF_STEP = {
    "f16": 2**-11,
    "bf16": 2**-8,
    "q8_0": 1 / 254,
    "q5_1": 1 / 31,
    "q5_0": 1 / 16,
    "q4_1": 1 / 15,
    "q4_0": 1 / 8,
}


@pytest.mark.parametrize("kind", list(HALF_STEP))
def test_quantised_matrices_are_within_half_a_step(tmp_path: Path, kind: Any) -> None:
    folder = save("llama", tmp_path, trained("gpt-2"), {"intermediate_size": 48})
    export_gguf(str(folder), tmp_path / "m.gguf", kind)
    mine = NVEmbed.from_pretrained(folder, device="cpu").backbone.model.state_dict()
    back = Backbone.from_pretrained(str(tmp_path / "m.gguf")).model.state_dict()
    for name, weight in mine.items():
        error = (back[name] - weight).abs()
        if weight.ndim == 1:
            assert not error.any(), name
            continue
        used = "q8_0" if name.startswith("embed") and kind[:2] in ("q4", "q5") else kind
        if weight.shape[-1] % 32:  # 48 fill no blocks
            used = "bf16" if kind == "bf16" else "f16"
        block = weight.shape[-1] if used in ("f16", "bf16") else 32
        largest = weight.abs().unflatten(-1, (-1, block)).amax(-1)
        scale = 0 if used in ("f16", "bf16") else 2**-10  # of a block, in float16
        bound = (HALF_STEP[used] + scale) * largest.repeat_interleave(block, -1)
        assert (error <= bound).all(), name
        assert error.any(), name
    held = {tensor.kind for tensor in read_gguf(tmp_path / "m.gguf").tensors.values()}
    assert kind.upper() in held
    vectors = [
        NVEmbed.from_pretrained(path, device="cpu", max_tokens=64).encode(TEXTS)
        for path in (folder, tmp_path / "m.gguf")
    ]
    cosine = (vectors[0] * vectors[1]).sum(1)
    least = {"f16": 0.999999, "bf16": 0.9999, "q8_0": 0.998}.get(kind, 0.9)
    assert least < cosine.min()


def test_last_token_pooling_and_direction_are_said(tmp_path: Path) -> None:
    folder = save("qwen3", tmp_path, trained("qwen2"), pooling="last", attention="causal")
    export_gguf(str(folder), tmp_path / "m.gguf", "f32")
    file = read_gguf(tmp_path / "m.gguf")
    assert (file.of_model("pooling_type"), file.of_model("attention.causal")) == (3, True)


def test_what_stands_around_a_text_is_said(tmp_path: Path) -> None:
    folder = save("llama", tmp_path, trained("gpt-2"))
    (path,) = folder.glob("**/nvembed_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"add_bos": False, "add_eos": False}))
    export_gguf(str(folder), tmp_path / "m.gguf", "f32")
    settings = read_gguf(tmp_path / "m.gguf").settings
    assert not settings["tokenizer.ggml.add_bos_token"]
    assert not settings["tokenizer.ggml.add_eos_token"]


@pytest.mark.parametrize(
    ("family", "scaling", "layers"),
    [
        ("qwen3", {"rope_type": "linear", "factor": 4.0}, 2),
        (
            "qwen3",
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
            2,
        ),
        (
            "llama",
            {
                **{"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0},
                **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
                "original_max_position_embeddings": 8192,
            },
            2,
        ),
        ("gemma3_text", {"rope_type": "linear", "factor": 8.0}, 6),
    ],
)
def test_scaled_positions(tmp_path: Path, family: str, scaling: dict, layers: int) -> None:
    tokenizer = trained("gpt-2")
    make_family(family, tmp_path / "seen", tokenizer)
    rope = json.loads((tmp_path / "seen" / "config.json").read_text())["rope_parameters"]
    inner = rope.get("full_attention", rope)
    inner |= scaling
    changed = {"rope_parameters": rope}
    if family == "gemma3_text":
        # The family has two layers, both with a window: the sixth is the first without.
        changed |= {"num_hidden_layers": 6}
        changed["layer_types"] = ["sliding_attention"] * 5 + ["full_attention"]
    folder = save_layers(family, tmp_path, tokenizer, changed)
    export_gguf(str(folder), tmp_path / "m.gguf", "f32")
    mine = states(NVEmbed.from_pretrained(folder, device="cpu").backbone)
    back = states(Backbone.from_pretrained(str(tmp_path / "m.gguf"), max_tokens=64))
    for state, expected in zip(back, mine, strict=True):
        torch.testing.assert_close(state, expected, atol=1e-5, rtol=1e-5)
    assert ("rope_freqs.weight" in read_gguf(tmp_path / "m.gguf").tensors) == (family == "llama")


def save_layers(family: str, folder: Path, tokenizer: Any, changed: dict[str, Any]) -> Path:
    """As ``save``, with other settings of the layers, whose weights are made anew."""
    import transformers

    make_family(family, folder / "old", tokenizer)
    values = json.loads((folder / "old" / "config.json").read_text()) | changed
    values |= {"query_pre_attn_scalar": 8}
    config = transformers.CONFIG_MAPPING[values.pop("model_type")](**values)
    made = transformers.AutoModelForCausalLM.from_config(config)
    made.save_pretrained(folder / "lm")
    tokenizer.save_pretrained(folder / "lm")
    model = NVEmbed.from_pretrained(folder / "lm", device="cpu", max_tokens=64)
    model.save_pretrained(str(folder / "model"), create_model_card=False)
    return folder / "model"


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "qwen2", "llama-bpe", "spaced", "bare"])
def test_a_tokenizer_comes_back_the_same(tmp_path: Path, pre: str) -> None:
    made = {"spaced": sentencepiece, "bare": lambda: sentencepiece(prefix=False)}
    tokenizer = made[pre]() if pre in made else trained(pre)
    folder = save("llama", tmp_path, tokenizer)
    export_gguf(str(folder), tmp_path / "m.gguf", "f32")
    back = Backbone.from_pretrained(str(tmp_path / "m.gguf"))
    for text in TRICKY:
        expected = tokenizer(text, add_special_tokens=False).input_ids
        assert back.tokenizer(text, add_special_tokens=False).input_ids == expected, text
    assert back.tokenizer.special_tokens_map == tokenizer.special_tokens_map
    settings = read_gguf(tmp_path / "m.gguf").settings
    assert settings.get("tokenizer.ggml.add_space_prefix") == {"spaced": True, "bare": False}.get(
        pre
    )


def metaspace() -> PreTrainedTokenizerFast:
    """As Mistral's of later versions: no second space in front of a text that begins with one."""
    tokenizer = sentencepiece()
    tokenizer.backend_tokenizer.normalizer = None
    pieces = rules.Metaspace(prepend_scheme="first", split=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pieces
    return tokenizer


@pytest.mark.parametrize(
    ("make", "said", "exact"),
    [
        (metaspace, "puts a space in front of every text", str.lstrip),
        (lambda: trained("qwen2"), "does not compose characters", str),
        (lambda: trained("gpt-2"), None, str),
    ],
)
def test_where_llama_cpp_differs_is_said(tmp_path, monkeypatch, make, said, exact) -> None:
    notes: list[str] = []
    monkeypatch.setattr(export_tokenizer, "hold_note", notes.append)
    tokenizer = make()
    export_gguf(str(save("llama", tmp_path, tokenizer)), tmp_path / "m.gguf", "f32")
    assert [said in note for note in notes] == ([] if said is None else [True])
    back = Backbone.from_pretrained(str(tmp_path / "m.gguf")).tokenizer
    # Of special tokens in a text the two kinds of spaces differ too.
    for text in map(exact, (text for text in TRICKY if "<s>" not in text)):
        expected = tokenizer(text, add_special_tokens=False).input_ids
        assert back(text, add_special_tokens=False).input_ids == expected, text


def test_rows_without_a_token_get_one(tmp_path: Path) -> None:
    """A table with more rows than the vocabulary, as llama.cpp asks for a token of each."""
    tokenizer = trained("gpt-2")
    folder = save_layers("llama", tmp_path, tokenizer, {"vocab_size": len(tokenizer) + 5})
    export_gguf(str(folder), tmp_path / "m.gguf", "f32")
    file = read_gguf(tmp_path / "m.gguf")
    rows = file.tensors["token_embd.weight"].shape[0]
    assert rows == len(tokenizer) + 5 == file.settings["tokenizer.ggml.tokens"]
    back = Backbone.from_pretrained(str(tmp_path / "m.gguf"))
    expected = tokenizer("[PAD701]", add_special_tokens=False).input_ids
    assert back.tokenizer("[PAD701]", add_special_tokens=False).input_ids == expected


# --- Refused --------------------------------------------------------------------------------------


def odd_splits() -> PreTrainedTokenizerFast:
    tokenizer = trained("gpt-2")
    tokenizer.backend_tokenizer.pre_tokenizer = rules.Sequence(
        [rules.Split(Regex("[aeiou]"), "isolated"), rules.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def unigram() -> PreTrainedTokenizerFast:
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("a", -1.0), ("b", -2.0)]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.Unigram(pieces, unk_id=0)),
        **{"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    )


def dropping() -> PreTrainedTokenizerFast:
    tokenizer = trained("gpt-2")
    tokenizer.backend_tokenizer.model.dropout = 0.5
    return tokenizer


def few_bytes() -> PreTrainedTokenizerFast:
    state = json.loads(sentencepiece().backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary["other"] = vocabulary.pop("<0x7F>")
    made = Tokenizer.from_str(json.dumps(state))
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def unmerged() -> PreTrainedTokenizerFast:
    """A token that merges do not lead to, and scores would."""
    state = json.loads(sentencepiece().backend_tokenizer.to_str())
    state["model"]["merges"] = [m for m in state["model"]["merges"] if "".join(m) != "in"]
    state["model"]["vocab"] = dict(state["model"]["vocab"])
    assert "in" in state["model"]["vocab"]
    made = Tokenizer.from_str(json.dumps(state))
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (odd_splits, r"splits or normalises texts by rules .* has no name for; expected those of"),
        (unigram, "its tokenizer is Unigram without merges; expected BPE with merges"),
        (dropping, "its tokenizer is BPE with affixes or dropout"),
        (few_bytes, "no token for the byte <0x7F>"),
        (unmerged, "the file's tokenizer gives other ids than the model's for"),
    ],
)
def test_a_tokenizer_that_llama_cpp_would_not_have_is_refused(tmp_path, make, said: str) -> None:
    folder = save("llama", tmp_path, make())
    with pytest.raises(ModelError, match=said) as caught:
        export_gguf(str(folder), tmp_path / "out" / "m.gguf", "f32")
    assert "\n" not in str(caught.value)
    assert "Use --format onnx or sentence-transformers" in str(caught.value)
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize(
    ("family", "config", "settings", "said"),
    [
        (
            "llama",
            {},
            {"pooling": "latent", "num_latents": 4, "num_heads": 2},
            "GGUF has no LatentAttentionPooling.*nvembed compress --head-free",
        ),
        ("llama", {}, {"pooling": "self_attention"}, "GGUF has no SelfAttentionPooling"),
        ("phi3", {}, {}, "a phi3 backbone cannot be written.*expected one of llama, mistral"),
        ("llama", {"hidden_act": "gelu"}, {}, "hidden_act is 'gelu'.*expected 'silu'"),
        ("gemma3_text", {"query_pre_attn_scalar": 16}, {}, "query_pre_attn_scalar is 16"),
        (
            "gemma3_text",
            {"layer_types": ["sliding_attention", "full_attention"]},
            {},
            "layer_types is",
        ),
    ],
)
def test_what_the_format_cannot_carry_is_refused(
    tmp_path: Path, family: str, config: dict, settings: dict, said: str
) -> None:
    folder = save(family, tmp_path, trained("gpt-2"), config, **settings)
    with pytest.raises(ModelError, match=said) as caught:
        export_gguf(str(folder), tmp_path / "m.gguf")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize(
    ("family", "rope", "said"),
    [
        ("llama", {"rope_type": "dynamic", "factor": 2.0}, "rope_type is 'dynamic'"),
        ("qwen3", {"rope_type": "llama3", "factor": 2.0}, "rope_type is 'llama3'"),
        ("qwen3", {"rope_type": "yarn", "beta_fast": 64}, "rope beta_fast is 64.*expected 32"),
    ],
)
def test_a_rope_scaling_without_a_setting_is_refused(
    tmp_path: Path, family: str, rope: dict[str, Any], said: str
) -> None:
    folder = save(family, tmp_path, trained("gpt-2"))
    model = NVEmbed.from_pretrained(folder, device="cpu")
    model.backbone.model.config.rope_parameters |= rope
    with pytest.raises(ModelError, match=said):
        export.write_gguf(model, tmp_path / "m.gguf", "f32", name="mine")


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    model = NVEmbed.from_pretrained(save("llama", tmp_path, trained("gpt-2")), device="cpu")
    with torch.no_grad():
        model.backbone.model.layers[1].mlp.down_proj.weight[0, 0] = 1e5
    with pytest.raises(ModelError, match=r"blk\.1\.ffn_down\.weight has values beyond .*bf16"):
        export.write_gguf(model, tmp_path / "m.gguf", "f16", name="mine")
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == []
    export.write_gguf(model, tmp_path / "m.gguf", "bf16", name="mine")


def test_the_command(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    save("llama", tmp_path, trained("gpt-2"))
    command = ["export", "model", "--format", "gguf", "--to"]
    assert run([*command, "m.gguf"]) == 0
    told = capsys.readouterr()
    assert told.out == "written: m.gguf (f16)\n"
    assert "pools the tokens of an instruction too" in told.err
    assert "--head-free" in told.err
    settings = json.loads(Path("model/nvembed_config.json").read_text())
    Path("model/nvembed_config.json").write_text(json.dumps(settings | {"text_style": "whole"}))
    assert run([*command, "whole.gguf"]) == 0
    assert not capsys.readouterr().err
    assert run([*command, "m.gguf", "--quantize", "q8_0"]) == 0  # its own file is replaced
    assert "Q8_0" in {tensor.kind for tensor in read_gguf(tmp_path / "m.gguf").tensors.values()}
    (tmp_path / "mine.gguf").write_text("mine")
    for wrong, said in (
        (["mine.gguf"], "is there already, and nvembed did not make it"),
        (["folder"], "expected a name that ends in .gguf"),
        (["n.gguf", "--dtype", "float16"], "--quantize with --format gguf"),
    ):
        assert run([*command, *wrong]) == 2
        assert said in capsys.readouterr().err
    assert (tmp_path / "mine.gguf").read_text() == "mine"
    assert run(["export", "model", "--format", "onnx", "--to", "x", "--quantize", "f16"]) == 2
    assert "--format gguf" in capsys.readouterr().err


def test_last_token_pooling_needs_no_note(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    save("llama", tmp_path, trained("gpt-2"), pooling="last")
    assert run(["export", "model", "--format", "gguf", "--to", "m.gguf"]) == 0
    assert capsys.readouterr().err == ""


def test_a_killed_export_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    folder, written = save("llama", tmp_path, trained("gpt-2")), []

    def fails(tensor: Any, **_: Any) -> Any:
        written.append(tensor.name)
        if len(written) > 3:
            raise KeyboardInterrupt
        return encoded(tensor, where="")

    encoded = export._encoded
    monkeypatch.setattr(export, "_encoded", fails)
    with pytest.raises(KeyboardInterrupt):
        export_gguf(str(folder), tmp_path / "out" / "m.gguf")
    assert not list((tmp_path / "out").iterdir())


def test_one_tensor_is_in_memory(tmp_path: Path, monkeypatch) -> None:
    """What is held beside the model is a tensor's bytes, and the rows that are being encoded."""
    folder = save("llama", tmp_path, trained("gpt-2"))
    model = NVEmbed.from_pretrained(folder, device="cpu")
    monkeypatch.setattr(export, "_AT_ONCE", 4096)
    value = torch.randn(4000, 320, dtype=torch.bfloat16)
    tensor = export._planned("x.weight", tuple(value.shape), "q8_0", lambda: value)
    tracemalloc.start()  # numpy's memory; torch's is the model
    try:
        encoded = export._encoded(tensor, where="x")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1.2 * encoded.nbytes
    expected = gguf.quantize(value.float().numpy(), gguf.GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(encoded, expected)
    held: list[int] = []
    original = export._encoded
    monkeypatch.setattr(
        export, "_encoded", lambda t, **k: (held.append(t.size), original(t, **k))[1]
    )
    export.write_gguf(model, tmp_path / "m.gguf", "f32", name="x")
    assert len(held) == len(read_gguf(tmp_path / "m.gguf").tensors)


def test_a_name_without_the_ending_is_refused_before_the_model_is_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a name that ends in \.gguf"):
        export_gguf("nowhere", tmp_path / "m.bin")
