"""docs/integrations.md, run: in every library queries are ours with their task, documents ours."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nvembed import NVEmbed
from nvembed.serving.engines import build_engine
from serving_fakes import make_config, running
from task_folders import write_task

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "integrations.md"
PARTS = re.split(r"^## ", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE)
pytestmark = pytest.mark.filterwarnings("ignore")  # of other libraries

Names = dict[str, Any]


def snippets(part: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", part, re.MULTILINE | re.DOTALL)


SECTIONS = {part.split("\n")[0]: snippets(part) for part in PARTS[1:] if snippets(part)}


def near(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(np.array(found, dtype=np.float32), expected, atol=1e-5)


@pytest.fixture(scope="module")
def started(
    tmp_path_factory: pytest.TempPathFactory, tiny_decoder_dir: Path
) -> Iterator[tuple[Path, Names]]:
    """The folder that the snippets run in, and the names that the first ones leave."""
    place = tmp_path_factory.mktemp("integrations")
    NVEmbed.from_pretrained(tiny_decoder_dir, device="cpu").save_pretrained(
        str(place / "assets" / "nvembed-smollm2-135m"), create_model_card=False
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("HAYSTACK_TELEMETRY_ENABLED", "false")
        patch.setenv("ANONYMIZED_TELEMETRY", "false")
        names: Names = {}
        for snippet in snippets(PARTS[0]):
            run(snippet, names)
        assert not np.allclose(queries_of(names), plain_queries_of(names), atol=1e-2)
        yield place, names


def run(snippet: str, names: Names) -> Names:
    exec(compile(snippet, DOCUMENT.name, "exec"), names)
    return names


def queries_of(names: Names) -> Any:
    """Our own vectors of the question, with its task."""
    return names["model"].encode_query([names["question"]], task=names["task"])


def plain_queries_of(names: Names) -> Any:
    """The question as a document."""
    return names["model"].encode_document([names["question"]])


@pytest.fixture
def names(started: tuple[Path, Names], monkeypatch: pytest.MonkeyPatch) -> Names:
    place, names = started
    monkeypatch.chdir(place)
    return dict(names)


def both(
    queries: Callable[[str], Any], documents: Callable[[list[str]], Any], names: Names
) -> None:
    """Hold the vectors of a library against ours."""
    near(queries(names["question"]), queries_of(names)[0])
    near(documents(names["texts"]), names["model"].encode_document(names["texts"]))


def test_sentence_transformers(names: Names) -> None:
    run(SECTIONS["sentence-transformers"][0], names)
    near(names["queries"], queries_of(names))
    near(names["documents"], names["model"].encode_document(names["texts"]))


def test_langchain(names: Names) -> None:
    pytest.importorskip("langchain_core", reason="needs nvembed[integrations]")
    run(SECTIONS["LangChain"][0], names)
    embeddings = names["store"].embeddings
    both(embeddings.embed_query, embeddings.embed_documents, names)


def test_langchain_with_its_own_class(names: Names) -> None:
    pytest.importorskip("langchain_huggingface", reason="needs nvembed[integrations]")
    embeddings = run(SECTIONS["LangChain"][1], names)["embeddings"]
    both(embeddings.embed_query, embeddings.embed_documents, names)
    embeddings.query_encode_kwargs = {}  # what the page warns of
    near(embeddings.embed_query(names["question"]), plain_queries_of(names)[0])


def test_llama_index(names: Names) -> None:
    pytest.importorskip("llama_index.core", reason="needs nvembed[integrations]")
    run(SECTIONS["LlamaIndex"][0], names)
    embedding = names["index"]._embed_model
    both(embedding.get_query_embedding, embedding.get_text_embedding_batch, names)


def test_llama_index_with_its_own_class(names: Names) -> None:
    pytest.importorskip("llama_index.embeddings.huggingface", reason="needs nvembed[integrations]")
    embedding = run(SECTIONS["LlamaIndex"][1], names)["embedding"]
    both(embedding.get_query_embedding, embedding.get_text_embedding_batch, names)


def test_haystack(names: Names) -> None:
    pytest.importorskip("haystack", reason="needs nvembed[integrations]")
    run(SECTIONS["Haystack"][0], names)
    stored = {
        document.content: document.embedding for document in names["store"].filter_documents()
    }
    embedder = names["pipeline"].get_component("embedder")
    both(
        lambda text: embedder.run(text=text)["embedding"],
        lambda texts: [stored[text] for text in texts],
        names,
    )


def test_haystack_with_a_server(names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    embedders = pytest.importorskip(
        "haystack.components.embedders", reason="needs nvembed[integrations]"
    )
    haystack = pytest.importorskip("haystack")
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    engine = build_engine(NVEmbed.from_pretrained("for-search", device="cpu"))
    with running(engine, make_config(model_name="docs")) as port:
        place = {"api_base_url": f"http://127.0.0.1:{port}/v1"}
        queries = embedders.OpenAITextEmbedder(model="docs:query", **place)
        documents = embedders.OpenAIDocumentEmbedder(model="docs", progress_bar=False, **place)

        def embed(texts: list[str]) -> list[list[float]]:
            given = [haystack.Document(content=text) for text in texts]
            return [document.embedding for document in documents.run(given)["documents"]]

        both(lambda text: queries.run(text)["embedding"], embed, names)


def test_chroma(names: Names) -> None:
    pytest.importorskip("chromadb", reason="needs nvembed[integrations]")
    run(SECTIONS["Chroma"][0], names)
    stored = names["collection"].get(["sorted", "pi"], include=["embeddings"])["embeddings"]
    documents = names["model"].encode_document(names["texts"])
    near(stored, documents)
    distance = 1 - (documents @ queries_of(names)[0]).max()
    assert names["hits"]["distances"][0][0] == pytest.approx(distance, abs=1e-5)


def test_txtai(names: Names) -> None:
    pytest.importorskip("txtai", reason="needs nvembed[integrations]")
    run(SECTIONS["txtai"][0], names)
    vectors = names["database"].model
    both(
        lambda text: vectors.transform((None, text, None)),
        lambda texts: vectors.batchtransform([(None, text, None) for text in texts], "data"),
        names,
    )


@pytest.mark.slow
def test_bertopic(names: Names) -> None:
    pytest.importorskip("bertopic", reason="needs nvembed[integrations]")
    run(SECTIONS["BERTopic"][0], names)
    assert names["topics"].embedding_model.embedding_model is names["model"]
    assert len(set(names["found"])) == 2
    assert names["found"][:2] == names["found"][2:4]
    again = names["topics"].embedding_model.embed_documents(names["texts"])
    near(again, names["model"].encode_document(names["texts"]))


def test_what_bertopic_looks_for() -> None:
    assert "sentence_transformers" in str(NVEmbed)


def test_mteb(names: Names, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mteb = pytest.importorskip("mteb", reason="needs nvembed[eval]")
    from nvembed.data.instructions import task_prompts
    from nvembed.evaluation import mteb_adapter
    from nvembed.evaluation.tasks import load_tasks

    write_task(tmp_path / "SciFact", "Retrieval")
    (local,) = load_tasks([tmp_path / "SciFact"])
    task = mteb_adapter._mteb_task(local)
    monkeypatch.setattr(mteb, "get_task", lambda name: task if name == "SciFact" else None)
    seen: list[tuple[str, str | None]] = []
    model = names["model"] = NVEmbed.from_pretrained("for-search")
    inner = model._inference

    def noting(inputs: list[str], **options: Any) -> Any:
        seen.extend((text, options["prompt"]) for text in inputs)
        return inner(inputs, **options)

    monkeypatch.setattr(model, "_inference", noting)
    run(SECTIONS["mteb"][0], names)
    prompts = dict(seen)
    assert prompts["soup with bread"] == task_prompts()["SciFact"]
    assert not prompts["a dog chases a cat and the cat runs"]
    assert 0 < names["results"][0].get_score() <= 1


@pytest.mark.slow
def test_joblib(names: Names) -> None:
    run(SECTIONS["joblib"][0], names)
    near(np.concatenate(names["parts"]), names["model"].encode_document(names["texts"]))


def test_every_section_is_tested() -> None:
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    for heading, blocks in SECTIONS.items():
        name = re.sub(r"\W", "_", heading.lower())
        name = {"llamaindex": "llama_index"}.get(name, name)
        assert name in tested, heading
        assert len(blocks) == 1 + (f"{name}_with_its_own_class" in tested)
