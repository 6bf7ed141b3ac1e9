"""What can be known without a model is told before one is loaded, and before the hub is asked."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
from httpx import Request, Response
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from nvembed.cli.main import run
from nvembed.core.errors import ConfigError, ModelError
from nvembed.core.files import write_json, write_jsonl
from nvembed.interop import hub
from nvembed.interop.model_folder import ModelSource
from nvembed.model.embedder import NVEmbed
from nvembed.model.encoder import check_task
from task_folders import write_task


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_decoder_dir: Path) -> Path:
    """A working folder, where loading a model or asking the hub is a failure."""

    def refuse(*given: Any, **options: Any) -> None:
        raise AssertionError(f"loaded or asked for: {given}")

    def download(name: str, file: str, **options: Any) -> str:
        assert options["local_files_only"], f"the hub was asked for {name}"
        return original(name, file, **options)

    original = hub.hf_hub_download
    monkeypatch.setattr(hub, "hf_hub_download", download)
    monkeypatch.setattr(NVEmbed, "from_pretrained", refuse)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "MODEL").symlink_to(tiny_decoder_dir)
    for name in ("empty", "no-model", "pictures"):
        (tmp_path / name).mkdir()
    (tmp_path / "no-model" / "x.txt").write_text("x")
    (tmp_path / "pictures" / "a.png").write_bytes(b"x")
    write_jsonl(tmp_path / "texts.jsonl", [{"text": f"text {n}"} for n in range(9)])
    write_jsonl(tmp_path / "body.jsonl", [{"body": "no column of texts"}])
    (tmp_path / "body.csv").write_text("body\nno column of texts\n")
    pairs = [{"query": f"q {n}", "positive": f"text {n}"} for n in range(9)]
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    write_task(tmp_path / "task", "STS")
    return tmp_path


COMMANDS = [
    "doctor {}",
    "encode {} --input texts.jsonl --output out.npy",
    "index texts.jsonl --to db --model {}",
    "search {} query --documents texts.jsonl",
    "serve {} --port 0",
    "serve MODEL models.other={} --port 0",
    "evaluate {} --tasks task",
    "mine pairs.jsonl out.jsonl --teacher {}",
    "mine pairs.jsonl out.jsonl --teacher bm25 rerank={}",
    "export {} --to out --format onnx",
    "export {} --to out.gguf --format gguf",
    "compress {} --texts texts.jsonl --to out --layers 1",
    "init pairs.jsonl --to out --backbone {}",
    "merge {} MODEL --to out",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_model_that_is_not_there(
    place: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(place.iterdir())
    for name, told in (("nope", "no such "), ("no-model", "no "), ("texts.jsonl", "no such ")):
        assert run(shlex.split(command.format(name))) == 2, name
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith(f"error: {name}: {told}"), line
    assert sorted(place.iterdir()) == before


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("index empty --to db --model MODEL", "empty: no documents in it"),
        ("index pictures --to db --model MODEL", "pictures: no documents in it"),
        ("index empty --to db --model MODEL --passages none", "empty: no documents in this folder"),
        ("index pictures/a.png --to db --model MODEL", "unknown kind of file 'a.png'"),
        ("index texts.jsonl body.csv --to db --model MODEL", 'body.csv: no column "text"'),
        ("index body.jsonl --to db --model MODEL", 'body.jsonl:1: no column "text"'),
        ("index texts.jsonl --to db --model MODEL --column x=y", "documents have no 'x'"),
        ("index no-model --to db --model MODEL --column x=y", "documents have no 'x'"),
        ("index texts.jsonl --to db --model MODEL --passages 0", "passages: 0 tokens"),
        (
            "index texts.jsonl --to db --model MODEL --passages none --long late",
            "late chunking; expected passages",
        ),
        ("encode MODEL --input empty --output out.npy", "empty: no documents in this folder"),
        ("search MODEL query --documents body.jsonl", 'body.jsonl:1: no column "text"'),
        ("evaluate MODEL --tasks empty", "empty: no evaluation task here"),
        ("mine body.jsonl out.jsonl --teacher MODEL", 'body.jsonl:1: missing "query"'),
        ("compress MODEL --texts body.jsonl --to out --layers 1", 'body.jsonl:1: no column "text"'),
        ("merge MODEL MODEL --to out --tasks empty", "empty: no evaluation task here"),
        ("encode MODEL --input texts.jsonl --output out.npy --task FiQA2019", "perhaps FiQA2018"),
        ("index texts.jsonl --to db --model MODEL --task FiQA2019", "perhaps FiQA2018"),
        ("search MODEL query --documents texts.jsonl --task FiQA2019", "perhaps FiQA2018"),
        ("doctor MODEL --task FiQA2019", "perhaps FiQA2018"),
        ("doctor MODEL --query ' '", "--query: the sample is empty"),
        ("doctor MODEL --document ''", "--document: the sample is empty"),
    ],
)
def test_other_mistakes_too(
    place: Path, command: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(place.iterdir())
    assert run(shlex.split(command)) == 2
    assert told in capsys.readouterr().err
    assert sorted(place.iterdir()) == before


def test_a_prompt_that_is_saved_with_the_model_is_a_task(place: Path) -> None:
    folder = place / "own"
    folder.mkdir()
    write_json(folder / "modules.json", [])
    write_json(folder / "config_sentence_transformers.json", {"prompts": {"My2024": "find: "}})
    for known in ("My2024", "FiQA2018", "FiQA2018-document", "find an answer", None):
        check_task(str(folder), known)
    with pytest.raises(ConfigError, match=r"'My2025' is neither .* perhaps My2024"):
        check_task(str(folder), "My2025")
    check_task("owner/name", "My2024")  # of the hub, whose prompts are not known yet


def test_a_name_of_one_word_may_have_been_downloaded(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = place / "hub"
    snapshot = cache / "models--old" / "snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (cache / "models--old" / "refs").mkdir()
    (cache / "models--old" / "refs" / "main").write_text("c" * 40)
    source = ModelSource("old", cache_folder=str(cache))
    source.check()
    assert source.require("config.json") == snapshot / "config.json"
    assert source.options()["local_files_only"]
    assert not ModelSource("owner/old").options()["local_files_only"]
    with pytest.raises(ModelError, match=r"^new: no such model folder; expected a folder, a GGUF"):
        ModelSource("new", cache_folder=str(cache)).check()


@pytest.mark.parametrize("reached", [True, False])
def test_a_slip_in_a_path_is_told_with_the_folder_that_was_meant(
    place: Path, monkeypatch: pytest.MonkeyPatch, reached: bool
) -> None:
    def asked(*_: object, **__: object) -> str:
        if reached:
            raise RepositoryNotFoundError("no", response=Response(404, request=Request("GET", "x")))
        raise LocalEntryNotFoundError("not here")

    monkeypatch.setattr(hub, "hf_hub_download", asked)
    (place / "runs" / "model").mkdir(parents=True)
    with pytest.raises(ModelError, match=r"^runs/modle: .*Did you mean runs/model\?$"):
        ModelSource("runs/modle").require("config.json")
    for name in ("runs/embedder", "owner/modle"):
        with pytest.raises(ModelError, match=f"^{name}: ((?!Did you mean).)*$"):
            ModelSource(name).require("config.json")
    (place / "runs" / "deep" / "model").mkdir(parents=True)
    with pytest.raises(ModelError, match=r"no such model folder.* Did you mean runs/deep/model\?$"):
        ModelSource("runs/deep/modle").check()
    # A model of the hub may be called nearly as a folder is, and is loaded.
    file = place / "config.json"
    file.write_text("{}")
    monkeypatch.setattr(hub, "hf_hub_download", lambda *_, **__: str(file))
    ModelSource("runs/models").check()
    assert ModelSource("runs/models").require("config.json") == file
