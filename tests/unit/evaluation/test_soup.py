"""Greedy soups by what they keep, and ``nvembed merge`` from end to end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nvembed import NVEmbed
from nvembed.cli.main import run
from nvembed.core.errors import ConfigError
from nvembed.evaluation.session import evaluate
from nvembed.evaluation.soup import greedy_soup, merge
from nvembed.evaluation.tasks import load_tasks
from nvembed.interop.merging import RECORD
from task_folders import write_task


def test_a_greedy_soup_keeps_what_does_not_harm() -> None:
    values = [1.0, 5.0, 4.0, 4.8]

    def score(chosen) -> float:
        """Pairs with 2 are worse than their members; others are as good as their mean, plus 1."""
        mean = sum(values[i] for i in chosen) / len(chosen)
        return mean if len(chosen) == 1 else mean + (-1 if 2 in chosen else 1)

    kept, best, alone = greedy_soup(4, score)
    assert alone == values
    # 3 joins (5.9), 2 does not, 0 does not (the mean of 1, 5 and 4.8 is 3.6).
    assert kept == [1, 3]
    assert best == pytest.approx(5.9)
    assert greedy_soup(2, lambda chosen: 0.0)[0] == [0, 1]  # equal is no harm
    assert greedy_soup(1, lambda chosen: 0.5) == ([0], 0.5, [0.5])


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_decoder_dir: Path) -> Path:
    """Three models with little noise and one with much."""
    folder = tmp_path_factory.mktemp("soup")
    base = NVEmbed.from_pretrained(tiny_decoder_dir, max_tokens=64)
    base.save_pretrained(str(folder / "base"), create_model_card=False)
    for number, size in enumerate([0.001, 0.001, 0.05]):
        shutil.copytree(folder / "base", folder / f"m{number}")
        file = folder / f"m{number}" / "model.safetensors"
        generator = torch.Generator().manual_seed(number)
        tensors = {
            name: value + size * torch.randn(value.shape, generator=generator)
            for name, value in load_file(file).items()
        }
        save_file(tensors, file, metadata={"format": "pt"})
        base = "base_model: a/b\n" if number == 0 else ""
        (file.parent / "README.md").write_text(f"---\nlicense: mit\n{base}---\n# m{number}\n")
    write_task(folder / "task", "STS")
    write_task(folder / "retrieval", "Retrieval")
    return folder


def test_the_command_with_weights(place: Path, tmp_path: Path, capsys) -> None:
    models = [str(place / "m0"), str(place / "m1")]
    assert run(["merge", *models, "--to", str(tmp_path / "to"), "--weights", "3,1"]) == 0
    said = capsys.readouterr().out
    assert f"0.750  {models[0]}\n0.250  {models[1]}\nwritten: {tmp_path / 'to'}\n" == said
    first, second, found = (
        load_file(Path(folder) / "model.safetensors") for folder in (*models, tmp_path / "to")
    )
    for name, value in found.items():
        assert torch.equal(value, 0.75 * first[name] + 0.25 * second[name])
    record = json.loads((tmp_path / "to" / RECORD).read_text())
    assert [part["share"] for part in record["models"]] == [0.75, 0.25]
    card = (tmp_path / "to" / "README.md").read_text(encoding="utf-8")
    assert "| `m0` | 0.75 |\n| `m1` | 0.25 |" in card
    assert "license: mit" in card  # both parts say so
    assert "base_model" not in card  # one of them alone does
    # What is there is not replaced, and a merged model can be merged again.
    assert run(["merge", *models, "--to", str(tmp_path / "to")]) == 2
    assert "something is there already" in capsys.readouterr().err
    again = ["merge", str(tmp_path / "to"), models[0], "--to", str(tmp_path / "again")]
    assert run([*again, "--method", "slerp"]) == 0


def test_tasks_decide(place: Path, tmp_path: Path) -> None:
    models = [place / f"m{number}" for number in range(3)]
    tasks = [place / "task", place / "retrieval"]
    merged = merge(models, tmp_path / "deep" / "to", tasks=tasks)

    def mean(folder: Path) -> float:
        found = evaluate(NVEmbed.from_pretrained(folder), load_tasks(tasks)).values()
        return sum(result.main_score or 0.0 for result in found) / 2

    assert [part.score for part in merged.parts] == pytest.approx([mean(m) for m in models])
    assert merged.score == pytest.approx(mean(tmp_path / "deep" / "to"))
    assert merged.score >= max(part.score or 0.0 for part in merged.parts)
    kept = [part for part in merged.parts if part.share]
    assert [part.share for part in kept] == [1 / len(kept)] * len(kept)
    assert not [path for path in (tmp_path / "deep").iterdir() if path.name.startswith(".merge")]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weights": [1.0]}, "2 numbers, one for each model"),
        ({"weights": [1.0, -1.0]}, "whose sum is not 0"),
        ({"weights": [1.0, float("nan")]}, "whose sum is not 0"),
        ({"weights": [1.0, 1.0], "tasks": ["task"]}, "tasks decide the weights"),
        ({"method": "arc"}, "method"),
    ],
)
def test_options_that_do_not_fit(place: Path, tmp_path: Path, options, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        merge([place / "m0", place / "m1"], tmp_path / "to", **options)
    assert not list(tmp_path.iterdir())


def test_slerp_is_of_two(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="slerp of 3 models"):
        merge([place / f"m{n}" for n in range(3)], tmp_path / "to", method="slerp")
    assert run(["merge", str(place / "m0"), "--to", str(tmp_path / "x"), "--weights", "a"]) == 2
