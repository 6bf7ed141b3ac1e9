"""The model of a run: what it starts from, the memory its activations need, the folder it ends as.

What a graph holds is counted by hooks on one pack of texts of the full length. The number is kept
in the run folder: it decides in which order a resumed run adds up floats.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, ValidationError
from torch import Tensor, UntypedStorage
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from nvembed.core.config import StrictModel
from nvembed.core.errors import ConfigError, DataError, TrainingError, UserError
from nvembed.core.files import atomic_folder, read_json_object, write_json, write_text
from nvembed.core.runs import TRAIN, RunFolder, derive_seed, seed_everything
from nvembed.data.instructions import query_prompt, task_prompts
from nvembed.interop.model_folder import ModelSource, model_kind, read_bases
from nvembed.kernels.layers import accelerate, compile_elementwise
from nvembed.model.backbone import (
    Backbone,
    add_lora,
    free_bytes,
    hold_frozen,
    merge_lora,
    recompute_layers,
    save_adapter,
)
from nvembed.model.card import CARD, model_card
from nvembed.model.embedder import NVEmbed, hold_masters, release_masters
from nvembed.model.packs import embed_pack
from nvembed.model.quantization import Quantizer
from nvembed.model.settings import LoraSettings, PoolingSettings
from nvembed.model.tokens import TokenizedText
from nvembed.model.transformer_load import open_adapted
from nvembed.training.checkpoint import trained_parameters
from nvembed.training.config import TrainConfig
from nvembed.training.distributed import DistributedContext, full

OFFICIAL_MAX_TOKENS = 512  # of its training, as far as is known; the released folder reads 32,768


def starting_model(config: TrainConfig, base_dir: Path, *, device: str) -> NVEmbed:
    """``build_model`` with new weights that the seed of the run decides."""
    seed_everything(derive_seed(config.seed, "weights"))
    model = build_model(config, base_dir, device=device)
    for number, stage in enumerate(config.stages):
        if too_wide := [width for width in stage.matryoshka or () if width > model.dimension]:
            raise ConfigError(
                f"width {too_wide[0]} is larger than the model's embeddings",
                where=f"stages.{number}.matryoshka",
                expected=f"1 to {model.dimension}",
            )
    return model


def computing(config: TrainConfig, device: torch.device) -> torch.autocast:
    """One autocast block for all packs of a step, in which every weight is cast once."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16")


def backbone_source(config: TrainConfig, base_dir: Path) -> str:
    """The folder, GGUF file or hub id of what a run starts from."""
    local = base_dir / config.model.backbone
    return str(local) if local.exists() else config.model.backbone


def build_model(config: TrainConfig, base_dir: Path, *, device: str | None = None) -> NVEmbed:
    """The model a run starts from, with adapters where the recipe wants them."""
    settings = config.model
    source = backbone_source(config, base_dir)
    pooling, max_tokens = settings.pooling, settings.max_tokens
    kind = model_kind(ModelSource(source))
    if pooling is None and kind == "language_model":
        pooling = PoolingSettings()
    if max_tokens is None and kind == "official":
        max_tokens = OFFICIAL_MAX_TOKENS
    model = NVEmbed.from_pretrained(
        source,
        pooling=pooling.kind if pooling else None,
        num_latents=pooling.num_latents if pooling else None,
        num_heads=pooling.num_heads if pooling else None,
        attention=settings.attention,
        max_tokens=max_tokens,
        dtype=settings.dtype,
        quantize=Quantizer(settings.quantization, frozen=True) if settings.quantization else None,
        device=device,
    )
    if config.lora is not None:
        if config.lora.from_backbone:
            go_on_with_adapters(model.backbone, ModelSource(source), config.lora, settings.dtype)
        else:
            add_lora(model.backbone, config.lora)
        if config.precision == "bfloat16":
            hold_frozen(model.backbone, torch.bfloat16)
    if config.backbone == "freeze":
        if not list(model.pooling.parameters()):
            raise ConfigError(
                "the backbone is frozen and the model's pooling has no weights: nothing to train",
                where="backbone",
                expected="model.pooling with kind latent or self_attention",
            )
        model.backbone.freeze()
    if config.compile:
        compile_elementwise(model.backbone.model)
    if config.activation_checkpointing:
        recompute_layers(model.backbone)
    if config.pooling_head == "freeze":
        model.pooling.requires_grad_(False)
    hold_masters(model)
    return model


