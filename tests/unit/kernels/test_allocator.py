from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

# Three buffers of 20 MB, written, freed and asked for again: how many fresh pages that takes.
SCRIPT = """
import resource, sys
import numpy as np
from nvembed.kernels.layers import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()

def use():
    buffers = [np.empty(20 << 20, dtype=np.uint8) for _ in range(3)]
    for buffer in buffers:
        buffer.fill(1)

for _ in range(5):
    use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _fresh_pages(how: str, **environment: str) -> int:
    given = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    given.pop("GLIBC_TUNABLES", None)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, how],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**given, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_buffers_are_used_again_unless_the_user_says_otherwise() -> None:
    plain = _fresh_pages("plain")
    assert _fresh_pages("keep") < plain / 10
    assert _fresh_pages("keep", MALLOC_TRIM_THRESHOLD_="1000000") > plain / 10
