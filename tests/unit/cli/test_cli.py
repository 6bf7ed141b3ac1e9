"""The command line on bad and good input: one line and exit code 2, or the work done."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import typer

from nvembed.cli import options
from nvembed.cli.main import run
from nvembed.core.files import write_jsonl


def failing(capsys, *arguments: str) -> str:
    """Run a command that must fail; return its one line."""
    assert run(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


RECIPE = """
output: {output}
model: {{backbone: {backbone}, max_tokens: 64, pooling: {{kind: mean}}}}
datasets:
  - {{name: pairs, path: pairs.jsonl, kind: retrieval, instruction: find, stages: [1]}}
stages:
  - {{name: one, steps: 2, batch_size: 4, learning_rate: 1.0e-3, in_batch_negatives: true}}
"""


@pytest.fixture
def recipe(tmp_path: Path, tiny_decoder_dir: Path) -> Path:
    rows = [{"query": f"question {i}", "positive": f"answer {i * 3 % 8}"} for i in range(8)]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(output=tmp_path / "run", backbone=tiny_decoder_dir))
    return path


def test_train_encode_and_search_work_together(recipe: Path, tmp_path: Path, capsys) -> None:
    assert run(["train", str(recipe), "seed=3"]) == 0
    assert "effective negatives per query" in capsys.readouterr().out
    model = str(tmp_path / "run" / "model")
    assert "seed: 3" in (tmp_path / "run" / "config.yaml").read_text()
    texts = tmp_path / "texts.jsonl"
    write_jsonl(texts, [{"id": str(i), "text": f"answer {i}"} for i in range(5)])
    output = tmp_path / "vectors.npy"
    assert run(["encode", model, "--input", str(texts), "--output", str(output)]) == 0
    vectors = np.load(output)
    assert vectors.shape == (5, 32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
    capsys.readouterr()
    assert run(["search", model, "answer 3", "--documents", str(texts), "--top-k", "2"]) == 0
    assert len(capsys.readouterr().out.strip().splitlines()) == 2


def test_a_finished_run_is_left_alone_and_fresh_starts_over(recipe: Path, tmp_path: Path) -> None:
    assert run(["train", str(recipe)]) == 0
    written = (tmp_path / "run" / "model" / "model.safetensors").stat().st_mtime_ns
    assert run(["train", str(recipe)]) == 0
    assert (tmp_path / "run" / "model" / "model.safetensors").stat().st_mtime_ns == written
    assert run(["train", str(recipe), "--fresh"]) == 0
    assert (tmp_path / "run" / "model" / "model.safetensors").stat().st_mtime_ns != written


def test_mistakes_in_a_recipe_are_told_at_once(recipe: Path, capsys) -> None:
    line = failing(capsys, "train", str(recipe), "stages.0.stepz=3", "model.pooling.kind=foo")
    assert "2 problems" in line
    assert "did you mean steps?" in line
    assert "'latent'" in line


def test_bad_training_data_names_file_and_line(recipe: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"query": "a", "positive": "b"}\n{"query": ""}\n')
    assert "pairs.jsonl:2" in failing(capsys, "train", str(recipe))
    (tmp_path / "pairs.jsonl").unlink()
    assert "no such file" in failing(capsys, "train", str(recipe))


def test_a_missing_backbone_or_model_is_one_line(recipe: Path, tmp_path: Path, capsys) -> None:
    missing = str(tmp_path / "nowhere" / "model")
    assert "neither a folder nor a hub id" in failing(
        capsys, "train", str(recipe), f"model.backbone={missing}"
    )
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "a"}\n')
    failing(capsys, "encode", missing, "--input", str(texts), "--output", str(tmp_path / "x.npy"))
    assert not (tmp_path / "x.npy").exists()


def test_texts_that_are_not_there_or_empty_are_told(tmp_path: Path, capsys) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "a"}\n{"body": "b"}\n')
    command = ["encode", "o/hash", "--input", str(texts), "--output", str(tmp_path / "x.npy")]
    assert "texts.jsonl:2" in failing(capsys, *command)
    texts.write_text("")
    failing(capsys, *command)


def test_a_task_with_broken_judgements_is_told(tmp_path: Path, capsys) -> None:
    task = tmp_path / "task"
    (task / "qrels").mkdir(parents=True)
    header = {"name": "t", "type": "Retrieval", "instruction": "find", "main_score": "ndcg_at_10"}
    (task / "task.json").write_text(json.dumps(header))
    write_jsonl(task / "corpus.jsonl", [{"_id": "d1", "title": "", "text": "one"}])
    write_jsonl(task / "queries.jsonl", [{"_id": "q1", "text": "one"}])
    (task / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td9\t1\n")
    line = failing(
        capsys, "evaluate", "bm25", "--tasks", str(task), "--output", str(tmp_path / "r")
    )
    assert "test.tsv: no judged document is known" in line
    assert "d9" in line


def test_unknown_commands_and_options_are_one_line(capsys) -> None:
    failing(capsys, "trian")
    failing(capsys, "train", "--nope")


def test_libraries_do_not_warn_between_our_lines(caplog) -> None:
    names = ("torchao", "bitsandbytes.backends.cpu.ops", "torch.utils._pytree")
    for name in ("bitsandbytes", *names):
        logging.getLogger(name).setLevel(logging.NOTSET)
    assert run(["--version"]) == 0
    for name in names:
        logging.getLogger(name).warning("Failed to load")
        logging.getLogger(name).error("broken")
    told = [(record.name, record.message) for record in caplog.records]
    assert [found for found in told if found[0] in names] == [(name, "broken") for name in names]


def test_parameters_of_a_command_are_arguments_options_and_flags(capsys) -> None:
    program, seen = typer.Typer(), []

    @program.command()
    @options.described(place="A place.", most=typer.Option(min=1, help="Most."), very_loud="Shout.")
    def command(
        place: str, *, most: int = 3, very_loud: bool = False, layout: str = "records"
    ) -> None:
        seen.append((place, most, very_loud, layout))

    assert run(["here", "--very-loud", "--layout", "beir"], program) == 0
    assert run(["there", "--most", "1"], program) == 0
    assert seen == [("here", 3, True, "beir"), ("there", 1, False, "records")]
    failing_codes = [run(["here", "--most", "0"], program), run(["a", "--no-very-loud"], program)]
    assert failing_codes == [2, 2]
    with pytest.raises(KeyError, match="unknown"):

        @options.described()
        def other(unknown: str) -> None: ...
