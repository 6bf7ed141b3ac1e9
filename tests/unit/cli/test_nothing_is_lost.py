"""No command replaces, changes or deletes a file that nvembed did not make.

``WRITERS`` has an entry for every command that writes, ``READERS`` for the others; a command in
neither fails a test here, and so does a new place in the source that writes or deletes.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import nvembed
from hash_encoder import HashEncoder
from nvembed.cli import main
from nvembed.core.files import atomic_folder, write_jsonl, write_text
from nvembed.core.ownership import MARK, problem_of
from nvembed.encoding import files as inference_files
from nvembed.model import workers
from pydocs.__main__ import program as demo
from task_folders import write_task

SOURCE = Path(nvembed.__file__).parent
ROOT = Path(__file__).resolve().parents[3]
DEMO = "examples/pydocs"
PAIRS = [{"query": f"word {i}", "positive": f"text of {i * 7 % 16}"} for i in range(16)]
USERS = "the user's own words"


@dataclass(frozen=True)
class Writer:
    """A command that writes.

    Attributes:
        made_by: what its marks say.
        argv: its arguments, with the output in place of OUT.
        files: that it writes, below OUT (``""`` is OUT itself).
        folders: that it replaces as a whole.
        growing: files that it adds to.
        marks: by other commands than its own.
    """

    made_by: str
    argv: tuple[str, ...]
    files: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    growing: tuple[str, ...] = ()

    def command(self, out: Path | str) -> list[str]:
        return [part.replace("OUT", str(out)) for part in self.argv]


RUN_FILES = ("/config.yaml", "/env.json", "/graph-memory.json")
RUN_FOLDERS = ("/model", "/model-one", "/adapter", "/mined")
DEMO_FOLDERS = ("/model", "/model-stage1", "/adapter", "/mined")
RUN_LOGS = ("/metrics.jsonl", "/train.log")
ARM = "/arms/here/seed-0"

WRITERS: dict[str, list[Writer]] = {
    "encode": [
        Writer(
            "encode",
            ("encode", "model", "--input", "docs.jsonl", "--output", f"OUT{end}"),
            files=()
            if end == ".lance"
            else tuple(end + beside for beside in ("", ".ids.json", ".ranges.npy", ".spans.npy")),
            folders=(end,) if end == ".lance" else (),
        )
        for end in (".npy", ".parquet", ".lance")
    ],
    "mine": [
        Writer(
            "mine",
            ("mine", "pairs.jsonl", "OUT.jsonl", "--teacher", "model"),
            files=(".jsonl", ".jsonl.report.json"),
        )
    ],
    "evaluate": [
        Writer(
            "evaluate",
            ("evaluate", "model", "--tasks", "task", "--output", "OUT.json"),
            files=(".json", ".run.json", ".items/task.npz", ".mteb/results/m/r/STS12.json"),
        ),
        Writer(
            "evaluate",
            ("evaluate", "model", "--tasks", "task", "--output", "OUT.json", "--start-over"),
            files=(".json", ".run.json"),
        ),
    ],
    "index": [
        Writer(
            "index",
            ("index", "docs.jsonl", "--to", "OUT", "--model", "model"),
            files=("/documents.lance",),
            folders=("/documents.lance",),
        )
    ],
    "export": [
        Writer(
            "export",
            ("export", "model", "--to", "OUT", "--format", "nvembed"),
            files=("",),
            folders=("",),
        ),
        Writer(
            "export",
            ("export", "model", "--to", "OUT.gguf", "--format", "gguf"),
            files=(".gguf",),
        ),
    ],
    "compress": [
        Writer(
            "compress",
            ("compress", "model", "--texts", "docs.jsonl", "--layers", "1", "--to", "OUT"),
            files=("",),
            folders=("",),
        )
    ],
    "merge": [Writer("merge", ("merge", "model", "--to", "OUT"), files=("",), folders=("",))],
    "train": [
        Writer(
            "train", ("train", "recipe.yaml", "output=OUT", *more), RUN_FILES, RUN_FOLDERS, RUN_LOGS
        )
        for more in ((), ("--fresh",), ("--dry-run",))
    ]
    + [Writer("train", ("train", "recipe.yaml", "--find-rate", "--plot", "OUT.png"), (".png",))],
    "ablate": [
        Writer(
            "ablate",
            ("ablate", "grid.yaml", "output=OUT"),
            files=(
                "/report.md",
                "/report.html",
                "/scores.csv",
                "/figure.png",
                f"{ARM}/outcome.json",
            ),
            growing=(f"{ARM}/arm.log",),
        ),
        Writer(
            "train",
            ("ablate", "grid.yaml", "output=OUT"),
            (f"{ARM}/config.yaml",),
            (f"{ARM}/model",),
        ),
        Writer("evaluate", ("ablate", "grid.yaml", "output=OUT"), (f"{ARM}/results.json",)),
    ],
    DEMO: [
        Writer(
            "demo",
            (DEMO, "--backbone", "model", "--output", "OUT"),
            files=("/losses.png", "/scores.png", "/eval/scores.json", "/eval/BM25.json"),
            folders=("/data", "/tasks"),
        ),
        Writer("train", (DEMO, "--backbone", "model", "--output", "OUT"), RUN_FILES, DEMO_FOLDERS),
    ],
    "data build": [
        Writer(
            "data build",
            ("data", "build", "recipe.yaml", "build.folder=OUT"),
            files=("/pairs.refused.jsonl",),
            folders=("/pairs",),
        )
    ],
    "init": [Writer("init", ("init", "pairs.jsonl", "--to", "OUT"), ("",), ("",))],
    "data task": [
        Writer("data task", ("data", "task", "pairs.jsonl", "--to", "OUT"), ("",), ("",))
    ],
    "data synthesize": [
        Writer(
            "data synthesize",
            ("data", "synthesize", "OUT", "--endpoint", "http://127.0.0.1:1/v1", "--model", "m"),
            files=("/tasks.jsonl", "/examples.jsonl", "/rejects.jsonl", "/summary.json"),
        )
    ],
}
# These print, serve, or keep what they made in the cache folder.
READERS = {"compare", "search", "serve", "doctor", "data inspect", "data check"}


def test_every_command_is_known_here() -> None:
    groups = {"": main.app, **{f"{g.name} ": g.typer_instance for g in main.app.registered_groups}}
    commands = {
        prefix + (command.name or command.callback.__name__)
        for prefix, group in groups.items()
        for command in group.registered_commands
    }
    assert commands | {DEMO} == set(WRITERS) | READERS


def run(command: Sequence[str]) -> int:
    """Run a command of ``nvembed``, or the example."""
    if command[0] == DEMO:
        return main.run(command[1:], demo, f"python {DEMO}")
    return main.run(command)


# Calls that write or delete without the name of a command, and why none can lose what is a user's.
UNMARKED = {
    # What the one mechanism is made of.
    "core/files.py": {"replace", "write_text", "open", "rmtree"},
    "core/ownership.py": {"open", "unlink", "rmdir", "rmtree"},
    # In a cache folder, under a hash of all that the contents depend on.
    "core/cache.py": {"rmtree", "write_text"},
    "examples/pydocs/harvest.py": {"write_jsonl", "unlink"},
    "encoding/file_search.py": {"write_array"},
    "kernels/machine.py": {"write_json"},
    "kernels/build.py": {"atomic_path", "write_text"},
    # In a working folder, under such a hash.
    "building/hard_negatives.py": {"write_jsonl"},
    "building/set_build.py": {"rmdir", "atomic_folder", "write_json"},
    "model/bulk.py": {"write_array", "write_arrays"},
    "mining/ranking.py": {"write_array"},
    "model/kept_vectors.py": {"write_array"},
    "core/store.py": {"atomic_path", "open", "save", "savez", "write_json"},
    # In a folder or file that is being made, by the block around it.
    "training/ablation/report.py": {"write_bytes"},
    "training/find_rate.py": {"write_bytes"},
    "building/row_filters.py": {"unlink", "open"},
    "building/held_out.py": {"write_json", "write_jsonl", "write_text"},
    "cli/start.py": {"write_jsonl", "write_text"},
    "data/built_sets.py": {"open"},
    "examples/pydocs/dataset.py": {"write_json", "write_jsonl", "write_text"},
    "evaluation/results.py": {"open"},
    "evaluation/session.py": {"rmdir"},  # of an empty folder
    "encoding/files.py": {"write_json"},
    "encoding/outputs.py": {"create_table", "rmdir", "open", "rename"},
    "model/backbone.py": {"save", "save_pretrained"},
    # The card among the files that save_pretrained writes where it is told to.
    "model/embedder.py": {"write_text"},
    "encoding/export/folders.py": {"write_json", "write_text", "save_pretrained"},
    "encoding/export/onnx.py": {"write_json", "save", "save_pretrained"},
    "encoding/export/stock.py": {"save_pretrained", "save", "write_json"},
    "interop/weights.py": {"write_json"},
    "interop/merging.py": {"write_json"},
    "evaluation/soup.py": {"write_json", "write_text"},
    "encoding/compression/compress.py": {"save_pretrained", "write_json", "write_text"},
    "training/model.py": {"save_pretrained", "write_text"},
    # A checkpoint, after a look at what else lies in its place.
    "training/checkpoint.py": {"open", "atomic_folder"},
    # Appended to a log that carries a mark, or to a journal that is known by its first line.
    "training/ablation/runner.py": {"open"},
    "core/runs.py": {"open"},
    "building/synthesis/endpoint.py": {"open"},
    # A database and its lock, after a look at the mark.
    "index/database.py": {"rmtree", "create_table"},
}
MARKED = {
    "atomic_path",
    "atomic_folder",
    "write_text",
    "write_json",
    "write_jsonl",
    "write_array",
    "write_arrays",
    "write_results",
}
WRITING = MARKED | {
    "open",
    "save",
    "savez",
    "write_bytes",
    "rmtree",
    "unlink",
    "rmdir",
    "rename",
    "replace",
    "create_table",
}
WRITING |= {"save_pretrained"}


def test_every_place_that_writes_is_marked_or_known_here() -> None:
    found: dict[str, set[str]] = {}
    files = [*SOURCE.rglob("*.py"), *(ROOT / DEMO).rglob("*.py")]
    for file in sorted(files):
        names: set[str] = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            function = node.func
            name = (
                function.attr
                if isinstance(function, ast.Attribute)
                else getattr(function, "id", "")
            )
            if name == "replace" and not (
                isinstance(function, ast.Attribute)
                and isinstance(function.value, ast.Name)
                and function.value.id == "os"
            ):
                continue  # of texts and dataclasses
            values = [*node.args, *(keyword.value for keyword in node.keywords)]
            texts = [
                v.value for v in values if isinstance(v, ast.Constant) and isinstance(v.value, str)
            ]
            if name == "open" and not any(
                re.fullmatch("[rbt+]*[wax][bt+]*", mode) for mode in texts
            ):
                continue  # to read
            marks = 1 if name in ("atomic_path", "atomic_folder") else 2
            if name in WRITING and not (name in MARKED and len(node.args) > marks):
                names.add(name)
        if names:
            inside = SOURCE if file.is_relative_to(SOURCE) else ROOT
            found[file.relative_to(inside).as_posix()] = names
    assert found == UNMARKED


# --- Nothing is begun where something would be lost -----------------------------------------------


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Inputs of all commands; loading a model is a failure of the test."""
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path)

    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("work had begun before the refusal")

    monkeypatch.setattr("nvembed.model.embedder.NVEmbed.from_pretrained", loaded)
    monkeypatch.setattr("pydocs.run.harvest", loaded)
    monkeypatch.setattr("nvembed.training.ablation.runner.load_tasks", loaded)
    monkeypatch.setattr(workers, "load_encoder", loaded)
    return tmp_path


