"""From a model and names of tasks to files: cache, resume, mteb's own path without a network."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from hash_encoder import HashEncoder
from noting import Counting
from nvembed.cli.main import run
from nvembed.core.errors import ConfigError, ModelError, UserError
from nvembed.core.files import alone_in
from nvembed.core.ownership import MARK
from nvembed.evaluation import session
from nvembed.evaluation.results import (
    TaskResult,
    items_folder,
    published_results,
    read_items,
    read_results,
)
from nvembed.evaluation.session import Engine, Settings, TaskOutcome, run_session
from nvembed.evaluation.tasks import LocalTask, load_tasks
from nvembed.model.encoder import Encoder
from task_folders import rows_of, write_rows, write_task


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Counting:
    encoder = Counting()
    monkeypatch.setattr("nvembed.model.encoder.load_encoder", lambda name, dtype: encoder)
    return encoder


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    write_task(tmp_path / "tasks" / "find", "Retrieval")
    write_task(tmp_path / "tasks" / "similar", "STS")
    return tmp_path / "tasks"


CARD = """---
license: {license}
license_link: {link}
datasets:
- mteb/banking77
- ms_marco
- somebody/unknown
---
text
"""


@pytest.mark.parametrize(
    ("license", "link", "expected"),
    [
        ("CC-BY-NC-4.0", "LICENSE", "cc-by-nc-4.0"),
        ("other", "https://example.com/licence", "https://example.com/licence"),
        ("llama3", "LICENSE", None),
    ],
)
def test_the_model_card_says_licence_and_data(
    tmp_path: Path, license: str, link: str, expected: str | None
) -> None:
    from nvembed.evaluation.hub import describe_model

    folder = tmp_path / "run" / "model"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(CARD.format(license=license, link=link))
    (tmp_path / "run" / "config.yaml").write_text("datasets: [{name: nfcorpus}, {name: pydocs}]")
    meta = describe_model(str(folder), HashEncoder(8), "1")
    assert meta.license == expected
    assert meta.training_datasets is not None
    assert {"Banking77Classification", "MSMARCO", "NFCorpus"} <= meta.training_datasets
    assert "NQ" not in meta.training_datasets


def test_without_a_card_nothing_is_said(tmp_path: Path) -> None:
    from nvembed.evaluation.hub import describe_model

    (tmp_path / "README.md").write_text("---\n[broken\n---\n")
    for name in (str(tmp_path), "somebody/nothing", "a:b"):
        meta = describe_model(name, HashEncoder(8), "1")
        assert meta.license is None
        assert meta.training_datasets is None


@pytest.fixture
def sts_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A task that mteb finds by name and loads with ``datasets`` from a folder."""
    from mteb.abstasks import AbsTaskSTS
    from mteb.abstasks.task_metadata import TaskMetadata

    rows = rows_of("STS")["test.jsonl"]
    (tmp_path / "hub-set").mkdir()
    write_rows(tmp_path / "hub-set" / "test.jsonl", rows)

    class FolderSTS(AbsTaskSTS):
        min_score, max_score = 0, 5
        metadata = TaskMetadata(
            name="FolderSTS",
            description="A task in a folder",
            dataset={"path": str(tmp_path / "hub-set"), "revision": "main"},
            type="STS",
            category="t2t",
            modalities=["text"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="cosine_spearman",
            prompt="Retrieve similar texts",
        )

    import mteb

    # The package has a function of the same name as this module.
    registry = sys.modules[mteb.get_task.__module__]
    monkeypatch.setitem(registry._TASKS_REGISTRY, "FolderSTS", FolderSTS)
    return "FolderSTS"


def test_one_process_at_a_time_writes_a_file_of_results(
    tasks: Path, tmp_path: Path, model: Counting
) -> None:
    settings = Settings("o/m", tmp_path / "results.json")
    with alone_in(items_folder(settings.output)) as alone:
        assert alone
        with pytest.raises(UserError, match="another process is evaluating into this file"):
            run_session(settings, load_tasks([tasks]))
    assert not settings.output.exists()
    settings.output.write_text("{}")  # of the user
    with pytest.raises(ConfigError):
        run_session(settings, load_tasks([tasks]))
    settings.output.unlink()
    items_folder(settings.output).rmdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "score_task", lambda *_: pytest.fail("no score"))
        with pytest.raises(pytest.fail.Exception):
            run_session(settings, load_tasks([tasks]))
    assert not items_folder(settings.output).exists()  # nothing empty stays behind
    assert run_session(settings, load_tasks([tasks])).results


