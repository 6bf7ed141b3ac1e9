"""The table of instructions: complete, verbatim, and usable as prompts."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest

from nvembed.core.errors import ConfigError
from nvembed.data.instructions import (
    all_instructions,
    query_prompt,
    read_task,
    resolve_prompt,
    split_prompt,
    task_instruction,
    task_prompts,
)

ROOT = Path(__file__).resolve().parents[3]


def test_names_and_types_are_those_of_mteb() -> None:
    mteb = pytest.importorskip("mteb")
    tasks = {
        task.metadata.name: task.metadata for task in mteb.get_benchmark("MTEB(eng, v1)").tasks
    }
    assert len(tasks) == 56
    assert {name: task.type for name, task in all_instructions().items()} == {
        name: metadata.type for name, metadata in tasks.items()
    }
    for name, task in all_instructions().items():
        if task.source == "mteb":
            assert task.instruction == tasks[name].prompt, name


def test_every_task_of_english_v2_is_known_and_no_alias_is_made_up() -> None:
    mteb = pytest.importorskip("mteb")
    for task in mteb.get_benchmark("MTEB(eng, v2)").tasks:
        assert task_instruction(task.metadata.name).type == task.metadata.type
    names = [name for task in all_instructions().values() for name in task.aliases]
    assert len(names) == len(set(names)) > 30
    assert not set(names) & set(all_instructions())
    for name in names:
        assert mteb.get_task(name).metadata.type == task_instruction(name).type


@pytest.mark.parametrize(
    ("name", "instruction", "source"),
    [
        (
            "ArguAna",
            "Given a claim, retrieve documents that support or refute the claim",
            "official",
        ),
        ("NQ", "Given a question, retrieve passages that answer the question", "official"),
        ("Touche2020", "Given a question, retrieve passages that answer the question", "official"),
        (
            "NFCorpus",
            "Given a question, retrieve relevant documents that answer the question",
            "official",
        ),
        ("STS22", "Retrieve semantically similar text", "official"),
        (
            "SummEval",
            "Given a news summary, retrieve other semantically similar summaries",
            "official",
        ),
        (
            "EmotionClassification",
            "Classify the emotion expressed in the given Twitter message into one of the six "
            "emotions: anger, fear, joy, love, sadness, and surprise",
            "mteb",
        ),
        (
            "CQADupstackRetrieval",
            "Given a question, retrieve detailed question descriptions from Stackexchange that "
            "are duplicates to the given question",
            "recalled",
        ),
    ],
)
def test_instructions_are_verbatim(name: str, instruction: str, source: str) -> None:
    assert task_instruction(name).instruction == instruction
    assert task_instruction(name).source == source


def test_sources_and_symmetry() -> None:
    table = all_instructions()
    by_source = {
        s: {n for n, t in table.items() if t.source == s} for s in ("official", "recalled")
    }
    assert by_source["recalled"] == {"CQADupstackRetrieval"}
    assert len(by_source["official"]) == 14 + 10 + 1  # retrieval, STS, SummEval
    symmetric = {name for name, task in table.items() if task.symmetric}
    sts = {name for name, task in table.items() if task.type == "STS"}
    pairs = {"SprintDuplicateQuestions", "TwitterSemEval2015", "TwitterURLCorpus"}
    assert len(sts) == 10
    assert symmetric == sts | pairs | {"QuoraRetrieval", "SummEval"}


def test_aliases_and_unknown_names() -> None:
    assert task_instruction("Touche2020Retrieval.v3") is task_instruction("Touche2020")
    assert task_instruction("CQADupstackUnixRetrieval").name == "CQADupstackRetrieval"
    with pytest.raises(ConfigError, match="'FiQA2019'; expected perhaps FiQA2018"):
        task_instruction("FiQA2019")
    with pytest.raises(ConfigError, match="perhaps Touche2020"):
        task_instruction("touche")
    with pytest.raises(ConfigError, match="a task of MTEB English v1"):
        task_instruction("qqqqqq")


def test_a_task_option_is_a_name_or_an_instruction() -> None:
    assert read_task(None) is None
    assert read_task("FiQA2018") == task_instruction("FiQA2018").instruction
    assert read_task(" FiQA2018\n") == task_instruction("FiQA2018").instruction
    assert read_task("Touche2020Retrieval.v3") == task_instruction("Touche2020").instruction
    for instruction in (
        "Find FiQA2018",
        "Summarise",
        "find",
        "QUERY",
        "",
        " ",
        "查找答案",
        "Finde",
    ):
        assert read_task(instruction) == instruction
    with pytest.raises(ConfigError, match=r"^task: 'fiqa2018' is neither .* perhaps FiQA2018"):
        read_task("fiqa2018")


@pytest.mark.parametrize(
    ("word", "near"),
    [
        ("FiQA2019", "FiQA2018"),
        ("scifact", "SciFact"),
        ("banking", "Banking77Classification"),
        ("FiQA2018-documnt", "FiQA2018"),
        ("my_tsk", "my_task"),
        ("my_ta", "my_task"),
        ("docume", "document"),
    ],
)
def test_a_word_that_looks_like_a_name_is_no_instruction(word: str, near: str) -> None:
    prompts = {"document": "d: ", "my_task": "mine: "}
    with pytest.raises(ConfigError, match=f"{word!r} is neither .* perhaps .*{near}"):
        resolve_prompt(word, prompts)
    assert read_task(word, None) == word  # no model is known yet


def test_unknown_identifiers_are_no_instructions() -> None:
    for word in ("QqqqXxxx", "qqqq_xxxx", "qqqqx7"):
        with pytest.raises(ConfigError, match="neither a task nor an instruction"):
            read_task(word)


def test_a_task_becomes_a_prompt() -> None:
    prompts = {"query": "q: ", "document": "", "FiQA2018": "of the model", "none": None}
    assert resolve_prompt(None, prompts) is None
    assert resolve_prompt("", prompts) == ""
    fiqa = query_prompt(task_instruction("FiQA2018").instruction)
    assert resolve_prompt("FiQA2018", prompts) == resolve_prompt("FiQA2018") == fiqa
    assert resolve_prompt("query", prompts) == "q: "
    assert resolve_prompt("document", prompts) == resolve_prompt("none", prompts) == ""
    assert resolve_prompt("find it", prompts) == "Instruct: find it\nQuery: "
    saved = task_prompts()
    assert resolve_prompt("FiQA2018-document", saved) == ""
    for name in saved:
        assert resolve_prompt(name, saved) == saved[name]


def test_prompts_by_name_work_in_a_model(tiny_decoder_dir: Path) -> None:
    from nvembed.model.embedder import NVEmbed

    model = NVEmbed.from_pretrained(tiny_decoder_dir, device="cpu")
    model.prompts.update(task_prompts())
    texts = ["what is a bond", "what is a share"]
    expected = model.encode_query(texts, task=task_instruction("FiQA2018").instruction)
    by_name = model.encode(texts, prompt_name="FiQA2018")
    np.testing.assert_array_equal(by_name, expected)
    bare = model.encode(texts)
    assert np.abs(by_name - bare).max() > 1e-3
    np.testing.assert_array_equal(model.encode(texts, prompt_name="FiQA2018-document"), bare)


def test_mteb_finds_the_prompt_of_each_side() -> None:
    pytest.importorskip("mteb")
    import mteb
    from mteb.models.abs_encoder import get_prompt_name
    from mteb.types import PromptType

    prompts = task_prompts()

    def found(task: str, side: PromptType | None) -> str:
        return prompts[get_prompt_name(prompts, mteb.get_task(task).metadata, side)]

    instruct = "Instruct: Given a financial question, retrieve relevant passages that answer the "
    assert found("FiQA2018", PromptType.query) == f"{instruct}query\nQuery: "
    assert found("FiQA2018", PromptType.document) == ""
    assert found("QuoraRetrieval", PromptType.document) == found("QuoraRetrieval", PromptType.query)
    assert found("STSBenchmark", None) == "Instruct: Retrieve semantically similar text\nQuery: "
    assert found("STSBenchmark.v2", None) == found("STSBenchmark", None)


def test_the_wheel_holds_the_table(tmp_path: Path) -> None:
    wheel = pytest.importorskip("hatchling.builders.wheel")
    built = next(wheel.WheelBuilder(str(ROOT)).build(directory=str(tmp_path)))
    with zipfile.ZipFile(built) as archive:
        text = archive.read("nvembed/data/instructions.yaml").decode()
    assert "FiQA2018:" in text


@pytest.mark.parametrize("text", ["a b", "", "two\nlines", "Query: x", "\nQuery: again"])
def test_a_prompt_is_taken_off_again(text: str) -> None:
    prompt = query_prompt("Find it: quickly")
    assert split_prompt(prompt + text) == (prompt, text)
    assert split_prompt(text) == ("", text)


@pytest.mark.parametrize("text", ["Instruct: Find it", "Instruct: Find it\nQuery:x", "x\nQuery: y"])
def test_what_is_no_prompt_of_ours_stays_in_the_text(text: str) -> None:
    assert split_prompt(text) == ("", text)
