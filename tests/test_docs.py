"""What the documents promise: snippets run, links lead somewhere, recipes are valid."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import yaml

import nvembed
from families import make_family
from nvembed.cli.main import run
from nvembed.core.config import load_config
from nvembed.core.errors import ModelError
from nvembed.core.files import write_jsonl
from nvembed.evaluation.reference import paper_tables
from nvembed.interop.model_folder import ModelSource, find_base
from nvembed.training.ablation.grid import GridConfig, grid_runs
from nvembed.training.config import TrainConfig
from official_folders import write_official
from task_folders import write_task

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
GRIDS = sorted((ROOT / "recipes" / "ablations").glob("*.yaml"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
# The guides whose every command, snippet and recipe is run with the README's.
GUIDE_NAMES = ("usage", "tutorial", "train", "mine", "compress", "clusters", "coming-from")
GUIDE_NAMES += ("nv-embed-v2",)
GUIDES = "\n".join([README, *((ROOT / "docs" / f"{n}.md").read_text("utf-8") for n in GUIDE_NAMES)])
LAUNCHERS = {"torchrun", "accelerate"}  # whose command is run in one process


def blocks(language: str, document: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", document, re.MULTILINE | re.DOTALL)


def command_lines(document: str = README) -> list[list[str]]:
    text = "\n".join(blocks("bash", document)).replace("\\\n", " ")
    return [words for line in text.split("\n") if (words := shlex.split(line, comments=True))]


@pytest.fixture
def place(
    tmp_path: Path, tiny_decoder_dir: Path, tiny_tokenizer, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A working folder with what the README takes for granted, at tiny size."""
    # nvidia/NV-Embed-v2 as it lies in the cache after a download, with other weights
    repository, commit = tmp_path / "hub" / "models--nvidia--NV-Embed-v2", "c" * 40
    write_official(repository / "snapshots" / commit, tiny_tokenizer)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("decoder-6m", "nvembed-smollm2-135m"):
        shutil.copytree(tiny_decoder_dir, tmp_path / "assets" / name)
    shutil.copytree(tiny_decoder_dir, tmp_path / "MODEL")
    write_task(tmp_path / "FOLDER", "STS")
    write_jsonl(tmp_path / "texts.jsonl", [{"text": f"text {i}"} for i in range(4)])
    pairs = [{"query": f"q{i}", "positive": f"text {i}"} for i in range(4)]
    rows = [(f"q{i}", f"text {i}", f"no {i}") for i in range(4)]
    of_others = {
        "triplets": [{"anchor": q, "positive": p, "negative": n} for q, p, n in rows],
        "flag": [{"query": q, "pos": [p], "neg": [n]} for q, p, n in rows],
        "tevatron": [
            {
                "query_id": q,
                "query": q,
                "positive_passages": [{"docid": p, "title": "", "text": p}],
                "negative_passages": [{"docid": n, "title": "", "text": n}],
            }
            for q, p, n in rows
        ],
    }
    (tmp_path / "recipes").mkdir()
    for name, records in of_others.items():
        write_jsonl(tmp_path / "recipes" / f"{name}.jsonl", records)
    write_jsonl(tmp_path / "recipes" / "pairs.jsonl", pairs)
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    rows = "".join(f"q{i},text {i}\n" for i in range(4))
    (tmp_path / "recipes" / "pairs.csv").write_text("question,answer\n" + rows)
    many = "".join(f"what is {i}?,number {i}\n" for i in range(20))
    (tmp_path / "faq.csv").write_text("question,answer\n" + many)
    (tmp_path / "manuals").mkdir()
    for i in range(60):
        text = f"# Part {i}\n\nHow the part of number {i} is put in.\n"
        (tmp_path / "manuals" / f"{i}.md").write_text(text)
    dataset = {"name": "pairs", "path": "pairs.jsonl", "kind": "retrieval", "instruction": "find"}
    recipe = {
        "output": "runs/small",
        "model": {"backbone": "../MODEL", "max_tokens": 64, "pooling": {"kind": "mean"}},
        "datasets": [{**dataset, "stages": [1]}],
        "stages": [{"name": "one", "steps": 1, "batch_size": 4, "in_batch_negatives": True}],
    }
    for name in ("small", "demo"):
        named = {**recipe, "output": f"runs/{name}"}
        (tmp_path / "recipes" / f"{name}.yaml").write_text(yaml.safe_dump(named))
    (tmp_path / "recipes" / "ablations").mkdir()
    grid = {"recipe": "../small.yaml", "output": "runs/grid", "tasks": ["../../FOLDER"]}
    grid["axes"] = {"pooling": {"mean": {}, "last": {"model.pooling": {"kind": "last"}}}}
    (tmp_path / "recipes" / "ablations" / "paper.yaml").write_text(yaml.safe_dump(grid))
    built = {**recipe, "build": {"folder": "built"}}
    (tmp_path / "recipes" / "small-built.yaml").write_text(yaml.safe_dump(built))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_readme_commands_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands = [
        words[words.index("nvembed") + 1 :] for words in command_lines(GUIDES) if "nvembed" in words
    ]
    expected = {"train", "data", "mine", "evaluate", "encode", "search", "export"}
    assert {words[0] for words in commands} >= expected
    for words in commands:
        assert run(words) == 0, f"{words}: {capsys.readouterr().err}"


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_readme_make_targets_exist() -> None:
    targets = {words[1] for words in command_lines() if words[0] == "make"}
    assert {"model", "demo", "test"} <= targets
    for target in targets:
        command = ["make", "--dry-run", "--directory", str(ROOT), target]
        subprocess.run(command, check=True, capture_output=True)


