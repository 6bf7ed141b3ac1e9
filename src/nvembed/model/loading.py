"""The one boundary to the libraries that load models: every weight in its place, or one line.

    with loading(name):
        model = AutoModel.from_pretrained(name)      # or SentenceTransformer, CrossEncoder, …

transformers starts a model with random numbers wherever a checkpoint has no tensor of that name, and
tells it in a log. Here its report of every model that is loaded in the block is read: tensors that are
missing, unexpected or of another shape are an error with their names, as are values that are not
finite. A prefix that all names share (``module.``, ``base_model.model.``, …) is taken off where the
names fit without it. Whatever else a library raises becomes one line too.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import align_module_device
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_PRETRAINING_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)

from nvembed.core.errors import ModelError, UserError
from nvembed.model.folder import check_files
from nvembed.model.shards import StoredTensor, read_tensor
from nvembed.model.source import COPY_AGAIN

_HEADS = (
    MODEL_FOR_PRETRAINING_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)
_LM_HEAD = "lm_head"
# BERT's. Nobody here reads what it gives, and masked language models are saved without it.
_POOLER = "pooler"

# transformers itself is not made for loading in several threads, and here its class is patched.
_one_at_a_time = threading.RLock()


@contextmanager
def loading(name: str, *, expected: str = "the folder or the hub id of a model") -> Iterator[None]:
    """Load models of transformers or sentence-transformers in a block.

    Args:
        name: folder or hub id, for errors; the files of a folder are looked at first.
        expected: what ``name`` should have been, for errors.

    Raises:
        ModelError: a file is damaged, weights do not fit, or a library cannot load the model.
    """
    if Path(name).is_dir():
        check_files(Path(name))
    reports: list[_Report] = []
    with _one_at_a_time:
        try:
            with _watched(name, reports):
                yield
        except UserError:
            raise
        except Exception as error:  # each library raises its own types, tokenizers a bare Exception
            # A report that is not good says more than what became of it.
            for report in reports:
                report.check(name)
            raise ModelError(
                f"cannot be loaded ({reason(error)})",
                where=name,
                expected=expected,
                hint=COPY_AGAIN
                if Path(name).exists()
                else "A hub id needs the network, or an earlier download",
            ) from error
    for report in reports:
        report.check(name)
    for model in {id(report.model): report.model for report in reports}.values():
        check_finite(model, where=name)


def reason(error: BaseException) -> str:
    """What a library said, as one line of at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__


@dataclass(frozen=True)
class Misfit:
    """How stored tensors differ from what a model needs.

    Attributes:
        missing: names that the model needs and nobody stored.
        unexpected: names that were stored and the model has no place for.
        shapes: name → stored and needed shape, of those that differ.
    """

    missing: Sequence[str]
    unexpected: Sequence[str]
    shapes: Mapping[str, tuple[Sequence[int], Sequence[int]]]

    @property
    def found(self) -> list[str]:
        """The first few tensors of each kind and their number, in words."""
        shapes = [
            f"{key} ({list(stored)} instead of {list(needed)})"
            for key, (stored, needed) in sorted(self.shapes.items())
        ]
        kinds = (
            ("missing", sorted(self.missing)),
            ("unexpected", sorted(self.unexpected)),
            ("of another shape", shapes),
        )
        return [f"{_counted(names)} {kind}: {_first(names)}" for kind, names in kinds if names]

    def check(self, where: str) -> None:
        """Refuse weights that do not fit.

        Raises:
            ModelError: naming them.
        """
        if self.found:
            raise ModelError(
                f"the weights do not fit: {'; '.join(self.found)}",
                where=where,
                expected="the tensors that the configuration asks for, no more and no less",
                hint=f"{COPY_AGAIN}, or check that weights and configuration belong together",
            )


def misfit(needed: Mapping[str, Sequence[int]], stored: Mapping[str, Sequence[int]]) -> Misfit:
    """Compare shapes by name."""
    return Misfit(
        [name for name in needed if name not in stored],
        [name for name in stored if name not in needed],
        {
            name: (stored[name], shape)
            for name, shape in needed.items()
            if name in stored and tuple(stored[name]) != tuple(shape)
        },
    )


def fit(
    needed: Mapping[str, Sequence[int]], stored: Mapping[str, StoredTensor], *, where: str
) -> dict[str, str]:
    """Find the stored tensor of every one that is needed.

    Args:
        needed: shapes by name.
        stored: tensors of a checkpoint; a prefix that all names share is taken off where they fit
            without it.
        where: for the error.

    Returns:
        Name needed → name stored.

    Raises:
        ModelError: naming what is missing, unexpected or of another shape.
    """
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    for prefix in ("", *shared_prefixes(shapes)):
        stripped = {name.removeprefix(prefix): shape for name, shape in shapes.items()}
        if not misfit(needed, stripped).found:
            return {name: f"{prefix}{name}" for name in needed}
    misfit(needed, shapes).check(where)
    raise AssertionError("a misfit is an error")


def fill(module: nn.Module, stored: Mapping[str, StoredTensor], *, where: str) -> None:
    """Give a module that was built without memory its weights, in the dtype it was built in.

    Raises:
        ModelError: they do not fit, cannot be read, or are not finite.
    """
    empty = module.state_dict()
    names = fit({name: value.shape for name, value in empty.items()}, stored, where=where)
    tensors = {}
    for name, value in empty.items():
        tensor = read_tensor(names[name], stored[names[name]], torch.device("cpu"), value.dtype)
        check_finite_tensor(tensor, names[name], where=where)
        tensors[name] = tensor
    module.load_state_dict(tensors, assign=True)


