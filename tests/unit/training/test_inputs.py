"""A run that goes on, or is finished, notices what changed since it was started."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from families import make_family
from gguf_files import write_gguf
from interruption import interrupt_after
from nvembed.core.config import dump_config
from nvembed.core.errors import DataError, TrainingError, UserError
from nvembed.core.files import read_jsonl, write_jsonl, write_text
from nvembed.core.runs import TRAIN, RunFolder
from nvembed.data.records import PairRecord, StsRecord, records_digest
from nvembed.training.config import TrainConfig
from nvembed.training.distributed import DistributedContext
from nvembed.training.dry_run import dry_run
from nvembed.training.run_folder import settle_inputs
from nvembed.training.trainer import train
from task_folders import write_task
from tiny_run import PAIRS, recipe


def _config(folder: Path) -> TrainConfig:
    config = recipe(Path("decoder"))
    stages = tuple(stage.model_copy(update={"steps": 3}) for stage in config.stages)
    return config.model_copy(update={"output": str(folder / "run"), "stages": stages})


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, tiny_decoder_dir: Path) -> Path:
    """A run that was stopped in its second stage, which it had mined for."""
    folder = tmp_path_factory.mktemp("stopped")
    shutil.copytree(tiny_decoder_dir, folder / "decoder")
    write_jsonl(folder / "pairs.jsonl", PAIRS)
    write_task(folder / "task", "STS")
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, 4)
        with pytest.raises(TrainingError, match="interrupted"):
            train(_config(folder), base_dir=folder)
    return folder


@pytest.fixture
def folder(stopped: Path, tmp_path: Path) -> Path:
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    write_text(tmp_path / "run" / "config.yaml", dump_config(_config(tmp_path)), TRAIN)
    return tmp_path


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, stopped: Path) -> Path:
    folder = tmp_path_factory.mktemp("done")
    shutil.copytree(stopped, folder, dirs_exist_ok=True)
    write_text(folder / "run" / "config.yaml", dump_config(_config(folder)), TRAIN)
    train(_config(folder), base_dir=folder)
    return folder


def _another_word(folder: Path) -> None:
    file = folder / "pairs.jsonl"
    file.write_text(file.read_text().replace("red 0", "red 9"))


def _a_record_less(folder: Path) -> None:
    file = folder / "pairs.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))


def _another_task(folder: Path) -> None:
    (file,) = (folder / "task").glob("*.jsonl")
    rows = [row for _, row in read_jsonl(file)]
    write_jsonl(file, [rows[-1], *rows[:-1]])


def _other_weights(folder: Path) -> None:
    file = folder / "decoder" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def _another_tokenizer(folder: Path) -> None:
    file = folder / "decoder" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "note": 1}))


def _other_mined_negatives(folder: Path) -> None:
    file = folder / "run" / "mined" / "two" / "pairs.jsonl"
    rows = [row for _, row in read_jsonl(file)]
    # As a run would write it: of what others write the mark tells already.
    write_jsonl(file, [{**row, "negative": row["negative"][:1]} for row in rows], TRAIN)


CHANGES: list[tuple[Callable[[Path], None], str]] = [
    (_another_word, "data set pairs"),
    (_a_record_less, "data set pairs"),
    (_another_task, "evaluation task"),
    (_other_weights, "model.backbone"),
    (_another_tokenizer, "model.backbone"),
]


def _contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "train.log")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def _refused(folder: Path, name: str) -> None:
    before = _contents(folder)
    with pytest.raises(TrainingError) as caught:
        train(_config(folder), base_dir=folder)
    assert f"changed since the run was started: {name}" in str(caught.value)
    assert "start over with --fresh" in str(caught.value)
    assert _contents(folder) == before


@pytest.mark.parametrize(
    ("change", "name"), [*CHANGES, (_other_mined_negatives, "mined set pairs")]
)
def test_a_run_that_goes_on_refuses(
    folder: Path, change: Callable[[Path], None], name: str
) -> None:
    change(folder)
    _refused(folder, name)
    if name != "mined set pairs":
        with pytest.raises(UserError, match=f"changed since the run was started: {name}"):
            dry_run(_config(folder), base_dir=folder)


@pytest.mark.parametrize(("change", "name"), CHANGES)
def test_so_does_a_finished_one(
    done: Path, tmp_path: Path, change: Callable[[Path], None], name: str
) -> None:
    shutil.copytree(done, tmp_path, dirs_exist_ok=True)
    write_text(tmp_path / "run" / "config.yaml", dump_config(_config(tmp_path)), TRAIN)
    assert train(_config(tmp_path), base_dir=tmp_path) == tmp_path / "run" / "model"
    change(tmp_path)
    _refused(tmp_path, name)


def test_what_no_number_depends_on_may_change(folder: Path, done: Path) -> None:
    rows = [dict(reversed(row.items())) | {"source": "elsewhere"} for row in PAIRS]
    write_jsonl(folder / "pairs.jsonl", rows)
    (folder / "decoder" / "README.md").write_text("changed")
    train(_config(folder), base_dir=folder)
    for file in ("model/model.safetensors", "inputs.json", "mined/two/pairs.jsonl"):
        assert (folder / "run" / file).read_bytes() == (done / "run" / file).read_bytes()


def test_a_run_that_is_started_over_is_of_what_is_there(folder: Path) -> None:
    recorded = json.loads((folder / "run" / "inputs.json").read_text())
    assert set(recorded) == {
        "data set pairs",
        "evaluation task task",
        "model.backbone",
        "mined set pairs in two",
    }
    _another_word(folder)
    train(_config(folder), base_dir=folder, fresh=True)
    now = json.loads((folder / "run" / "inputs.json").read_text())
    assert {name for name in now if now[name] != recorded[name]} == {
        "data set pairs",
        "mined set pairs in two",
    }


def test_a_run_that_came_to_nothing_may_be_started_with_other_data(
    tmp_path: Path, tiny_decoder_dir: Path
) -> None:
    shutil.copytree(tiny_decoder_dir, tmp_path / "decoder")
    write_task(tmp_path / "task", "STS")
    write_jsonl(tmp_path / "pairs.jsonl", [{"query": "alone"}])
    with pytest.raises(DataError):
        train(_config(tmp_path), base_dir=tmp_path)
    write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    train(_config(tmp_path), base_dir=tmp_path)


def test_a_run_without_a_record_goes_on_and_says_so(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As runs of earlier versions do."""
    (folder / "run" / "inputs.json").unlink()
    train(_config(folder), base_dir=folder)
    assert "what the run was started with is not recorded" in capsys.readouterr().out
    _another_word(folder)
    _refused(folder, "data set pairs")


