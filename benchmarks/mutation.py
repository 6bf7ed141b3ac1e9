"""Which faults the tests would notice: small changes of the core modules, one at a time (mutmut).

    python benchmarks/mutation.py --minutes 30
    python benchmarks/mutation.py --minutes 60 --modules model/attention.py model/tokens.py --seed 1

mutmut makes the mutants of a module, runs the tests of that module once, then forks this loaded
process for every mutant and runs the tests that reach the changed function, the quick ones first.
Only the tests of the module itself count (``TESTS``), so a mutant that some other test would notice
by chance survives here. All happens in a copy of the tree.

Mutants are sampled evenly: of each module as many as its share of the minutes allows, in an order
drawn from the seed. The table and the survivors with their diffs go to ``--output``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.mutation.file_mutation import mutate_file_contents
from mutmut.utils.format_utils import get_mutant_name

ROOT = Path(__file__).resolve().parents[1]
COPIED = (
    "src",
    "tests",
    "benchmarks",
    "recipes",
    "docs",
    "pyproject.toml",
    "Makefile",
    "README.md",
)

# Modules of src/nvembed with the tests that are theirs, relative to tests/unit; of slow files those
# that no quick one stands in for.
TESTS: dict[str, tuple[str, ...]] = {
    "model/attention.py": ("model/test_attention.py",),
    "training/step.py": (
        "training/test_step_passes.py",
        "training/test_step.py::test_recomputing_under_autocast_changes_no_bit",
    ),
    "training/stages.py": ("training/test_stages.py", "training/test_optim.py"),
    "building/contamination.py": ("building/test_contamination.py",),
    "kernels/nearest.py": ("kernels/test_nearest.py",),
    "model/tokens.py": (
        "model/test_tokens.py",
        "model/test_tokens_merges.py",
        "model/test_tokens_threads.py",
    ),
}
FURTHER_TESTS: dict[str, tuple[str, ...]] = {
    "model/pooling.py": ("model/test_pooling.py", "model/test_pooling_prompt.py"),
    "evaluation/significance.py": ("evaluation/test_significance.py",),
    "data/batch.py": ("data/test_batch.py",),
    "index/where.py": ("index/test_where.py",),
    "mining/selection.py": ("mining/test_mining_filters.py", "mining/test_miner.py"),
    "data/instructions.py": ("model/test_tokens.py",),
    "model/packing.py": ("model/test_packing.py", "model/test_batches.py"),
    "training/contrastive_loss.py": ("training/test_contrastive.py",),
}

# Run before the rate of a module is known; fewer are not worth another start.
FIRST_BATCH = 12

# Exit codes of pytest in a mutant's process, as mutmut records them.
SURVIVED, NO_TESTS = (0,), (5, 33)
TIMEOUT = (-24, 24, 36, 152, 255)

# On a busy machine the tests of a mutant may take many times as long as they usually do.
SETTINGS = """[mutmut]
source_paths =
    src
only_mutate =
    src/nvembed/{module}
also_copy =
{also_copy}
pytest_add_cli_args_test_selection =
{tests}
pytest_add_cli_args =
    --hypothesis-seed=0
    -pno:cacheprovider
    -pwithout_shrinking
timeout_multiplier = 8.0
timeout_constant = 8.0
use_git_change_detection = false
"""

# A failing example is enough; to look for the smallest one takes minutes.
WITHOUT_SHRINKING = """from hypothesis import Phase, settings

