"""From a CSV to a model: ``init``, then ``train``, as a user types them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from nvembed.cli.main import run
from nvembed.core.config import load_config
from nvembed.core.files import read_jsonl
from nvembed.core.runs import RunFolder
from nvembed.evaluation.session import evaluate, evaluate_bm25
from nvembed.evaluation.tasks import load_tasks
from nvembed.model.embedder import NVEmbed
from nvembed.training import run_folder
from nvembed.training.config import TrainConfig
from nvembed.training.dry_run import dry_run


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with open(tmp_path / "faq.csv", "w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["Question", "Answer", "id"])
        for i in range(48):
            writer.writerow([f"what of {i}?", f"word{i}, {i * 37 % 48}", i])
        writer.writerow(["no answer", "", 48])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_folder, "choose_precision", lambda *_: ("float32", None))  # quick
    return tmp_path


def test_from_a_csv_to_scores(
    place: Path, tiny_decoder_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["init", "faq.csv", "--to", "faq", "--backbone", str(tiny_decoder_dir)]
    assert run(command) == 0, capsys.readouterr().err
    told = capsys.readouterr()
    assert "columns   query: Question, positive: Answer" in told.out
    assert "48 of kind retrieval: 24 to train on, 24 held out" in told.out
    assert told.out.endswith("next      nvembed train faq/recipe.yaml\n")
    assert "faq.csv:50" in told.err
    assert "only 24 records could be held out" in told.err
    forecast = dry_run(load_config(TrainConfig, "faq/recipe.yaml"), base_dir=place / "faq")
    assert forecast.stages[0].evaluations == 2  # before and at the end
    train = [row for _, row in read_jsonl(place / "faq" / "train.jsonl")]
    assert len(train) == 24
    assert run(command) == 2
    assert "faq: something is there already" in capsys.readouterr().err

    assert run(["train", "faq/recipe.yaml", "precision=float32"]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    tasks = load_tasks(["faq/held-out"])
    end = NVEmbed.from_pretrained("faq/run/model")
    limit = end.backbone.max_tokens
    start = NVEmbed.from_pretrained(tiny_decoder_dir, pooling="mean", max_tokens=limit)
    rows = {row["step"]: row["evaluation"] for row in evaluations(place)}
    assert min(rows) == 0
    for model, scores in ((start, rows[0]), (end, rows[max(rows)])):
        expected = evaluate(model, tasks)["faq"].main_score
        assert scores["tasks"]["faq"] == pytest.approx(expected, abs=1e-6)
    bm25 = evaluate_bm25(tasks)["faq"].main_score
    heading = next(line for line in out.splitlines() if "before" in line)
    assert [word for word in heading.split() if word.isalnum()][-4:] == [
        *("before", "after", "tune", "BM25")
    ]
    line = next(line for line in out.splitlines() if "  faq " in line)
    shown = [float(cell) / 100 for cell in line.replace("│", " ").split()[-3:]]
    values = [rows[0]["tasks"]["faq"], rows[max(rows)]["tasks"]["faq"], bm25]
    assert shown == pytest.approx(values, abs=1e-4)
    for part in ("model: faq/run/model", "evaluate faq/run/model --tasks faq/held-out", "serve"):
        assert part in out
    assert run(["train", "faq/recipe.yaml", "precision=float32"]) == 0  # finished: the table again
    assert line in capsys.readouterr().out


def evaluations(place: Path) -> list[dict]:
    rows = RunFolder(place / "faq" / "run").read_metrics()
    return [row for row in rows if "evaluation" in row]


def test_labels_and_scores_too(
    place: Path, tiny_decoder_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = "".join(f"text {i},{'xyz'[i % 3]}\n" for i in range(60)) + "alone,w\n"
    (place / "labels.csv").write_text("message,intent\n" + labels)
    graded = "".join(f"left {i},right {i},{i % 4 / 3}\n" for i in range(60))
    (place / "graded.csv").write_text("text1,text2,score\n" + graded)
    for name in ("labels", "graded"):
        command = ["init", f"{name}.csv", "--to", name, "--backbone", str(tiny_decoder_dir)]
        assert run(command) == 0, capsys.readouterr().err
    recipe = (place / "labels" / "recipe.yaml").read_text()
    assert 'conversion: "label"' in recipe  # one label has a single text
    header = json.loads((place / "graded" / "held-out" / "task.json").read_text())
    assert header["type"] == "STS"


def test_from_documents_to_scores(
    place: Path, tiny_decoder_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lancedb", reason="needs the extra nvembed[index]")
    (place / "docs").mkdir()
    filler = " ".join(f"word{n}" for n in range(120))  # so that a file is no single passage
    for n in range(24):
        sections = "".join(f"## Part {i}\n\nnumber {n} and {i}: {filler}\n\n" for i in range(4))
        (place / "docs" / f"{n}.md").write_text(f"# Page {n}\n\n{sections}")
    (place / "docs" / "plain.txt").write_text("No heading stands above this text.\n")
    command = ["init", "docs", "--to", "tuned", "--backbone", str(tiny_decoder_dir)]
    assert run(command) == 0, capsys.readouterr().err
    told = capsys.readouterr()
    assert "headings with the passages below them, of 24 files; divided by file" in told.out
    assert "96 of kind retrieval: 68 to train on, 28 held out" in told.out
    assert "1 of 25 files gave no pairs: no headings" in told.err
    train = [row for _, row in read_jsonl("tuned/train.jsonl")]
    queries = [row["text"] for _, row in read_jsonl("tuned/held-out/queries.jsonl")]
    held = {query.split(" > ")[0] for query in queries}
    assert len(held) == 7
    assert len({row["query"].split(" > ")[0] for row in train}) == 17
    assert not held & {row["query"].split(" > ")[0] for row in train}
    trained = {text for row in train for text in row["positive"]}
    documents = {row["text"] for _, row in read_jsonl("tuned/held-out/corpus.jsonl")}
    assert len(documents) >= 28
    assert not trained & documents

    assert run(["train", "tuned/recipe.yaml", "precision=float32"]) == 0, capsys.readouterr().err
    assert "model: tuned/run/model" in capsys.readouterr().out
    assert run([*command[:3], "docs/tuned"]) == 2  # among the documents
    assert run(["data", "task", "docs", "--to", "asked"]) == 0
    assert "asked: retrieval, 96 of 96 asked" in capsys.readouterr().out


def test_a_task_of_a_whole_file(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["data", "task", "faq.csv", "--to", "tasks/faq", "--instruction", "find it"]) == 0
    told = capsys.readouterr().out
    assert "tasks/faq: retrieval, 48 of 48 asked" in told
    assert "nvembed evaluate MODEL --tasks tasks/faq --bm25" in told
    (task,) = load_tasks(["tasks/faq"])
    assert (task.instruction, len(task.data.queries)) == ("find it", 48)
    assert run(["data", "task", "faq.csv", "--to", "other", "--column", "query=no"]) == 2
    assert 'no column "no" for "query"' in capsys.readouterr().err
