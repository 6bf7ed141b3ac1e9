"""The backbone: a Hugging Face model run on flat batches, bidirectional by proof.

Model families ignore flags silently, so a model that stays causal is an error here. LoRA adapters
(peft) are put on it in place. Next file: ``model/pooling.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Self

import psutil
import torch
from pydantic import Field
from sentence_transformers.base.modules import InputModule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from nvembed.core.errors import ModelError
from nvembed.core.files import atomic_folder
from nvembed.core.runs import TRAIN
from nvembed.interop.loading import check_vocabulary, load_pretrained, reason, with_adapters
from nvembed.interop.model_folder import BACKBONE_CONFIG, COPY_AGAIN, ModelSource, named_base
from nvembed.interop.saved import read_values
from nvembed.kernels.layers import accelerate
from nvembed.model.attention import FLAT_ATTENTION, OTHER_BACKBONE, probe_direction
from nvembed.model.packing import FlatBatch, flatten
from nvembed.model.placement import DeviceMap
from nvembed.model.quantization import Quantizer, load_quantized, quantized_as
from nvembed.model.settings import AttentionDirection, LoraSettings
from nvembed.model.tokens import TextStyle, TextTokenizer, TokenizedText
from nvembed.model.transformer_load import load_adapted, load_gguf


@dataclass(frozen=True, slots=True)
class SavedBackbone:
    """What a saved backbone says in ``nvembed_config.json``; see ``Backbone``."""

    attention: AttentionDirection
    max_tokens: Annotated[int, Field(ge=1)]
    text_style: TextStyle
    add_bos: bool
    add_eos: bool
    # Names of the base where it is saved as adapters; see ``interop/model_folder.py``.
    bases: list[Annotated[str, Field(min_length=1)]] = field(default_factory=list)


class Backbone(InputModule):
    """Text to token states, nothing padded.

    ``model`` is a transformers base model (no head). ``max_tokens`` (512 where None) counts BOS,
    prompt and EOS; longer texts are cut, and a table of positions is never exceeded.
    """

    config_file_name = BACKBONE_CONFIG
    config_keys = [each.name for each in fields(SavedBackbone)]

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
        bases: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.attention: AttentionDirection = attention
        self.text_style: TextStyle = text_style
        self.add_bos = add_bos
        self.add_eos = add_eos
        self.bases = list(bases)
        self._frozen = False
        self.text_tokenizer = TextTokenizer(
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
        source: ModelSource | str,
        *,
        dtype: torch.dtype | str | None = None,
        device_map: DeviceMap | None = None,
        quantize: Quantizer | None = None,
        **settings: Any,
    ) -> Self:
        """Load a decoder or encoder from a folder, a GGUF file or the hub; prove its direction.

        Weights are float32 unless a ``dtype`` is given; ``"auto"`` is the one they were saved in.
        ``settings`` are those of the class.
        """
        if isinstance(source, str):
            source = ModelSource(source)
        model: Any
        if settings.pop("bases", ()):
            model, tokenizer = load_adapted(source, dtype, device_map, quantize)
        elif source.gguf is not None:
            model, tokenizer = load_gguf(source, dtype, device_map, quantize)
        else:
            make = partial(load_quantized, source, dtype, quantize) if quantize else None
            model, tokenizer = load_pretrained(source, dtype, device_map, FLAT_ATTENTION, make)
            if quantize and quantized_as(model) is None:
                quantize.quantize(model.to(quantize.device))
        check_vocabulary(model, tokenizer, where=source.place)
        if getattr(model, "pooler", None) is not None:
            model.pooler = None  # BERT's; unused, and unused weights only cost memory
        backbone = cls(model, tokenizer, bases=named_base(source), **settings)
        prove_direction(backbone, name=source.name)
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
        """Longest sequence, with BOS, prompt and EOS; sentence-transformers' max_seq_length."""
        return self.text_tokenizer.max_tokens

    @max_tokens.setter
    def max_tokens(self, value: int) -> None:
        self.text_tokenizer.max_tokens = self._readable(value)

    max_seq_length = max_tokens

    def _readable(self, max_tokens: int) -> int:
        """A limit within the table of positions, such as BERT's, beyond which nothing is read."""
        weight = getattr(self._position_table, "weight", None)
        if weight is None or type(max_tokens) is not int:
            return max_tokens
        return min(max_tokens, int(weight.shape[0]) - self._first_position)

    @property
    def max_positions(self) -> int | None:
        """Positions that the model was made for; None where it does not say."""
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return None if positions is None else int(positions) - self._first_position

    @property
    def _position_table(self) -> Any:
        return getattr(getattr(self.model, "embeddings", None), "position_embeddings", None)

    @property
    def _first_position(self) -> int:
        # RoBERTa and its kin keep a row of the position table for padding, and count after it.
        padding = getattr(self._position_table, "padding_idx", None)
        return 0 if padding is None else int(padding) + 1

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

    def tokenize_texts(self, texts: Sequence[str], prompt: str = "") -> list[TokenizedText]:
        """Ids and pool starts of texts that share a prompt."""
        return self.text_tokenizer(texts, prompt)

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
        return output.last_hidden_state[0]

    def states(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Last hidden states ``(T, D)`` of rows of token ids, the longest row first."""
        flat = flatten([TokenizedText(tuple(row), 0) for row in rows])
        return self.hidden(flat.to(self.device))

    def save(
        self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any
    ) -> None:
        """Write weights (safetensors), configuration and tokenizer; of adapters not the base."""
        kind = None if is_adapted(self) else getattr(self.model, "quantized_as", None)
        if kind is not None:
            hint = "Load it without dtype int8 or quantize, which are for encoding"
            raise ModelError(f"weights in {kind} are not saved", where=output_path, hint=hint)
        if is_adapted(self):
            # "auto" would ask the hub whether the vocabulary was changed; it never is.
            self.model.save_pretrained(output_path, save_embedding_layers=False)
        else:
            self.model.save_pretrained(output_path, safe_serialization=True)
            self.save_tokenizer(output_path)
        self.save_config(output_path)

    def get_config_dict(self) -> dict[str, Any]:
        """What ``save_config`` writes; the bases of adapters alone."""
        settings: dict[str, Any] = super().get_config_dict()
        if not is_adapted(self):
            del settings["bases"]
        return settings

    @classmethod
    def load(  # type: ignore[override]  # options of other modules are ignored
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        model_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> Self:
        """Load from a saved model, as sentence-transformers calls it."""
        source = ModelSource.of_module(model_name_or_path, subfolder, options)
        file = source.require(cls.config_file_name, hint=COPY_AGAIN)
        settings = source.read_json(cls.config_file_name) or {}
        given = model_kwargs or {}
        return cls.from_pretrained(
            source,
            dtype=given.get("dtype") or given.get("torch_dtype") or "auto",
            device_map=given.get("device_map"),
            quantize=given.get("quantize"),
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
    """Probe that attention goes the way that was asked for and stays within each text."""
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


# --- Adapters; peft is imported where one is wanted -----------------------------------------------


def add_lora(backbone: Backbone, settings: LoraSettings) -> None:
    """Freeze the backbone and put fresh adapters on it, in place."""
    from peft import LoraConfig

    targets = settings.targets if isinstance(settings.targets, str) else list(settings.targets)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
        use_dora=settings.dora,
        use_rslora=settings.rslora,
        bias="none",
    )
    adapted = with_adapters(backbone.model, config)
    accelerate(adapted)
    backbone.model = adapted


def is_adapted(backbone: Backbone) -> bool:
    """Whether there are adapters that are not merged."""
    return hasattr(backbone.model, "peft_config")


def save_adapter(backbone: Backbone, folder: Path) -> None:
    """Write the adapters alone, which must happen before they are merged."""
    with atomic_folder(folder, TRAIN) as temporary:
        backbone.save(str(temporary))


def merge_lora(backbone: Backbone) -> None:
    """Add the adapters into the weights and drop them, in place; does nothing without adapters."""
    model: Any = backbone.model
    if is_adapted(backbone):
        backbone.model = model.merge_and_unload()


# --- Memory in training ---------------------------------------------------------------------------


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device; on a CPU what the machine or the container has left."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    try:
        limit, used = (
            Path(f"/sys/fs/cgroup/memory.{name}").read_text() for name in ("max", "current")
        )
        return min(free, int(limit) - int(used))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return free


def recompute_layers(backbone: Backbone) -> None:
    """Checkpoint activations: of a layer only its input is kept in training, in place.

    Dropout is the same in both forwards, since torch keeps the generator's state.
    """
    modules = backbone.model.modules()
    layers: list[Any] = [m for m in modules if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(
            f"the layers of {backbone.model.config.model_type} cannot be computed again",
            where="activation_checkpointing",
            hint=f"Leave it out, or: {OTHER_BACKBONE}",
        )
    for layer in layers:
        # transformers' own switch has another name in every other release; it sets the same.
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


def hold_frozen(backbone: Backbone, dtype: torch.dtype) -> None:
    """Keep frozen linear weights in the dtype of autocast, in place."""
    for module in backbone.model.modules():
        weight = module.weight if isinstance(module, nn.Linear) else None
        # Quantised weights are of types of their own.
        if type(weight) is nn.Parameter and not weight.requires_grad:
            weight.data = weight.data.to(dtype)