def test_local_tasks_resume_and_keep_items(tasks: Path, tmp_path: Path, model: Counting) -> None:
    output = tmp_path / "out" / "results.json"
    settings = Settings("o/m", output, cache=tmp_path / "cache")
    first = run_session(settings, load_tasks([tasks], ["find"]))
    items = read_items(items_folder(output), "find")
    assert items is not None
    assert items.arrays["values_N"].mean() == pytest.approx(first.results["find"].main_score)
    before = len(model.asked)
    done = run_session(settings, load_tasks([tasks]))
    assert list(done.results) == ["find", "similar"]
    assert done.results["find"] == first.results["find"]
    assert all(task == "Find what fits" for _, _, task in model.asked[before:])
    assert read_results(output) == done.results
    before = len(model.asked)
    again = run_session(settings, load_tasks([tasks]), resume=False)
    assert len(model.asked) == before  # everything came from the cache
    by_mteb = Settings("o/m", tmp_path / "mteb.json", engine="mteb")
    other = run_session(by_mteb, load_tasks([tasks])).results
    for name in ("find", "similar"):
        assert again.results[name].main_score == pytest.approx(other[name].main_score, abs=1e-6)


def test_starting_over_leaves_nothing_of_other_tasks(
    tasks: Path, tmp_path: Path, sts_name: str, model: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nvembed.evaluation.hub import find_hub_tasks

    output = tmp_path / "results.json"
    folder, settings = items_folder(output), Settings("o/m", output)
    hub = find_hub_tasks(names=[sts_name]).tasks
    run_session(settings, load_tasks([tasks]), hub)
    assert {path.name for path in folder.iterdir()} == {"find.npz", "similar.npz", MARK}
    run_session(settings, load_tasks([tasks], ["find"]))  # tasks not asked for this time stay
    assert set(read_results(output)) == {"find", "similar", sts_name}
    assert read_items(folder, "similar") is not None

    def out_of_memory(name: str, dtype: object) -> None:
        raise ModelError("no room")

    written = output.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("nvembed.model.encoder.load_encoder", out_of_memory)
        with pytest.raises(ModelError):
            run_session(settings, load_tasks([tasks]), resume=False)
    assert output.read_bytes() == written
    assert read_items(folder, "find") is not None

    # mteb leaves no items: those of the first model must not be taken for the second's.
    other = Settings("o/other", output, engine="mteb")
    run_session(other, load_tasks([tasks], ["find"]), resume=False)
    assert list(read_results(output)) == ["find"]
    assert [path.name for path in folder.iterdir()] == [MARK]
    assert not list((tmp_path / "results.mteb").rglob(f"{sts_name}.json"))


def test_auto_goes_on_with_the_number_type_that_was_measured(
    tasks: Path, tmp_path: Path, model: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate(task: str, measured: str, *options: str) -> tuple[int, str]:
        monkeypatch.setattr("nvembed.kernels.machine.fastest_precision", lambda device: measured)
        output = tmp_path / "results.json"
        words = ["evaluate", "o/m", "--tasks", str(tasks / task), "--output", str(output)]
        code = run([*words, *options])
        return code, json.loads((tmp_path / "results.run.json").read_text())["dtype"]

    assert evaluate("find", "float32") == (0, "float32")
    assert evaluate("similar", "bfloat16") == (0, "float32")
    assert set(read_results(tmp_path / "results.json")) == {"find", "similar"}
    assert evaluate("similar", "float32", "--dtype", "bfloat16") == (2, "float32")  # asked for
    assert evaluate("similar", "bfloat16", "--start-over") == (0, "bfloat16")


def test_results_of_other_data_are_not_gone_on_with(
    tasks: Path, tmp_path: Path, model: Counting
) -> None:
    settings = Settings("o/m", tmp_path / "r.json", "float32")
    run_session(settings, load_tasks([tasks]))
    scores = settings.output.read_bytes()
    ((name, rows),) = rows_of("STS").items()
    write_rows(tasks / "similar" / name, [{**rows[0], "sentence1": "another"}, *rows[1:]])
    with pytest.raises(ConfigError, match="the task similar has other data than when it was sco"):
        run_session(settings, load_tasks([tasks]))
    assert settings.output.read_bytes() == scores
    done = run_session(settings, load_tasks([tasks]), resume=False)
    assert set(done.results) == {"find", "similar"}


def test_other_results_are_not_mixed(
    tasks: Path, tmp_path: Path, model: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "results.json"
    run_session(Settings("o/m", output), load_tasks([tasks]))
    written = output.read_text()
    with pytest.raises(ConfigError, match="with the model 'o/m', not 'o/n'"):
        run_session(Settings("o/n", output), load_tasks([tasks]))
    monkeypatch.setattr(session, "_commit", lambda model: "c0ffee")
    with pytest.raises(ConfigError, match=r"with the revision .*not 'c0ffee'"):
        run_session(Settings("o/m", output), load_tasks([tasks]))
    monkeypatch.undo()
    monkeypatch.setattr("nvembed.model.encoder.load_encoder", lambda name, dtype: model)
    write_task(tasks / "similar", "STS", instruction="Something else")
    with pytest.raises(ConfigError, match=r"instruction of similar 'Find what fits', not 'Some"):
        run_session(Settings("o/m", output), load_tasks([tasks]))
    assert output.read_text() == written
    run_session(Settings("o/m", output), load_tasks([tasks]), resume=False)


def test_mteb_task_by_name_without_network(tmp_path: Path, sts_name: str, model: Counting) -> None:
    from mteb.cache import ResultCache

    from nvembed.evaluation.hub import find_hub_tasks

    hub = find_hub_tasks(names=[sts_name]).tasks
    output = tmp_path / "results.json"
    done = run_session(Settings("some/model", output), hub=hub)
    assert not done.failed
    assert {side for side, _, _ in model.asked} == {"query"}
    assert {task for _, _, task in model.asked} == {"Retrieve similar texts"}
    local = load_tasks([write_task(tmp_path / "t", "STS", instruction="Retrieve similar texts")])
    plain = run_session(Settings("some/model", tmp_path / "plain.json"), local).results["t"]
    assert done.results[sts_name].main_score == pytest.approx(plain.main_score, abs=1e-6)

    loaded = ResultCache(tmp_path / "results.mteb").load_results(include_remote=False)
    assert [one.task_name for one in loaded.model_results[0].task_results] == [sts_name]
    assert loaded.model_results[0].model_name == "some/model"
    (meta,) = (tmp_path / "results.mteb").rglob("model_meta.json")
    values = json.loads(meta.read_text())
    assert (values["embed_dim"], values["similarity_fn_name"]) == (64, "cosine")
    assert values["use_instructions"] is True
    asked = len(model.asked)
    run_session(Settings("some/model", output), hub=hub)
    assert len(model.asked) == asked

    # mteb's files of the first run must not answer for other instructions.
    run_session(Settings("some/model", output, instructions="none"), hub=hub, resume=False)
    assert {task for _, _, task in model.asked[asked:]} == {None}


def test_a_task_out_of_reach_does_not_stop_the_others(
    tmp_path: Path, sts_name: str, model: Counting
) -> None:
    from nvembed.evaluation.hub import find_hub_tasks

    hub = find_hub_tasks(names=["STS12", sts_name]).tasks
    done = run_session(Settings("o/m", tmp_path / "results.json"), hub=hub)
    assert list(done.results) == [sts_name]
    assert list(done.failed) == ["STS12"]
    assert "cannot be loaded" in done.failed["STS12"]
    assert json.loads((tmp_path / "results.run.json").read_text())["failed"] == done.failed


def test_names_are_found_or_told() -> None:
    from nvembed.evaluation.hub import find_hub_tasks

    names = {task.metadata.name for task in find_hub_tasks(["MTEB(eng, v1)"]).tasks}
    assert {"ArguAna", "STS12", "SummEval"} <= names
    assert len(names) == 56
    kept = find_hub_tasks(["MTEB(eng, v1)"], types=["Summarization"]).tasks
    assert [task.metadata.name for task in kept] == ["SummEval"]
    with pytest.raises(ConfigError, match=r"no benchmark called 'MTEB\(eng v1\)'.*MTEB\(eng, v1\)"):
        find_hub_tasks(["MTEB(eng v1)"])
    with pytest.raises(ConfigError, match=r"no task called 'ArguAn'.*ArguAna"):
        find_hub_tasks(names=["ArguAn"])
    with pytest.raises(ConfigError, match="no task type among these tasks called 'Retrival'"):
        find_hub_tasks(names=["ArguAna"], types=["Retrival"])
    refused = find_hub_tasks(names=["CIFAR10", "ArguAna"])
    assert [task.metadata.name for task in refused.tasks] == ["ArguAna"]
    assert refused.refused == {"CIFAR10": "needs image; the model reads text alone"}


def test_published_scores_are_a_column() -> None:
    ours = {
        "ArguAna": TaskResult("Retrieval", "ndcg_at_10", 0.5, 3.0, {"ndcg_at_10": 0.5}),
        "mine": TaskResult("Retrieval", "ndcg_at_10", 0.4, 3.0, {"ndcg_at_10": 0.4}),
    }
    column = published_results("nvidia/NV-Embed-v2", ours)
    assert {name: result.main_score for name, result in column.items()} == {
        "ArguAna": pytest.approx(0.7007)
    }
    with pytest.raises(ConfigError, match=r"no published scores of 'nvidia/NV-Embed'.*NV-Embed-v"):
        published_results("nvidia/NV-Embed", ours)


def test_a_model_stands_beside_its_own_published_scores(
    tmp_path: Path,
    sts_name: str,
    model: Counting,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(session, "_commit", lambda model: "c0ffee")
    name, output = "nvidia/NV-Embed-v2", tmp_path / "results.json"
    words = ["evaluate", name, "--mteb-task", sts_name, "--against", name, "--output", str(output)]
    assert run(words) == 0
    score = read_results(output)[sts_name].main_score
    assert score is not None
    assert f"{100 * score:.2f}" in capsys.readouterr().out


def test_the_scores_of_long_tasks_are_told_as_they_come(
    tasks: Path,
    tmp_path: Path,
    model: Counting,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["evaluate", "o/m", "--tasks", str(tasks), "--dtype", "float32", "--output"]
    assert run([*arguments, str(tmp_path / "short.json")]) == 0
    assert "of 2 tasks" not in capsys.readouterr().err
    monkeypatch.setattr(session, "_SHOWN_FROM", -1.0)  # also a task of 0.00 s
    assert run([*arguments, str(tmp_path / "long.json")]) == 0
    scores = read_results(tmp_path / "long.json")
    lines = [line.split(", ")[0] for line in capsys.readouterr().err.splitlines() if " of " in line]
    assert lines == [
        f"{name}: {metric} {100 * (scores[name].main_score or 0):.2f} ({number} of 2 tasks"
        for number, (name, metric) in enumerate(
            {"find": "ndcg_at_10", "similar": "cosine_spearman"}.items(), start=1
        )
    ]
    # Scores of other tasks in the same file are no part of the count.
    for name in ("find", "similar"):
        given = [*arguments[:3], str(tasks / name), *arguments[4:], str(tmp_path / "parts.json")]
        assert run(given) == 0
        assert "(1 of 1 tasks" in capsys.readouterr().err
    assert set(read_results(tmp_path / "parts.json")) == {"find", "similar"}


def test_the_command_does_what_it_can_and_says_the_rest(
    tmp_path: Path, sts_name: str, model: Counting, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "results.json")
    asked = [word for name in (sts_name, "STS12", "CIFAR10") for word in ("--mteb-task", name)]
    words = ["evaluate", "o/m", *asked]
    assert run([*words, "--output", output, "--against", "nvidia/NV-Embed-v2"]) == 2
    out, err = capsys.readouterr()
    assert sts_name in out
    assert "not done: CIFAR10: needs image" in err
    assert "not done: STS12: STS12: cannot be loaded" in err
    assert "2 tasks could not be done" in err
    assert list(read_results(output)) == [sts_name]
    assert run(["evaluate", "o/m", "--output", output]) == 2
    assert "nothing to evaluate" in capsys.readouterr().err
    assert run(["evaluate", "o/m", "--task", "STS12"]) == 2  # an instruction, in other commands
    assert "It is --mteb-task NAME (of evaluate) now" in capsys.readouterr().err


def test_instructions_by_source() -> None:
    import mteb

    from nvembed.data.instructions import task_instruction
    from nvembed.evaluation.hub import hub_instruction

    metadata = mteb.get_task("ArguAna").metadata
    assert hub_instruction(metadata, "paper") == task_instruction("ArguAna").instruction
    assert hub_instruction(metadata, "none") is None
    assert metadata.prompt == {"query": hub_instruction(metadata, "mteb")}
    banking = mteb.get_task("Banking77Classification").metadata  # not in the official file
    assert isinstance(banking.prompt, str)
    assert hub_instruction(banking, "official") == banking.prompt


def test_keep_going_scores_the_rest_and_says_what_is_missing(
    model: Counting,
    tasks: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_task(tasks / "broken", "STS")
    (tasks / "broken" / "test.jsonl").write_text("{")
    write_task(tasks / "spoiled", "STS")
    score = session.score_task

    def score_or_fail(task: LocalTask, encoder: Encoder, engine: Engine) -> TaskOutcome:
        if task.name == "spoiled":
            raise ModelError("the model gave NaN")
        return score(task, encoder, engine)

    monkeypatch.setattr(session, "score_task", score_or_fail)
    output = tmp_path / "results.json"
    words = ["evaluate", "o/m", "--tasks", str(tasks), str(tmp_path / "no"), "--dtype", "float32"]
    words += ["--output", str(output)]
    assert run(words) == 2
    assert not output.exists()
    capsys.readouterr()
    assert run([*words, "--keep-going"]) == 2
    shown = capsys.readouterr()
    assert set(read_results(output)) == {"find", "similar"}
    assert "find" in shown.out
    lines = shown.err.splitlines()
    assert [line.split(": ")[:2] for line in lines[:3]] == [
        ["not done", str(tmp_path / "no")],
        ["not done", "broken"],
        ["not done", "spoiled"],
    ]
    assert "no such folder" in lines[0]
    assert "test.jsonl:1: not valid JSON" in lines[1]
    assert lines[2].endswith("the model gave NaN")
    assert "3 tasks could not be done" in lines[3]
    record = json.loads((tmp_path / "results.run.json").read_text(encoding="utf-8"))
    assert record["failed"] == {"spoiled": "the model gave NaN"}


def test_keep_going_with_nothing_but_broken_tasks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (write_task(tmp_path / "tasks" / "broken", "STS") / "test.jsonl").unlink()
    words = ["evaluate", "o/m", "--tasks", str(tmp_path / "tasks"), "--keep-going"]
    assert run([*words, "--output", str(tmp_path / "results.json")]) == 2
    shown = capsys.readouterr()
    assert "1 task could not be done" in shown.err
    assert shown.err.count("no such file") == 1
    assert not (tmp_path / "results.json").exists()
