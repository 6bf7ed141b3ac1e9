"""The one boundary to the libraries that load models: every weight in its place, or one line.

transformers fills what a checkpoint lacks with random numbers. Here its report of every model that
is loaded in a block is read: missing, unexpected or misshapen tensors and values that are not
finite are an error. A prefix that all names share is taken off where they fit without it.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from sentence_transformers import SentenceTransformer
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_PRETRAINING_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)
from transformers.utils import logging

from nvembed.core.errors import ConfigError, ModelError, UserError
from nvembed.interop.model_folder import COPY_AGAIN, ModelSource, check_present, damaged
from nvembed.interop.saved import read_modules
from nvembed.interop.weights import (
    INDEX,
    LM_HEAD,
    Misfit,
    check_finite,
    check_finite_tensor,
    read_header,
    shared_prefixes,
    stored_tensors,
)

_HEADS = (
    MODEL_FOR_PRETRAINING_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)
# BERT's. Nobody here reads what it gives, and masked language models are saved without it.
_POOLER = "pooler"

# Settings that transformers and sentence-transformers read where they are there; all are objects.
_SETTINGS = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "nvembed_config.json",
    "adapter_config.json",
)
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt")
_WEIGHTS = ("model.safetensors", "adapter_model.safetensors", "pytorch_model.bin")
# Of a DoRA adapter: peft writes it without the ".weight" that transformers looks for.
_LENGTHS = "lora_magnitude_vector"

# transformers itself is not made for loading in several threads, and here its class is patched.
_one_at_a_time = threading.RLock()


@contextmanager
def loading(name: str, *, expected: str = "the folder or the hub id of a model") -> Iterator[None]:
    """Load models of transformers or sentence-transformers in a block, or raise a ModelError.

    The files of a folder are looked at first; ``expected`` says what ``name`` should have been.
    """
    if Path(name).is_dir():
        check_files(Path(name))
    reports: list[tuple[PreTrainedModel, Any]] = []
    with _one_at_a_time:
        try:
            with _watched(name, reports), _without_bars():
                yield
        except UserError:
            raise
        except Exception as error:  # each library raises its own types, tokenizers a bare Exception
            # A report that is not good says more than what became of it.
            for report in reports:
                _misfit(*report).check(name)
            raise ModelError(
                f"cannot be loaded ({reason(error)})",
                where=name,
                expected=expected,
                hint=COPY_AGAIN
                if Path(name).exists()
                else "A hub id needs the network, or an earlier download",
            ) from error
    for report in reports:
        _misfit(*report).check(name)
    for model in {id(model): model for model, _ in reports}.values():
        check_finite(model, where=name)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Without transformers' bars of weights, between our lines.

    Its own switch would take away the bars of downloads too, hence the variable behind it.
    """
    shown = logging.is_progress_bar_enabled()
    logging._tqdm_active = False
    try:
        yield
    finally:
        logging._tqdm_active = shown


def load_pretrained(
    source: ModelSource,
    dtype: torch.dtype | str | None,
    device_map: Any,
    attention: str,
    make: Callable[[Any], PreTrainedModel | None] | None = None,
) -> tuple[PreTrainedModel, Any]:
    """A base model (no head) of transformers, and its tokenizer, from a folder or the hub.

    ``dtype`` None is float32, ``"auto"`` the stored one; ``attention`` is a name that transformers
    knows. ``make`` may load the model of a configuration in another way; None leaves it to them.
    """
    given = source.options()
    where = {"subfolder": source.inside, "cache_dir": given.pop("cache_folder"), **given}
    name, place = source.name, source.place
    with loading(place, expected="a Hugging Face model folder or hub id"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **where)
        config.use_cache = False
        model = None if make is None else make(config)
        model = model or AutoModel.from_pretrained(
            name,
            config=config,
            attn_implementation=attention,
            dtype=dtype or torch.float32,
            device_map=device_map,
            trust_remote_code=False,
            **where,
        )
    with loading(place, expected="the model's tokenizer (tokenizer.json)"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **where)
    return model, tokenizer


def with_adapters(model: PreTrainedModel, settings: Any) -> Any:
    """Put fresh adapters on a model, in place, by a configuration of peft; a ``PeftModel``."""
    from peft import get_peft_model

    with warnings.catch_warnings():
        # peft reads a property that transformers 5 has renamed; nothing a user could do about.
        warnings.filterwarnings(
            "ignore", message=".*is_gradient_checkpointing", category=FutureWarning
        )
        # Of an int8 base: that adapters could not be merged into it, which nobody does.
        warnings.filterwarnings("ignore", message=".*get_apply_tensor_subclass")
        return get_peft_model(model, settings)


def usable_device(device: str | torch.device | None) -> str | None:
    """The name of a device that this machine has; ``None`` stays."""
    if device is None:
        return None
    try:
        torch.zeros(1, device=device).item()  # of the meta device there are no values
    except Exception as error:  # RuntimeError, AssertionError, NotImplementedError, by device
        raise ConfigError(
            f"{str(device)!r} cannot be used ({reason(error)})",
            where="device",
            expected="a device of this machine, such as cpu",
        ) from error
    return str(device)


