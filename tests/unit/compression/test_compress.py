"""``nvembed compress`` end to end: a folder, what its record says, and a recovery by its recipe."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from sentence_transformers import SentenceTransformer

from nvembed import NVEmbed
from nvembed.cli.main import run
from nvembed.core.files import write_jsonl
from nvembed.data.instructions import prompt_instruction, task_prompts
from nvembed.encoding.compression.compress import _split
from nvembed.encoding.compression.recovery import recovery_recipe
from nvembed.encoding.export.folders import export_folder
from nvembed.model.pooling import MeanPooling

DECODER = Path(__file__).resolve().parents[3] / "assets" / "decoder-6m"
WORDS = ["red", "blue", "green", "fox", "owl", "cat", "tree", "lake", "hill", "sun", "moon", "star"]
TEXTS = [f"the {a} {b} is near a {c}" for a in WORDS[:4] for b in WORDS[4:8] for c in WORDS[8:12]]
QUERY = "Instruct: find it\nQuery: "


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compress")
    model = NVEmbed.from_pretrained(
        DECODER, pooling="latent", num_latents=8, num_heads=2, max_tokens=64
    )
    with torch.no_grad():  # a head that is still what it began as does nothing
        torch.nn.init.normal_(model.pooling.layer.to_out.weight, std=0.05)
        torch.nn.init.normal_(model.pooling.layer.feed_forward.down.weight, std=0.02)
    model.prompts["query"] = QUERY
    model.save_pretrained(str(folder / "whole"), create_model_card=False)
    card = "---\nlicense: mit\n---\n# whole\n\n## Training\n\nby hand\n\n## Scores\n\n0.4321\n"
    (folder / "whole" / "README.md").write_text(card)
    write_jsonl(folder / "texts.jsonl", [{"text": text} for text in TEXTS])
    return folder


def command(place: Path, to: str, *more: str) -> int:
    texts = str(place / "texts.jsonl")
    return run(["compress", str(place / "whole"), "--texts", texts, "--to", str(place / to), *more])


def test_a_small_model_is_written_and_recovers(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = ("--vocabulary", "400", "--layers", "2", "--mlp", "512", "--sample", "16")
    assert command(place, "small", *sizes) == 0
    printed = capsys.readouterr().out
    small, whole = (NVEmbed.from_pretrained(place / name) for name in ("small", "whole"))
    config = small.backbone.model.config
    assert (config.num_hidden_layers, config.intermediate_size) == (2, 512)
    assert config.vocab_size == len(small.backbone.tokenizer) <= 400
    assert small.prompts["query"] == QUERY
    record = json.loads((place / "small" / "compression.json").read_text())
    steps = {step["step"]: step for step in record["steps"]}
    assert list(steps) == ["whole", "vocabulary", "layers", "mlp"]
    for name, model in (("whole", whole), ("mlp", small)):
        assert steps[name]["parameters"] == sum(p.numel() for p in model.parameters())
        assert f"{steps[name]['parameters']:,}" in printed
    cosines = [step["cosine"] for step in steps.values()]
    assert cosines[0] == pytest.approx(1, abs=1e-3)
    assert cosines[0] + 1e-6 > cosines[1] > cosines[2] != cosines[3]
    queries = [step["queries"] for step in steps.values()]
    assert queries[0] == pytest.approx(1, abs=1e-3)
    assert queries[0] + 1e-6 > queries[1] > queries[2] != queries[3]
    assert not set(queries[2:]) & set(cosines)
    assert sum(len(each["layers"]) for each in record["left_out"]["layers"]) == 2
    assert record["left_out"]["mlp"] == {"channels": 512}
    assert record["left_out"]["vocabulary"]["tokens"] == 8192 - config.vocab_size
    assert [len(record["fitted"][step]) for step in ("layers", "mlp")] == [2, 2]
    assert all(row["before"] >= row["after"] for row in record["fitted"]["layers"])
    assert record["held_out"] == len(TEXTS) // 4
    card = (place / "small" / "README.md").read_text(encoding="utf-8")
    for step in record["steps"]:
        assert f"| {step['step']} | {step['parameters']:,} | " in card
    assert "Scores of that model are not those of this one" in card
    assert card.startswith("---\n")
    assert "license: mit" in card
    assert "by hand" in card
    assert "0.4321" not in card  # what the whole model's card says of its scores
    # The head came along: with it removed the vectors are others.
    assert any(name.startswith("1.") for name, _ in small.named_parameters())

    # The fit has left nothing to learn of so few words.
    damaged = NVEmbed.from_pretrained(place / "small")
    with torch.no_grad():
        for number, weight in enumerate(damaged.backbone.parameters()):
            torch.manual_seed(number)
            weight.add_(torch.randn_like(weight) * 0.3 * weight.std())
    damaged.save_pretrained(str(place / "damaged"), create_model_card=False)
    monkeypatch.chdir(place)
    changes = [
        f"model.backbone={place / 'damaged'}",
        "stages.recover.steps=12",
        "stages.recover.batch_size=16",
        f"output={place / 'run'}",
    ]
    changes += ["stages.recover.warmup_steps=2", "precision=float32", "memory_gb=1.0"]
    assert run(["train", str(place / "small" / "recover.yaml"), *changes]) == 0
    recovered = NVEmbed.from_pretrained(place / "run" / "model")
    assert recovered.prompts["query"] == QUERY
    assert recovered.backbone.max_tokens == whole.backbone.max_tokens == 64
    for prompt in ("", QUERY):
        wanted = whole.encode(TEXTS, prompt=prompt)
        before, after = (
            float((model.encode(TEXTS, prompt=prompt) * wanted).sum(axis=1).mean())
            for model in (damaged, recovered)
        )
        assert after > before + 0.2 * (1 - before), (prompt, before, after)


def test_a_model_without_its_head_recovers_for_servers_that_know_none(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command(place, "plain", "--head-free") == 0
    plain, whole = (NVEmbed.from_pretrained(place / name) for name in ("plain", "whole"))
    assert isinstance(plain.pooling, MeanPooling)
    assert plain.backbone.text_style == "whole"
    assert plain.prompts == whole.prompts
    record = json.loads((place / "plain" / "compression.json").read_text())
    assert record["left_out"] == {"head": "LatentAttentionPooling"}
    before, after = record["steps"]
    assert (before["step"], after["step"]) == ("whole", "head")
    # Every other held-out text with the prompt of the model, which is pooled with it now.
    held_out, _ = _split(place / "texts.jsonl")
    for key, texts, prompt in (("cosine", held_out, ""), ("queries", held_out[::2], QUERY)):
        pairs = [model.encode(texts, prompt=prompt) for model in (plain, whole)]
        assert after[key] == pytest.approx(
            float((pairs[0] * pairs[1]).sum(axis=1).mean()), abs=1e-5
        )
    assert after["queries"] < after["cosine"] - 0.001
    recipe = yaml.safe_load((place / "plain" / "recover.yaml").read_text())
    assert [(one["instruction"], one["weight"]) for one in recipe["datasets"]] == [
        (None, 1),
        ("find it", 1),
    ]

    monkeypatch.chdir(place)
    changes = ["stages.recover.steps=16", "stages.recover.batch_size=16", f"output={tmp_path}/run"]
    changes += ["stages.recover.warmup_steps=2", "precision=float32", "memory_gb=1.0"]
    assert run(["train", str(place / "plain" / "recover.yaml"), *changes]) == 0
    export_folder(str(tmp_path / "run" / "model"), tmp_path / "stock", "sentence-transformers")
    stock = SentenceTransformer(str(tmp_path / "stock"), device="cpu")
    for prompt in ("", QUERY):
        wanted = whole.encode(TEXTS, prompt=prompt)
        before = (plain.encode(TEXTS, prompt=prompt) * wanted).sum(axis=1).mean()
        # A server that is given prompt and text as one string.
        served = stock.encode([prompt + text for text in TEXTS])
        after = (served * wanted).sum(axis=1).mean()
        assert after > before + 0.2 * (1 - before), (prompt, before, after)


def test_texts_in_the_vocabulary_keep_their_vectors(place: Path) -> None:
    assert command(place, "cut", "--vocabulary", "8000") == 0
    cut, whole = (NVEmbed.from_pretrained(place / name) for name in ("cut", "whole"))
    assert len(cut.backbone.tokenizer) < 1000
    np.testing.assert_array_equal(cut.encode(TEXTS), whole.encode(TEXTS))
    queries = [model.encode(TEXTS[:9], prompt_name="query") for model in (cut, whole)]
    np.testing.assert_array_equal(*queries)
    record = json.loads((place / "cut" / "compression.json").read_text())
    assert record["left_out"]["vocabulary"]["of_the_texts"] == 0
    assert record["steps"][1]["cosine"] == record["steps"][0]["cosine"]
    assert record["steps"][1]["bytes"] < 0.75 * record["steps"][0]["bytes"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ((), "nothing is to be made smaller; expected layers, mlp, vocabulary or head_free"),
        (("--layers", "4", "--mlp", "1024"), "layers: 4 given, expected 1 to 3; mlp: 1024 given"),
        (("--vocabulary", "200"), "vocabulary: 200 tokens; expected at least"),
        (("--vocabulary", "8192"), "vocabulary: 8192 given, expected 1 to 8191"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], said: str
) -> None:
    assert command(place, "none", *more) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert said in error
    assert not (place / "none").exists()


def test_too_few_texts_and_a_language_model(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few: list[dict[str, Any]] = [{"text": f"text {number % 7}"} for number in range(20)]
    write_jsonl(tmp_path / "few.jsonl", few)
    for model, texts, said in (
        (place / "whole", tmp_path / "few.jsonl", "7 different texts; expected at least 8"),
        (DECODER, place / "texts.jsonl", "a language model, not an embedding model"),
    ):
        arguments = ["compress", str(model), "--texts", str(texts), "--layers", "1"]
        assert run([*arguments, "--to", str(tmp_path / "to")]) == 2
        assert said in capsys.readouterr().err


def test_queries_of_a_recovery_have_instructions_of_all_kinds(place: Path) -> None:
    model = NVEmbed.from_pretrained(place / "whole")
    own = {f"own-{number}": f"Instruct: find it {number}\nQuery: " for number in range(20)}
    model.prompts = own | task_prompts() | {"odd": "no instruction"}
    recipe = recovery_recipe(model, "whole", place / "texts.jsonl", place / "to", 100)
    documents, *queries = yaml.safe_load(recipe)["datasets"]
    assert (documents["instruction"], documents["weight"]) == (None, len(queries))
    assert {one["weight"] for one in queries} == {1}
    told = [one["instruction"] for one in queries]
    assert told[:7] == [f"find it {number}" for number in range(0, 20, 3)]
    of_tasks = list(dict.fromkeys(filter(None, map(prompt_instruction, task_prompts().values()))))
    places = [of_tasks.index(instruction) for instruction in told[7:]]
    assert len(told) <= 16
    assert places[0] == 0
    assert places[-1] > 0.8 * len(of_tasks)
    model.prompts = {}
    (_, query) = yaml.safe_load(recovery_recipe(model, "w", place / "t", place / "to", 9))[
        "datasets"
    ]
    assert query["instruction"].startswith("Given a question")


def test_the_recipe_names_places_as_they_are_seen_from_the_folder(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    command = "compress whole --texts texts.jsonl --to sub/small --layers 3"
    assert run(shlex.split(command)) == 0
    recipe = yaml.safe_load((place / "sub" / "small" / "recover.yaml").read_text())
    assert recipe["output"] == "sub/small-recovered"
    assert recipe["model"]["backbone"] == "../small"
    assert recipe["datasets"][0]["path"] == "../../texts.jsonl"
    assert recipe["stages"][0]["teacher"]["model"] == "../../whole"
