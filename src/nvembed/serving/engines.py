"""The model as the server sees it: texts become items with a token count, items become vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from nvembed.core.errors import UserError
from nvembed.data.instructions import Side, resolve_prompt, side_prompt
from nvembed.model.encoder import Encoder, SentenceTransformerEncoder, prompts_of, unit_rows
from nvembed.model.tokens import TokenizedText, plain_backend, text_ends

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from nvembed.model.embedder import NVEmbed

CHARS_PER_TOKEN = 4  # of an encoder whose tokenizer is its own affair
MOST_FORWARDS = 4  # on a CPU, where nothing else is said: each holds its own activations
_NO_LIMIT = 2**31 - 1  # of a model that reads texts of any length

Cut = Literal["end", "start", "none"]
"""What is cut of a text that is too long for the model; ``none`` keeps it all."""


@dataclass(frozen=True, slots=True)
class EmbedOptions:
    """How texts are read: by which method of ``Encoder``, with which prompt, what is cut."""

    input_type: Side = "document"
    task: str | None = None  # see ``Encoder``; None is the model's own prompt of the input type
    prompt: str | None = None  # stands in front of the texts in place of that
    cut: Cut = "end"
    normalize: bool = True  # vectors have length 1; else they are as the pooling gives them


@dataclass(frozen=True, slots=True)
class Item:
    """One text, ready for the engine that made it."""

    content: Any
    tokens: int  # at least 1; above ``max_tokens`` where nothing was to be cut
    options: EmbedOptions = EmbedOptions()


Token = dict[str, Any]
"""What ``/tokenize`` says of a token: id, text, whether it is special (put in by the tokenizer, as
BOS and EOS are), and first and last-plus-one character from the beginning of the prompt."""


class EncoderEngine:
    """Any encoder: one call per method and task, tokens guessed from characters.

    Texts are prepared one call at a time, from any thread; ``forwards`` threads ``embed`` at once.
    """

    takes_ids = False  # token ids can be embedded
    supports_tokens = False  # ``tokens`` works, ``cut`` may be anything
    supports_raw = False  # ``normalize`` may be False
    batch_tokens = 4096  # of a forward that the device is fastest with
    forwards = 1  # the tokenizer of an encoder is not safe in several threads
    dtype = "float32"
    pooling = "unknown"
    prompts: Mapping[str, str | None] = MappingProxyType({})  # the model's own, by name

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    @property
    def dimension(self) -> int:
        """Width of the vectors."""
        return self._encoder.dimension

    @property
    def max_tokens(self) -> int:
        """Longest sequence, with prompt and special tokens."""
        return _NO_LIMIT

    def prepare(self, texts: Sequence[str], options: EmbedOptions) -> list[Item]:
        """Tokenise texts; a UserError where the instruction leaves no room for one."""
        return [Item(text, 1 + len(text) // CHARS_PER_TOKEN, options) for text in texts]

    def prepare_ids(self, rows: Sequence[Sequence[int]], options: EmbedOptions) -> list[Item]:
        """Take ids without special tokens, bare; a UserError where the vocabulary lacks one."""
        raise _unknown_tokenizer()

    def tokens(self, texts: Sequence[str], prompt: str, *, special: bool) -> list[list[Token]]:
        """Return all tokens of texts behind a prompt, with BOS and EOS where ``special``."""
        raise _unknown_tokenizer()

    def embed(self, items: Sequence[Item]) -> NDArray[np.float32]:
        """Embed in one forward: ``(len(items), dimension)``, rows of length 1 where wanted."""
        rows_of: dict[EmbedOptions, list[int]] = {}
        for row, item in enumerate(items):
            rows_of.setdefault(item.options, []).append(row)
        vectors = np.empty((len(items), self.dimension), dtype=np.float32)
        for options, rows in rows_of.items():
            vectors[rows] = self._vectors([items[row].content for row in rows], options)
        return vectors

    def _vectors(self, texts: list[str], options: EmbedOptions) -> NDArray[np.float32]:
        query = options.input_type == "query"
        encode = self._encoder.encode_query if query else self._encoder.encode_document
        return encode(texts, task=options.task)


class PackEngine(EncoderEngine):
    """An ``NVEmbed``: texts of any clients and prompts side by side in one flat batch.

    On a CPU several forwards run side by side, each with its share of the threads, since those of
    one forward wait for each other some hundred times.
    """

    takes_ids = True
    supports_tokens = True
    supports_raw = True

    def __init__(self, model: NVEmbed, forwards: int | None = None) -> None:
        import torch

        from nvembed.model.packs import CPU_PACK_TOKENS, CUDA_PACK_TOKENS

        super().__init__(cast(Encoder, model))
        self._model = model.eval()
        # No weight changes here: latents are folded once, as soon as that pays.
        self._fixed = ExitStack()
        self._fixed.enter_context(model.pooling.fixed_weights())
        self._tokenizer = model.backbone.text_tokenizer
        self._vocabulary = int(model.backbone.model.config.get_text_config().vocab_size)
        self._on_cpu = model.device.type == "cpu"
        cores = torch.get_num_threads()
        self.batch_tokens = CPU_PACK_TOKENS if self._on_cpu else CUDA_PACK_TOKENS
        self.forwards = forwards or (min(cores, MOST_FORWARDS) if self._on_cpu else 1)
        self._threads = max(1, cores // self.forwards)
        self.prompts = prompts_of(self._encoder)
        self.dtype = str(model.backbone.dtype).removeprefix("torch.")
        self.pooling = _pooling_kind(model.pooling)

    @property
    def max_tokens(self) -> int:
        """Longest sequence, with prompt and special tokens."""
        return self._model.backbone.max_tokens

    @cached_property
    def _backend(self) -> Tokenizer:
        return plain_backend(self._model.backbone.tokenizer)

    def prepare(self, texts: Sequence[str], options: EmbedOptions) -> list[Item]:
        """Tokenise."""
        task_prompt = resolve_prompt(options.task, self.prompts)
        prompt = _prompt(options, task_prompt, self.prompts, self._model.default_prompt_name)
        if options.cut == "end":
            rows = self._tokenizer(texts, prompt)
        else:
            rows = text_ends(self._tokenizer, texts, prompt, cut=options.cut == "start")
        return [Item(row, len(row), options) for row in rows]

    def prepare_ids(self, rows: Sequence[Sequence[int]], options: EmbedOptions) -> list[Item]:
        """Add the special tokens."""
        texts = self._tokenizer.from_ids(rows, self._vocabulary)
        if options.cut != "end":
            frame = self._tokenizer.whole([""])[0]
            room = self.max_tokens - len(frame.head) - len(frame.tail)
            kept = [row[-room:] for row in rows] if options.cut == "start" else rows
            texts = [TokenizedText((*frame.head, *ids, *frame.tail), 0) for ids in kept]
        return [Item(text, len(text), options) for text in texts]

    def tokens(self, texts: Sequence[str], prompt: str, *, special: bool) -> list[list[Token]]:
        """Tokenise to the sequences that the model reads."""
        rows = [_tokens(self._backend, prompt + text, special=False) for text in texts]
        if not special:
            return rows
        frame = self._tokenizer.whole([""])[0]
        head, tail = ([_special(self._backend, i) for i in ids] for ids in (frame.head, frame.tail))
        return [[*head, *row, *tail] for row in rows]

    def embed(self, items: Sequence[Item]) -> NDArray[np.float32]:
        """Run the model once."""
        import torch

        from nvembed.model.packs import embed_filled

        if self._on_cpu:
            torch.set_num_threads(self._threads)  # of this thread, and of threads to come
        texts = [item.content for item in items]
        with torch.inference_mode():
            pooled = embed_filled(self._model, texts, normalized=False)[:, : self.dimension]
            vectors = pooled.float().cpu().numpy()
        # A model in 16 bit normalises in 16 bit, to lengths that are off by up to 0.4 %.
        wanted = np.array([[item.options.normalize] for item in items])
        return np.where(wanted, unit_rows(vectors), vectors)


class StockEngine(EncoderEngine):
    """A stock sentence-transformers model whose tokenizer is a fast one."""

    supports_tokens = True
    supports_raw = True

    def __init__(self, encoder: SentenceTransformerEncoder) -> None:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.base.modules import Normalize

        super().__init__(encoder)
        self._stock = encoder
        model = self._model = encoder.model
        self.prompts = encoder.prompts
        self.dtype = str(model.dtype).removeprefix("torch.")
        self.pooling = _pooling_kind(model[1]) if len(model) > 1 else "none"
        self._pooled = SentenceTransformer(
            modules=[module for module in model if not isinstance(module, Normalize)],
            device=str(model.device),
            prompts={name: prompt or "" for name, prompt in encoder.prompts.items()},
            default_prompt_name=model.default_prompt_name,
            truncate_dim=model.truncate_dim,
        )
        # Its own truncation is set anew by every call of the model, in another thread.
        self._backend = plain_backend(model.tokenizer)

    @property
    def max_tokens(self) -> int:
        """Longest sequence, with prompt and special tokens."""
        limit = self._model.max_seq_length
        return _NO_LIMIT if limit is None else int(limit)

    def prepare(self, texts: Sequence[str], options: EmbedOptions) -> list[Item]:
        """Count tokens, and cut the beginning where that is wanted."""
        task_prompt, default = self._stock.prompt_of(options.task), self._model.default_prompt_name
        prompt = _prompt(options, task_prompt, self.prompts, default)
        items = []
        for text in texts:
            tokens = len(self._backend.encode(prompt + text))
            while options.cut == "start" and tokens > self.max_tokens:
                text = self._without_beginning(text, tokens - self.max_tokens)
                tokens = len(self._backend.encode(prompt + text))
            if options.cut != "none":
                tokens = min(tokens, self.max_tokens)
            items.append(Item(text, tokens, options))
        return items

    def tokens(self, texts: Sequence[str], prompt: str, *, special: bool) -> list[list[Token]]:
        """Tokenise."""
        return [_tokens(self._backend, prompt + text, special=special) for text in texts]

    def _vectors(self, texts: list[str], options: EmbedOptions) -> NDArray[np.float32]:
        query = options.input_type == "query"
        encode = self._pooled.encode_query if query else self._pooled.encode_document
        prompt = self._stock.prompt_of(options.task) if options.prompt is None else options.prompt
        found = encode(texts, prompt=prompt, normalize_embeddings=False, show_progress_bar=False)
        vectors = np.asarray(found, dtype=np.float32)
        return unit_rows(vectors) if options.normalize else vectors

    def _without_beginning(self, text: str, tokens: int) -> str:
        offsets = self._backend.encode(text, add_special_tokens=False).offsets
        if tokens >= len(offsets):
            raise UserError(
                "the instruction leaves no room for the text",
                where=f"max_tokens={self.max_tokens}",
                hint="Shorten the instruction",
            )
        return text[max(offsets[tokens][0], 1) :]


def build_engine(encoder: Encoder, forwards: int | None = None) -> EncoderEngine:
    """Put the fitting engine around a loaded model; ``forwards`` as in ``BatchingConfig``."""
    from nvembed.model.embedder import NVEmbed

    if isinstance(encoder, NVEmbed):
        return PackEngine(encoder, forwards)
    stock = isinstance(encoder, SentenceTransformerEncoder)
    fast = stock and getattr(cast(Any, encoder).model.tokenizer, "is_fast", False)
    return StockEngine(cast(Any, encoder)) if fast else EncoderEngine(encoder)


def _pooling_kind(module: Any) -> str:
    """Name a pooling as TEI does where it knows it: ``mean``, ``cls``, ``last_token``."""
    mode = getattr(module, "pooling_mode", None)
    name = mode if isinstance(mode, str) else type(module).__name__
    return {
        "lasttoken": "last_token",
        "MeanPooling": "mean",
        "LastTokenPooling": "last_token",
        "LatentAttentionPooling": "latent",
        "SelfAttentionPooling": "self_attention",
    }.get(name, name)


def _prompt(
    options: EmbedOptions,
    task_prompt: str | None,
    prompts: Mapping[str, str | None],
    default_name: str | None,
) -> str:
    prompt = task_prompt if options.prompt is None else options.prompt
    return side_prompt(prompts, options.input_type, default_name) if prompt is None else prompt


def _tokens(backend: Tokenizer, text: str, *, special: bool) -> list[Token]:
    found = backend.encode(text, add_special_tokens=special)
    each = zip(found.ids, found.offsets, found.special_tokens_mask, strict=True)
    return [
        _special(backend, id)
        if added
        else {"id": id, "text": text[at:end], "special": False, "start": at, "stop": end}
        for id, (at, end), added in each
    ]


def _special(backend: Tokenizer, id: int) -> Token:
    name = backend.id_to_token(id)
    return {"id": id, "text": name, "special": True, "start": None, "stop": None}


def _unknown_tokenizer() -> UserError:
    return UserError("the tokenizer of this model is not known", expected="texts")
