"""The notebooks of examples/notebooks, run from top to bottom in a real kernel."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nvembed import SearchOptions, search_index

NOTEBOOKS = Path(__file__).resolve().parents[2] / "examples" / "notebooks"


def printed(path: Path, place: Path) -> str:
    """Run a notebook in a folder; return what its cells show."""
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient and ipykernel")
    import nbformat

    book = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in book.cells), "clear the outputs before saving"
    resources = {"metadata": {"path": str(place)}}
    nbclient.NotebookClient(book, timeout=600, kernel_name="python3", resources=resources).execute()
    shown = []
    for cell in book.cells:
        for output in cell.get("outputs", ()):
            shown.append(output.get("text") or output.get("data", {}).get("text/plain", ""))
    return "\n".join(shown)


def test_every_notebook_is_run_here() -> None:
    assert sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")) == [
        "search_your_files",
        "tune_on_your_pairs",
    ]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_files_are_indexed_and_found(tmp_path: Path) -> None:
    shown = printed(NOTEBOOKS / "search_your_files.ipynb", tmp_path)
    new, total = map(int, re.search(r"\((\d+), (\d+)\)", shown).groups())
    assert new == total >= 15
    assert len(re.findall(r"^0\.\d{3}  \S", shown, re.MULTILINE)) == 6  # three hits of two searches
    options = SearchOptions(top_k=3, hybrid=True)
    for query in ("how do I train on several GPUs?", "which files can be read?"):
        for hit in search_index(tmp_path / "runs" / "my-files.db", query, options):
            assert f"{hit.cosine:.3f}  {' '.join(hit.text.split())[:90]}" in shown


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_model_is_tuned_on_pairs(tmp_path: Path) -> None:
    shown = printed(NOTEBOOKS / "tune_on_your_pairs.ipynb", tmp_path)
    assert "stages:" in shown
    scores = re.search(r"ndcg_at_10\D+([\d.]+)\D+([\d.]+)\D+([\d.]+)", shown)
    assert scores is not None, shown
    before, after, _ = map(float, scores.groups())
    assert after > before
    assert (tmp_path / "runs" / "tuned" / "run" / "model" / "README.md").is_file()
    assert "encode" in shown  # the bar of show_progress_bar=True
