"""From a name to an encoder: our model, a bare language model, or any sentence-transformers model.

torch and the model libraries are imported here and not before.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from nvembed.core.errors import ModelError, UserError
from nvembed.core.notes import release_notes
from nvembed.inference.protocol import Encoder, unit_rows
from nvembed.model.settings import Precision, PrecisionChoice
from nvembed.text.template import query_prompt

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def load_encoder(name: str, dtype: PrecisionChoice | None = None) -> Encoder:
    """Load an embedding model by folder or hub id.

    NVIDIA's releases, a folder saved by this package (``modules.json`` names ``nvembed`` classes)
    and a bare language model (no ``modules.json``) become an ``NVEmbed``; anything else is a plain
    sentence-transformers model.

    Args:
        name: folder or hub id.
        dtype: of the weights; ``auto`` is what this machine is fastest in, ``None`` keeps what was
            saved.

    Raises:
        ModelError: there is nothing of that name that can be loaded.
    """
    settled = settle_dtype(name, dtype)
    from sentence_transformers import SentenceTransformer

    from nvembed.model.embedder import NVEmbed

    try:
        if _is_foreign(name):
            options = {} if settled is None else {"dtype": settled}
            plain = SentenceTransformer(name, model_kwargs=options)
            encoder: Encoder = SentenceTransformerEncoder(plain)
        else:
            encoder = cast(Encoder, NVEmbed.from_pretrained(name, dtype=settled))
        release_notes()
        return encoder
    except UserError:
        raise
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()
        raise ModelError(
            f"cannot be loaded ({reason[0] if reason else type(error).__name__})",
            where=name,
            expected="the folder or the hub id of a model",
            hint="A hub id needs the network, or an earlier download",
        ) from error


def settle_dtype(
    name: str, dtype: PrecisionChoice | None, *, begun: Precision | None = None
) -> Precision | None:
    """Settle the type that a model computes in, for a whole job; see ``settle_precision``.

    Args:
        name: folder or hub id.
        dtype: of the weights, as the user chose it.
        begun: that of the job, where it goes on.

    Raises:
        ModelError: there is no such model folder; told before anything is measured.
    """
    path = Path(name)
    if path.is_file() or (not path.is_dir() and _is_path(name)):
        raise ModelError("no such model folder", where=name, expected="a folder or a hub id")
    if path.is_dir() and not any((path / f).is_file() for f in ("modules.json", "config.json")):
        raise ModelError(
            "no model in this folder", where=name, expected="modules.json or config.json in it"
        )
    if dtype != "auto":
        return dtype
    from nvembed.model.precision import settle_precision

    return settle_precision(dtype, begun=begun)


class SentenceTransformerEncoder:
    """A plain sentence-transformers model behind the encoder protocol, vectors normalised.

    The task becomes a prompt only for a model that was trained with instructions, which shows in
    its own prompts ("Instruct: ..."). Any other model keeps its own ``query`` and ``document``
    prompts and never sees the task: an instruction in front of a text that it did not learn to read
    harms its vectors.
    """

    def __init__(self, model: SentenceTransformer) -> None:
        self._model = model
        prompts = (model.prompts or {}).values()
        self.follows_instructions = any(p.strip().startswith("Instruct") for p in prompts if p)

    @property
    def model(self) -> SentenceTransformer:
        """The wrapped model."""
        return self._model

    @property
    def dimension(self) -> int:
        """Width of the vectors."""
        width = self._model.get_embedding_dimension()
        if width is None:
            raise ModelError("the model does not say how wide its vectors are")
        return int(width)

    def encode_query(self, texts: Sequence[str], *, task: str | None = None) -> NDArray[np.float32]:
        """Embed queries; see :class:`Encoder`."""
        return self._encode(self._model.encode_query, texts, task)

    def encode_document(
        self, texts: Sequence[str], *, task: str | None = None
    ) -> NDArray[np.float32]:
        """Embed documents; see :class:`Encoder`."""
        return self._encode(self._model.encode_document, texts, task)

    def _encode(self, encode: Any, texts: Sequence[str], task: str | None) -> NDArray[np.float32]:
        if not texts:
            return np.empty((0, self.dimension), dtype=np.float32)
        prompt = query_prompt(task) if self.follows_instructions and task is not None else None
        vectors = encode(
            list(texts), prompt=prompt, normalize_embeddings=True, show_progress_bar=False
        )
        # A model in 16 bit normalises in 16 bit, to lengths that are off by up to 0.4 %.
        return unit_rows(np.asarray(vectors, dtype=np.float32))


def _is_path(name: str) -> bool:
    # A hub id is "name" or "owner/name".
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def _is_foreign(name: str) -> bool:
    """Tell a sentence-transformers model that has none of our modules."""
    from nvembed.model.kind import model_kind
    from nvembed.model.source import ModelSource

    source = ModelSource(name)
    if model_kind(source) != "saved":
        return False
    listing = source.require("modules.json")
    try:
        types = [str(entry["type"]) for entry in json.loads(listing.read_text("utf-8"))]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            "not a list of modules", where=str(listing), expected='[{"type": "...", "path": "..."}]'
        ) from error
    return not any(name.startswith("nvembed.") for name in types)
