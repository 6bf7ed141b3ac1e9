"""An encoder: what is needed of an embedding model, and the way from a name to one.

torch and the model libraries are imported when a model is loaded, and not before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from nvembed.core.arguments import Precision, PrecisionChoice, checked
from nvembed.core.errors import ModelError
from nvembed.core.reporting import release_notes
from nvembed.interop.model_folder import model_fingerprint
from nvembed.text.instructions import resolve_prompt

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


class Encoder(Protocol):
    """Turns texts into unit vectors, float32 ``(len(texts), dimension)`` in the order of the texts.

    A task is the name of an MTEB task or of a prompt of the model, or the instruction itself in
    plain words; ``nvembed.text.instructions.resolve_prompt`` makes it a prompt. ``None`` is no
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


def unit_rows(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Bring the rows of ``(N, D)`` to length 1; rows of zeros stay."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(lengths, np.finfo(np.float32).tiny)


def prompts_of(encoder: Encoder) -> Mapping[str, str | None]:
    """Return the prompts that were saved with a model, by name; none where it keeps none."""
    prompts: Mapping[str, str | None] | None = getattr(encoder, "prompts", None)
    return prompts or {}


@checked
def load_encoder(name: str, dtype: PrecisionChoice | None = None) -> Encoder:
    """Load an embedding model by folder or hub id.

    A folder with an exported ONNX graph runs in onnxruntime. NVIDIA's releases, a folder saved by
    this package (``modules.json`` names ``nvembed`` classes)
    and a bare language model (no ``modules.json``) become an ``NVEmbed``; anything else is a plain
    sentence-transformers model.

    Args:
        name: folder or hub id.
        dtype: type of weights; ``auto`` is what this machine is fastest in, ``None`` keeps what was
            saved.

    Raises:
        ConfigError: an argument of a wrong type.
        ModelError: there is nothing of that name that can be loaded.
    """
    settled = settle_dtype(name, dtype)
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer

    from nvembed.interop.loading import check_vocabulary, loading, prove_encoding
    from nvembed.interop.model_folder import ModelSource, holds_graph, is_foreign
    from nvembed.interop.weights import check_finite
    from nvembed.model.embedder import NVEmbed

    if holds_graph(name):
        from nvembed.encoding.export.onnx import OnnxEncoder

        if settled not in (None, "float32"):
            raise ModelError(
                f"an ONNX graph in {settled}",
                where=name,
                expected="float32, which it was exported in",
                hint="Leave --dtype out, or use the model that it was exported from",
            )
        return OnnxEncoder(name)
    if not is_foreign(ModelSource(name)):
        encoder = cast(Encoder, NVEmbed.from_pretrained(name, dtype=settled))
        release_notes()
        return encoder
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
    if dtype != "auto":
        return dtype
    if holds_graph(name):
        return "float32"
    from nvembed.kernels.precision import settle_precision

    return settle_precision(dtype, begun=begun)


def computed_fingerprint(model: str, dtype: str | None, *settings: object) -> str:
    """Name the vectors of a model, in a settled type, as this machine computes them to the bit."""
    from nvembed.kernels.precision import kernels

    return model_fingerprint(model, dtype, *settings, *kernels())


class SentenceTransformerEncoder:
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

    def encode_query(self, texts: Sequence[str], *, task: str | None = None) -> NDArray[np.float32]:
        """Embed queries; see :class:`Encoder`."""
        return self._encode(self.model.encode_query, texts, task)

    def encode_document(
        self, texts: Sequence[str], *, task: str | None = None
    ) -> NDArray[np.float32]:
        """Embed documents; see :class:`Encoder`."""
        return self._encode(self.model.encode_document, texts, task)

    def prompt_of(self, task: str | None) -> str | None:
        """Return the prompt of a task; ``None`` is the model's own of either side."""
        prompt = resolve_prompt(task, self.prompts)
        named = task is not None and task.strip() in self.prompts
        return prompt if self.follows_instructions or named else None

    def _encode(self, encode: Any, texts: Sequence[str], task: str | None) -> NDArray[np.float32]:
        if not texts:
            return np.empty((0, self.dimension), dtype=np.float32)
        options = {"normalize_embeddings": True, "show_progress_bar": False}
        vectors = encode(list(texts), prompt=self.prompt_of(task), **options)
        # A model in 16 bit normalises in 16 bit, to lengths that are off by up to 0.4 %.
        return unit_rows(np.asarray(vectors, dtype=np.float32))
