"""The prepared GPU run: nothing found is lost, no part stops another, and its numbers are right."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu
from gpu import Part


def shell(name: str, script: str, seconds: float | None = 30.0) -> Part:
    """A part that writes a row and goes on as the script says."""
    row = json.dumps({"part": name, "row": "found", "value": 1234.5})
    return Part(name, seconds, ("sh", "-c", f"echo '{row}' >> $OUT/results.jsonl; {script}"))


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(gpu, "_LEAST", 0.05)
    monkeypatch.setattr(gpu, "_GRACE", 0.2)
    return tmp_path


def is_alive(process: int) -> bool:
    """A zombie whose parent has not asked yet is dead."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_part_that_raises_or_hangs_is_told_and_the_next_begins(out: Path) -> None:
    hangs = "trap '' TERM; sleep 60 & echo $! > $OUT/pid; wait; sleep 60"
    parts = [
        shell("raises", "echo 'ValueError: broken' >&2; exit 3"),
        shell("hangs", hangs, 0.4),
        shell("works", "echo $PYTHONPATH > $OUT/path", None),
    ]
    ends = gpu.run_parts(parts, out, 60.0)
    assert [end["status"] for end in ends] == ["failed", "stopped", "finished"]
    assert ends[0]["error"] == "ended with 3: ValueError: broken"
    assert ends[1]["error"] == "not done after 0 s"
    assert ends[1]["seconds"] < 10
    assert "error" not in ends[2]
    assert str(BENCHMARKS.parent / "src") in (out / "path").read_text()
    assert not is_alive(int((out / "pid").read_text()))  # what the part had started
    found = [row for row in gpu.read_rows(out) if row["row"] == "found"]
    assert [row["part"] for row in found] == ["raises", "hangs", "works"]
    tables = (out / "results.md").read_text()
    assert tables.count("| found | 1,234 |") == 3
    assert "failed, 0" in tables
    assert "ValueError: broken" in tables


def test_a_part_without_time_is_not_begun(out: Path) -> None:
    ends = gpu.run_parts([shell("first", "sleep 60", 60.0), shell("second", "true")], out, 0.3)
    assert [end["status"] for end in ends] == ["stopped", "not begun"]
    assert [row["part"] for row in gpu.read_rows(out) if row["row"] == "found"] == ["first"]


def test_a_kill_leaves_the_rows_and_the_tables_of_what_was_done(out: Path) -> None:
    program = (
        "import gpu, sys; from gpu import Part; from pathlib import Path; import json;"
        "gpu.run_parts([Part(*p) for p in json.loads(sys.argv[1])], Path(sys.argv[2]), 60.0)"
    )
    parts = [shell("done", "true"), shell("killed", "sleep 5")]
    given = json.dumps([[part.name, part.seconds, part.command] for part in parts])
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS)}
    process = subprocess.Popen([sys.executable, "-c", program, given, str(out)], env=environment)
    until = time.monotonic() + 60
    results = out / gpu.RESULTS
    while not results.exists() or '"killed"' not in results.read_text():
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with open(results, "a") as file:
        file.write('{"part": "killed", "row": "ha')  # the kill came while a row was written
    rows = gpu.read_rows(out)
    assert [(row["part"], row["row"]) for row in rows] == [
        ("done", "found"),
        ("done", "status"),
        ("killed", "found"),
    ]
    assert "| found | 1,234 |" in (out / "results.md").read_text()
    assert "## killed\n\ncut off" in gpu.markdown(rows)


def test_rows_of_the_same_columns_are_one_table() -> None:
    row = {"part": "p", "row": "a", "x": 0.12345, "y": 12345, "z": 12345.6, "good": True}
    other = {"part": "p", "row": "c", "failed": "a|b"}
    end = {"part": "p", "row": "status", "status": "finished", "seconds": 1.0}
    lines = gpu.markdown([row, row | {"row": "b"}, other, end]).splitlines()
    assert lines[2:] == [
        "## p",
        "",
        "finished, 1",
        "",
        "| row | x | y | z | good |",
        "|---|---|---|---|---|",
        "| a | 0.1235 | 12,345 | 12,346 | True |",
        "| b | 0.1235 | 12,345 | 12,346 | True |",
        "",
        "| row | failed |",
        "|---|---|",
        "| c | a\\|b |",
    ]


def test_every_part_has_a_module_and_the_budgets_fit() -> None:
    assert {part.name for part in gpu.PARTS} < {
        path.stem for path in (BENCHMARKS / "gpu_parts").glob("*.py")
    }
    fixed = [part.seconds for part in gpu.PARTS if part.seconds is not None]
    assert len(fixed) == len(gpu.PARTS) - 1
    assert gpu.PARTS[-1].seconds is None  # takes what is left
    assert sum(fixed) + 60 < gpu.SECONDS <= 540


def test_the_commands_of_the_guide_are_accepted() -> None:
    guide = (BENCHMARKS.parent / "docs" / "gpu.md").read_text("utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", guide, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines]
    assert len(commands) == 3
    for command in commands:
        assert command[:2] == ["python", "benchmarks/gpu.py"]
        given = gpu.option_parser().parse_args(command[2:])
        assert given.out != Path("runs/gpu") or command == commands[0]
    for part in gpu.PARTS:
        assert f"| `{part.name}` | {part.seconds or 'the rest'}" in guide


# --- What the parts count -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory):
    import torch
    from gpu_parts.shapes import random_model

    folder = tmp_path_factory.mktemp("small")
    return random_model(torch.device("cpu"), folder, rehearse=True)


