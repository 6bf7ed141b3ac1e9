"""Run folders with files that training did not write: one line or nothing, and no harm."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from interruption import interrupt_after
from nvembed.core.config import dump_config
from nvembed.core.errors import TrainingError, UserError
from nvembed.core.files import write_jsonl, write_text
from nvembed.core.runs import TRAIN, RunFolder
from nvembed.model.card import model_card
from nvembed.model.embedder import NVEmbed
from nvembed.training.config import TrainConfig
from nvembed.training.dry_run import dry_run
from nvembed.training.trainer import train
from tiny_run import PAIRS, recipe


def _config(decoder: Path) -> TrainConfig:
    whole = recipe(decoder)
    stage = whole.stages[0].model_copy(update={"steps": 6})
    dataset = whole.datasets[0].model_copy(update={"stages": (1,)})
    changes = {"stages": (stage,), "datasets": (dataset,), "evaluation": None}
    return whole.model_copy(update=changes)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, tiny_decoder_dir: Path) -> Path:
    """A run of six steps, stopped after four: checkpoints of the second and the fourth."""
    folder = tmp_path_factory.mktemp("stopped")
    write_jsonl(folder / "pairs.jsonl", PAIRS)
    config = _config(tiny_decoder_dir).model_copy(update={"output": str(folder / "run")})
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, 4)
        with pytest.raises(TrainingError, match="interrupted"):
            train(config, base_dir=folder)
    return folder


@pytest.fixture
def config(stopped: Path, tmp_path: Path, tiny_decoder_dir: Path) -> TrainConfig:
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    output = str(tmp_path / "run")
    moved = _config(tiny_decoder_dir).model_copy(update={"output": output})
    write_text(tmp_path / "run" / "config.yaml", dump_config(moved), TRAIN)
    return moved


def _contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "train.log")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def _refused(config: TrainConfig) -> str:
    """The error of the run, which left everything as it was."""
    folder = Path(config.output).parent
    before = _contents(folder)
    with pytest.raises(UserError) as caught:
        train(config, base_dir=folder)
    assert _contents(folder) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("foreign", "message"),
    [
        ('["step", 1]', "metrics.jsonl:2: the line holds list; expected a row of metrics"),
        ("7", "metrics.jsonl:2: the line holds int"),
        ('{"loss": 0.5}', "metrics.jsonl:2: the line holds a row without a step"),
        ('{"step": "1"}', "metrics.jsonl:2: the line holds a row without a step"),
        ('{"step": -1}', "metrics.jsonl:2: the line holds a row without a step"),
        ('{"step": 1, "lo', "metrics.jsonl:2: not valid JSON"),
        ("[" * 100_000, "metrics.jsonl:2: numbers too long or nesting too deep"),
    ],
)
def test_foreign_metrics_are_refused_and_kept(
    config: TrainConfig, foreign: str, message: str
) -> None:
    file = RunFolder(Path(config.output)).metrics
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], foreign, *lines[1:]]) + "\n")
    found = _refused(config)
    assert message in found
    assert "start over with --fresh" in found


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"bytes_per_token": "x"}',
        '{"bytes_per_token": 0, "budget_bytes": 9}',
        '{"bytes_per_token": NaN, "budget_bytes": 9}',
        '{"bytes_per_token": 1, "budget_bytes": []}',
    ],
)
def test_a_damaged_measurement_is_taken_again(config: TrainConfig, content: str) -> None:
    folder = Path(config.output).parent
    memory = RunFolder(Path(config.output)).graph_memory
    measured = memory.read_bytes()
    memory.write_text(content)
    dry_run(config, base_dir=folder)
    assert memory.read_text() == content
    train(config, base_dir=folder)
    assert memory.read_bytes() == measured


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a: &a [*a]\n", b"[1]\n", b"seed: [\n", b""])
def test_a_damaged_configuration_is_refused(config: TrainConfig, content: bytes) -> None:
    RunFolder(Path(config.output)).config.write_bytes(content)
    said = "was changed since nvembed made it" if content else "holds a run with another config"
    assert re.search(f"config.yaml: .*{said}", _refused(config))


@pytest.mark.parametrize("content", [b"", b"[]", b'{"started": 5}', b"\xff", None])
def test_a_damaged_environment_matters_to_trackers_alone(
    config: TrainConfig, content: bytes | None
) -> None:
    run = RunFolder(Path(config.output))
    run.env.unlink()
    if content is not None:
        run.env.write_bytes(content)
    with pytest.raises(UserError, match=r"env\.json.*start over with --fresh"):
        run.read_env()
    train(config, base_dir=run.path.parent)
    model = NVEmbed.from_pretrained(run.model, device="cpu")
    place = {"origin": str(run.model), "place": "new"}
    assert "Started from" in model_card(model, **place)
    run.config.write_bytes(b"a: &a [*a]\n")
    assert "config.yaml is not the configuration of a run" in model_card(model, **place)


def _damage(state: dict[str, Any], kind: str) -> Any:
    match kind:
        case "list":
            return [state]
        case "no position":
            return {key: value for key, value in state.items() if key != "position"}
        case "position of a wrong type":
            return {**state, "position": {**state["position"], "step": "4"}}
        case "unknown key":
            return {**state, "position": {**state["position"], "more": 4}}
        case "stage beyond the recipe":
            return {**state, "position": {**state["position"], "stage": 9}}
        case "evaluations of a wrong type":
            return {**state, "position": {**state["position"], "extra": {"best": [1]}}}
        case "optimizer of a wrong type":
            return {**state, "optimizer": []}
        case _:
            return {**state, "optimizer": {**state["optimizer"], "groups": [{}]}}


@pytest.mark.parametrize(
    "kind",
    [
        "list",
        "no position",
        "position of a wrong type",
        "unknown key",
        "stage beyond the recipe",
        "evaluations of a wrong type",
        "optimizer of a wrong type",
        "groups without rates",
    ],
)
def test_a_checkpoint_of_a_wrong_form_is_passed_over(
    config: TrainConfig, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(Path(config.output))
    states = sorted(run.checkpoints.glob("step-*/state.json"))
    assert [path.parent.name for path in states] == ["step-0000000002", "step-0000000004"]
    wrong = {path: json.dumps(_damage(json.loads(path.read_text()), kind)) for path in states}
    states[1].write_text(wrong[states[1]])
    train(config, base_dir=run.path.parent)
    told = capsys.readouterr().out
    assert "checkpoint step-0000000004 cannot be read" in told
    assert "going on after step 2" in told
    for path, text in wrong.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    shutil.rmtree(run.model)
    for end in run.checkpoints.glob("step-*"):
        if end / "state.json" not in states:
            shutil.rmtree(end)
    assert "checkpoints can be read" in _refused(config)


@pytest.mark.parametrize("best", [{"x": 1}, {"score": "high"}, {"since": None}])
def test_evaluations_of_a_wrong_form_are_refused(config: TrainConfig, best: Any) -> None:
    newest = Path(config.output) / "checkpoints" / "step-0000000004" / "state.json"
    state = json.loads(newest.read_text())
    state["position"]["extra"] = {"best": best}
    newest.write_text(json.dumps(state))
    assert "does not say how the evaluations went" in _refused(config)


def test_tensors_in_each_others_place_are_refused(config: TrainConfig) -> None:
    (newest,) = Path(config.output).glob("checkpoints/step-0000000004")
    weights, optimizer = newest / "weights.safetensors", newest / "optimizer.safetensors"
    moments = optimizer.read_bytes()
    shutil.copy(weights, optimizer)
    assert "the state of the optimizer does not fit" in _refused(config)
    weights.write_bytes(moments)
    assert "the checkpoint does not fit the model" in _refused(config)
