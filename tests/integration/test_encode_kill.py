"""``nvembed encode --processes 2``, killed: its processes end, and the command goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from nvembed.core.files import write_jsonl
from nvembed.core.ownership import MARK
from nvembed.model.embedder import NVEmbed

pytestmark = pytest.mark.slow


def wait_for(happened, seconds: float = 300) -> None:  # type: ignore[no-untyped-def]
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_killed_with_its_processes_and_run_again(tmp_path: Path, tiny_decoder_dir: Path) -> None:
    texts = [f"text number {i} " * (1 + i % 9) for i in range(6000)]
    write_jsonl(tmp_path / "in.jsonl", [{"id": i, "text": text} for i, text in enumerate(texts)])
    output, made = tmp_path / "out.npy", tmp_path / "out.npy.parts"
    command = [sys.executable, "-m", "nvembed", "encode", str(tiny_decoder_dir)]
    command += ["--input", str(tmp_path / "in.jsonl"), "--output", str(output)]
    command += ["--processes", "2", "--dtype", "float32"]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    wait_for(lambda: list(made.glob("*.npz")))
    children = psutil.Process(run.pid).children(recursive=True)
    assert len(children) >= 2
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    kept = len(list(made.glob("*.npz")))
    assert not output.exists()
    wait_for(lambda: not any(c.is_running() and c.status() != "zombie" for c in children), 60)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert 1 <= kept < 6
    model = NVEmbed.from_pretrained(tiny_decoder_dir, device="cpu")
    np.testing.assert_allclose(np.load(output), model.encode(texts), atol=1e-5)
    assert {path.name for path in tmp_path.iterdir()} == {
        "in.jsonl",
        "out.npy",
        "out.npy.ids.json",
        "out.npy.run.json",
        MARK,
    }
