"""An encoder: what is needed of an embedding model, and the way from a name to one.

torch and the model libraries are imported when a model is loaded, and not before.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from nvembed.core.arguments import Precision, PrecisionChoice, checked, is_settled
from nvembed.core.errors import ModelError
from nvembed.core.http import post_json
from nvembed.core.reporting import announce, release_notes
from nvembed.data.instructions import Side, read_task, resolve_prompt, side_prompt, task_prompts
from nvembed.interop.model_folder import model_fingerprint

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from tokenizers import Tokenizer

    from nvembed.model.tokens import TokenizedText


class Encoder(Protocol):
    """Turns texts into unit vectors, float32 ``(len(texts), dimension)`` in the order of the texts.

    A task is the name of an MTEB task or of a prompt of the model, or the instruction itself in
    plain words; ``nvembed.data.instructions.resolve_prompt`` makes it a prompt. ``None`` is no
    instruction. An encoder that has prompts of its own says so, see ``prompts_of``.
    """

    @property
    def dimension(self) -> int:
        """Width of the vectors."""
        ...

    def encode_query(
        self, texts: Sequence[str], /, *, task: str | None = None
    ) -> NDArray[np.float32]:
        """Embed queries, which are given without their instruction."""
        ...

    def encode_document(
        self, texts: Sequence[str], /, *, task: str | None = None
    ) -> NDArray[np.float32]:
        """Embed documents; a task only where it is symmetric, and documents get it as well."""
        ...


class BaseEncoder(ABC):
    """An ``Encoder`` whose sides are computed by one method."""

    def encode_query(self, texts: Sequence[str], *, task: str | None = None) -> NDArray[np.float32]:
        """Embed queries; see ``Encoder``."""
        return self._encode("query", texts, task)

    def encode_document(
        self, texts: Sequence[str], *, task: str | None = None
    ) -> NDArray[np.float32]:
        """Embed documents; see ``Encoder``."""
        return self._encode("document", texts, task)

    @abstractmethod
    def _encode(self, side: Side, texts: Sequence[str], task: str | None) -> NDArray[np.float32]:
        pass


def unit_rows(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Bring the rows of ``(N, D)`` to length 1; rows of zeros stay."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(lengths, np.finfo(np.float32).tiny)


def shorten(vectors: NDArray[np.float32], dimension: int) -> NDArray[np.float32]:
    """Keep the first dimensions of unit vectors ``(N, D)`` and bring them back to length 1."""
    return unit_rows(vectors[:, :dimension])


def prompts_of(encoder: Encoder) -> Mapping[str, str | None]:
    """Return the prompts that were saved with a model, by name; none where it keeps none."""
    prompts: Mapping[str, str | None] | None = getattr(encoder, "prompts", None)
    return {} if prompts is None else prompts


def check_task(name: str, task: str | None) -> None:
    """Refuse a task that a model in a folder will not know, before its weights are read."""
    from nvembed.interop.model_folder import ModelSource, check_model_name, holds_graph
    from nvembed.interop.saved import read_prompts

    check_model_name(name)
    if task is not None and Path(name).is_dir() and not holds_graph(name):
        saved = read_prompts(ModelSource(name)).prompts or {}
        read_task(task, {**task_prompts(), **saved})


def set_query_prompt(encoder: Encoder, task: str) -> bool:
    """Make a task the prompt of queries that bring none; return whether the model reads one."""
    if isinstance(encoder, SentenceTransformerEncoder):
        prompt = encoder.prompt_of(task)
    else:
        prompt = resolve_prompt(task, prompts_of(encoder))
    if prompt is None:
        return False
    cast(dict[str, str | None], prompts_of(encoder))["query"] = prompt
    return True


def reading_limit(encoder: Encoder) -> tuple[Tokenizer | None, int | None]:
    """Return the tokenizer of a model, and how many tokens of a document it reads, if it says."""
    inner: Any = encoder
    if isinstance(encoder, SentenceTransformerEncoder):
        inner = encoder.model
    elif isinstance(encoder, OnnxEncoder):
        inner = encoder.text
    tokenizer: Any = getattr(inner, "tokenizer", None)
    limit = getattr(inner, "max_seq_length", getattr(inner, "max_tokens", None))
    if not getattr(tokenizer, "is_fast", False):
        return None, limit
    from nvembed.model.tokens import plain_backend

    prompt = side_prompt(prompts_of(encoder), "document")
    around = 2 + (len(tokenizer.tokenize(prompt)) if prompt else 0)  # BOS and EOS, or the like
    return plain_backend(tokenizer), None if limit is None else limit - around


@checked
def load_encoder(name: str, dtype: PrecisionChoice | None = None) -> Encoder:
    """Load an embedding model by folder or hub id.

    A folder with an exported ONNX graph runs in onnxruntime. NVIDIA's releases, a folder saved by
    this package (``modules.json`` names ``nvembed`` classes)
    and a bare language model (no ``modules.json``) become an ``NVEmbed``; anything else is a plain
    sentence-transformers model.

    Args:
        name: folder, GGUF file, ``package:NAME`` or hub id.
        dtype: type of weights; ``auto`` is what this machine is fastest in, ``int8`` takes products
            in 8 bits on a CPU, ``None`` keeps what was saved. ``auto-nf4`` computes in the same and
            holds weights in 4 bits, see ``NVEmbed.from_pretrained(quantize=…)``.

    Raises:
        ConfigError: an argument of a wrong type.
        ModelError: there is nothing of that name that can be loaded.
    """
    settled = settle_dtype(name, dtype)
    announce(f"loading {name}")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer

    from nvembed.interop.loading import check_vocabulary, loading, prove_encoding
    from nvembed.interop.model_folder import ModelSource, holds_graph
    from nvembed.interop.saved import is_foreign
    from nvembed.interop.weights import check_finite
    from nvembed.model.embedder import NVEmbed

    if holds_graph(name):
        if settled not in (None, "float32"):
            raise ModelError(
                f"an ONNX graph in {settled}",
                where=name,
                expected="float32, which it was exported in",
                hint="Leave --dtype out (--quantize too), or use the model it was exported from",
            )
        return OnnxEncoder(name)
    if not is_foreign(ModelSource(name)):
        computed, _, held = (settled or "").partition("-")
        options: dict[str, Any] = {"dtype": computed or None, "quantize": held or None}
        encoder = cast(Encoder, NVEmbed.from_pretrained(name, **options))
        release_notes()
        return encoder
    if settled not in (None, "float32", "bfloat16"):
        message = f"a plain sentence-transformers model in {settled}"
        expected = "a model that nvembed saved, or a language model"
        raise ModelError(message, where=name, expected=expected, hint="Use --dtype bfloat16")
    with loading(name):
        model = SentenceTransformer(name, model_kwargs={"dtype": settled} if settled else {})
        if isinstance(model[0], Transformer):
            check_vocabulary(model[0].model, model.tokenizer, where=name)
    check_finite(model, where=name)
    prove_encoding(model, name=name)
    release_notes()
    return SentenceTransformerEncoder(model)


def settle_dtype(
    name: str, dtype: PrecisionChoice | None, *, begun: Precision | None = None
) -> Precision | None:
    """Settle the type that a model computes in, for a whole job; see ``settle_precision``."""
    from nvembed.interop.model_folder import check_model_name, holds_graph

    check_model_name(name)
    if is_settled(dtype):
        return dtype
    if holds_graph(name):
        return cast(Precision, dtype.replace("auto", "float32"))
    from nvembed.kernels.machine import settle_precision

    return settle_precision(dtype, begun=begun)


def computed_fingerprint(model: str, dtype: str | None, *settings: object) -> str:
    """Name the vectors of a model, in a settled type, as this machine computes them to the bit."""
    from nvembed.kernels.machine import kernels

    return model_fingerprint(model, dtype, *settings, *kernels())


class SentenceTransformerEncoder(BaseEncoder):
    """A plain sentence-transformers model as an encoder, vectors normalised.

    The task becomes a prompt only for a model that was trained with instructions, which shows in
    its own prompts ("Instruct: ..."). Any other model keeps its own ``query`` and ``document``
    prompts and never sees the task: an instruction in front of a text that it did not learn to read
    harms its vectors. A task that is the name of one of its prompts is that prompt.
    """

    def __init__(self, model: SentenceTransformer) -> None:
        self.model = model
        prompts = (model.prompts or {}).values()
        self.follows_instructions = any(p.strip().startswith("Instruct") for p in prompts if p)

    @property
    def prompts(self) -> Mapping[str, str | None]:
        """The model's own prompts by name."""
        return self.model.prompts or {}

    @property
    def dimension(self) -> int:
        """Width of the vectors."""
        width = self.model.get_embedding_dimension()
        if width is None:
            raise ModelError("the model does not say how wide its vectors are")
        return int(width)

    def prompt_of(self, task: str | None) -> str | None:
        """Return the prompt of a task; ``None`` is the model's own of either side."""
        prompt = resolve_prompt(task, self.prompts)
        named = task is not None and task.strip() in self.prompts
        return prompt if self.follows_instructions or named else None

    def _encode(self, side: Side, texts: Sequence[str], task: str | None) -> NDArray[np.float32]:
        if not texts:
            return np.empty((0, self.dimension), dtype=np.float32)
        encode = self.model.encode_query if side == "query" else self.model.encode_document
        options: Any = {"normalize_embeddings": True, "show_progress_bar": False}
        vectors = encode(list(texts), prompt=self.prompt_of(task), **options)
        # A model in 16 bit normalises in 16 bit, to lengths that are off by up to 0.4 %.
        return unit_rows(np.asarray(vectors, dtype=np.float32))


