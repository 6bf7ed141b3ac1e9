"""The model as the server sees it: texts become items with a token count, items become vectors.

``prepare`` is called one at a time, from any thread; ``embed`` from ``forwards`` threads at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from nvembed.core.errors import UserError
from nvembed.inference.protocol import Encoder, unit_rows
from nvembed.text.template import query_prompt

if TYPE_CHECKING:
    from nvembed.model.embedder import NVEmbed

Side = Literal["query", "document"]

# Of an encoder whose tokenizer is its own affair.
CHARS_PER_TOKEN = 4

MOST_FORWARDS = 4
"""Side by side on a CPU, where nothing else is said: each holds its own activations."""


@dataclass(frozen=True, slots=True)
class Wish:
    """How texts are to be read.

    Attributes:
        side: which of the encoder's two methods they are for.
        task: the instruction in plain words; ``None`` is the model's own prompt of that side.
    """

    side: Side = "document"
    task: str | None = None


@dataclass(frozen=True, slots=True)
class Item:
    """One text, ready for the model.

    Attributes:
        content: what ``embed`` of the same engine reads.
        tokens: its length, at least 1.
    """

    content: Any
    tokens: int


class Engine(Protocol):
    """What the server needs of a model."""

    @property
    def dimension(self) -> int:
        """Width of the vectors."""
        ...

    @property
    def takes_ids(self) -> bool:
        """Whether token ids can be embedded."""
        ...

    @property
    def batch_tokens(self) -> int:
        """Tokens of a forward that the device is fastest with."""
        ...

    @property
    def forwards(self) -> int:
        """How many threads may call ``embed`` at once."""
        ...

    def prepare(self, texts: Sequence[str], wish: Wish) -> list[Item]:
        """Tokenise texts.

        Raises:
            UserError: the instruction leaves no room for a text.
        """
        ...

    def prepare_ids(self, rows: Sequence[Sequence[int]]) -> list[Item]:
        """Take ids of the model's tokenizer, without special tokens.

        Raises:
            UserError: an id that the vocabulary does not have.
        """
        ...

    def embed(self, items: Sequence[Item]) -> NDArray[np.float32]:
        """Embed in one forward: ``(len(items), dimension)``, rows of length 1."""
        ...


class PackEngine:
    """An ``NVEmbed``: texts of any clients and prompts side by side in one flat batch.

    On a CPU several forwards run side by side, each with its share of the threads. The threads of
    one forward wait for each other some hundred times; as soon as the event loop or a client needs
    one of their cores, all of them stand still until it is back.

    Args:
        model: the model.
        forwards: how many side by side; ``None`` is the default of ``BatchingConfig``.
    """

    def __init__(self, model: NVEmbed, forwards: int | None = None) -> None:
        import torch

        from nvembed.model.packs import CPU_PACK_TOKENS, CUDA_PACK_TOKENS

        self._model = model.eval()
        self._vocabulary = int(model.backbone.model.config.get_text_config().vocab_size)
        self._on_cpu = model.device.type == "cpu"
        cores = torch.get_num_threads()
        self.batch_tokens = CPU_PACK_TOKENS if self._on_cpu else CUDA_PACK_TOKENS
        self.forwards = forwards or (min(cores, MOST_FORWARDS) if self._on_cpu else 1)
        self._threads = max(1, cores // self.forwards)

    @property
    def dimension(self) -> int:
        """Width of the vectors."""
        return self._model.dimension

    @property
    def takes_ids(self) -> bool:
        """Always."""
        return True

    def prepare(self, texts: Sequence[str], wish: Wish) -> list[Item]:
        """Tokenise; see :class:`Engine`."""
        prompt = self._own_prompt(wish.side) if wish.task is None else query_prompt(wish.task)
        rows = self._model.backbone.tokenize_texts(texts, prompt)
        return [Item(row, len(row)) for row in rows]

    def prepare_ids(self, rows: Sequence[Sequence[int]]) -> list[Item]:
        """Add the special tokens; see :class:`Engine`."""
        texts = self._model.backbone.text_tokenizer.from_ids(rows, self._vocabulary)
        return [Item(text, len(text)) for text in texts]

    def embed(self, items: Sequence[Item]) -> NDArray[np.float32]:
        """Run the model once; see :class:`Engine`."""
        import torch

        from nvembed.model.packs import embed_filled

        if self._on_cpu:
            torch.set_num_threads(self._threads)  # of this Python thread alone
        texts = [item.content for item in items]
        with torch.inference_mode():
            vectors = embed_filled(self._model, texts)[:, : self.dimension]
            # A model in 16 bit normalises in 16 bit, to lengths that are off by up to 0.4 %.
            return unit_rows(vectors.float().cpu().numpy())

    def _own_prompt(self, side: Side) -> str:
        # As encode_query and encode_document of sentence-transformers choose.
        names = ("query",) if side == "query" else ("document", "passage", "corpus")
        prompts = self._model.prompts
        name = next((name for name in names if name in prompts), self._model.default_prompt_name)
        return (prompts.get(name) or "") if name is not None else ""


class EncoderEngine:
    """Any other encoder: one call per side and instruction, tokens guessed from characters."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    @property
    def dimension(self) -> int:
        """Width of the vectors."""
        return self._encoder.dimension

    batch_tokens = 4096
    forwards = 1  # its tokenizer is not safe in several threads

    @property
    def takes_ids(self) -> bool:
        """Never: nothing is known of its tokenizer."""
        return False

    def prepare(self, texts: Sequence[str], wish: Wish) -> list[Item]:
        """Guess lengths; see :class:`Engine`."""
        return [Item((text, wish), 1 + len(text) // CHARS_PER_TOKEN) for text in texts]

    def prepare_ids(self, rows: Sequence[Sequence[int]]) -> list[Item]:
        """Refuse; see ``takes_ids``."""
        raise UserError("the tokenizer of this model is not known", expected="texts")

    def embed(self, items: Sequence[Item]) -> NDArray[np.float32]:
        """Call the encoder; see :class:`Engine`."""
        rows_of: dict[Wish, list[int]] = {}
        for row, item in enumerate(items):
            rows_of.setdefault(item.content[1], []).append(row)
        vectors = np.empty((len(items), self.dimension), dtype=np.float32)
        for wish, rows in rows_of.items():
            encoder = self._encoder
            encode = encoder.encode_query if wish.side == "query" else encoder.encode_document
            vectors[rows] = encode([items[row].content[0] for row in rows], task=wish.task)
        return vectors


def build_engine(encoder: Encoder, forwards: int | None = None) -> Engine:
    """Put the fitting engine around a loaded model; ``forwards`` as in ``BatchingConfig``."""
    from nvembed.model.embedder import NVEmbed

    if isinstance(encoder, NVEmbed):
        return PackEngine(encoder, forwards)
    return EncoderEngine(encoder)