def check_finite(module: nn.Module, *, where: str) -> None:
    """Make sure that no weight is NaN or infinite.

    Raises:
        ModelError: one is; names the tensor.
    """
    for prefix, part in module.named_modules():
        with align_module_device(part):  # weights that wait elsewhere come here meanwhile
            for name, tensor in part.named_parameters(recurse=False):
                check_finite_tensor(tensor, f"{prefix}.{name}" if prefix else name, where=where)


def check_finite_tensor(tensor: Tensor, name: str, *, where: str) -> None:
    """As ``check_finite``, of one tensor."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.is_floating_point()
    if not plain or tensor.device.type == "meta":  # quantised weights are of types of their own
        return
    values = tensor.detach()
    if values.dtype.itemsize == 1:
        values = values.float()
    # One pass without a mask. A sum that overflows is looked at again, value by value.
    if bool(torch.isfinite(values.sum(dtype=torch.float32))):
        return
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise ModelError(
            f"tensor {name} is not finite: {bad} of {values.numel()} values are NaN or infinite",
            where=where,
            expected="numbers",
            hint="The model was damaged in training or in a conversion; take an earlier state of it",
        )


def check_vocabulary(model: Any, tokenizer: Any, *, where: str) -> None:
    """Make sure that every token of a tokenizer has an embedding.

    Tokens that were added and that no text is turned into, such as a padding token, may have none.

    Raises:
        ModelError: one has not: the tokenizer is another model's.
    """
    table = model.get_input_embeddings()
    rows = int(table.weight.shape[0]) if table is not None else None
    special = (
        getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "cls", "sep")
    )
    last = max([tokenizer.vocab_size - 1, *(token for token in special if token is not None)])
    if rows is not None and last >= rows:
        raise ModelError(
            f"the tokenizer gives token ids up to {last} and the model has {rows} embeddings",
            where=where,
            expected="the tokenizer that the model was trained with",
            hint=COPY_AGAIN,
        )


def shared_prefixes(names: Collection[str]) -> list[str]:
    """Prefixes in front of all names but that of a language-model head, shortest first."""
    parts = [name.split(".") for name in names if _LM_HEAD not in name.split(".")]
    if not parts:
        return []
    shortest = min(map(len, parts)) - 1  # something must be left of every name
    length = 0
    while length < shortest and all(part[length] == parts[0][length] for part in parts):
        length += 1
    return [".".join(parts[0][:end]) + "." for end in range(1, length + 1)]


@dataclass(frozen=True)
class _Report:
    """What transformers says about one checkpoint that it has loaded into a model."""

    model: PreTrainedModel
    info: Any

    @property
    def misfit(self) -> Misfit:
        model = self.model
        computed = {name for name, _ in model.named_buffers()} - set(model.state_dict())
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        unused = {_POOLER} if _is_base(model) else set()
        spare = _heads(model) if self.info.unexpected_keys else set()
        return Misfit(
            [
                name
                for name in self.info.missing_keys
                if name not in tied and name.split(".")[0] not in unused
            ],
            [
                name
                for name in self.info.unexpected_keys
                if name not in computed and name.split(".")[0] not in spare
            ],
            {name: (stored, needed) for name, stored, needed in self.info.mismatched_keys},
        )

    def check(self, name: str) -> None:
        self.misfit.check(name)


@contextmanager
def _watched(name: str, reports: list[_Report]) -> Iterator[None]:
    """Collect the reports of all models that this thread loads in the block.

    ``output_loading_info`` gives the same report to the caller of transformers alone, which here is
    sentence-transformers at times, and that of the adapter alone where a folder has one.
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
        report = _Report(model, result[0])
        if report.misfit.missing and state_dict is None:
            for stripped in _stripped(checkpoint_files):
                again = original(model, stripped, checkpoint_files, *given, **options)
                if len(again[0].missing_keys) < len(result[0].missing_keys):
                    result, report = again, _Report(model, again[0])
                    break
        # transformers would now make room for what is missing or of another shape: of a damaged
        # configuration any amount.
        if report.info.mismatched_keys:
            report.check(name)
        reports.append(report)
        return result

    PreTrainedModel._load_pretrained_model = staticmethod(load)
    try:
        yield
    finally:
        PreTrainedModel._load_pretrained_model = kept


@contextmanager
def _opened(files: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The tensors of safetensors files by name, not read yet."""
    with ExitStack() as stack:
        handles = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        yield {name: handle.get_slice(name) for handle in handles for name in handle.keys()}


def _stripped(files: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    """The tensors of a checkpoint under shorter and shorter names."""
    if not files or not all(str(file).endswith(".safetensors") for file in files):
        return
    with _opened(files) as tensors:
        for prefix in shared_prefixes(tensors):
            yield {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _is_base(model: PreTrainedModel) -> bool:
    """A model without a head: of one with a head the pooler is used."""
    return model.base_model is model


def _heads(model: PreTrainedModel) -> set[str]:
    """Parts that models of this family have besides their base: heads, which may be left over."""
    found = {_LM_HEAD}
    classes = [mapping.get(type(model.config), None) for mapping in _HEADS]
    for group in classes:
        for cls in group if isinstance(group, tuple) else (group,):
            if cls is None or not model.base_model_prefix:
                continue
            with torch.device("meta"):
                parts = [name for name, _ in cls(model.config).named_children()]
            found.update(part for part in parts if part != model.base_model_prefix)
    return found | ({_POOLER} if _is_base(model) else set())


def _counted(names: Sequence[str]) -> str:
    return f"{len(names)} tensor is" if len(names) == 1 else f"{len(names)} tensors are"


def _first(names: Sequence[str], shown: int = 3) -> str:
    return ", ".join(names[:shown]) + (", …" if len(names) > shown else "")