# --- Endpoints ------------------------------------------------------------------------------------

BATCH_TEXTS = 64
PARALLEL_REQUESTS = 4


def is_endpoint(name: str) -> bool:
    """Tell an address from a folder or a hub id."""
    return name.startswith(("http://", "https://"))


class EndpointEncoder(BaseEncoder):
    """An OpenAI-compatible endpoint (vLLM, TEI, Infinity, hosted ones …), vectors normalised.

    Texts go to ``<url>/embeddings``, with the instruction in front as NVEmbed models have it;
    endpoints of models that know no instructions want none. Batches are sent four at a time; what
    fails for the moment is tried again (``core/http.py``).

    Args:
        url: up to and with ``/v1``.
        model: name that the endpoint knows it by.
        timeout: seconds for one batch.
    """

    def __init__(self, url: str, model: str, *, timeout: float = 120.0) -> None:
        self._url = url.rstrip("/") + "/embeddings"
        self._model = model
        self._timeout = timeout

    @cached_property
    def dimension(self) -> int:
        """Width of the vectors, found by embedding a word."""
        return int(self._embed(["width"]).shape[1])

    def _encode(self, side: Side, texts: Sequence[str], task: str | None) -> NDArray[np.float32]:
        prompt = resolve_prompt(task) or ""  # of documents too; mostly there is none
        batches = [
            [prompt + text for text in texts[start : start + BATCH_TEXTS]]
            for start in range(0, len(texts), BATCH_TEXTS)
        ]
        if not batches:
            return np.empty((0, self.dimension), dtype=np.float32)
        with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
            return unit_rows(np.concatenate(list(pool.map(self._embed, batches))))

    def _embed(self, texts: list[str]) -> NDArray[np.float32]:
        answer = post_json(self._url, {"model": self._model, "input": texts}, timeout=self._timeout)
        try:
            rows = sorted(answer["data"], key=lambda row: int(row["index"]))
            vectors = np.array([row["embedding"] for row in rows], dtype=np.float32)
            if vectors.ndim != 2 or [int(row["index"]) for row in rows] != list(range(len(texts))):
                raise ValueError
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(
                "the answer does not hold one vector per text",
                where=self._url,
                expected='{"data": [{"index": int, "embedding": [float]}]}',
            ) from error
        return vectors


