"""The doctor: a healthy model passes, and each broken property gives the finding that names it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from families import make_family
from gguf_files import write_gguf
from nvembed.cli.main import run
from nvembed.core.errors import ConfigError, ModelError
from nvembed.encoding.doctor import checks
from nvembed.encoding.doctor.checks import Placement, Subject
from nvembed.encoding.doctor.examine import (
    Diagnosis,
    DoctorOptions,
    Finding,
    examine,
    examine_model,
    print_diagnosis,
)
from nvembed.model.embedder import NVEmbed
from nvembed.model.encoder import SentenceTransformerEncoder, load_encoder
from nvembed.model.memory import weight_bytes
from nvembed.model.packs import CPU_PACK_TOKENS

OPTIONS = DoctorOptions(task="Find it", query="where is it", document="it is there")


def load(folder: Path, **options: Any) -> NVEmbed:
    return NVEmbed.from_pretrained(folder, device="cpu", **{"max_tokens": 96, **options})


def found(diagnosis: Diagnosis, name: str) -> Finding:
    return next(finding for finding in diagnosis.findings if finding.name == name)


def check(subject: Subject, name: str) -> Finding:
    return Finding(name, *checks.CHECKS[name](subject))


def problems(diagnosis: Diagnosis) -> set[str]:
    return {f.name for f in diagnosis.findings if f.status == "problem"}


@pytest.mark.parametrize("pooling", ["mean", "latent", "self_attention", "last"])
def test_a_healthy_model_passes(tiny_decoder_dir: Path, pooling: str) -> None:
    model = load(tiny_decoder_dir, pooling=pooling)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    diagnosis = examine(model, "tiny", OPTIONS)
    bad = [f for f in diagnosis.findings if f.status != "ok" and f.name != "vectors"]
    assert diagnosis.healthy
    assert not bad
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(value.dtype == before[name].dtype for name, value in after.items())


def test_the_samples_show_what_is_pooled(tiny_decoder_dir: Path) -> None:
    diagnosis = examine(load(tiny_decoder_dir, pooling="latent"), "tiny", OPTIONS)
    query, document = diagnosis.samples
    text = "".join(token.text for token in query.tokens if token.role == "text")
    assert text == "where␣is␣it"
    prompt = "".join(token.text for token in query.tokens if token.role == "instruction")
    assert prompt == "Instruct:␣Find␣it⏎Query:␣"
    assert [t.role for t in query.tokens][:1] + [t.role for t in query.tokens][-1:] == [
        "BOS",
        "EOS",
    ]
    assert [t.pooled for t in query.tokens] == [t.role in ("text", "EOS") for t in query.tokens]
    assert all(token.pooled for token in document.tokens)
    assert {token.role for token in document.tokens} == {"BOS", "text", "EOS"}
    last = examine(load(tiny_decoder_dir, pooling="last"), "tiny", OPTIONS)
    assert [t.pooled for t in last.samples[0].tokens] == [False] * (len(query.tokens) - 1) + [True]
    assert found(last, "pooled tokens").message == "the last token alone (EOS)"


def test_causal_attention_is_a_problem_unless_the_last_token_is_pooled(
    tiny_decoder_dir: Path,
) -> None:
    diagnosis = examine(load(tiny_decoder_dir, attention="causal"), "tiny", OPTIONS)
    assert problems(diagnosis) == {"attention"}
    assert found(diagnosis, "attention").message.startswith("causal, although")
    last = examine(load(tiny_decoder_dir, attention="causal", pooling="last"), "tiny", OPTIONS)
    assert found(last, "attention").status == "warning"
    assert not problems(last)
    # Settings that lie do not help: the probe runs the model.
    liar = load(tiny_decoder_dir)
    hidden = liar.backbone.hidden

    def causal(flat):
        liar.backbone.attention = "causal"
        try:
            return hidden(flat)
        finally:
            liar.backbone.attention = "bidirectional"

    liar.backbone.hidden = causal
    assert problems(examine(liar, "tiny", OPTIONS)) >= {"attention"}


def test_texts_that_see_each_other_are_a_problem(tiny_decoder_dir: Path) -> None:
    model = load(tiny_decoder_dir)
    hidden = model.backbone.hidden
    model.backbone.hidden = lambda flat: hidden(flat) + hidden(flat).mean(0)
    diagnosis = examine(model, "tiny", OPTIONS)
    assert problems(diagnosis) == {"attention"}
    assert "change each other" in found(diagnosis, "attention").message


def test_a_missing_eos_is_a_problem(tiny_decoder_dir: Path) -> None:
    for pooling in ("mean", "last"):
        model = load(tiny_decoder_dir, pooling=pooling)
        model.backbone.text_tokenizer._tail = ()
        diagnosis = examine(model, "tiny", OPTIONS)
        assert problems(diagnosis) == {"BOS and EOS"}
        assert "no EOS at the end" in found(diagnosis, "BOS and EOS").message
    model = load(tiny_decoder_dir)
    model.backbone.text_tokenizer._head = ()
    assert problems(examine(model, "tiny", OPTIONS)) == {"BOS and EOS"}


def test_pooling_the_instruction_is_a_problem(tiny_decoder_dir: Path, monkeypatch) -> None:
    monkeypatch.setattr("nvembed.model.tokens._text_start", lambda offsets, length: 3)
    diagnosis = examine(load(tiny_decoder_dir), "tiny", OPTIONS)
    assert problems(diagnosis) == {"pooled tokens"}
    wrong = len("Instruct: Find it\nQuery: ") - 3
    assert found(diagnosis, "pooled tokens").message.startswith(f"{wrong} tokens of the instr")
    # Nothing of the text pooled: the mask starts at the EOS.
    monkeypatch.setattr("nvembed.model.tokens._text_start", lambda offsets, length: len(offsets))
    subject = Subject(load(tiny_decoder_dir), "Instruct: x\nQuery: ", "a", "b")
    assert check(subject, "pooled tokens").message == "no token of the text is pooled"


def test_vectors_that_are_not_normalised_or_not_finite(tiny_decoder_dir: Path) -> None:
    model = load(tiny_decoder_dir)
    del model[2]
    diagnosis = examine(model, "tiny", OPTIONS)
    assert problems(diagnosis) == {"vectors"}
    assert "instead of 1" in found(diagnosis, "vectors").message
    model = load(tiny_decoder_dir)
    model.backbone.model.norm.weight.data.fill_(float("nan"))
    diagnosis = examine(model, "tiny", OPTIONS)
    assert {"vectors", "16-bit drift"} <= problems(diagnosis)
    assert found(diagnosis, "vectors").message == "NaN or infinity"


def test_tokenizer_facts(tiny_decoder_dir: Path) -> None:
    model = load(tiny_decoder_dir, max_tokens=300)
    finding = found(examine(model, "tiny", OPTIONS), "tokenizer")
    assert finding.status == "warning"
    assert "300 tokens are let in, the model knows 256 positions" in finding.message
    model = load(tiny_decoder_dir)
    model.backbone.model.config.eos_token_id = 5
    finding = found(examine(model, "tiny", OPTIONS), "tokenizer")
    assert finding.message == "EOS is 2 in the tokenizer, 5 in the model's config"
    rows = len(model.tokenizer)
    model.tokenizer.add_tokens(["<new>"])
    finding = found(examine(model, "tiny", OPTIONS), "tokenizer")
    assert finding.status == "problem"
    assert finding.message == f"{rows + 1} tokens, but the model has {rows} embeddings"


def test_truncation_of_both_styles(tiny_decoder_dir: Path) -> None:
    model = load(tiny_decoder_dir)
    finding = found(examine(model, "tiny", OPTIONS), "truncation")
    expected = "texts over 96 tokens lose their end, but not the instruction or the EOS"
    assert finding == Finding("truncation", "ok", expected)
    model.backbone.text_tokenizer.style = "official"
    finding = found(examine(model, "tiny", OPTIONS), "truncation")
    assert finding.status == "warning"
    assert "lose their EOS" in finding.message


def test_memory_and_placement(tiny_decoder_dir: Path) -> None:
    model = load(tiny_decoder_dir, pooling="latent", num_latents=16)
    diagnosis = examine(model, "tiny", DoctorOptions(batch=5, max_tokens=10))
    full, half = diagnosis.memory
    elements = sum(p.numel() for p in model.parameters()) + 2 * 8 * 16 * 32  # folded latents
    assert (full.dtype, half.dtype, full.tokens) == ("float32", "bfloat16", 50)
    assert (full.weights, half.weights) == (4 * elements, 2 * elements)
    assert full.total == full.weights + full.activations
    head = sum(p.numel() for p in model.pooling.parameters()) * 4
    assert Placement("LatentAttentionPooling", "cpu", "float32", head) in diagnosis.placement
    assert sum(part.bytes for part in diagnosis.placement) == sum(weight_bytes(model).values())
    # encode never holds more than a pack
    assert examine(model, "tiny", DoctorOptions(batch=10_000)).memory[0].tokens == CPU_PACK_TOKENS


def test_thresholds_of_drift_speed_and_placement(tiny_decoder_dir: Path, monkeypatch) -> None:
    subject = Subject(load(tiny_decoder_dir), "", "a", "b")
    for values, status in (
        ({"a": 0.9999, "b": 0.9995}, "ok"),
        ({"a": 0.9999, "b": 0.995}, "warning"),
        ({"a": 0.9, "b": 0.9999}, "problem"),
    ):
        subject.drift = values
        assert check(subject, "16-bit drift").status == status
    by_size = "learning rate by its size: 2e-3 with LoRA, 2e-3 for all weights"
    assert check(subject, "training").message == by_size
    subject.drift = "no room"
    assert check(subject, "16-bit drift").message == "not measured: no room"
    half = (Placement("Backbone", "cpu", "bfloat16", 10),)
    subject.placement = half
    monkeypatch.setattr(checks, "fastest_precision", lambda device: "float32")
    assert check(subject, "speed").status == "warning"
    monkeypatch.setattr(checks, "fastest_precision", lambda device: "bfloat16")
    assert check(subject, "speed").status == "ok"
    subject.placement = (*half, Placement("Head", "cuda:0", "float32", 1))
    assert check(subject, "placement").message == "spread over cpu, cuda:0"
    subject.placement = (Placement("Head", "meta", "float32", 1),)
    assert check(subject, "placement").status == "problem"
    alike, apart = np.eye(4, dtype=np.float32)[[0, 0]], np.eye(4, dtype=np.float32)[:2]
    for together, alone, status in (
        (alike, alike[0], "warning"),
        (apart, apart[0], "ok"),
        (apart, apart[1], "warning"),
    ):
        subject.together, subject.alone = together, alone
        assert check(subject, "vectors").status == status


def test_drift_is_that_of_sixteen_bit(tiny_decoder_dir: Path, monkeypatch) -> None:
    message = found(examine(load(tiny_decoder_dir), "tiny", OPTIONS), "16-bit drift").message
    values = [float(word.rstrip(",")) for word in message.split() if word[0].isdigit()]
    assert len(values) == 2
    assert all(0.999 < value < 1 for value in values)  # float32 against itself would print 1.00000
    monkeypatch.setattr("nvembed.encoding.doctor.checks.free_bytes", lambda device: 1000)
    finding = found(examine(load(tiny_decoder_dir), "tiny", OPTIONS), "16-bit drift")
    assert finding.status == "warning"
    assert "GB are free" in finding.message


@pytest.fixture
def foreign(tmp_path: Path, tiny_tokenizer) -> Path:
    """A BERT with mean pooling, made by sentence-transformers alone."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    transformer = Transformer(str(make_family("bert", tmp_path / "bert", tiny_tokenizer)))
    transformer.tokenizer.pad_token = "</s>"
    transformer.max_seq_length = 64
    model = SentenceTransformer(modules=[transformer, Pooling(32, "mean")], device="cpu")
    model.save_pretrained(str(tmp_path / "foreign"), create_model_card=False)
    return tmp_path / "foreign"


