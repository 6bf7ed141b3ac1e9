"""The model of a run: what it starts from, and the folder it ends as."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from nvembed.core.errors import ConfigError, TrainingError, UserError
from nvembed.core.files import atomic_folder
from nvembed.core.runs import TRAIN
from nvembed.core.seeding import derive_seed, seed_everything
from nvembed.interop.kind import model_kind
from nvembed.interop.source import ModelSource
from nvembed.kernels.accelerate import compile_elementwise
from nvembed.model.activation_checkpointing import recompute_layers
from nvembed.model.adapters import add_lora, hold_frozen, merge_lora, save_adapter
from nvembed.model.embedder import NVEmbed
from nvembed.model.master_weights import hold_masters, release_masters
from nvembed.model.quantization import quantize_frozen
from nvembed.model.settings import PoolingSettings
from nvembed.text.instructions import task_prompts
from nvembed.text.template import query_prompt
from nvembed.training.checkpoint import trained_parameters
from nvembed.training.config import TrainConfig
from nvembed.training.fitting import check_widths
from nvembed.training.tensor_files import full


def starting_model(config: TrainConfig, base_dir: Path, *, device: str) -> NVEmbed:
    """``build_model`` with new weights that the seed of the run decides.

    Raises:
        ConfigError: the recipe asks for more than the model has.
    """
    seed_everything(derive_seed(config.seed, "weights"))
    model = build_model(config, base_dir, device=device)
    check_widths(config, model.dimension)
    return model


def computing(config: TrainConfig, device: torch.device) -> torch.autocast:
    """The block in which a run computes in its precision.

    One block for all packs of a step, in which every weight is cast once; accelerate's own mixed
    precision casts them again for every pack.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16")


def backbone_source(config: TrainConfig, base_dir: Path) -> str:
    """The folder or hub id of what a run starts from."""
    local = base_dir / config.model.backbone
    return str(local) if local.is_dir() else config.model.backbone


def build_model(config: TrainConfig, base_dir: Path, *, device: str | None = None) -> NVEmbed:
    """The model a run starts from, with adapters where the recipe wants them."""
    settings = config.model
    source = backbone_source(config, base_dir)
    pooling = settings.pooling
    if pooling is None and model_kind(ModelSource(source)) == "language_model":
        pooling = PoolingSettings()
    model = NVEmbed.from_pretrained(
        source,
        pooling=pooling.kind if pooling else None,
        num_latents=pooling.num_latents if pooling else None,
        num_heads=pooling.num_heads if pooling else None,
        attention=settings.attention,
        max_tokens=settings.max_tokens,
        dtype=settings.dtype,
        device=device,
    )
    if settings.quantization is not None:
        quantize_frozen(model, settings.quantization)
    if config.lora is not None:
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


def save_model(
    model: NVEmbed,
    config: TrainConfig,
    folder: Path,
    *,
    base_dir: Path,
    final: bool = False,
    write: bool = True,
) -> None:
    """Write an ordinary sentence-transformers folder with adapters merged and prompts set.

    Weights are saved in the types that they were loaded in.

    Args:
        model: the model in training; left as it is unless ``final``.
        config: for the prompts: one per data set, and ``query`` where all retrieval sets share one;
            besides them those of the MTEB tasks.
        folder: written beside and moved into place.
        base_dir: folder of the recipe, to find the base again where it was rounded or sharded.
        final: merge and round in place, which needs no second copy of the weights.
        write: in one process; all of them call, because weights may be shared out.

    Raises:
        TrainingError: it could not be written; the checkpoint is there.
    """
    lossy = config.model.quantization or (config.lora and config.precision == "bfloat16")
    if lossy or isinstance(model.backbone.model, FSDPModule):
        saved = _rebuilt(model, config, base_dir, build=write)
    else:
        saved = model if final or not write else copy.deepcopy(model)
    if not write:
        return
    merge_lora(saved.backbone)
    release_masters(saved)
    prompts = {dataset.name: query_prompt(dataset.instruction) for dataset in config.datasets}
    retrieval = {prompts[d.name] for d in config.datasets if d.kind == "retrieval"}
    if len(retrieval) == 1:
        prompts["query"] = retrieval.pop()
    saved.prompts = {"document": "", **task_prompts(), **prompts}
    with _unwritten_is_an_error(folder), atomic_folder(folder, TRAIN) as temporary:
        saved.save_pretrained(str(temporary), create_model_card=False)


def save_adapters(model: NVEmbed, folder: Path) -> None:
    """Write the adapters alone, before ``save_model`` merges them.

    Raises:
        TrainingError: they could not be written; the checkpoint is there.
    """
    with _unwritten_is_an_error(folder):
        save_adapter(model.backbone, folder)


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
    """What was trained, on the base as it was before it was rounded or sharded; on the CPU.

    All processes give their shares; the one that does not ``build`` gets its own model back.
    """
    settings = config.model.model_copy(update={"quantization": None})
    plain = config.model_copy(update={"model": settings, "precision": "float32", "compile": False})
    into: dict[str, Tensor] = {}
    if build:
        with torch.random.fork_rng():
            fresh = build_model(plain, base_dir, device="cpu")
        into = dict(trained_parameters(fresh))
    for name, parameter in trained_parameters(model).items():
        value = full(parameter)
        if build:
            into[name].copy_(value)
    return fresh if build else model