def reason(error: BaseException) -> str:
    """What a library said, as one line of at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def prove_encoding(
    model: SentenceTransformer,
    embed: Callable[[list[str]], torch.Tensor] | None = None,
    *,
    name: str,
) -> None:
    """Encode a text, so that what a model cannot do is told when it is loaded.

    ``embed`` is the forward below ``encode``, where that is all there is to prove.
    """
    if model.device.type == "meta":
        return
    encode: Any = partial(model.encode, prompt="", convert_to_tensor=True, show_progress_bar=False)
    with loading(name, expected="a model that encodes texts"):
        vector = (embed or encode)(["a text"])
    check_finite_tensor(vector, "of an embedding", where=name)


def check_vocabulary(model: Any, tokenizer: Any, *, where: str) -> None:
    """Make sure that every token that a text can be turned into has an embedding."""
    try:
        table = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # no table of tokens, as in models of images
        return
    rows = int(table.weight.shape[0]) if table is not None else None
    special = (
        getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "cls", "sep")
    )
    last = max([tokenizer.vocab_size - 1, *(token for token in special if token is not None)])
    if rows is not None and last >= rows:
        message = f"the tokenizer gives token ids up to {last} and the model has {rows} embeddings"
        raise damaged(message, where, "the tokenizer that the model was trained with")


def check_files(folder: Path) -> None:
    """Look at every file of a model folder that will be read: libraries fail far from a damage."""
    for place in _module_folders(folder):
        source = ModelSource(str(place))
        for name in _SETTINGS:
            source.read_json(name)
        for name in (*_TOKENIZERS, *_WEIGHTS):
            path = place / name
            if path.is_file():
                check_present(path)
                if path.suffix == ".safetensors":
                    read_header(path)
        if (place / INDEX).is_file():
            stored_tensors(source)
        _check_depth(source)


def _module_folders(folder: Path) -> Iterator[Path]:
    yield folder
    if (folder / "modules.json").is_file():
        for entry in read_modules(ModelSource(str(folder))):
            place = folder / entry.path
            # A module without settings, such as a normalisation, may have no folder.
            if place != folder and place.is_dir():
                yield place


def _check_depth(source: ModelSource) -> None:
    """Refuse more layers than there are tensors, which a library would build for hours."""
    config = source.read_json("config.json") or {}
    inner = config.get("text_config")
    layers = (inner if isinstance(inner, dict) else config).get("num_hidden_layers")
    weights = [name for name in (INDEX, _WEIGHTS[0]) if source.find(name) is not None]
    if isinstance(layers, int) and weights and layers > (count := len(stored_tensors(source))):
        where = f"{source.name}/config.json"
        expected = f"those of the weights, which are {count} tensors"
        raise damaged(f"num_hidden_layers is {layers}", where, expected)


def _misfit(model: PreTrainedModel, info: Any) -> Misfit:
    """What transformers says about a checkpoint that it has loaded into a model."""
    computed = {name for name, _ in model.named_buffers()} - set(model.state_dict())
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    # Of a model without a head nobody uses the pooler.
    pooler = {_POOLER} if model.base_model is model else set()
    spare = pooler | _heads(model) if info.unexpected_keys else set()

    def kept(names: Iterable[str], known: Collection[str], parts: set[str]) -> list[str]:
        return [name for name in names if name not in known and name.split(".")[0] not in parts]

    return Misfit(
        kept(info.missing_keys, tied, pooler),
        kept(info.unexpected_keys, computed, spare),
        {name: (stored, needed) for name, stored, needed in info.mismatched_keys},
    )


@contextmanager
def _watched(name: str, reports: list[tuple[PreTrainedModel, Any]]) -> Iterator[None]:
    """Collect the reports of all models that this thread loads in the block.

    ``output_loading_info`` gives them to the caller of transformers alone, here another library.
    """
    kept = PreTrainedModel.__dict__["_load_pretrained_model"]
    original = PreTrainedModel._load_pretrained_model
    own_thread = threading.get_ident()

    def load(
        model: PreTrainedModel, state_dict: Any, checkpoint_files: Any, *given: Any, **options: Any
    ) -> Any:
        result = original(model, state_dict, checkpoint_files, *given, **options)
        if threading.get_ident() != own_thread:
            return result
        if state_dict is None and _misfit(model, result[0]).missing:
            for renamed in _renamed(checkpoint_files):
                again = original(model, renamed, checkpoint_files, *given, **options)
                if len(again[0].missing_keys) < len(result[0].missing_keys):
                    result = again
                    break
        # transformers would now make room for what is missing or of another shape: of a damaged
        # configuration any amount.
        if result[0].mismatched_keys:
            _misfit(model, result[0]).check(name)
        # transformers may still take names off this report, of an adapter's base.
        reports.append((model, result[0]))
        return result

    cls: Any = PreTrainedModel
    cls._load_pretrained_model = staticmethod(load)
    try:
        yield
    finally:
        cls._load_pretrained_model = kept


def _renamed(files: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    """The tensors of a checkpoint as a DoRA adapter's, or under shorter and shorter names."""
    if not files or not all(str(file).endswith(".safetensors") for file in files):
        return
    with ExitStack() as stack:
        handles = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        tensors = {
            name: handle.get_slice(name)
            for handle in handles
            for name in handle.keys()  # noqa: SIM118  # not a mapping
        }
        if any(name.endswith(_LENGTHS) for name in tensors):
            yield {
                f"{name}.weight" if name.endswith(_LENGTHS) else name: tensor
                for name, tensor in tensors.items()
            }
        for prefix in shared_prefixes(tensors):
            yield {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _heads(model: PreTrainedModel) -> set[str]:
    """Parts that models of this family have besides their base: heads, which may be left over."""
    found = {LM_HEAD}
    for mapping in _HEADS:
        group = mapping.get(type(model.config), None)
        for cls in group if isinstance(group, tuple) else (group,):
            if cls is None or not model.base_model_prefix:
                continue
            with torch.device("meta"):
                parts = [name for name, _ in cls(model.config).named_children()]
            found.update(part for part in parts if part != model.base_model_prefix)
    return found
