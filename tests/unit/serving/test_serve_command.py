"""Keys files, token ids against texts, the engine against the model, ``nvembed serve``."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import nvembed.serving.server as serving_run
from nvembed.cli.main import run
from nvembed.core.errors import ConfigError, DataError
from nvembed.core.http import address_of, bound_socket
from nvembed.model.tokens import TextTokenizer, TokenizedText
from nvembed.serving.config import ServerConfig
from nvembed.serving.engines import EmbedOptions, Item, PackEngine
from nvembed.serving.middleware import read_keys


def test_keys_file(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# ours\nalice:" + "a" * 20 + "\n\n" + "b" * 20 + "\n")
    keys = read_keys(path)
    assert keys.owner("Bearer " + "a" * 20) == "alice"
    assert keys.owner("bearer " + "b" * 20) == "key-4"
    for wrong in (None, "", "Bearer", "Bearer alice", "Basic " + "a" * 20, "Bearer " + "a" * 21):
        assert keys.owner(wrong) is None


@pytest.mark.parametrize(
    ("text", "place"), [("", "keys:"), ("short\n", "keys:1"), ("a:" + "x" * 20 + "\n" * 2, None)]
)
def test_bad_keys_files(tmp_path: Path, text: str, place: str | None) -> None:
    path = tmp_path / "keys"
    path.write_text(text if place else text * 2)
    with pytest.raises(ConfigError, match=place or "keys:3"):
        read_keys(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys(tmp_path / "missing")


def test_names_of_a_model(tmp_path: Path) -> None:
    folder = tmp_path / "decoder"
    folder.mkdir()
    own, named = ServerConfig(), ServerConfig(model_name="docs", model_aliases=("a", "docs"))
    assert serving_run.model_names(f"{folder}/", own) == ("decoder",)
    assert serving_run.model_names(str(folder), named) == ("docs", "a", "decoder")
    hub = serving_run.model_names("nvidia/NV-Embed-v2", own)
    assert hub == ("nvidia/NV-Embed-v2", "NV-Embed-v2")
    aliased = ServerConfig(model_aliases=("a",))
    assert serving_run.model_names("name", aliased) == ("name", "a")


@pytest.mark.parametrize("style", ["nvembed", "official"])
@pytest.mark.parametrize("max_tokens", [4, 64])
def test_ids_give_the_sequences_of_their_texts(tiny_tokenizer, style, max_tokens: int) -> None:
    tokenizer = TextTokenizer(tiny_tokenizer, max_tokens=max_tokens, style=style)
    texts = ["abc", "a longer text than four tokens"]
    ids = [tiny_tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert tokenizer.from_ids(ids, len(tiny_tokenizer)) == tokenizer(texts)
    with pytest.raises(DataError, match="text 1: token id -1 is not in the vocabulary"):
        tokenizer.from_ids([[3], [-1]], len(tiny_tokenizer))
    with pytest.raises(DataError, match="no token ids"):
        tokenizer.from_ids([[]], len(tiny_tokenizer))


def test_the_engine_gives_the_models_vectors(tiny_decoder_dir: Path) -> None:
    from nvembed import NVEmbed

    model = NVEmbed.from_pretrained(tiny_decoder_dir)
    model.prompts["query"] = "Instruct: own\nQuery: "
    engine = PackEngine(model)
    texts = ["one", "another text", "x"]
    items = engine.prepare(texts, EmbedOptions()) + engine.prepare(texts, EmbedOptions("query"))
    items += engine.prepare(texts, EmbedOptions("query", "find it"))
    oracle = [
        model.encode_document(texts),
        model.encode_query(texts),
        model.encode_query(texts, task="find it"),
    ]
    np.testing.assert_allclose(engine.embed(items), np.concatenate(oracle), atol=1e-6)
    assert not np.allclose(oracle[1], oracle[2], atol=1e-3)
    model.truncate_dim = 8
    short = engine.embed(engine.prepare(texts, EmbedOptions()))
    expected = oracle[0][:, :8] / np.linalg.norm(oracle[0][:, :8], axis=1, keepdims=True)
    np.testing.assert_allclose(short, expected, atol=1e-6)


def test_the_engine_folds_latents_once(
    tiny_decoder_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from nvembed import NVEmbed

    model = NVEmbed.from_pretrained(tiny_decoder_dir, pooling="latent", num_latents=8)
    layer = model.pooling.layer
    torch.nn.init.normal_(layer.to_out.weight)  # else no latent has an effect
    texts = ["one", "another text, of more tokens"]
    expected = model.encode_document(texts)
    engine, project, projected = PackEngine(model), layer._keys_values, list[int]()

    def counted() -> object:
        projected.append(1)
        return project()

    monkeypatch.setattr(layer, "_keys_values", counted)
    items = engine.prepare(texts, EmbedOptions())
    for _ in range(20):
        np.testing.assert_allclose(engine.embed(items), expected, atol=1e-6)
    assert 0 < len(projected) < 20
    before = len(projected)
    engine.embed(items)
    assert len(projected) == before
    del engine  # what it kept goes with it
    assert layer._kept is None


def test_packs_have_few_lengths_and_little_filler(tiny_decoder_dir: Path) -> None:
    from nvembed import NVEmbed
    from nvembed.model.packs import filler

    model = NVEmbed.from_pretrained(tiny_decoder_dir)
    lengths: list[int] = []
    model.backbone.model.register_forward_pre_hook(
        lambda module, args, given: lengths.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    engine = PackEngine(model)
    for tokens in (1, 8, 9, 100, 1000):
        assert engine.embed([Item(TokenizedText((5,) * tokens, 0), tokens)]).shape[0] == 1
    assert lengths == [8, 8, 16, 104, 1024]
    totals = [tokens + sum(map(len, filler(tokens))) for tokens in range(1, 4097)]
    assert len(set(totals)) <= 64
    assert all(total <= max(8, 1.13 * t + 1) for t, total in enumerate(totals, start=1) if t >= 64)


def test_one_forward_per_core_up_to_four(tiny_decoder_dir: Path) -> None:
    import torch

    from nvembed import NVEmbed

    model, before = NVEmbed.from_pretrained(tiny_decoder_dir), torch.get_num_threads()
    try:
        for cores, asked, forwards, threads in (
            (1, None, 1, 1),
            (2, None, 2, 1),
            (8, None, 4, 2),
            (8, 1, 1, 8),
            (2, 3, 3, 1),
        ):
            torch.set_num_threads(cores)
            engine = PackEngine(model, asked)
            assert engine.forwards == forwards
            engine.embed(engine.prepare(["text"], EmbedOptions()))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_serve_hands_its_options_on(
    tiny_decoder_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}
    monkeypatch.setattr(
        serving_run,
        "run_server",
        lambda engine, config, place, **rest: seen.update(
            engine=engine, config=config, host=place.getsockname()[0], **rest
        ),
    )
    keys = tmp_path / "keys"
    keys.write_text("alice:" + "a" * 20)
    command = ["serve", str(tiny_decoder_dir), "batching.batch_tokens=77", "--port", "0"]
    assert run([*command, "--keys", str(keys), "--dtype", "float32"]) == 0
    assert seen["config"].model_name == tiny_decoder_dir.name
    assert seen["config"].batching.batch_tokens == 77
    assert seen["host"] == "127.0.0.1"
    assert isinstance(seen["engine"], PackEngine)
    assert seen["keys"].owner("Bearer " + "a" * 20) == "alice"


def test_serve_refuses_bad_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "nowhere/at/all", "batching.batch_tokens=0", "limit.max_texts=3"]) == 2
    error = capsys.readouterr().err
    assert "batching.batch_tokens" in error
    assert "did you mean limits" in error
    assert run(["serve", "nowhere/at/all", "--port", "0"]) == 2
    assert "no such model folder" in capsys.readouterr().err


def test_a_database_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", str(tmp_path), "--model", "x"]) == 2
    assert "--model goes with --ui or --mcp" in capsys.readouterr().err
    assert run(["serve", str(tmp_path), "batching.batch_tokens=77", "--ui"]) == 2
    assert run(["serve", str(tmp_path), "--mcp", "--ui"]) == 2
    assert "exclude each other" in capsys.readouterr().err
    assert run(["serve", str(tmp_path), "batching.batch_tokens=77", "--mcp"]) == 2
    assert "none of them with --ui or --mcp" in capsys.readouterr().err
    assert run(["serve", str(tmp_path / "none"), "--ui"]) == 2
    assert "no database" in capsys.readouterr().err
    (tmp_path / "db" / "documents.lance").mkdir(parents=True)
    assert run(["serve", str(tmp_path / "db")]) == 2
    assert "is a database, not a model; expected --ui or --mcp" in capsys.readouterr().err


@pytest.mark.parametrize("ui", [[], ["--ui"]])
def test_a_taken_port_is_told_before_anything_is_loaded(
    ui: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from hash_encoder import HashEncoder
    from nvembed.core.files import write_jsonl
    from nvembed.index.build import index_documents

    write_jsonl(tmp_path / "docs.jsonl", [{"text": "a"}])
    index_documents(tmp_path / "db", [tmp_path / "docs.jsonl"], model=HashEncoder(16))
    with bound_socket("127.0.0.1", 0) as taken:
        taken.listen()
        port = str(taken.getsockname()[1])
        # The model of this database is nowhere, so to load it would be another error.
        place = tmp_path / "db" if ui else tmp_path / "no-model"
        assert run(["serve", str(place), *ui, "--port", port]) == 2
    told = capsys.readouterr().err
    assert f"127.0.0.1:{port}: cannot listen there (address already in use)" in told
    assert told.count("\n") == 1


def test_addresses() -> None:
    with bound_socket("127.0.0.1", 0) as place:
        assert re.fullmatch(r"http://127\.0\.0\.1:[1-9]\d*", address_of(place))
    with bound_socket("::1", 0) as place:
        assert re.fullmatch(r"http://\[::1\]:[1-9]\d*", address_of(place))
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1:9: cannot listen there"):
        bound_socket("192.0.2.1", 9)  # of documentation
