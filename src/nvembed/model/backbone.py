"""The backbone: a Hugging Face model run on flat batches, bidirectional by proof.

Loads any decoder (or encoder) without its language-model head, puts it behind our flat attention,
switches the cache off, and checks by a probe that attention really goes the way that was asked for.
Model families ignore flags silently, so a model that stays causal is an error here, not a warning.
Next file: ``model/pooling.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from pydantic import Field
from sentence_transformers.base.modules import InputModule
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel

from nvembed.core.errors import ModelError
from nvembed.interop.loading import check_vocabulary, loading, reason
from nvembed.interop.model_folder import read_values
from nvembed.interop.source import COPY_AGAIN, ModelSource
from nvembed.model.attention import FLAT_ATTENTION, OTHER_BACKBONE
from nvembed.model.placement import DeviceMap
from nvembed.model.probe import probe_direction
from nvembed.model.settings import AttentionDirection
from nvembed.text.packing import FlatBatch, flatten
from nvembed.text.tokens import TextStyle, TextTokenizer, TokenizedText


@dataclass(frozen=True, slots=True)
class SavedBackbone:
    """What a saved backbone says in ``nvembed_config.json``; see ``Backbone``."""

    attention: AttentionDirection
    max_tokens: Annotated[int, Field(ge=1)]
    text_style: TextStyle
    add_bos: bool
    add_eos: bool


class Backbone(InputModule):
    """Text to token states, nothing padded.

    Args:
        model: a transformers base model (no head) that runs with ``nvembed_flat`` attention.
        tokenizer: its fast tokenizer.
        attention: ``bidirectional``, or ``causal`` for ablations.
        max_tokens: longest sequence, with BOS, prompt and EOS; longer texts are cut. A table of
            positions is never exceeded. ``None`` is 512.
        text_style: token rules, see :mod:`nvembed.text.tokens`.
        add_bos: put the BOS token in front where there is one.
        add_eos: put the EOS token at the end.
    """

    config_file_name = "nvembed_config.json"
    config_keys = [field.name for field in fields(SavedBackbone)]

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        attention: AttentionDirection = "bidirectional",
        max_tokens: int | None = None,
        text_style: TextStyle = "nvembed",
        add_bos: bool = True,
        add_eos: bool = True,
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.attention: AttentionDirection = attention
        self.text_style: TextStyle = text_style
        self.add_bos = add_bos
        self.add_eos = add_eos
        self._frozen = False
        self._text = TextTokenizer(
            tokenizer,
            max_tokens=self._readable(512 if max_tokens is None else max_tokens),
            style=text_style,
            add_bos=add_bos,
            add_eos=add_eos,
        )
        # Saved with the model: stock transformers then builds the right mask too.
        model.config.is_causal = attention == "causal"

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        *,
        subfolder: str = "",
        dtype: torch.dtype | str | None = None,
        revision: str | None = None,
        token: bool | str | None = None,
        cache_folder: str | None = None,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
        device_map: DeviceMap | None = None,
        attention: AttentionDirection = "bidirectional",
        max_tokens: int | None = None,
        text_style: TextStyle = "nvembed",
        add_bos: bool = True,
        add_eos: bool = True,
    ) -> Self:
        """Load a decoder or encoder from a folder or the hub, and prove its direction.

        Args:
            name_or_path: local folder or hub id.
            subfolder: where config, weights and tokenizer lie inside it.
            dtype: of the weights; ``None`` means float32, ``"auto"`` the dtype they were saved in.
            revision: commit, tag or branch on the hub.
            token: of the hub, for gated models.
            cache_folder: where downloads are kept.
            local_files_only: never ask the hub.
            trust_remote_code: run code that comes with the model; off, and rarely needed.
            device_map: spread the layers over devices, see ``model/placement.py``.
            attention: see the class.
            max_tokens: see the class.
            text_style: see the class.
            add_bos: see the class.
            add_eos: see the class.

        Raises:
            ModelError: nothing loadable there, the family cannot run on flat batches, or its
                attention does not go the way that was asked for.
        """
        where: dict[str, Any] = {
            "subfolder": subfolder,
            "revision": revision,
            "token": token,
            "cache_dir": cache_folder,
            "local_files_only": local_files_only,
            "trust_remote_code": trust_remote_code,
        }
        place = name_or_path
        if Path(name_or_path).is_dir():
            place = str(Path(name_or_path) / subfolder)
        with loading(place, expected="a Hugging Face model folder or hub id"):
            config = AutoConfig.from_pretrained(name_or_path, **where)
            config.use_cache = False
            model = AutoModel.from_pretrained(
                name_or_path,
                config=config,
                attn_implementation=FLAT_ATTENTION,
                dtype=dtype or torch.float32,
                device_map=device_map,
                **where,
            )
        with loading(place, expected="the model's tokenizer (tokenizer.json)"):
            tokenizer = AutoTokenizer.from_pretrained(name_or_path, **where)
        check_vocabulary(model, tokenizer, where=place)
        if getattr(model, "pooler", None) is not None:
            model.pooler = None  # BERT's; unused, and unused weights only cost memory
        backbone = cls(
            model,
            tokenizer,
            attention=attention,
            max_tokens=max_tokens,
            text_style=text_style,
            add_bos=add_bos,
            add_eos=add_eos,
        )
        prove_direction(backbone, name=str(name_or_path))
        return backbone

    def freeze(self) -> None:
        """Keep the weights as they are: no gradient, so no graph either, and no dropout."""
        self._frozen = True
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """As in torch, but a frozen backbone stays as it is in encoding."""
        return super().train(mode and not self._frozen)

    @property
    def max_tokens(self) -> int:
        """Longest sequence, with BOS, prompt and EOS."""
        return self._text.max_tokens

    @max_tokens.setter
    def max_tokens(self, value: int) -> None:
        self._text.max_tokens = self._readable(value)

    def _readable(self, max_tokens: int) -> int:
        """A limit within the table of positions, beyond which nothing can be read."""
        rows = self._position_rows
        return min(max_tokens, rows) if rows is not None and type(max_tokens) is int else max_tokens

    @property
    def _position_rows(self) -> int | None:
        """Rows of a table of positions, such as BERT's; ``None`` without a table."""
        table = getattr(getattr(self.model, "embeddings", None), "position_embeddings", None)
        weight = getattr(table, "weight", None)
        return None if weight is None else int(weight.shape[0]) - self._first_position

    @property
    def max_positions(self) -> int | None:
        """Positions that the model was made for; None where it does not say."""
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return None if positions is None else int(positions) - self._first_position

    # The name sentence-transformers uses for the same number.
    @property
    def max_seq_length(self) -> int:
        """Same as ``max_tokens``."""
        return self.max_tokens

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        self.max_tokens = value

    @property
    def device(self) -> torch.device:
        """Where flat batches go."""
        return main_device(self.model)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        # ``to(device)`` of the whole model must not gather what device_map has spread.
        if getattr(self.model, "hf_device_map", None):
            return self
        return super()._apply(fn, recurse)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return next(self.model.parameters()).dtype

    @property
    def width(self) -> int:
        """Hidden size."""
        return int(self.model.config.get_text_config().hidden_size)

    def get_embedding_dimension(self) -> int:
        """Hidden size, by the name sentence-transformers asks for."""
        return self.width

    @property
    def text_tokenizer(self) -> TextTokenizer:
        """The one path from text to tokens, as an object that a cache can stand in front of."""
        return self._text

    def tokenize_texts(self, texts: Sequence[str], prompt: str = "") -> list[TokenizedText]:
        """Ids and pool starts of texts that share a prompt."""
        return self._text(texts, prompt)

    def preprocess(
        self, inputs: Sequence[Any], prompt: str | None = None, **_: Any
    ) -> dict[str, Any]:
        """Tokenise and flatten, as sentence-transformers calls it."""
        return {"flat": flatten(self.tokenize_texts(list(inputs), prompt or ""))}

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Add ``token_embeddings`` ``(T, D)`` for the flat batch under ``flat``."""
        features["flat"] = features["flat"].to(self.device)
        features["token_embeddings"] = self.hidden(features["flat"])
        return features

    def hidden(self, flat: FlatBatch) -> Tensor:
        """Last hidden states ``(T, D)`` of a flat batch on the model's device."""
        output = self.model(
            input_ids=flat.token_ids_T[None],
            position_ids=flat.position_ids_T[None] + self._first_position,
            attention_mask=None,
            segments=flat.segments,
            causal=self.attention == "causal",
        )
        hidden_TD: Tensor = output.last_hidden_state[0]
        return hidden_TD

    @property
    def _first_position(self) -> int:
        # RoBERTa and its kin keep a row of the position table for padding, and count after it.
        table = getattr(getattr(self.model, "embeddings", None), "position_embeddings", None)
        padding = getattr(table, "padding_idx", None)
        return 0 if padding is None else int(padding) + 1

    def states(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Last hidden states ``(T, D)`` of rows of token ids, the longest row first."""
        flat = flatten([TokenizedText(tuple(row), 0) for row in rows])
        return self.hidden(flat.to(self.device))

    def save(
        self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any
    ) -> None:
        """Write weights (safetensors), configuration and tokenizer."""
        self.model.save_pretrained(output_path, safe_serialization=True)
        self.save_tokenizer(output_path)
        self.save_config(output_path)

    @classmethod
    def load(  # type: ignore[override]  # options of other modules are ignored
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        **_: Any,
    ) -> Self:
        """Load from a saved model, as sentence-transformers calls it."""
        source = ModelSource(
            model_name_or_path, revision, token, cache_folder, local_files_only, subfolder
        )
        file = source.require(cls.config_file_name, hint=COPY_AGAIN)
        settings = source.read_json(cls.config_file_name) or {}
        given = model_kwargs or {}
        wanted = given.get("dtype") or given.get("torch_dtype")
        return cls.from_pretrained(
            model_name_or_path,
            dtype=wanted or "auto",
            device_map=given.get("device_map"),
            subfolder=subfolder,
            **source.options(),
            **read_values(SavedBackbone, settings, where=str(file)),
        )


def main_device(decoder: torch.nn.Module) -> torch.device:
    """Where inputs go: of a spread backbone the first place that is not the CPU beside a GPU."""
    spread_over = getattr(decoder, "hf_device_map", None)
    if not spread_over:
        return next(decoder.parameters()).device
    places = [torch.device(place) for place in spread_over.values()]
    return next((place for place in places if place.type != "cpu"), torch.device("cpu"))


def prove_direction(backbone: Backbone, *, name: str) -> None:
    """Probe that attention goes the way that was asked for and stays within each text.

    Raises:
        ModelError: the model is causal although bidirectional attention was asked for (or the
            reverse), a neighbour in the pack changes a text, or the family does not run at all.
    """
    model = backbone.model
    if main_device(model).type == "meta":
        return
    was_training = model.training
    model.eval()
    try:
        found = probe_direction(backbone.states, model.config.get_text_config().vocab_size)
    except Exception as error:  # whatever a family's code meets with
        raise ModelError(
            f"the {model.config.model_type} family does not run on flat batches ({reason(error)})",
            where=name,
            hint=OTHER_BACKBONE,
        ) from error
    finally:
        model.train(was_training)
    if found.direction != backbone.attention:
        raise ModelError(
            f"attention is {found.direction}",
            where=name,
            expected=f"{backbone.attention} attention (a probe changes the last token and watches "
            "the first)",
            hint="This model family needs support in nvembed/model/attention.py",
        )
    if found.neighbours_seen:
        raise ModelError(
            "texts packed together see each other", where=name, hint="Choose another backbone"
        )