settings.register_profile("without_shrinking", phases=(Phase.explicit, Phase.generate))
settings.load_profile("without_shrinking")
"""


@dataclass
class Outcome:
    """What became of the mutants of one module."""

    module: str
    mutants: int
    counts: Counter[str] = field(default_factory=Counter)
    survivors: list[str] = field(default_factory=list)

    @property
    def tried(self) -> int:
        return self.counts.total()

    @property
    def score(self) -> float:
        """Share of the tried mutants that a test noticed; one that never ends is noticed too."""
        return (self.counts["killed"] + self.counts["timeout"]) / max(self.tried, 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = [*TESTS, *FURTHER_TESTS]
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument(
        "--modules", nargs="+", default=list(TESTS), choices=known, metavar="FILE", help=str(known)
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "mutation.md")
    parser.add_argument("--keep", type=Path, help="keep the copies in this new folder")
    options = parser.parse_args()
    output = options.output.absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * options.minutes
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="mutation-") as scratch:
        for number, module in enumerate(options.modules):
            folder = (options.keep or Path(scratch)).absolute() / module.replace("/", "-")
            now = time.monotonic()
            share = max(deadline - now, 0) / (len(options.modules) - number)
            outcomes.append(run_module(module, folder, now + share, options.seed))
            print(line(outcomes[-1]), flush=True)
            report = table(outcomes, options.seed) + "".join(survivors(o) for o in outcomes)
            output.write_text(report, encoding="utf-8")
    print(f"table and survivors: {output}")


def run_module(module: str, folder: Path, deadline: float, seed: int) -> Outcome:
    """Copy the tree into ``folder`` and try mutants of one module until the deadline."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, folder / name, ignore=ignored)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, folder / name)
    (folder / "without_shrinking.py").write_text(WITHOUT_SHRINKING)
    tests = (TESTS | FURTHER_TESTS)[module]
    also_copied = [*(set(COPIED) - {"src", "tests"}), "without_shrinking.py"]
    (folder / "setup.cfg").write_text(
        SETTINGS.format(
            module=module,
            tests="\n".join(f"    tests/unit/{name}" for name in tests),
            also_copy="\n".join(f"    {name}" for name in also_copied),
        )
    )
    os.chdir(folder)  # mutmut's library reads its settings from here
    path = Path("src/nvembed") / module
    mutated = mutate_file_contents(str(path), path.read_text(encoding="utf-8"))
    names = [get_mutant_name(path, name) for name in mutated.mutant_names]
    codes = try_mutants(path, random.Random(seed).sample(names, len(names)), deadline)
    outcome = Outcome(module, len(names))
    for name in names:
        if name in codes:
            outcome.counts[verdict := status(codes[name])] += 1
            if verdict in ("survived", "no tests"):
                diff = get_diff_for_mutant(name, path=path)
                outcome.survivors.append(f"{name}: {verdict}\n{diff}")
    os.chdir(ROOT)
    return outcome


def try_mutants(path: Path, names: Sequence[str], deadline: float) -> dict[str, int]:
    """Exit codes of the mutants that were tried, in the order of ``names`` until time is up."""
    codes: dict[str, int] = {}
    started, size = time.monotonic(), FIRST_BATCH
    while len(codes) < len(names) and size >= min(FIRST_BATCH, len(names) - len(codes)):
        run_mutmut(names[len(codes) : len(codes) + size])
        meta = json.loads(Path("mutants", f"{path}.meta").read_text(encoding="utf-8"))
        found = {k: v for k, v in meta["exit_code_by_key"].items() if v is not None}
        if len(found) == len(codes):
            sys.exit(f"mutmut tried no mutant of {path}")
        codes = found
        now = time.monotonic()
        # What is left of the time, less a tenth: the first batch has paid for the start.
        size = int(0.9 * (deadline - now) * len(codes) / (now - started))
    return codes


def run_mutmut(names: Sequence[str]) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-m", "mutmut", "run", "--max-children", "1", *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"mutmut failed:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")


def status(code: int) -> str:
    """What an exit code says; whatever is neither success nor a timeout is a failure of tests."""
    if code in SURVIVED:
        return "survived"
    if code in NO_TESTS:
        return "no tests"
    return "timeout" if code in TIMEOUT else "killed"


def table(outcomes: Sequence[Outcome], seed: int) -> str:
    rows = "\n".join(line(outcome) for outcome in outcomes)
    head = "| module | mutants | tried | killed | timeout | survived | no tests | score |"
    return f"Seed {seed}.\n\n{head}\n|---|---|---|---|---|---|---|---|\n{rows}\n"


def line(outcome: Outcome) -> str:
    counts = [outcome.counts[name] for name in ("killed", "timeout", "survived", "no tests")]
    cells = [outcome.module, outcome.mutants, outcome.tried, *counts, f"{outcome.score:.1%}"]
    return "| " + " | ".join(map(str, cells)) + " |"


def survivors(outcome: Outcome) -> str:
    diffs = "".join(f"\n```diff\n{text}\n```\n" for text in outcome.survivors)
    return f"\n## {outcome.module}\n{diffs}" if diffs else ""


if __name__ == "__main__":
    main()