def go_on_with_adapters(
    backbone: Backbone, source: ModelSource, settings: LoraSettings, dtype: str | None
) -> None:
    """Put the adapters that a backbone is saved as in place of the weights they are merged into.

    Raises:
        ConfigError: it is not saved as adapters, or they are others than ``settings`` says.
    """

    def check(saved: Any) -> None:
        names = {"rank": "r", "alpha": "lora_alpha", "dora": "use_dora", "rslora": "use_rslora"}
        theirs = {name: getattr(saved, of_peft, None) for name, of_peft in names.items()}
        if different := [
            f"{name}: {value}" for name, value in theirs.items() if value != getattr(settings, name)
        ]:
            raise ConfigError(
                f"other adapters than those of {source.name}",
                where="lora",
                expected=", ".join(different),
            )
        saved.lora_dropout, saved.inference_mode = settings.dropout, False

    if not (bases := read_bases(source)):
        raise ConfigError(
            f"from_backbone is on, and {source.name} is not saved as adapters",
            where="lora.from_backbone",
            expected="false, or a model.backbone such as the adapter/ of a run",
        )
    adapted: Any
    adapted, _ = open_adapted(source, dtype, None, check)
    adapted.to(next(backbone.model.parameters()).device)
    adapted.config.is_causal = backbone.model.config.is_causal
    accelerate(adapted)
    backbone.model, backbone.bases = adapted, list(bases)


def save_model(
    model: NVEmbed,
    config: TrainConfig,
    folder: Path,
    *,
    base_dir: Path,
    final: bool = False,
    write: bool = True,
) -> None:
    """Write a sentence-transformers folder, adapters merged, in the types that were loaded."""
    lossy = config.model.quantization or (config.lora and config.precision == "bfloat16")
    if lossy or isinstance(model.backbone.model, FSDPModule):
        saved = _rebuilt(model, config, base_dir, build=write)
    else:
        saved = model if final or not write else copy.deepcopy(model)
    if not write:
        return
    merge_lora(saved.backbone)
    release_masters(saved)
    _write(saved, config, folder)


def save_adapters(model: NVEmbed, config: TrainConfig, folder: Path) -> None:
    """Write adapters and head without the base, in float32, before ``save_model`` merges them.

    On a base that is an official model the adapters go alone: its backbone is no model by itself.
    """
    if model.backbone.bases:
        _write(model, config, folder)
        return
    with _unwritten_is_an_error(folder):
        save_adapter(model.backbone, folder)


def _write(model: NVEmbed, config: TrainConfig, folder: Path) -> None:
    prompts = {dataset.name: query_prompt(dataset.instruction) for dataset in config.datasets}
    retrieval = {prompts[d.name] for d in config.datasets if d.kind == "retrieval"}
    if len(retrieval) == 1:
        prompts["query"] = retrieval.pop()
    kept = {name: prompt for name, prompt in model.prompts.items() if prompt}  # of what it began as
    model.prompts = {"document": "", **task_prompts(), **kept, **prompts}
    with _unwritten_is_an_error(folder), atomic_folder(folder, TRAIN) as temporary:
        model.save_pretrained(str(temporary), create_model_card=False)
        card = model_card(
            model, origin=model.origin, place=str(folder), run=RunFolder(folder.parent)
        )
        write_text(temporary / CARD, card)


@contextmanager
def _unwritten_is_an_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # safetensors and tokenizers raise their own types on a full disk
        raise TrainingError(
            f"the model could not be written ({error})",
            where=str(folder),
            hint="Free space on the disk and run the same command again; the checkpoint is there",
        ) from error