def test_operations_are_those_that_torch_counts(small, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from gpu_parts.shapes import forward_operations
    from torch.utils.flop_counter import FlopCounterMode

    from nvembed.kernels import attention as kernels
    from nvembed.kernels.layers import accelerate, restore
    from nvembed.model.packs import embed_pack
    from nvembed.model.tokens import TokenizedText

    monkeypatch.setattr(kernels, "supports_bfloat16", lambda *_: False)  # torch cannot see it
    lengths = [24, 24, 9]
    texts = [TokenizedText(tuple(range(length)), 0) for length in lengths]
    restore(small)
    try:
        fixed = small.pooling.fixed_weights(fold_now=True)
        with torch.no_grad(), fixed, FlopCounterMode(display=False) as counter:
            embed_pack(small, texts)
    finally:
        accelerate(small)
    assert counter.get_total_flops() == forward_operations(small, lengths)


def test_texts_have_the_tokens_that_are_asked_for(small) -> None:
    from gpu_parts.shapes import random_texts

    texts = random_texts(20, 33)
    assert len(set(texts)) == 20
    assert set(map(len, small.backbone.tokenize_texts(texts))) == {33}


def test_parity_sees_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from gpu_parts import attention

    lengths, device = (7, 3, 3, 1), torch.device("cpu")
    for causal in (False, True):
        errors = attention.parity(device, lengths, causal=causal)
        assert errors.keys() == {"output", "query", "key", "value"}
        assert 0 < max(errors.values()) < attention.LARGEST_ERROR
    right = attention.flat_attention

    def other_direction(*args, causal: bool, **options):
        return right(*args, causal=not causal, **options)

    monkeypatch.setattr(attention, "flat_attention", other_direction)
    wrong = attention.parity(device, lengths, causal=False)
    assert min(wrong.values()) > attention.LARGEST_ERROR
    assert attention.difference(torch.tensor([float("nan")]), torch.ones(1).double()) == float(
        "inf"
    )


def test_pieces_are_joined_to_what_was_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpu_parts import recipe

    monkeypatch.setattr(recipe, "PIECE_BYTES", 7000)
    (tmp_path / "adapter").mkdir()
    content = os.urandom(20000)
    (tmp_path / "adapter" / "weights").write_bytes(content)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "out").mkdir()
    extra = [tmp_path / "metrics.jsonl"]
    names = recipe.pieces(tmp_path / "adapter", extra, tmp_path / "out", tmp_path)
    parts = [(tmp_path / "out" / name).read_bytes() for name in names]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert names[0] == "model.tar.00"
    assert len(names) > 3
    assert max(map(len, parts)) == 7000
    with tarfile.open(fileobj=io.BytesIO(b"".join(parts))) as archive:
        assert archive.extractfile("adapter/weights").read() == content
        assert archive.getnames() == ["adapter", "adapter/weights", "metrics.jsonl"]


def test_the_recipe_keeps_the_sets_that_are_there_and_fits_the_time(tmp_path: Path) -> None:
    from gpu_parts import recipe

    data = tmp_path / "data"
    (data / "built").mkdir(parents=True)
    for name in ("squad_train.jsonl.gz", "stsb.jsonl", "built/sentences.jsonl", "stranger.jsonl"):
        (data / name).touch()
    context = gpu.Context("recipe", tmp_path, tmp_path, 60.0, base="base", data=data)
    config = recipe.settings(context, "base")
    # Texts without labels need the teacher.
    assert [each.name for each in config.datasets] == ["squad_train", "stsb"]
    assert config.datasets[0].path == str(data / "squad_train.jsonl.gz")
    assert [stage.teacher for stage in config.stages] == [None, None]
    assert config.stages[1].cosent is not None
    assert config.build is None
    taught = gpu.Context("recipe", tmp_path, tmp_path, 60.0, False, "base", data, "teacher")
    kept = recipe.settings(taught, "base")
    assert [each.name for each in kept.datasets] == ["squad_train", "stsb", "sentences"]
    assert kept.stages[0].teacher.model == "teacher"

    steps = [stage.steps for stage in config.stages]
    half = recipe.scaled(config, 0.5)
    assert [stage.steps for stage in half.stages] == [n // 2 for n in steps]
    assert [stage.warmup_steps for stage in half.stages] == [n // 40 for n in steps]


@pytest.mark.slow
def test_a_rehearsal_gives_every_part_its_rows(tmp_path: Path) -> None:
    out, environment = tmp_path / "out", {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--rehearse", "--out", str(out)]
    command += ["--seconds", "7000", "--work", str(tmp_path)]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    rows = gpu.read_rows(out)
    ends = {row["part"]: row["status"] for row in rows if row["row"] == gpu.STATUS}
    assert ends == {part.name: "finished" for part in gpu.PARTS}, (out / gpu.LOG).read_text()
    found = {(row["part"], row["row"]): row for row in rows}
    assert found["attention", "parity"]["within"]
    assert found["attention", "tests"]["code"] == 0  # all are skipped
    assert found["encode", "load"]["same_vectors"]
    assert found["encode", "latent attention"]["difference"] < 0.02
    assert found["train", "many texts"]["tokens_per_second"] > 0
    assert found["train", "sentence-transformers, cached"]["tokens"] == 4 * 5 * 15
    assert found["serve", "nvembed, 7.85 B"]["answers"] > 0
    assert found["serve", "sentence-transformers, small"]["answers"] > 0
    assert found["quantize", "bfloat16"]["least_cosine"] == pytest.approx(1, abs=1e-3)
    assert found["recipe", "trained"]["ended"] == "all steps"
    assert (out / "model.tar.00").exists()
    assert len(list(out.iterdir())) <= 8  # as many as a lent machine gives back
    # A folder with results is nothing to write into.
    again = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert again.returncode == 2
    assert "is not empty" in again.stderr
