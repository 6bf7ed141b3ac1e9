"""``NVEmbed``: backbone, pooling and normalisation as one sentence-transformers model.

Ours is loading without remote code, instructions (``task=``), and encoding in packs of a token
budget (``model/encoding.py``). Next file in the tour: ``training/contrastive_loss.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, TypedDict, Unpack, get_args

import torch
from pydantic import Field
from sentence_transformers.base.modules import InputModule, Module, Normalize
from sentence_transformers.util import get_device_name, import_from_string

from nvembed.core.arguments import WeightBits, checked
from nvembed.core.errors import ConfigError, ModelError
from nvembed.core.files import write_text
from nvembed.core.reporting import announce, withdraw
from nvembed.data.instructions import resolve_prompt, task_prompts
from nvembed.interop.loading import loading, prove_encoding, usable_device
from nvembed.interop.model_folder import ModelSource, damaged, model_kind
from nvembed.interop.saved import ModuleEntry, read_modules, read_prompts, read_stock
from nvembed.interop.weights import check_finite
from nvembed.kernels.build import this_cpu
from nvembed.kernels.layers import accelerate
from nvembed.model.backbone import Backbone
from nvembed.model.encoding import EncodingModel
from nvembed.model.official_load import load_official
from nvembed.model.packs import embed_short
from nvembed.model.placement import DeviceMap
from nvembed.model.pooling import POOLINGS, Pooling, build_pooling
from nvembed.model.quantization import Quantizer, wanted_quantizer
from nvembed.model.settings import AttentionDirection, LongTexts, PoolingKind

# What modules.json may name without remote code: our classes by name, and anything inside
# sentence-transformers itself.
_OWN: tuple[type[Module], ...] = (Backbone, *POOLINGS.values())
_OWN_MODULES = {f"{cls.__module__}.{cls.__name__}": cls for cls in _OWN}

_Stored = Literal["float32", "bfloat16", "float16", "float64", "auto"]
DtypeName = Literal[_Stored, "int8"]
"""Types that weights are computed in; ``auto`` is the stored one, ``int8`` is for encoding."""


class EncodeOptions(TypedDict, total=False):
    """What ``encode_query`` and ``encode_document`` hand on; see ``NVEmbed.encode``."""

    batch_size: int
    show_progress_bar: bool | None
    output_value: Literal["sentence_embedding"]
    precision: Literal["float32", "int8", "uint8", "binary", "ubinary"]
    convert_to_numpy: bool
    convert_to_tensor: bool
    device: str | torch.device | list[str | torch.device] | None
    normalize_embeddings: bool
    truncate_dim: int | None
    pool: dict[str, Any] | None
    chunk_size: int | None
    long: LongTexts


class _Place(NamedTuple):
    """Where and in which type the weights of a model are wanted; see ``from_pretrained``."""

    device: str | None
    device_map: DeviceMap | None
    dtype: torch.dtype | Literal["auto"] | None
    quantize: Quantizer | None = None


class _Recognised(type(EncodingModel)):  # type: ignore[misc]  # of sentence-transformers
    """Names the library that our class is derived from, which BERTopic looks for in ``str``.

    It would take another model, all-MiniLM-L6-v2, without a word.
    """

    def __repr__(cls) -> str:
        return f"<class '{cls.__module__}.{cls.__qualname__}' of sentence_transformers>"


class NVEmbed(EncodingModel, metaclass=_Recognised):
    """A text-embedding model made from a decoder LM by the NV-Embed recipe.

    Use ``from_pretrained``; the constructor is that of ``SentenceTransformer``.

    Attributes:
        origin: folder or hub id it was loaded from, or started from; "" of modules put together.
        types_before_training: types of parameters that are float32 while they are trained, by
            name; see ``hold_masters``.
    """

    origin: str = ""
    types_before_training: dict[str, torch.dtype]

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.types_before_training = {}
        accelerate(self)

    @classmethod
    @checked
    def from_pretrained(
        cls,
        name_or_path: Annotated[str, Field(min_length=1)] | Path,
        *,
        pooling: PoolingKind | None = None,
        num_latents: Annotated[int, Field(ge=1)] | None = None,
        num_heads: Annotated[int, Field(ge=1)] | None = None,
        attention: AttentionDirection | None = None,
        max_tokens: Annotated[int, Field(ge=1)] | None = None,
        device: str | torch.device | None = None,
        device_map: DeviceMap | None = None,
        dtype: torch.dtype | DtypeName | None = None,
        quantize: WeightBits | Quantizer | None = None,
        revision: str | None = None,
        token: bool | str | None = None,
        cache_folder: str | Path | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Load an embedding model, or start one from any decoder or encoder.

        Args:
            name_or_path: folder or hub id. ``nvidia/NV-Embed-v2``, ``-v1`` and folders in their
                layout are read without their code; another one with a ``modules.json`` is loaded as
                saved; anything else is a language model to start from. So is a model of stock
                sentence-transformers modules, whose transformer, limit and prompts are taken, and
                a GGUF file: its path, or ``package:NAME`` for the one inside an installed package
                (``package:NAME/FILE.gguf`` of several). Its blocks become numbers again.
            pooling: for a new model (default ``mean``, which needs no training; the model's own
                where one of stock modules is started from).
            num_latents: for a new latent pooling (default 512).
            num_heads: for a new latent or self-attention pooling (default 8).
            attention: for a new model (default ``bidirectional``).
            max_tokens: longest sequence; ``None`` keeps the saved limit (512 for a new model). A
                stock model's own limit and a table of positions are never exceeded.
            device: ``None`` picks the best there is.
            device_map: spread the backbone over devices: ``"auto"``, or module name → device.
            dtype: ``None`` keeps the saved dtype (float32 for a new model; for an official one
                bfloat16 on CUDA and float32 elsewhere); ``"auto"`` is the stored dtype. ``"int8"``
                takes the products of the backbone in 8 bits, on a CPU and for encoding alone.
            quantize: holds the backbone's linear layers in 8 or 4 bits as they are read, computing
                in ``dtype``: ``"int8"``, ``"fp8"`` or ``"nf4"`` (extra ``quantization``). A model
                saved as adapters is quantised after they were added.
            revision: commit, tag or branch on the hub.
            token: access token of the hub, for gated models.
            cache_folder: where downloads are kept.
            local_files_only: never ask the hub.

        Raises:
            ConfigError: an argument of a wrong type or value.
            ModelError: nothing that can be loaded, or options that a saved model fixes already.
        """
        kept_in = None if cache_folder is None else str(cache_folder)
        source = ModelSource(str(name_or_path), revision, token, kept_in, local_files_only)
        announce(f"loading {source.name}")
        head = {"pooling": pooling, "num_latents": num_latents, "num_heads": num_heads}
        place = _settled(device, device_map, dtype, quantize)
        model = cls._load(source, place, {**head, "attention": attention}, max_tokens)
        model.origin = source.name
        withdraw()
        return model

    @classmethod
    def _load(
        cls, source: ModelSource, place: _Place, new: dict[str, Any], max_tokens: int | None
    ) -> Self:
        """Load whatever a source is; ``new`` are the options of a model that is started."""
        source.check()
        kind = model_kind(source)
        stock = read_stock(source) if kind == "saved" else None
        if kind == "language_model":
            model = cls._start(source, place, new, max_tokens)
        elif stock is not None:
            own = stock.max_tokens or 512
            new["pooling"] = new["pooling"] or stock.pooling(source)
            limit = own if max_tokens is None else min(max_tokens, own)
            model = cls._start(replace(source, inside=stock.folder), place, new, limit)
            model._read_settings(source)
        else:
            if given := [name for name, value in new.items() if value is not None]:
                raise ModelError(
                    f"{', '.join(given)}: pooling and attention are fixed in a saved model",
                    where=source.name,
                    hint="Leave these options out, or start from the language model",
                )
            load = cls._load_official if kind == "official" else cls._load_saved
            model = load(source, place, max_tokens)
        if kind != "official":
            # There every tensor has been compared and its values checked, and a pass through the
            # wide latent attention takes copies of its weights: memory that only loading needs.
            prove_encoding(model, partial(embed_short, model), name=source.name)
        return model

    @classmethod
    def _start(
        cls, source: ModelSource, place: _Place, new: Mapping[str, Any], max_tokens: int | None
    ) -> Self:
        """Put a new pooling on a language model."""
        backbone = Backbone.from_pretrained(
            source,
            dtype=place.dtype,
            device_map=place.device_map,
            quantize=place.quantize,
            attention=new["attention"] or "bidirectional",
            max_tokens=max_tokens,
        )
        sizes = {key: new[key] for key in ("num_latents", "num_heads") if new[key] is not None}
        head = build_pooling(new["pooling"] or "mean", backbone.width, **sizes)
        return cls(modules=[backbone, head, Normalize()], device=place.device)

    @classmethod
    def _load_official(cls, source: ModelSource, place: _Place, max_tokens: int | None) -> Self:
        device = place.device or get_device_name()
        loaded = load_official(
            source,
            device=device,
            device_map=place.device_map,
            dtype=place.dtype,
            max_tokens=max_tokens,
            quantize=place.quantize,
        )
        model = cls(modules=[*loaded, Normalize()], device=device)
        model.prompts.update(task_prompts())
        model._read_settings(source)
        return model

    @classmethod
    def _load_saved(cls, source: ModelSource, place: _Place, max_tokens: int | None) -> Self:
        wanted = {key: getattr(place, key) for key in ("dtype", "device_map", "quantize")}
        model_kwargs = {key: value for key, value in wanted.items() if value is not None}
        modules: list[torch.nn.Module] = []
        for entry in read_modules(source):
            with loading(source.name):
                modules.append(
                    module_class(entry, source).load(
                        source.name,
                        subfolder=entry.path,
                        model_kwargs=model_kwargs,
                        trust_remote_code=False,
                        **source.options(),
                    )
                )
            check_finite(modules[-1], where=str(Path(source.name) / entry.path))
        _check_chain(modules, source)
        model = cls(modules=modules, device=place.device)
        model._read_settings(source)
        if max_tokens is not None:
            model.max_seq_length = max_tokens
        return model

    def _read_settings(self, source: ModelSource) -> None:
        """Take over the prompts that were saved with the model."""
        saved = read_prompts(source)
        self.prompts.update(saved.prompts or {})
        if saved.default_prompt_name is not None and saved.default_prompt_name not in self.prompts:
            raise ModelError(
                f"no prompt called {saved.default_prompt_name!r}, which is the default",
                where=f"{source.name}/config_sentence_transformers.json",
                expected=", ".join(self.prompts),
            )
        self.default_prompt_name = saved.default_prompt_name
        self.similarity_fn_name = saved.similarity_fn_name

    def _create_model_card(self, path: str, model_name: str | None = None, *_: Any) -> None:
        from nvembed.model.card import CARD, model_card  # jinja2, which loading does not need

        place = self.model_card_data.model_id or model_name or path
        write_text(Path(path) / CARD, model_card(self, origin=self.origin or place, place=place))

    @checked
    def encode_query(  # type: ignore[override]  # one signature for the overloads
        self,
        inputs: Any,
        prompt_name: str | None = None,
        prompt: str | None = None,
        *,
        task: str | None = None,
        **options: Unpack[EncodeOptions],
    ) -> Any:
        """Embed queries.

        Args:
            inputs: one text or a sequence of texts.
            prompt_name: name of a prompt saved with the model.
            prompt: the prompt itself; wins over ``prompt_name``.
            task: the name of an MTEB task ("FiQA2018"), or of a prompt saved with the model, or
                the instruction itself, e.g. "Given a question, retrieve passages that answer the
                question", which is rendered by the template. Wins over both. Without any of them
                the model's ``query`` prompt is used if it has one.
            **options: those of ``encode``.
        """
        if task is not None:
            prompt, prompt_name = resolve_prompt(task, self.prompts), None
        encode: Any = super().encode_query
        return encode(inputs, prompt_name=prompt_name, prompt=prompt, **options)

    @checked
    def encode_document(  # type: ignore[override]
        self,
        inputs: Any,
        prompt_name: str | None = None,
        prompt: str | None = None,
        *,
        task: str | None = None,
        **options: Unpack[EncodeOptions],
    ) -> Any:
        """Embed documents: bare texts; in symmetric tasks both sides carry ``task``."""
        if task is not None:
            prompt, prompt_name = resolve_prompt(task, self.prompts), None
        encode: Any = super().encode_document
        return encode(inputs, prompt_name=prompt_name, prompt=prompt, **options)


