"""A synthesis against an endpoint on this machine that also misbehaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chat_endpoint import FakeEndpoint, fake_endpoint, good_answer, word
from nvembed.building.synthesis.endpoint import EndpointError
from nvembed.building.synthesis.prompts import SynthesisConfig
from nvembed.building.synthesis.run import Summary, synthesize
from nvembed.core.errors import ConfigError, DataError, UserError
from nvembed.core.ownership import MARK
from nvembed.data.config import DatasetConfig
from nvembed.data.loading import load_source, read_records

pytest.importorskip("httpx2")

KEY = "sk-secret-0123456789"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeEndpoint]:
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with fake_endpoint() as fake:
        yield fake


def config(fake: FakeEndpoint, **changes: Any) -> SynthesisConfig:
    settings: dict[str, Any] = {
        "endpoint": fake.url,
        "model": "writer",
        "kinds": ("short-long",),
        "tasks": 6,
        "tasks_per_request": 3,
        "retry_delay": 0.001,
        "timeout": 5.0,
    }
    return SynthesisConfig(**(settings | changes))


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def outputs(folder: Path) -> dict[str, str]:
    names = ("tasks.jsonl", "examples.jsonl", "rejects.jsonl")
    return {name: (folder / name).read_text() for name in names}


def test_all_kinds_become_records_with_instructions(fake: FakeEndpoint, tmp_path: Path) -> None:
    kinds = ("short-long", "long-short", "short-short")
    summary = synthesize(config(fake, kinds=kinds), tmp_path)
    for kind in kinds:
        counts = summary.kinds[kind]
        assert (counts.tasks, counts.examples) == (6, 12)
        assert (counts.double_tasks, counts.double_examples, counts.rejected) == (0, 0, 0)
    assert len(fake.prompts) == len(set(fake.prompts)) == 3 * (2 + 12)
    assert (summary.prompt_tokens, summary.answer_tokens) == (10 * 42, 5 * 42)
    records = read_records(tmp_path / "examples.jsonl", "retrieval")
    tasks = [row["task"] for row in rows(tmp_path / "tasks.jsonl")]
    assert [record.instruction for record in records] == [task for task in tasks for _ in "12"]
    # What the records hold is what was answered to a prompt that names their task.
    answered = {prompt: good_answer(prompt) for prompt in fake.prompts}
    for record in records:
        prompts = [prompt for prompt, answer in answered.items() if record.query in answer]
        assert len(prompts) == 1
        assert f"Here is a task: {record.instruction}\n" in prompts[0]
        assert record.positives[0] in answered[prompts[0]]
        assert record.negatives[0] in answered[prompts[0]]
    # As a data set of a recipe: the instruction comes with the record.
    dataset = DatasetConfig(
        name="synthetic", path="examples.jsonl", kind="retrieval", instruction=None
    )
    source = load_source(dataset, base_dir=tmp_path)
    example = source.example(7, np.random.default_rng(0), 1)
    assert (example.instruction, example.query) == (tasks[3], records[7].query)
    body = fake.bodies[0]
    assert (body["path"], body["model"], body["temperature"]) == (
        "/v1/chat/completions",
        "writer",
        1.0,
    )
    assert "Authorization" not in fake.headers[0]
    assert json.loads((tmp_path / "summary.json").read_text())["kinds"]["short-long"]["tasks"] == 6


@pytest.mark.parametrize(
    "trouble",
    ["status:500", "status:408", "status:429 0", "status:429 soon", "drop", "slow:1"],
)
def test_what_passes_is_waited_out(fake: FakeEndpoint, tmp_path: Path, trouble: str) -> None:
    fake.script = lambda of_prompt, number: (
        trouble if of_prompt == 0 and number % 3 == 0 else "good"
    )
    summary = synthesize(config(fake, timeout=0.3), tmp_path / "troubled")
    troubles = len(fake.prompts) - 14
    assert troubles >= 4
    assert summary.unanswered == 0
    fake.script = lambda of_prompt, number: "good"
    synthesize(config(fake), tmp_path / "calm")
    assert outputs(tmp_path / "troubled") == outputs(tmp_path / "calm")


def test_the_endpoint_says_how_long_to_wait_and_all_do(fake: FakeEndpoint, tmp_path: Path) -> None:
    fake.script = lambda of_prompt, number: "status:429 0.4" if number == 5 else "good"
    fake.delay = 0.02
    synthesize(config(fake, concurrency=4), tmp_path)
    gaps = [later - earlier for earlier, later in pairwise(fake.times)]
    # A few were on their way already; then nobody came for 0.4 s.
    assert max(gaps) >= 0.35
    assert gaps.index(max(gaps)) <= 8
    assert len(fake.times) == 15


@pytest.mark.parametrize(
    ("trouble", "problem"),
    [
        ("text:no braces here", "no JSON object"),
        ('text:{"tasks": ["a", ', "broken JSON"),
        ('text:{"tasks": [1, 2]}', "tasks.0: Input should be a valid string"),
        ('text:{"tasks": []}', "tasks: List should have at least 1 item"),
        ('text:{"tasks": ["\\ud800"]}', "unable to parse raw data as a unicode string"),
        ("cut", "the answer was cut"),
        ("html", "the response is no JSON"),
        ('body:{"choices": []}', "the response holds no answer"),
        ("body:[]", "the response holds no answer"),
        ('body:{"choices": [{"message": {"content": null}}]}', "the answer is empty"),
    ],
)
def test_unusable_answers_are_asked_again_then_written_down(
    fake: FakeEndpoint, tmp_path: Path, trouble: str, problem: str
) -> None:
    bad = {"prompt": ""}

    def script(of_prompt: int, number: int) -> str:
        if number == 0:
            bad["prompt"] = fake.prompts[0]
        # The first prompt never gets an answer, the others do on the second time.
        return trouble if fake.prompts[-1] == bad["prompt"] or of_prompt == 0 else "good"

    fake.script = script
    summary = synthesize(config(fake, concurrency=1, examples_per_task=1, attempts=3), tmp_path)
    if trouble.startswith(("text", "cut")):
        # Examples are written down as well: a script for tasks is no example either.
        assert summary.prompt_tokens == 10 * len(fake.prompts)
    else:
        assert summary.uncounted > 0
    rejects = rows(tmp_path / "rejects.jsonl")
    assert [row["id"] for row in rejects] == ["tasks/short-long/000000"]
    assert problem in rejects[0]["problem"]
    assert fake.prompts.count(bad["prompt"]) == 3
    assert summary.kinds["short-long"].rejected == 1
    assert (summary.kinds["short-long"].tasks, summary.kinds["short-long"].examples) == (6, 6)
    asked = len(fake.prompts)
    synthesize(config(fake, examples_per_task=1), tmp_path)
    assert len(fake.prompts) == asked  # not asked again


@pytest.mark.parametrize(
    "change",
    [{"positive": "  "}, {"negative": 3}, {"negative": "A b"}, {"query": "x" * 20_001}],
)
def test_examples_are_checked(fake: FakeEndpoint, tmp_path: Path, change: Any) -> None:
    good = {"query": "q", "positive": "a  B", "negative": "n"}
    fake.answer = lambda prompt: (
        good_answer(prompt) if prompt.startswith("Think") else json.dumps(good | change)
    )
    summary = synthesize(config(fake, tasks=3, examples_per_task=1, attempts=1), tmp_path)
    assert summary.kinds["short-long"].rejected == 3
    assert summary.kinds["short-long"].examples == 0


def test_doubles_are_dropped_and_more_is_asked_for(fake: FakeEndpoint, tmp_path: Path) -> None:
    base = "given a question about bees and flowers find the passage that explains it"

    def answer(prompt: str) -> str:
        if not prompt.startswith("Think"):
            query = "the very same question from everyone who asks"
            return json.dumps({"query": query, "positive": word(prompt), "negative": "no"})
        new = " ".join(word(prompt, place) for place in range(6))
        return json.dumps({"tasks": [base, base.upper() + "!", f"{base} well", new]})

    fake.answer = answer
    summary = synthesize(config(fake, tasks=4, tasks_per_request=4), tmp_path)
    counts = summary.kinds["short-long"]
    tasks = [row["task"] for row in rows(tmp_path / "tasks.jsonl")]
    assert len(tasks) == 4
    assert tasks[0] == base
    assert sum(base in task for task in tasks) == 1
    assert counts.double_tasks >= 6
    assert (counts.examples, counts.double_examples) == (1, 7)


def test_a_model_without_ideas_ends_the_asking(fake: FakeEndpoint, tmp_path: Path) -> None:
    fake.answer = lambda prompt: (
        json.dumps({"tasks": ["only this"]}) if prompt.startswith("Think") else good_answer(prompt)
    )
    summary = synthesize(config(fake, tasks=50, tasks_per_request=50), tmp_path)
    assert summary.kinds["short-long"].tasks == 1
    assert summary.kinds["short-long"].double_tasks == 3
    assert summary.kinds["short-long"].examples == 2


def test_concurrency_and_rate(fake: FakeEndpoint, tmp_path: Path) -> None:
    fake.delay = 0.05
    started = time.monotonic()
    synthesize(config(fake, tasks=30, tasks_per_request=30, concurrency=8), tmp_path / "a")
    assert time.monotonic() - started < 61 * 0.05  # one after the other it would take longer
    assert 4 <= fake.most_in_flight <= 8
    fake.delay = 0.0
    fake.times.clear()
    # 1,200 a minute are 0.05 s between two.
    synthesize(config(fake, requests_per_minute=1200, examples_per_task=1), tmp_path / "b")
    assert len(fake.times) == 8
    assert fake.times[-1] - fake.times[0] >= 7 * 0.05 * 0.9


def test_what_is_refused_for_good_stops_at_once(fake: FakeEndpoint, tmp_path: Path) -> None:
    fake.script = lambda of_prompt, number: "status:404"
    with pytest.raises(EndpointError, match=r"status 404 .*Check the address, the model"):
        synthesize(config(fake, concurrency=1), tmp_path)
    assert len(fake.prompts) == 1


def test_an_endpoint_that_is_gone_ends_the_run_and_the_next_one_goes_on(
    fake: FakeEndpoint, tmp_path: Path
) -> None:
    fake.script = lambda of_prompt, number: "good" if number < 5 else "drop"
    with pytest.raises(EndpointError, match="10 requests in a row came to nothing"):
        synthesize(config(fake, tasks=9, concurrency=1, retries=0), tmp_path / "a")
    fake.script = lambda of_prompt, number: "good"
    fake.prompts.clear()
    synthesize(config(fake, tasks=9), tmp_path / "a")
    assert len(fake.prompts) == 21 - 5
    synthesize(config(fake, tasks=9), tmp_path / "b")
    assert outputs(tmp_path / "a") == outputs(tmp_path / "b")


def test_a_request_that_comes_to_nothing_is_asked_by_the_next_run(
    fake: FakeEndpoint, tmp_path: Path
) -> None:
    bad: list[str] = []

    def script(of_prompt: int, number: int) -> str:
        if number == 4:
            bad.append(fake.prompts[-1])
        return "status:500" if fake.prompts[-1] in bad else "good"

    fake.script = script
    summary = synthesize(config(fake, retries=1, concurrency=1), tmp_path)
    assert (summary.unanswered, summary.kinds["short-long"].examples) == (1, 11)
    fake.script = lambda of_prompt, number: "good"
    fake.prompts.clear()
    summary = synthesize(config(fake), tmp_path)
    assert fake.prompts == bad
    assert (summary.unanswered, summary.kinds["short-long"].examples) == (0, 12)


def test_the_same_again_asks_nothing_and_more_asks_for_the_rest(
    fake: FakeEndpoint, tmp_path: Path
) -> None:
    synthesize(config(fake), tmp_path / "a")
    before = outputs(tmp_path / "a")
    fake.prompts.clear()
    synthesize(config(fake), tmp_path / "a")
    assert fake.prompts == []
    assert outputs(tmp_path / "a") == before
    synthesize(config(fake, tasks=9), tmp_path / "a")
    assert len(fake.prompts) == 1 + 3 * 2
    fake.prompts.clear()
    synthesize(config(fake, tasks=9), tmp_path / "b")
    assert outputs(tmp_path / "a") == outputs(tmp_path / "b")
    with pytest.raises(ConfigError, match=r"other settings \(model\)"):
        synthesize(config(fake, model="other"), tmp_path / "a")


def test_the_journal_bears_a_torn_line_and_refuses_a_broken_one(
    fake: FakeEndpoint, tmp_path: Path
) -> None:
    synthesize(config(fake), tmp_path)
    before = outputs(tmp_path)
    journal = tmp_path / "journal.jsonl"
    whole = journal.read_bytes()
    lines = whole.splitlines(keepends=True)
    for cut in (1, len(lines[-1]) // 2, len(lines[-1]) - 1, len(whole) - 3, len(whole)):
        journal.write_bytes(whole[:-cut])
        fake.prompts.clear()
        synthesize(config(fake), tmp_path)
        assert len(fake.prompts) == (14 if cut > len(lines[-1]) else 1)
        assert outputs(tmp_path) == before
    for broken in (b"{broken\n", b"[]\n", b"{}\n", b"\xff\n", b"\n"):
        journal.write_bytes(b"".join([*lines[:3], broken, *lines[3:]]))
        with pytest.raises(DataError, match=r"journal.jsonl:4: is no line of a journal"):
            synthesize(config(fake), tmp_path)
    journal.write_bytes(b"".join(lines[1:]))
    with pytest.raises(DataError, match=r"journal.jsonl:1: is no line of a journal"):
        synthesize(config(fake), tmp_path)


def test_half_written_files_are_cleared_up_and_no_others(
    fake: FakeEndpoint, tmp_path: Path
) -> None:
    (tmp_path / ".env.local").write_text("mine")
    (tmp_path / ".examples.jsonl.bak").write_text("mine")
    (tmp_path / ".examples.jsonl.x1y2z3w4.nvembed-new").write_text("half")
    synthesize(config(fake), tmp_path)
    ours = {"journal.jsonl", "tasks.jsonl", "examples.jsonl", "rejects.jsonl", "summary.json"}
    assert {path.name for path in tmp_path.iterdir()} == ours | {
        ".env.local",
        ".examples.jsonl.bak",
        MARK,
    }


def test_a_folder_that_cannot_be_made_is_one_line(fake: FakeEndpoint, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/journal.jsonl: cannot open"):
        synthesize(config(fake), tmp_path / "file")


def test_a_killed_run_loses_what_was_in_flight_at_most(fake: FakeEndpoint, tmp_path: Path) -> None:
    settings = config(fake, tasks=15, tasks_per_request=15, concurrency=4)
    code = (
        "import sys; from pathlib import Path\n"
        "from nvembed.building.synthesis.prompts import SynthesisConfig\n"
        "from nvembed.building.synthesis.run import synthesize\n"
        "synthesize(SynthesisConfig.model_validate_json(sys.argv[1]), Path(sys.argv[2]))\n"
    )
    source = str(Path(__file__).resolve().parents[3] / "src")
    fake.delay = 0.03
    for killed_after in (3, 12, 20):
        process = subprocess.Popen(
            [sys.executable, "-c", code, settings.model_dump_json(), str(tmp_path / "a")],
            env=os.environ | {"PYTHONPATH": source},
        )
        deadline = time.monotonic() + 30
        while len(fake.prompts) < killed_after and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    time.sleep(0.1)
    fake.delay = 0.0
    synthesize(settings, tmp_path / "a")
    # 31 requests, and up to 4 in flight each time.
    assert 31 <= len(fake.prompts) <= 31 + 3 * 4
    fake.prompts.clear()
    synthesize(settings, tmp_path / "b")
    assert len(fake.prompts) == 31
    assert outputs(tmp_path / "a") == outputs(tmp_path / "b")


def test_the_key_is_sent_and_shown_nowhere(
    fake: FakeEndpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level("DEBUG")
    monkeypatch.setenv("MY_KEY", f" {KEY}\n")
    settings = config(fake, key_variable="MY_KEY", attempts=2, concurrency=1)
    fake.answer = lambda prompt: f"not JSON, but {KEY}" if "Here" in prompt else good_answer(prompt)
    fake.script = lambda of_prompt, number: "status:500" if of_prompt == 0 else "good"
    summary: Summary = synthesize(settings, tmp_path)
    assert summary.kinds["short-long"].rejected == 12
    assert {headers["Authorization"] for headers in fake.headers} == {f"Bearer {KEY}"}
    fake.script = lambda of_prompt, number: "status:401"
    with pytest.raises(EndpointError) as caught:
        synthesize(settings, tmp_path / "refused")
    assert "[key]" in str(caught.value)
    assert "MY_KEY" in str(caught.value)
    assert KEY not in str(caught.value)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 7
    assert not any(KEY.encode() in path.read_bytes() for path in files)
    captured = capfd.readouterr()
    assert KEY not in caplog.text + captured.out + captured.err
    assert "127.0.0.1" in caplog.text  # logs there were
    monkeypatch.setenv("MY_KEY", "two words and more")
    with pytest.raises(ConfigError) as refused:
        synthesize(settings, tmp_path / "refused")
    assert "two words" not in str(refused.value)


def test_a_full_disk_is_one_line_and_the_next_run_goes_on(
    fake: FakeEndpoint, tmp_path: Path
) -> None:
    code = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from nvembed.cli.main import run\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2500, 2500))\n"
        "sys.exit(run(sys.argv[1:]))\n"
    )
    source = str(Path(__file__).resolve().parents[3] / "src")
    settings = ["tasks=6", "tasks_per_request=3", "concurrency=1", 'kinds=["short-long"]']
    command = ["data", "synthesize", str(tmp_path), "--endpoint", fake.url, "--model", "writer"]
    done = subprocess.run(
        [sys.executable, "-c", code, *command, *settings],
        env=os.environ | {"PYTHONPATH": source},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert "journal.jsonl: cannot write" in done.stderr
    asked = len(fake.prompts)
    synthesize(config(fake), tmp_path)
    assert 3 < asked < 14
    assert len(fake.prompts) == 14 + 1
    assert len(rows(tmp_path / "examples.jsonl")) == 12