def test_a_foreign_model(foreign: Path) -> None:
    diagnosis = examine_model(str(foreign), OPTIONS)
    assert diagnosis.healthy
    assert found(diagnosis, "attention").message.startswith("bidirectional")
    assert diagnosis.description.startswith("sentence-transformers: bert")
    query = diagnosis.samples[0]  # without an instruction, which it has not learnt
    assert "".join(token.text for token in query.tokens) == "where␣is␣it"
    assert all(token.pooled for token in query.tokens)
    assert len(diagnosis.memory) == 2

    encoder = load_encoder(str(foreign))
    assert isinstance(encoder, SentenceTransformerEncoder)
    encoder.model.prompts = {"query": "Instruct: x\nQuery: "}
    instructed = examine(SentenceTransformerEncoder(encoder.model), "foreign", OPTIONS)
    finding = found(instructed, "pooled tokens")
    assert finding.status == "warning"
    assert finding.message == "25 tokens of the instruction are pooled"


def test_a_table_of_vectors_has_nothing_to_attend(tiny_tokenizer) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    weights = np.random.default_rng(0).standard_normal((len(tiny_tokenizer), 12))
    table = StaticEmbedding(
        tiny_tokenizer.backend_tokenizer, embedding_weights=weights.astype(np.float32)
    )
    model = SentenceTransformer(modules=[table], device="cpu")
    diagnosis = examine(SentenceTransformerEncoder(model), "table", OPTIONS)
    assert diagnosis.healthy
    assert not diagnosis.memory