def test_readme_holds_no_other_commands() -> None:
    # Otherwise the tests above would pass over them.
    assert {words[0] for words in command_lines(GUIDES)} <= {"nvembed", "make", *LAUNCHERS}


def test_readme_python_runs(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    snippets = blocks("python", GUIDES)
    assert snippets
    tuned = nvembed.NVEmbed.from_pretrained("MODEL", device="cpu")
    tuned.save_pretrained("faq/run/model", create_model_card=False)
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert out.startswith("tensor([[")
    assert out.endswith("(1, 32)\n")


def test_readme_output_is_what_its_snippet_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)  # with the model of the repository
    try:
        find_base(ModelSource("assets/nvembed-smollm2-135m"))
    except ModelError:
        pytest.skip("the base of the shipped model is not installed: make model")
    exec(compile(blocks("python")[0], "README.md", "exec"), {})
    printed, shown = capsys.readouterr().out, blocks("text")[0]
    assert [float(n) for n in re.findall(r"\d\.\d+", printed)] == pytest.approx(
        [float(n) for n in re.findall(r"\d\.\d+", shown)], abs=2e-3
    )


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150
    assert len(README.split()) <= 1100


def test_every_number_of_the_readme_stands_in_the_results() -> None:
    prose = re.sub(
        r"```.*?```|`[^`]*`|\]\([^)]*\)|arXiv [\d.]+|Python 3\.\d+", " ", README, flags=re.S
    )
    numbers = {
        n for n in re.findall(r"\d+(?:[.,]\d+)+(?:e-\d+)?", prose) if n not in {"2.0", "4.0"}
    }
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert len(numbers) > 10
    assert {number for number in numbers if number not in results} == set()