# --- ONNX graphs ----------------------------------------------------------------------------------

GRAPH_FILE = "model.onnx"
GRAPH_INPUTS = ("input_ids", "attention_mask", "pool_mask")
GRAPH_OUTPUT = "sentence_embedding"  # a plain "embedding" is the name of a node already
# Of the backbone, which a caller of the graph has to know.
TOKENIZER_SETTINGS = ("max_tokens", "text_style", "add_bos", "add_eos")
# Padded tokens of one run of the graph: enough to fill the cores, few enough for any memory.
_BATCH_TOKENS = 4096


def padded_inputs(texts: Sequence[TokenizedText]) -> dict[str, NDArray[np.int64]]:
    """The graph's inputs for tokenised texts, padded with zeros on the right."""
    width = max(len(text) for text in texts)
    arrays = {name: np.zeros((len(texts), width), dtype=np.int64) for name in GRAPH_INPUTS}
    for row, text in enumerate(texts):
        arrays["input_ids"][row, : len(text)] = text.ids
        arrays["attention_mask"][row, : len(text)] = 1
        arrays["pool_mask"][row, text.pool_start : len(text)] = 1
    return arrays


def run_graph(session: Any, texts: Sequence[TokenizedText]) -> NDArray[np.float32]:
    """Vectors of tokenised texts."""
    (vectors,) = session.run([GRAPH_OUTPUT], dict(padded_inputs(texts)))
    return np.asarray(vectors, dtype=np.float32)


