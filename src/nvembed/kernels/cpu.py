"""This machine's CPU, and which code it is given: decided by its features, never by a clock.

Which library multiplies and which kernel attends changes the last bits of vectors, so the choice
must be the same in every process and at every start, also beside other jobs. The one choice that
features do not tell, that of bfloat16, is measured in ``kernels/timing.py``.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True, slots=True)
class CPU:
    """What is known of a CPU.

    Attributes:
        vendor: such as ``AuthenticAMD``; empty where the system does not tell.
        model: its name.
        features: names of its instructions, as Linux has them; empty where it does not tell.
        cores: as many as the system sees.
        described: all lines that tell CPUs with different instructions apart.
    """

    vendor: str
    model: str
    features: frozenset[str]
    cores: int
    described: str

    @property
    def onednn_multiplies_float32_faster(self) -> bool:
        """Whether oneDNN multiplies float32 matrices at least as fast as MKL, torch's choice.

        On CPUs of another maker MKL leaves out instructions, by version and model: on AMD oneDNN
        was 1.1 to 2.2 times as fast (docs/log.md). Intel's own and ARM CPUs stay with torch's.
        """
        return bool(self.vendor) and self.vendor != "GenuineIntel"

    @property
    def has_wide_registers(self) -> bool:
        """Whether it has AVX-512: with narrower registers our kernels gain nothing over torch's."""
        return "avx512f" in self.features

    @property
    def may_multiply_bfloat16(self) -> bool:
        """Whether it may have instructions for bfloat16; without them it is emulated, slowly."""
        return not self.features or bool(
            self.features & {"avx512_bf16", "amx_bf16", "bf16", "svebf16"}
        )


@cache
def this_cpu() -> CPU:
    """Describe the CPU of this machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    return read_cpu(lines)


def read_cpu(lines: list[str]) -> CPU:
    """Read the lines of ``/proc/cpuinfo``; there are none on systems without one."""
    first: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        first.setdefault(name.strip(), value.strip())
    described = {platform.machine(), platform.processor()}
    kinds = ("model name", "flags", "Features", "CPU part")
    return CPU(
        vendor=first.get("vendor_id", ""),
        model=first.get("model name") or platform.processor() or platform.machine(),
        features=frozenset(f"{first.get('flags', '')} {first.get('Features', '')}".split()),
        cores=os.cpu_count() or 1,
        described="\n".join(sorted(described | {line for line in lines if line.startswith(kinds)})),
    )