@pytest.mark.parametrize("content", ["", "[]", '{"data set pairs": 5}'])
def test_a_record_that_cannot_be_read_is_told(folder: Path, content: str) -> None:
    (folder / "run" / "inputs.json").write_text(content)
    with pytest.raises(TrainingError, match=r"inputs\.json.*delete it to go on"):
        train(_config(folder), base_dir=folder)
    assert (folder / "run" / "inputs.json").read_text() == content


def test_processes_that_read_other_files_are_told(tmp_path: Path) -> None:
    class Second(DistributedContext):
        def of_main(self, value: Any) -> Any:
            return {**value, "data set pairs": "of the first"}

    inputs = {"data set pairs": "of the second", "model.backbone": "same"}
    with pytest.raises(TrainingError, match="process 1 finds another data set pairs than the"):
        settle_inputs(RunFolder(tmp_path), inputs, Second(rank=1, count=2), print)


def test_records_are_told_apart_by_every_part() -> None:
    one = PairRecord("q", ("p",), ("n",), (1.0,), (0.5,), "find")
    others = [
        PairRecord("Q", ("p",), ("n",), (1.0,), (0.5,), "find"),
        PairRecord("q", ("p", "n"), (), (1.0, 0.5), (), "find"),
        PairRecord("q", ("p",), ("m",), (1.0,), (0.5,), "find"),
        PairRecord("q", ("p",), ("n",), (1.0,), (0.6,), "find"),
        PairRecord("q", ("p",), ("n",), (1.0,), (0.5,), "seek"),
        PairRecord("q", ("p",), ("n",), (1.0,), (0.5,)),
    ]
    found = [records_digest([record]) for record in (one, *others)]
    assert len(set(found)) == len(found)
    assert records_digest([one, others[0]]) != records_digest([others[0], one])
    pair = StsRecord("a", "b", 4.0)
    assert records_digest([pair]) != records_digest([StsRecord("a", "b", 4.5)])


@pytest.mark.slow
def test_a_gguf_file_is_a_backbone_like_a_folder(tmp_path: Path, byte_level_tokenizer) -> None:
    """The same weights, adapters and metrics, to the bit, and the file is known by its contents."""
    pytest.importorskip("gguf", reason="needs the extra gguf")
    llama = make_family("llama", tmp_path / "decoder", byte_level_tokenizer)
    write_gguf(llama, tmp_path / "tiny.gguf", "llama")
    write_jsonl(tmp_path / "pairs.jsonl", PAIRS)

    def config(backbone: str, steps: int = 1) -> TrainConfig:
        base = recipe(Path(backbone))
        stage = base.stages[0].model_copy(update={"steps": steps})
        output = str(tmp_path / f"run-{backbone}")
        changes = {"output": output, "stages": (stage,), "precision": "bfloat16"}
        return base.model_copy(update={**changes, "evaluation": None})

    dry_run(config("tiny.gguf"), base_dir=tmp_path)
    for backbone in ("decoder", "tiny.gguf"):
        train(config(backbone), base_dir=tmp_path)
    for file in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        found = [(tmp_path / f"run-{one}" / file).read_bytes() for one in ("decoder", "tiny.gguf")]
        assert found[0] == found[1]
    adapter = json.loads((tmp_path / "run-tiny.gguf/adapter/adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(tmp_path / "tiny.gguf")
    with (tmp_path / "tiny.gguf").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(TrainingError, match=r"changed since the run was started: model\.backbone"):
        train(config("tiny.gguf"), base_dir=tmp_path)
