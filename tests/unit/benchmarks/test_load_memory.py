"""The benchmark of memory at load, on one layer."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "load_memory.py"


@pytest.mark.slow
def test_peak_is_the_weights_and_little_more() -> None:
    command = [sys.executable, str(SCRIPT), "--scale", "0.05"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    ratios = [float(found) for found in re.findall(r"= ([0-9.]+) x", done.stdout)]
    assert len(ratios) == 2
    # Below 1 the weights would not have been loaded at all.
    assert all(0.95 < ratio < 1.15 for ratio in ratios), done.stdout