def test_what_cannot_be_examined(tiny_decoder_dir: Path) -> None:
    from hash_encoder import HashEncoder

    with pytest.raises(ModelError, match="HashEncoder cannot be examined"):
        examine(HashEncoder(), "hash", OPTIONS)
    with pytest.raises(ConfigError, match="--query: the sample is empty"):
        examine(load(tiny_decoder_dir), "tiny", DoctorOptions(query=" "))


def test_the_command(tiny_decoder_dir: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    good, bad = str(tmp_path / "good"), str(tmp_path / "bad")
    for folder, attention in ((good, "bidirectional"), (bad, "causal")):
        model = load(tiny_decoder_dir, attention=attention, max_tokens=200)
        model.save_pretrained(folder, create_model_card=False)
    assert run(["doctor", good, "--task", "SciFact", "--query", "zinc helps"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    assert "bidirectional" in out
    assert "no problem" in out or "healthy" in out
    assert "z i n c ␣ h e l p s" in out
    assert run(["doctor", bad]) == 1
    assert "✗ 1 problem" in capsys.readouterr().out
    assert run(["doctor", bad, "--json", "--batch", "2", "--max-tokens", "8"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["healthy"] is False
    assert report["memory"][0]["tokens"] == 16
    assert {f["name"] for f in report["findings"] if f["status"] == "problem"} == {"attention"}
    assert report["samples"][0]["tokens"][0] == {"text": "<s>", "role": "BOS", "pooled": False}
    assert run(["doctor", str(tmp_path / "none")]) == 2
    assert run(["doctor", good, "--batch", "0"]) == 2
    assert run(["doctor", good, "--task", "SciFac"]) == 2
    assert "perhaps SciFact" in capsys.readouterr().err


def test_the_report_shows_advice_and_json_is_complete(tiny_decoder_dir: Path, capsys) -> None:
    diagnosis = examine(load(tiny_decoder_dir, attention="causal"), "tiny", OPTIONS)
    print_diagnosis(diagnosis)
    assert "→ Load the language model with attention=bidirectional" in " ".join(
        capsys.readouterr().out.split()
    )
    print_diagnosis(diagnosis, as_json=True)
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(diagnosis.as_json()))


def test_a_gguf_file_says_what_it_is(tmp_path: Path, byte_level_tokenizer) -> None:
    pytest.importorskip("gguf", reason="needs the extra gguf")
    folder = make_family("llama", tmp_path / "folder", byte_level_tokenizer)
    path = write_gguf(folder, tmp_path / "tiny.gguf", "llama", "Q8_0")
    diagnosis = examine_model(str(path), DoctorOptions())
    said = diagnosis.findings[0].message
    assert said.startswith("Tiny; architecture llama; layers 2; width 32; heads 4; context 128; ")
    tokens = len(byte_level_tokenizer)
    assert f"tokens {tokens}; tokenizer gpt2/gpt-2; tensors " in said
    assert re.search(r"14 Q8_0, .*; weights 0\.0 M; file .*; licence apache-2\.0$", said)
    assert diagnosis.memory
    other = write_gguf(folder, tmp_path / "other.gguf", "llama", pre="default")
    refused = examine_model(str(other), DoctorOptions())
    assert not refused.healthy
    assert [f.status for f in refused.findings] == ["ok", "problem"]
    assert "'default'" in refused.findings[1].message
    print_diagnosis(refused)