class OnnxEncoder(BaseEncoder):
    """The graph of a folder that ``nvembed export --format onnx`` wrote, as an encoder."""

    def __init__(self, folder: str | Path) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise ModelError(
                "an ONNX graph needs onnxruntime",
                where=str(folder),
                hint="pip install 'nvembed[onnx]'",
            ) from error
        from transformers import PreTrainedTokenizerFast

        from nvembed.interop.loading import loading
        from nvembed.interop.model_folder import ONNX_FILE, read_json_file
        from nvembed.model.tokens import TextTokenizer

        path = Path(folder)
        with loading(str(path), expected="what nvembed export --format onnx wrote"):
            settings: dict[str, Any] = read_json_file(path / ONNX_FILE)
            special = read_json_file(path / "special_tokens_map.json")
            max_tokens, style, add_bos, add_eos = map(settings.__getitem__, TOKENIZER_SETTINGS)
            self.text = TextTokenizer(
                PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"), **special),
                max_tokens=max_tokens,
                style=style,
                add_bos=add_bos,
                add_eos=add_eos,
            )
            self.prompts: dict[str, str] = settings["prompts"]
            self._session = onnxruntime.InferenceSession(str(path / GRAPH_FILE))
            self.dimension = int(self._session.get_outputs()[0].shape[1])

    def _encode(self, side: Side, texts: Sequence[str], task: str | None) -> NDArray[np.float32]:
        prompt = resolve_prompt(task, self.prompts)
        if prompt is None:
            prompt = side_prompt(self.prompts, side)
        tokens = self.text(texts, prompt)
        vectors = np.empty((len(tokens), self.dimension), dtype=np.float32)
        order = sorted(range(len(tokens)), key=lambda row: -len(tokens[row]))
        start = 0
        while start < len(order):
            # Longest first, so the first text of a batch is as wide as all of it.
            end = start + max(_BATCH_TOKENS // len(tokens[order[start]]), 1)
            batch, start = order[start:end], end
            vectors[batch] = run_graph(self._session, [tokens[row] for row in batch])
        return vectors
