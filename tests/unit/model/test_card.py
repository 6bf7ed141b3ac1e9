"""Model cards: what they say is in the run, and the code in them runs."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import yaml

import tiny_run
from nvembed.core.files import write_jsonl
from nvembed.model.card import read_card
from nvembed.model.embedder import NVEmbed
from nvembed.training.config import TrainConfig
from nvembed.training.trainer import train
from task_folders import write_task

BASE = "---\nlicense: apache-2.0\nlanguage: en\nbase_model: some/decoder\n---\n# a decoder\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_decoder_dir: Path) -> Path:
    """A run of two stages with adapters, evaluated before and after."""
    folder = tmp_path_factory.mktemp("card")
    shutil.copytree(tiny_decoder_dir, folder / "decoder")
    (folder / "decoder" / "README.md").write_text(BASE)
    write_jsonl(folder / "pairs.jsonl", tiny_run.PAIRS)
    write_task(folder / "task", "STS")
    recipe = tiny_run.recipe(folder / "decoder").model_dump(mode="json")
    own = {**tiny_run.DATASET, "licence": "CC0", "stages": [1, 2]}
    recipe |= {"output": str(folder / "runs" / "mine"), "datasets": [own]}
    recipe["evaluation"] |= {"before": True, "keep_best": False}
    for stage in recipe["stages"]:
        stage["steps"] = 2
    train(TrainConfig.model_validate(recipe), base_dir=folder)
    return folder / "runs" / "mine"


def run_snippets(card: str, capsys: pytest.CaptureFixture[str]) -> list[list[float]]:
    printed = []
    for snippet in re.findall(r"^```python\n(.*?)^```", card, re.MULTILINE | re.DOTALL):
        capsys.readouterr()
        exec(compile(snippet, "README.md", "exec"), {})
        printed.append([float(n) for n in re.findall(r"-?\d\.\d+", capsys.readouterr().out)])
    return printed


@pytest.mark.parametrize("name", ["model", "model-one", "adapter"])
def test_the_code_of_a_trained_models_card_runs_as_copied(
    run: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, stock = run_snippets((run / name / "README.md").read_text(), capsys)
    model = NVEmbed.from_pretrained(run / name, device="cpu")
    texts = ["sorted(x) returns a new sorted list.", "pi is a constant."]
    query = model.encode_query(["how do I sort a list?"], task="find")
    expected = (query @ model.encode_document(texts).T)[0]
    assert ours == pytest.approx(expected, abs=1e-4)
    assert stock == pytest.approx(expected, abs=1e-4)


def test_the_card_tells_the_run(run: Path) -> None:
    head, text = read_card(str(run / "model"))
    assert head["base_model"] == "some/decoder"  # what the decoder says of itself
    assert head["language"] == "en"
    assert "license" not in head
    assert "# mine\n" in text
    assert "# mine, model-one\n" in (run / "model-one" / "README.md").read_text()
    assert "The weights stem from `decoder` (apache-2.0)" in text
    assert "Started from `decoder`;" in text  # and not where that lies on this disk
    assert "LoRA of rank 4" in text
    for row in (
        "| one | 2 | 6 | 0.001 | on | 2 | 0.1 |",
        "| two | 2 | 6 | 0.001 | off | 2, mined | 0.1 |",
        "| pairs | retrieval | find | pairs.jsonl | CC0 |",
    ):
        assert row in text
    scores = re.findall(r"\| (before|after \w+) \| (\w+) \| main score \| (-?\d\.\d{4}) \|", text)
    rows = [yaml.safe_load(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluated = [row["evaluation"]["tasks"] for row in rows if "evaluation" in row]
    assert [name for name, *_ in scores] == ["before", "after one", "after two"]
    assert [float(score) for *_, score in scores] == pytest.approx(
        [tasks[scores[0][1]] for tasks in evaluated], abs=1e-4
    )
    assert 'prompt `query`: "Instruct: find\\nQuery: "' in text


def test_a_copy_that_is_saved_anew_keeps_what_was_told(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run / "model", tmp_path / "copy")
    card = (tmp_path / "copy" / "README.md").read_text()
    (tmp_path / "copy" / "README.md").write_text(card.replace("---\n", "---\nlicense: mit\n", 1))
    model = NVEmbed.from_pretrained(tmp_path / "copy", device="cpu")
    model.truncate_dim = 8
    monkeypatch.chdir(tmp_path)
    model.save_pretrained(str(tmp_path / "again"))
    head, text = read_card("again")
    assert head["license"] == "mit"
    assert head["base_model"] == "some/decoder"
    assert text.partition("## Training")[2] == card.partition("## Training")[2]
    assert 'from_pretrained("again")' in text
    assert all(len(numbers) == 2 for numbers in run_snippets(text, capsys))
    assert str(tmp_path) not in text


def test_what_was_not_trained_is_not_called_so(
    tiny_decoder_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = NVEmbed.from_pretrained(tiny_decoder_dir, device="cpu")
    model.save_pretrained(str(tmp_path / "new"))
    card = (tmp_path / "new" / "README.md").read_text()
    assert "Not recorded: the model lay in no run folder" in card
    assert "None recorded." in card
    ours, stock = run_snippets(card, capsys)  # without a saved prompt the instruction is given
    assert ours == pytest.approx(stock, abs=1e-4)
    query = model.encode_query(
        ["how do I sort a list?"], task="Given a question, retrieve passages that answer it"
    )
    assert ours[1] == pytest.approx(
        (query @ model.encode_document(["pi is a constant."]).T)[0, 0], abs=1e-4
    )
    model.save_pretrained(str(tmp_path / "named"), model_name="me/mine")
    assert 'from_pretrained("me/mine")' in (tmp_path / "named" / "README.md").read_text()
