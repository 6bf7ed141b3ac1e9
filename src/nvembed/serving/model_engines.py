"""Engines around the kinds of models: ours, stock sentence-transformers, any other encoder."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from nvembed.core.errors import UserError
from nvembed.encoding.encoder import Encoder, SentenceTransformerEncoder, prompts_of, unit_rows
from nvembed.serving.engine import Engine, Item, Token, Wish
from nvembed.text.instructions import resolve_prompt, side_prompt
from nvembed.text.long_texts import text_ends
from nvembed.text.tokens import TokenizedText

if TYPE_CHECKING:
    from nvembed.model.embedder import NVEmbed

# Of an encoder whose tokenizer is its own affair.
CHARS_PER_TOKEN = 4

MOST_FORWARDS = 4
"""Side by side on a CPU, where nothing else is said: each holds its own activations."""

# Of a model that reads texts of any length.
_NO_LIMIT = 2**31 - 1


class PackEngine:
    """An ``NVEmbed``: texts of any clients and prompts side by side in one flat batch.

    On a CPU several forwards run side by side, each with its share of the threads. The threads of
    one forward wait for each other some hundred times; as soon as the event loop or a client needs
    one of their cores, all of them stand still until it is back.

    Args:
        model: the model.
        forwards: how many side by side; ``None`` is the default of ``BatchingConfig``.
    """

    takes_ids = True
    supports_tokens = True
    supports_raw = True

    def __init__(self, model: NVEmbed, forwards: int | None = None) -> None:
        import torch

        from nvembed.model.packs import CPU_PACK_TOKENS, CUDA_PACK_TOKENS

        self._model = model.eval()
        self._tokenizer = model.backbone.text_tokenizer
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
    def max_tokens(self) -> int:
        """Longest sequence, with prompt and special tokens."""
        return self._model.backbone.max_tokens

    @property
    def prompts(self) -> Mapping[str, str | None]:
        """The model's own prompts by name."""
        return prompts_of(cast(Encoder, self._model))

    @property
    def dtype(self) -> str:
        """Type of the weights."""
        return str(self._model.backbone.dtype).removeprefix("torch.")

    @property
    def pooling(self) -> str:
        """Kind of the pooling."""
        return pooling_kind(self._model.pooling)

    def prepare(self, texts: Sequence[str], wish: Wish) -> list[Item]:
        """Tokenise; see :class:`Engine`."""
        prompt = self._prompt(wish)
        if wish.cut == "end":
            rows = self._tokenizer(texts, prompt)
        else:
            rows = text_ends(self._tokenizer, texts, prompt, cut=wish.cut == "start")
        return [Item(row, len(row), wish.normalize) for row in rows]

    def prepare_ids(self, rows: Sequence[Sequence[int]], wish: Wish) -> list[Item]:
        """Add the special tokens; see :class:`Engine`."""
        texts = self._tokenizer.from_ids(rows, self._vocabulary)
        if wish.cut != "end":
            frame = self._tokenizer.whole([""])[0]
            room = self.max_tokens - len(frame.head) - len(frame.tail)
            kept = [row[-room:] for row in rows] if wish.cut == "start" else rows
            texts = [TokenizedText((*frame.head, *ids, *frame.tail), 0) for ids in kept]
        return [Item(text, len(text), wish.normalize) for text in texts]

    def tokens(self, texts: Sequence[str], prompt: str, *, special: bool) -> list[list[Token]]:
        """Tokenise to the sequences that the model reads; see :class:`Engine`."""
        tokenizer: Any = self._model.backbone.tokenizer
        frame = self._tokenizer.whole([""])[0]
        rows = []
        for text in texts:
            whole = prompt + text
            encoded = tokenizer(
                whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
            row = [
                Token(id, whole[start:stop], False, start, stop)
                for id, (start, stop) in zip(
                    encoded["input_ids"], encoded["offset_mapping"], strict=True
                )
            ]
            if special:
                head, tail = (_special(tokenizer, ids) for ids in (frame.head, frame.tail))
                row = [*head, *row, *tail]
            rows.append(row)
        return rows

    def embed(self, items: Sequence[Item]) -> NDArray[np.float32]:
        """Run the model once; see :class:`Engine`."""
        import torch

        from nvembed.model.packs import embed_filled

        if self._on_cpu:
            torch.set_num_threads(self._threads)  # of this Python thread alone
        texts = [item.content for item in items]
        with torch.inference_mode():
            pooled = embed_filled(self._model, texts, normalized=False)[:, : self.dimension]
            return _normalized(pooled.float().cpu().numpy(), items)

    def _prompt(self, wish: Wish) -> str:
        if wish.prompt is not None:
            return wish.prompt
        prompt = resolve_prompt(wish.task, self.prompts)
        if prompt is not None:
            return prompt
        return side_prompt(self.prompts, wish.side, self._model.default_prompt_name)


class EncoderEngine:
    """Any other encoder: one call per side and instruction, tokens guessed from characters."""

    takes_ids = False
    supports_tokens = False
    supports_raw = False
    batch_tokens = 4096
    forwards = 1  # its tokenizer is not safe in several threads

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    @property
    def dimension(self) -> int:
        """Width of the vectors."""
        return self._encoder.dimension

    @property
    def max_tokens(self) -> int:
        """No limit that is known."""
        return _NO_LIMIT

    @property
    def dtype(self) -> str:
        """Type of the vectors."""
        return "float32"

    @property
    def pooling(self) -> str:
        """Not known."""
        return "unknown"

    @property
    def prompts(self) -> Mapping[str, str | None]:
        """None that could be told to the encoder by name."""
        return {}

    def prepare(self, texts: Sequence[str], wish: Wish) -> list[Item]:
        """Guess lengths; see :class:`Engine`."""
        return [Item((text, wish), 1 + len(text) // CHARS_PER_TOKEN) for text in texts]

    def prepare_ids(self, rows: Sequence[Sequence[int]], wish: Wish) -> list[Item]:
        """Refuse; see ``takes_ids``."""
        raise _unknown_tokenizer()

    def tokens(self, texts: Sequence[str], prompt: str, *, special: bool) -> list[list[Token]]:
        """Refuse; see ``supports_tokens``."""
        raise _unknown_tokenizer()

    def embed(self, items: Sequence[Item]) -> NDArray[np.float32]:
        """Call the encoder; see :class:`Engine`."""
        rows_of: dict[Wish, list[int]] = {}
        for row, item in enumerate(items):
            rows_of.setdefault(item.content[1], []).append(row)
        vectors = np.empty((len(items), self.dimension), dtype=np.float32)
        for wish, rows in rows_of.items():
            vectors[rows] = self._vectors([items[row].content[0] for row in rows], wish)
        return vectors

    def _vectors(self, texts: list[str], wish: Wish) -> NDArray[np.float32]:
        encoder = self._encoder
        encode = encoder.encode_query if wish.side == "query" else encoder.encode_document
        return encode(texts, task=wish.task)


class StockEngine(EncoderEngine):
    """A stock sentence-transformers model whose tokenizer is a fast one."""

    supports_tokens = True
    supports_raw = True

    def __init__(self, encoder: SentenceTransformerEncoder) -> None:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.base.modules import Normalize

        super().__init__(encoder)
        model = self._model = encoder.model
        self._stock = encoder
        self._pooled = SentenceTransformer(
            modules=[module for module in model if not isinstance(module, Normalize)],
            device=str(model.device),
            prompts={name: prompt or "" for name, prompt in encoder.prompts.items()},
            default_prompt_name=model.default_prompt_name,
            truncate_dim=model.truncate_dim,
        )
        # Its own truncation is set anew by every call of the model, in another thread.
        self._tokenizer = copy.deepcopy(model.tokenizer)

    @property
    def max_tokens(self) -> int:
        """Longest sequence, with prompt and special tokens."""
        limit = self._model.max_seq_length
        return _NO_LIMIT if limit is None else int(limit)

    @property
    def prompts(self) -> Mapping[str, str | None]:
        """The model's own prompts by name."""
        return self._stock.prompts

    @property
    def dtype(self) -> str:
        """Type of the weights."""
        return str(self._model.dtype).removeprefix("torch.")

    @property
    def pooling(self) -> str:
        """Kind of the pooling."""
        return pooling_kind(self._model[1]) if len(self._model) > 1 else "none"

    def prepare(self, texts: Sequence[str], wish: Wish) -> list[Item]:
        """Count tokens, and cut the beginning where that is wanted; see :class:`Engine`."""
        prompt = self._prompt(wish)
        items = []
        for text in texts:
            tokens = self._length(prompt + text)
            while wish.cut == "start" and tokens > self.max_tokens:
                text = self._without_beginning(text, tokens - self.max_tokens)
                tokens = self._length(prompt + text)
            if wish.cut != "none":
                tokens = min(tokens, self.max_tokens)
            items.append(Item((text, wish), tokens, wish.normalize))
        return items

    def tokens(self, texts: Sequence[str], prompt: str, *, special: bool) -> list[list[Token]]:
        """Tokenise; see :class:`Engine`."""
        rows = []
        for text in texts:
            whole = prompt + text
            encoded = self._encoded(whole, special=special)
            ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
            rows.append(
                [
                    _special(self._tokenizer, [id])[0]
                    if added
                    else Token(id, whole[start:stop], False, start, stop)
                    for id, (start, stop), added in zip(
                        ids, offsets, encoded["special_tokens_mask"], strict=True
                    )
                ]
            )
        return rows

    def _vectors(self, texts: list[str], wish: Wish) -> NDArray[np.float32]:
        model = self._pooled
        encode = model.encode_query if wish.side == "query" else model.encode_document
        prompt = self._stock.prompt_of(wish.task) if wish.prompt is None else wish.prompt
        found = encode(texts, prompt=prompt, normalize_embeddings=False, show_progress_bar=False)
        vectors = np.asarray(found, dtype=np.float32)
        return unit_rows(vectors) if wish.normalize else vectors

    def _prompt(self, wish: Wish) -> str:
        if wish.prompt is not None:
            return wish.prompt
        prompt = self._stock.prompt_of(wish.task)
        if prompt is not None:
            return prompt
        return side_prompt(self.prompts, wish.side, self._model.default_prompt_name)

    def _length(self, text: str) -> int:
        return len(self._encoded(text, special=True)["input_ids"])

    def _without_beginning(self, text: str, tokens: int) -> str:
        offsets = self._encoded(text, special=False)["offset_mapping"]
        if tokens >= len(offsets):
            raise UserError(
                "the instruction leaves no room for the text",
                where=f"max_tokens={self.max_tokens}",
                hint="Shorten the instruction",
            )
        return text[max(offsets[tokens][0], 1) :]

    def _encoded(self, text: str, *, special: bool) -> Any:
        return self._tokenizer(
            text,
            add_special_tokens=special,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            truncation=False,
            verbose=False,
        )


def build_engine(encoder: Encoder, forwards: int | None = None) -> Engine:
    """Put the fitting engine around a loaded model; ``forwards`` as in ``BatchingConfig``."""
    from nvembed.model.embedder import NVEmbed

    if isinstance(encoder, NVEmbed):
        return PackEngine(encoder, forwards)
    if isinstance(encoder, SentenceTransformerEncoder) and getattr(
        encoder.model.tokenizer, "is_fast", False
    ):
        return StockEngine(encoder)
    return EncoderEngine(encoder)


def pooling_kind(module: Any) -> str:
    """Name a pooling as TEI does where it knows it: ``mean``, ``cls``, ``last_token``."""
    mode = getattr(module, "pooling_mode", None)
    if isinstance(mode, str):
        return {"lasttoken": "last_token"}.get(mode, mode)
    return {
        "MeanPooling": "mean",
        "LastTokenPooling": "last_token",
        "LatentAttentionPooling": "latent",
        "SelfAttentionPooling": "self_attention",
    }.get(type(module).__name__, type(module).__name__)


def _normalized(vectors: NDArray[np.float32], items: Sequence[Item]) -> NDArray[np.float32]:
    # A model in 16 bit normalises in 16 bit, to lengths that are off by up to 0.4 %.
    wanted = np.array([item.normalize for item in items])
    return np.where(wanted[:, None], unit_rows(vectors), vectors)


def _special(tokenizer: Any, ids: Sequence[int]) -> list[Token]:
    names = tokenizer.convert_ids_to_tokens(list(ids))
    return [Token(id, name, True, None, None) for id, name in zip(ids, names, strict=True)]


def _unknown_tokenizer() -> UserError:
    return UserError("the tokenizer of this model is not known", expected="texts")