def module_class(entry: ModuleEntry, source: ModelSource) -> type[Module]:
    """One of our classes or of sentence-transformers; never code that comes with a model."""
    own = _OWN_MODULES.get(entry.type)
    if own is not None:
        return own
    where = f"{source.name}/modules.json"
    if not entry.type.startswith("sentence_transformers."):
        raise ModelError(
            f"module class {entry.type} is not part of nvembed",
            where=where,
            expected=", ".join(sorted(_OWN_MODULES)),
            hint="Load it with SentenceTransformer(..., trust_remote_code=True)",
        )
    found = import_from_string(entry.type)
    if not (isinstance(found, type) and issubclass(found, Module)):
        raise damaged(f"{entry.type} is not a module", where)
    return found


def _check_chain(modules: Sequence[torch.nn.Module], source: ModelSource) -> None:
    """Refuse modules that cannot follow each other."""
    first, pooling = modules[0], modules[1] if len(modules) > 1 else None
    if not isinstance(first, InputModule) or (isinstance(first, Backbone) and pooling is None):
        raise damaged(
            f"its modules are {', '.join(type(module).__name__ for module in modules)}",
            f"{source.name}/modules.json",
            "a backbone, a pooling and what follows them, in this order",
        )
    if isinstance(pooling, Pooling) and pooling.width != first.get_embedding_dimension():
        expected = f"that of its backbone, {first.get_embedding_dimension()}"
        raise damaged(f"its pooling is of width {pooling.width}", source.name, expected)