@torch.no_grad()
def _rebuilt(model: NVEmbed, config: TrainConfig, base_dir: Path, *, build: bool) -> NVEmbed:
    """What was trained on the base before rounding or sharding; without ``build`` the model."""
    settings = config.model.model_copy(update={"quantization": None})
    plain = config.model_copy(update={"model": settings, "precision": "float32", "compile": False})
    made, into = model, dict[str, Parameter]()
    if build:
        with torch.random.fork_rng():
            made = build_model(plain, base_dir, device="cpu")
        into = trained_parameters(made)
    for name, parameter in trained_parameters(model).items():
        value = full(parameter)
        if build:
            into[name].copy_(value)
    return made


# Of what is free when a run starts: graphs are not all that a step needs (one layer's work in
# progress, gradients, moments, the loss), and others may want memory too.
FREE_SHARE = 0.5


class ActivationBudget(StrictModel):
    """Bytes that a graph holds per token of texts of the full length, and bytes for all graphs."""

    bytes_per_token: float = Field(gt=0, allow_inf_nan=False)
    budget_bytes: int = Field(gt=0)

    @property
    def tokens(self) -> int:
        """Tokens whose graphs fit."""
        return int(self.budget_bytes / self.bytes_per_token)


def settle_activation_budget(
    file: Path, model: NVEmbed, config: TrainConfig, processes: DistributedContext
) -> ActivationBudget:
    """Read what the run settled on, or measure and write it; the first process decides."""
    known = read_activation_budget(file)
    if processes.agree(known is None):
        known = measure_activation_budget(model, config)
        if processes.is_main:
            write_json(file, known.model_dump(), TRAIN)
    assert known is not None
    return processes.of_main(known)


def read_activation_budget(file: Path) -> ActivationBudget | None:
    """Read what a run settled on; ``None`` where it did not, or the file is damaged."""
    if not file.is_file():
        return None
    with suppress(DataError, ValidationError):
        return ActivationBudget.model_validate(read_json_object(file, "what graphs need"))
    return None


def measure_activation_budget(model: NVEmbed, config: TrainConfig) -> ActivationBudget:
    """What a run that started now would settle on."""
    given = config.memory_gb
    budget = int(given * 1e9) if given else int(free_bytes(model.device) * FREE_SHARE)
    per_token = graph_bytes_per_token(model, config.pack_tokens)
    return ActivationBudget(bytes_per_token=per_token, budget_bytes=budget)


def graph_bytes_per_token(model: NVEmbed, pack_tokens: int) -> float:
    """Run one pack of texts of the full length and count what its graph holds."""
    length = min(model.backbone.max_tokens, pack_tokens)
    count = max(1, pack_tokens // length)
    vocabulary = int(model.backbone.model.config.get_text_config().vocab_size)
    generator = torch.Generator().manual_seed(0)
    ids_NL = torch.randint(vocabulary, (count, length), generator=generator).tolist()
    with counted_graph(model) as held:
        embed_pack(model, [TokenizedText(tuple(ids), 0) for ids in ids_NL])
    return sum(storage.nbytes() for storage in held.values()) / (count * length)


@contextmanager
def counted_graph(model: torch.nn.Module) -> Iterator[dict[int, UntypedStorage]]:
    """Collect all storages that graphs made in the block save, without parameters."""

    def storage_of(tensor: Tensor) -> UntypedStorage:
        return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()

    held: dict[int, UntypedStorage] = {}
    own = {storage_of(tensor)._cdata for tensor in (*model.parameters(), *model.buffers())}

    def note(tensor: Tensor) -> Tensor:
        storage = storage_of(tensor)
        if storage._cdata not in own:
            held[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield held


def peak_bytes(device: torch.device) -> int:
    """Most memory that this process has held on a device so far; on a CPU all of the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    import resource  # not on Windows, where only the dry run needs it

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