def test_the_page_of_the_api_has_all_names() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^::: nvembed\.(\w+)$", page, re.MULTILINE)) == sorted(
        {*nvembed.__all__} - {"__version__"}
    )


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_loads_nothing_from_outside(tmp_path: Path) -> None:
    pytest.importorskip("mkdocstrings", reason="needs the extra docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    pages = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.glob("*.html")}
    assert {"index.html", "databases.html", "tutorial.html", "CONTRIBUTING.html"} <= pages.keys()
    assert len(pages) > len(DOCUMENTS)
    for name, page in pages.items():
        assert (
            re.findall(r"<(?:script|img|link|iframe)[^>]*(?:src|href)=.?(?:https?:)?//", page) == []
        ), name
        assert not re.search(r'href="\.\./', page), name  # files of the repository
    for public in nvembed.__all__:
        assert public == "__version__" or f'id="nvembed.{public}"' in pages["api.html"], public

    assert "pack_tokens: int = Field(default=4096" in re.sub(r"<[^>]*>", "", pages["api.html"])


def test_readme_recipes_run(place: Path) -> None:
    recipe = yaml.safe_load((place / "recipes" / "small.yaml").read_text())
    fragments = [yaml.safe_load(block) for block in blocks("yaml", GUIDES)]
    assert fragments
    for number, fragment in enumerate(fragments):
        for stage in fragment.get("stages", ()):
            stage.update(steps=1, batch_size=4, matryoshka=[8, 32])  # of the tiny model's size
        whole = {**recipe, **fragment, "output": f"runs/{number}"}
        (place / "recipes" / "fragment.yaml").write_text(yaml.safe_dump(whole))
        assert run(["train", "recipes/fragment.yaml"]) == 0
        made = place / "runs" / str(number)
        assert (made / "model" / "modules.json").is_file()
        assert (made / "adapter" / "adapter_config.json").is_file() == ("lora" in fragment)


def test_every_block_of_the_documents_is_run() -> None:
    # docs/server.md by tests/integration/test_server_docs.py, the others here.
    run_here = {"README.md": None, **{f"{name}.md": None for name in GUIDE_NAMES}}
    run_here |= {"index.md": {"bash", "json"}, "evaluation.md": {"yaml"}}
    run_there = {"server.md": {"bash", "sh", "python"}}
    run_there |= {"gpu.md": {"bash"}}  # by tests/unit/benchmarks/test_gpu_run.py
    run_there |= {"scale.md": {"bash", "python", "text"}}  # test_scale_page.py
    run_there |= {"integrations.md": {"python"}}  # tests/integration/test_integrations.py
    # The rest of it by tests/integration/test_llama_cpp.py; text is marked as not tested.
    run_there |= {"serving-elsewhere.md": {"bash", "sh", "python", "text"}}
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        languages = set(re.findall(r"^```(\w+)$", text, re.MULTILINE))
        known = (run_here | run_there).get(document.name, set())
        assert known is None or languages == known, document.name


def test_the_exports_for_other_servers_run(
    place: Path, byte_level_tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf", reason="needs the extra gguf")
    pytest.importorskip("onnxscript", reason="needs the extra onnx")
    text = (ROOT / "docs" / "serving-elsewhere.md").read_text(encoding="utf-8")
    for block in re.findall(r"^#+ .*?(?=^#+ |\Z)", text, re.MULTILINE | re.DOTALL):
        assert ("```text" in block) == ("(not tested here)" in block.split("\n")[0])
    make_family("llama", place / "lm", byte_level_tokenizer)
    model = nvembed.NVEmbed.from_pretrained(place / "lm", device="cpu")
    model.save_pretrained(str(place / "runs" / "demo" / "model"), create_model_card=False)
    for words in command_lines(text):
        assert run(words[1:]) == 0, f"{words}: {capsys.readouterr().err}"
    assert (place / "model.gguf").read_bytes()[:4] == b"GGUF"
    assert (place / "plain" / "modules.json").is_file()


def test_the_commands_of_the_index_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands = command_lines((ROOT / "docs" / "index.md").read_text(encoding="utf-8"))
    shutil.copytree(place / "MODEL", place / "runs" / "demo" / "model")
    document = {
        "text": "sorted() sorts",
        "id": "old-1",
        "year": 2001,
        "day": "2024-01-31",
        "lang": "en",
    }
    write_jsonl(place / "docs.jsonl", [document, {**document, "id": "new"}])
    (place / "more.csv").write_text(
        "id,text,year,day,lang\nmore,pi is a constant,2002,2024-02-01,en\n"
    )
    (place / "folder").mkdir()
    (place / "folder" / "a.txt").write_text("one more\n")
    (place / "gone.txt").write_text("old-1\n")
    assert [words[1] for words in commands] == [*["index"] * 3, *["search"] * 2, "index"]
    for words in commands:
        assert run(words[1:]) == 0, f"{words}: {capsys.readouterr().err}"
    out = capsys.readouterr().out
    assert "2 new" in out
    assert "1 deleted" in out
    assert "[more]" in out
    assert "[old-1]" not in out


def test_the_settings_for_an_assistant_name_a_command_that_is_there(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (settings,) = blocks("json", (ROOT / "docs" / "index.md").read_text(encoding="utf-8"))
    (server,) = json.loads(settings)["mcpServers"].values()
    assert server["command"] == "nvembed"
    assert run(server["args"]) == 2
    assert "/home/me/docs.db: no database" in capsys.readouterr().err


def test_the_grid_of_the_evaluation_guide_is_valid(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    for block in blocks("yaml", text):
        path = ROOT / "recipes" / "ablations" / "grid.yaml"
        copy = tmp_path / "grid.yaml"
        copy.write_text(block)
        grid = load_config(GridConfig, copy)
        assert len(grid_runs(grid, path.parent)) == len(grid.arms()) * len(grid.seeds)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
        if not target.startswith(("http:", "https:", "mailto:")):
            assert (document.parent / target).exists(), target


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipes_are_valid(path: Path) -> None:
    load_config(TrainConfig, path)
    first = path.read_text(encoding="utf-8").split("\n")[0]
    assert first == f"# nvembed train recipes/{path.name}"


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.name)
def test_grids_are_valid(path: Path) -> None:
    grid = load_config(GridConfig, path)
    runs = grid_runs(grid, path.parent)
    assert len(runs) == len(grid.arms()) * len(grid.seeds)
    for paper in grid.paper:
        assert set(paper.rows.values()) <= set(paper_tables()[paper.table].rows)
    first = path.read_text(encoding="utf-8").split("\n")[0]
    assert first == f"# nvembed ablate recipes/ablations/{path.name}"


def test_there_are_recipes() -> None:
    assert RECIPES
    assert GRIDS