def _settled(
    device: str | torch.device | None,
    device_map: DeviceMap | None,
    dtype: torch.dtype | DtypeName | None,
    quantize: WeightBits | Quantizer | None,
) -> _Place:
    """Check that this machine has the devices, and that weights may be of the type."""
    asked = quantize is not None or dtype == "int8"
    quantizer = wanted_quantizer(quantize, dtype, device) if asked else None
    if asked and device_map is not None:
        raise ConfigError("quantize with a device_map", expected="one device")
    if dtype == "int8":  # what is computed between the products
        dtype = "bfloat16" if this_cpu().may_multiply_bfloat16 else "float32"
    if isinstance(device_map, Mapping):
        for target in device_map.values():
            usable_device(f"cuda:{target}" if isinstance(target, int) else target)
    usable = usable_device(device)
    if dtype is None or dtype == "auto":
        return _Place(usable, device_map, dtype, quantizer)
    found = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    if str(found).removeprefix("torch.") not in get_args(_Stored):
        raise ConfigError(
            f"{found} given", where="dtype", expected="float32, bfloat16, float16, int8 or auto"
        )
    return _Place(usable, device_map, found, quantizer)


def hold_masters(model: NVEmbed) -> None:
    """Hold all parameters that receive gradients in float32, in place.

    In 16 bits most updates would round to nothing. ``release_masters`` rounds once, at the end.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype is not torch.float32:
            model.types_before_training[name] = parameter.dtype
            parameter.data = parameter.data.float()


def release_masters(model: NVEmbed) -> None:
    """Round what ``hold_masters`` holds to the types that it had, in place."""
    parameters = dict(model.named_parameters())
    for name, dtype in model.types_before_training.items():
        parameters[name].data = parameters[name].data.to(dtype)
    model.types_before_training = {}