def write_inputs(folder: Path) -> None:
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text('{"model_type": "mistral"}')
    write_jsonl(folder / "docs.jsonl", [{"text": f"a text on {i}"} for i in range(9)])
    write_jsonl(folder / "pairs.jsonl", PAIRS)
    write_task(folder / "task", "STS")
    recipe = {
        "output": "run",
        "model": {"backbone": "model", "max_tokens": 64, "pooling": {"kind": "mean"}},
        "datasets": [
            {"name": "pairs", "path": "pairs.jsonl", "kind": "retrieval", "instruction": "find"}
        ],
        "stages": [
            {"name": name, "steps": 1, "batch_size": 4, "in_batch_negatives": True}
            for name in ("one", "two")
        ],
        "precision": "float32",
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    grid = {
        "recipe": "recipe.yaml",
        "output": "grid",
        "axes": {"place": {"here": {}}},
        "seeds": [0],
        "tasks": ["task"],
    }
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid))


def contents(folder: Path) -> dict[str, str | bytes]:
    """All files and links, marks among them."""
    return {
        path.relative_to(folder).as_posix(): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def users_file(path: Path, _: str) -> None:
    path.write_text(USERS)


def users_folder(path: Path, _: str) -> None:
    path.mkdir()
    (path / "notes.txt").write_text(USERS)


def of_another_command(path: Path, _: str) -> None:
    write_text(path, USERS, "another")


def edited_file(path: Path, made_by: str) -> None:
    write_text(path, "ours", made_by)
    path.write_text("ou’s")
    assert path.stat().st_size != 4


def edited_to_the_same_size(path: Path, made_by: str) -> None:
    write_text(path, "ours", made_by)
    path.write_text("hers")


def link(path: Path, _: str) -> None:
    Path("linked").write_text(USERS)
    path.symlink_to(Path("linked").absolute())


def link_to_nothing(path: Path, _: str) -> None:
    path.symlink_to("nothing")


def hard_link(path: Path, _: str) -> None:
    Path("linked").write_text(USERS)
    os.link("linked", path)


def edited_folder(path: Path, made_by: str) -> None:
    ours_folder(path, made_by)
    (path / "README.md").write_text(USERS)


def folder_with_a_note(path: Path, made_by: str) -> None:
    ours_folder(path, made_by)
    (path / "sub").mkdir()
    (path / "sub" / "notes.txt").write_text(USERS)


def folder_with_a_link(path: Path, made_by: str) -> None:
    ours_folder(path, made_by)
    (path / "there").symlink_to("/usr")


def unmarked_folder(path: Path, made_by: str) -> None:
    """As an earlier version left it."""
    ours_folder(path, made_by)
    (path / MARK).unlink()


def folder_of_another_command(path: Path, _: str) -> None:
    ours_folder(path, "another")


def ours_folder(path: Path, made_by: str) -> None:
    with atomic_folder(path, made_by) as folder:
        (folder / "README.md").write_text("ours")
    assert problem_of(path, made_by) is None


Occupant = Callable[[Path, str], None]
AT_A_FILE: list[Occupant] = [users_file, users_folder, of_another_command, edited_file]
AT_A_FILE += [edited_to_the_same_size, link, link_to_nothing, hard_link]
AT_A_FOLDER: list[Occupant] = [users_file, users_folder, link, link_to_nothing, edited_folder]
AT_A_FOLDER += [folder_with_a_note, folder_with_a_link, unmarked_folder, folder_of_another_command]


def refused(place: Path, command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must refuse and leave everything as it is; return what it says."""
    before = contents(place)
    code = run(command)
    err = capsys.readouterr().err
    assert code == 2, (command, err)
    assert err.startswith("error: "), err
    assert err.count("\n") == 1, err
    assert contents(place) == before, (command, err)
    return err


def occupied(writers: list[Writer]) -> Iterator[tuple[Writer, str, Occupant]]:
    for writer in writers:
        for name in writer.files:
            for occupant in AT_A_FILE:
                yield writer, name, occupant
        for name in writer.growing:
            for occupant in (users_file, users_folder, link, hard_link):
                yield writer, name, occupant
        for name in writer.folders:
            for occupant in AT_A_FOLDER:
                yield writer, name, occupant


# Of the product of names and occupants every seventh: nearly all of either, in seconds.
@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", WRITERS)
def test_nothing_of_the_users_is_replaced(
    name: str, step: int, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = list(occupied(WRITERS[name]))[::step]
    assert cases
    for number, (writer, written, occupant) in enumerate(cases):
        out = place / "out" / str(number) / "x"
        target = Path(f"{out}{written}")
        target.parent.mkdir(parents=True)
        occupant(target, writer.made_by)
        err = refused(place, writer.command(out), capsys)
        assert str(out) in err, (writer.argv, written, occupant.__name__, err)
        Path("linked").unlink(missing_ok=True)
        shutil.rmtree(place / "out")


# --- Nothing that is read is written --------------------------------------------------------------

# What the error says → commands.
OVERLAPS = {
    "same file": [
        "encode model --input docs.jsonl --output docs.jsonl",
        "encode model --input docs.jsonl --output task/../docs.jsonl",
        "encode model --input docs.jsonl --output link.jsonl",
        "encode model --input docs.jsonl --output hard.jsonl",
        "encode model --input docs.jsonl --output here/docs.jsonl",
        "encode model --input link.jsonl --output docs.jsonl",
        "mine pairs.jsonl pairs.jsonl --teacher bm25",
        "mine pairs.jsonl docs.jsonl --teacher bm25 --documents docs.jsonl",
        "train run/config.yaml output=run",
    ],
    "lies inside": [
        "encode model --input task --output task/v.npy",
        "encode model --input docs.jsonl --output model/v.npy",
        "mine pairs.jsonl model/m.jsonl --teacher model",
        "mine pairs.jsonl m.jsonl --teacher model --documents task --work task/w",
        "evaluate bm25 --tasks task --output task/r.json",
        "evaluate bm25 --tasks task --output task/task.json",
        "evaluate model --tasks task --cache model",
        "index task --to task/db --model model",
        "export model --to model/new --format nvembed",
        "compress model --texts docs.jsonl --layers 1 --to model/new",
        "train recipe.yaml output=model/run",
        "data build recipe.yaml build.folder=task/built datasets.0.path=task",
        "ablate grid.yaml output=task/grid",
    ],
    "same folder": [
        "encode model --input docs.jsonl --output model",
        "train recipe.yaml output=mymodels model.backbone=mymodels/model",
        "train recipe.yaml --fresh output=mymodels model.backbone=mymodels/model",
        "data build recipe.yaml build.folder=. datasets.0.name=task 'build.tasks=[\"task\"]'",
        "data build recipe.yaml build.folder=. 'datasets=[{name: model, path: "
        "pairs.jsonl, kind: retrieval, instruction: null}]'",
        f"{DEMO} --backbone mymodels/model --output mymodels",
    ],
    "same folder|lies inside": [
        "index task --to task --model model",
        "export model --to model --format nvembed",
    ],
    "holds an input": [
        "train recipe.yaml output=mymodels model.backbone=mymodels/model/inner",
        "train recipe.yaml output=. datasets.0.path=mined/one/p.jsonl",
        "data build recipe.yaml build.folder=. datasets.0.path=pairs/p.jsonl",
    ],
}


@pytest.mark.parametrize(
    ("command", "message"),
    [(command, message) for message, commands in OVERLAPS.items() for command in commands],
)
def test_what_is_read_is_not_written(
    command: str, message: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "link.jsonl").symlink_to("docs.jsonl")
    os.link(place / "docs.jsonl", place / "hard.jsonl")
    (place / "here").symlink_to(place)
    for name in ("mymodels/model", "mymodels/model/inner"):
        (place / name).mkdir(parents=True)
        (place / name / "config.json").write_text(USERS)
    for name in ("mined/one/p.jsonl", "pairs/p.jsonl"):
        write_jsonl(place / name, PAIRS)
    (place / "run").mkdir()
    shutil.copy(place / "recipe.yaml", place / "run" / "config.yaml")
    assert re.search(message, refused(place, shlex.split(command), capsys))


@pytest.mark.parametrize("folder", ["", "data"])
def test_the_default_folder_of_a_recipe_can_hold_a_source(
    folder: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``beir.yaml`` builds to ``data/beir/<set>`` beside it, where this set is read from."""
    source = place / folder / "data" / "beir" / "scifact"
    write_jsonl(source / "corpus.jsonl", [{"_id": "d", "title": "", "text": "a text"}])
    write_jsonl(source / "queries.jsonl", [{"_id": "q", "text": "a query"}])
    (source / "qrels").mkdir()
    (source / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq\td\t1\n")
    recipe = yaml.safe_load((place / "recipe.yaml").read_text())
    recipe["datasets"][0] |= {"name": "scifact", "path": "data/beir/scifact", "layout": "beir"}
    path = place / folder / "beir.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert "same folder" in refused(place, ["data", "build", str(path)], capsys)
    # Beside it there is room.
    users = contents(place)
    assert run(["data", "build", str(path), "build.folder=data/built"]) == 0
    assert users.items() <= contents(place).items()


def test_a_built_folder_can_hold_a_source(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``build.folder: .`` and a set ``faq`` that is read from ``faq/pairs.jsonl``."""
    write_jsonl(place / "faq" / "pairs.jsonl", PAIRS)
    recipe = yaml.safe_load((place / "recipe.yaml").read_text())
    recipe["datasets"][0] |= {"name": "faq", "path": "faq/pairs.jsonl"}
    recipe["build"] = {"folder": "."}
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert "holds an input" in refused(place, ["data", "build", "recipe.yaml"], capsys)


# --- Runs that do their work ----------------------------------------------------------------------

# Names that our own files beside them have, or nearly have.
NEIGHBOURS = ["notes.txt", ".v.npy.bak", ".v.npy.old", ".v.npy.12345678", "v.npy.parts/notes.txt"]
NEIGHBOURS += ["v.npy.parts/vectors.npz", ".m.jsonl.old/x", ".mining-m.jsonl/notes.txt"]
NEIGHBOURS += ["r.items/other.npz", "r.mteb/notes.txt", ".r.json.bak", "r.items/.hidden"]
NEIGHBOURS += ["built/.steps/pairs/notes.txt", "built/.steps/pairs/read-1/x", "built/.pairs.old/x"]
NEIGHBOURS += ["built/.pairs.12345678/x", "built/other/part-00000.parquet", "built/.pairs.bak"]
JOBS = [
    ["encode", "o/fake", "--input", "docs.jsonl", "--output", "v.npy"],
    ["encode", "o/fake", "--input", "docs.jsonl", "--output", "v.npy", "--precision", "int8"],
    ["mine", "pairs.jsonl", "m.jsonl", "--teacher", "bm25", "near_duplicate=null"],
    ["evaluate", "bm25", "--tasks", "find", "--output", "r.json"],
    ["evaluate", "bm25", "--tasks", "find", "--output", "r.json", "--start-over"],
    ["data", "build", "recipe.yaml", "build.folder=built"],
    ["data", "build", "recipe.yaml", "build.folder=built", "build.rows_per_shard=4"],
]


def test_neighbours_of_what_is_written_stay(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "load_encoder", lambda model, dtype: HashEncoder(8))
    monkeypatch.setattr(inference_files, "computed_fingerprint", lambda model, dtype: "m")
    done: Counter[int] = Counter()

    @settings(max_examples=12, deadline=None, derandomize=True)
    @given(
        st.lists(st.tuples(st.sampled_from(JOBS), st.sets(st.sampled_from(NEIGHBOURS))), max_size=4)
    )
    def check(jobs: list[tuple[list[str], set[str]]]) -> None:
        folder = tmp_path_factory.mktemp("neighbours")
        monkeypatch.chdir(folder)
        write_inputs(folder)
        write_task(folder / "find", "Retrieval")
        users = contents(folder)
        for command, neighbours in jobs:
            for name in sorted(neighbours):
                Path(name).parent.mkdir(parents=True, exist_ok=True)
                Path(name).write_text(f"{USERS}: {name}")
                users[name] = Path(name).read_bytes()
            code = run(command)
            assert code in (0, 2)
            done[code] += 1
            now = contents(folder)
            assert {name: now.get(name) for name in users} == users

    check()
    assert done[0] > 5


@pytest.mark.parametrize("job", [JOBS[1], JOBS[2], JOBS[3], JOBS[4], JOBS[6]])
def test_what_is_ours_is_replaced(
    job: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command again works, also after a change of what it reads."""
    monkeypatch.setattr(workers, "load_encoder", lambda model, dtype: HashEncoder(8))
    monkeypatch.setattr(inference_files, "computed_fingerprint", lambda model, dtype: "m")
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path)
    write_task(tmp_path / "find", "Retrieval")
    assert run(job) == 0
    first = contents(tmp_path)
    write_jsonl(tmp_path / "docs.jsonl", [{"text": f"another text on {i}"} for i in range(4)])
    write_jsonl(tmp_path / "pairs.jsonl", PAIRS[:9])
    assert run(job) == 0
    second = contents(tmp_path)
    assert first.keys() >= second.keys()
    changed = {name for name in second if first[name] != second[name]}
    assert changed > {"docs.jsonl", "pairs.jsonl"} or job[0] == "evaluate"


@pytest.mark.parametrize("text", [USERS, f"{USERS}\n", '{"run": 1}\n', '{"id": "a"}'])
def test_a_file_that_is_no_journal_is_not_cut(
    text: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One without a line break looked like a line half written."""
    (place / "out").mkdir()
    (place / "out" / "journal.jsonl").write_text(text)
    refused(place, WRITERS["data synthesize"][0].command("out"), capsys)
