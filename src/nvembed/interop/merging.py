"""Merging model folders of one architecture, tensor by tensor, and adapters as what they add.

Everything but weights comes from the first folder. Where a module is an adapter (LoRA), the product
of its matrices is merged, not the matrices: ``Σ wᵢ sᵢ Bᵢ Aᵢ`` is exactly one adapter whose rank is
the sum of theirs, with ``A`` the rows of all ``Aᵢ`` and ``B`` the columns of all ``wᵢ sᵢ Bᵢ``. With
a rank given, each product is replaced by the nearest one of that rank.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

from nvembed.core.arguments import shown_value
from nvembed.core.errors import ModelError
from nvembed.core.files import write_json
from nvembed.core.reporting import hold_note
from nvembed.interop.model_folder import (
    ADAPTER,
    ADAPTER_CONFIG,
    ModelSource,
    check_present,
    read_json_file,
)
from nvembed.interop.saved import ModuleEntry, read_modules
from nvembed.interop.weights import (
    INDEX,
    SINGLE,
    StoredTensor,
    check_finite_tensor,
    read_header,
    read_tensor,
    stored_tensors,
    write_shards,
)

MergeMethod = Literal["linear", "slerp"]
RECORD = "nvembed_merge.json"

# Settings that say nothing about what is computed.
_IDLE = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}
_COMPARED = ("config.json", "nvembed_config.json", "tokenizer.json")
_LEFT = {".md", ".log", ".png", ".svg"}
# Of siblings the cosine of all weights is near 1, of models without a common base near 0.
_LEAST_COSINE = 0.5
_A, _B = "lora_A", "lora_B"  # in the names of an adapter's matrices


@dataclass(frozen=True, slots=True)
class Mix:
    """How tensors become one: shares that sum to 1, on a line or (of two) on an arc."""

    shares: tuple[float, ...]
    method: MergeMethod = "linear"
    rank: int | None = None  # the most that a merged adapter may have

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        """One tensor of tensors of one shape."""
        if self.method == "slerp":
            return slerp(tensors[0], tensors[1], self.shares[1])
        return weighted_sum(tensors, self.shares)


def weighted_sum(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """``Σ shareᵢ tensorᵢ`` in float32 (float64 of float64)."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    total = torch.zeros(tensors[0].shape, dtype=dtype)
    for tensor, share in zip(tensors, shares, strict=True):
        total.add_(tensor.to(dtype), alpha=share)
    return total


def slerp(first: Tensor, second: Tensor, t: float) -> Tensor:
    """The point at ``t`` of the arc from one tensor to another, as vectors; float32.

    With the angle ω between them: ``(sin((1 − t) ω) first + sin(t ω) second) / sin ω``; the line
    where they are parallel (or one is zero), since there ω says nothing.
    """
    a, b = first.reshape(-1).double(), second.reshape(-1).double()
    lengths = a.norm() * b.norm()
    cosine = float(a @ b / lengths) if lengths > 0 else 1.0
    angle = math.acos(min(max(cosine, -1.0), 1.0))
    if math.sin(angle) < 1e-6:
        return weighted_sum([first, second], [1 - t, t])
    shares = [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]
    return weighted_sum([first, second], shares)


def nearest_of_rank(b_OR: Tensor, a_RI: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Two factors of the matrix of a given rank that is nearest to ``b a``, and what it leaves out.

    By the singular values of the product (Eckart and Young), which is never formed: with
    ``b = Q S`` and ``aᵀ = P T`` they are those of ``S Tᵀ``. Each factor takes the root of a
    singular value; a rank beyond that of the product is filled up with zeros. What is left out is
    the share of the product's squares. Float32.
    """
    q_OR, s_RR = torch.linalg.qr(b_OR.double())
    p_IR, t_RR = torch.linalg.qr(a_RI.double().T)
    left_RR, values_R, right_RR = torch.linalg.svd(s_RR @ t_RR.T, full_matrices=False)
    roots = values_R[:rank].sqrt()
    near_OK = q_OR @ left_RR[:, :rank] * roots
    near_KI = roots[:, None] * (right_RR[:rank] @ p_IR.T)
    whole = float(values_R.square().sum())
    left_out = float(values_R[rank:].square().sum()) / whole if whole > 0 else 0.0
    missing = rank - len(roots)
    near_OK, near_KI = pad(near_OK, (0, missing)), pad(near_KI, (0, 0, 0, missing))
    return near_OK.float(), near_KI.float(), left_out


def merge_folders(folders: Sequence[Path], to: Path, mix: Mix) -> None:
    """Write the merged model into an empty folder.

    Raises:
        ModelError: folders that are not of one architecture, tokenizer, pooling and base.
    """
    first = folders[0]
    modules = _modules(first)
    if mix.rank is not None and not any((first / one / ADAPTER).is_file() for one in modules):
        raise ModelError(
            "a rank is given, and there is no adapter", where=str(first), expected="adapters"
        )
    for other in folders[1:]:
        _check_same(first, other, modules)
    for path in sorted(first.rglob("*")):
        name = path.relative_to(first)
        hidden = any(part.startswith(".") for part in name.parts)
        weights = path.suffix == ".safetensors" or path.name in (INDEX, RECORD)
        if path.is_file() and not hidden and not weights and path.suffix not in _LEFT:
            check_present(path)
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, to / name)
    for number, module in enumerate(modules):
        places = [folder / module for folder in folders]
        if (places[0] / ADAPTER_CONFIG).is_file():
            _merge_adapters(places, to / module, mix)
        if any((places[0] / file).is_file() for file in (SINGLE, INDEX)):
            _merge_weights(places, to / module, mix, of_base=number == 0)


def _modules(folder: Path) -> list[str]:
    """Folders of the modules of a model that hold weights; "" is the model's own."""
    if not folder.is_dir():
        raise ModelError("no such folder", where=str(folder), expected="a model's folder")
    paths = [entry.path for entry in _entries(folder)] or [""]
    files = (SINGLE, INDEX, ADAPTER)
    found = [path for path in paths if any((folder / path / file).is_file() for file in files)]
    if not found:
        raise ModelError(
            "no weights to merge", where=str(folder), expected=f"{SINGLE} or {ADAPTER} in it"
        )
    return found


def _entries(folder: Path) -> list[ModuleEntry]:
    """Modules of a model; none of a bare language model or an adapter."""
    has = (folder / "modules.json").is_file()
    return read_modules(ModelSource(str(folder))) if has else []


def _check_same(first: Path, other: Path, modules: Sequence[str]) -> None:
    def differ(what: str) -> ModelError:
        return ModelError(
            f"{what} in {first}",
            where=str(other),
            expected="models of one architecture, tokenizer, pooling and base",
        )

    if (found := _modules(other)) != list(modules):
        raise differ(f"it has weights of {_named(found)}; those of {_named(modules)} are")
    kinds = [
        ", ".join(entry.type.rpartition(".")[2] for entry in _entries(folder))
        for folder in (other, first)
    ]
    if kinds[0] != kinds[1]:
        raise differ(f"the modules are {kinds[0] or 'not said'}, and {kinds[1] or 'not said'}")
    for module in sorted({"", *(entry.path for entry in _entries(first))}):
        for file in _COMPARED:
            mine, known = (_settings(folder / module / file) for folder in (other, first))
            if mine == known:
                continue
            if file == "tokenizer.json":
                raise differ("the tokenizer is another one than")
            keys = [key for key in {**known, **mine} if mine.get(key) != known.get(key)]
            values = [shown_value(found.get(keys[0])) for found in (mine, known)]
            place = f"{module}/{file}".lstrip("/")
            raise differ(f"{keys[0]} is {values[0]} ({place}), and {values[1]}")


def _named(modules: Sequence[str]) -> str:
    return " and ".join(module or "the backbone" for module in modules)


def _settings(path: Path) -> dict[str, Any]:
    values = read_json_file(path) if path.is_file() else {}
    return {key: value for key, value in values.items() if key not in _IDLE}


def _merge_weights(places: Sequence[Path], to: Path, mix: Mix, *, of_base: bool) -> None:
    stored = [stored_tensors(ModelSource(str(place))) for place in places]
    _check_shapes(places, stored)
    products = torch.zeros(len(places), 3, dtype=torch.float64)

    def merged(name: str) -> Tensor:
        tensors = list(_tensors(name, stored))
        kept = tensors[0].dtype
        if not kept.is_floating_point:
            if all(torch.equal(tensor, tensors[0]) for tensor in tensors):
                return tensors[0]
            raise ModelError(f"tensor {name} is no numbers to mix", where=str(places[0]))
        if tensors[0].ndim > 1:
            _note_products(products, tensors)
        whole = mix.of(tensors).to(kept)
        check_finite_tensor(whole, name, where="the merged model")
        return whole

    sizes = {}
    for name, tensor in stored[0].items():
        element = read_tensor(name, tensor, torch.device("meta"), None).element_size()
        sizes[name] = math.prod(tensor.shape) * element
    to.mkdir(parents=True, exist_ok=True)
    write_shards(to, stored[0], sizes, merged)
    for place, (dot, own, other) in zip(places, products.tolist(), strict=True):
        cosine = dot / math.sqrt(own * other) if own * other > 0 else 1.0
        if cosine >= _LEAST_COSINE:
            continue
        said = f"its weights have a cosine of {cosine:.2f} with those of {places[0]}"
        if of_base:
            expected = "models that were tuned from one base"
            raise ModelError(said, where=str(place), expected=expected)
        hold_note(f"{place}: {said}: they began at other random weights, and may not mix well")


def _note_products(products: Tensor, tensors: Sequence[Tensor]) -> None:
    """Add up ``first · other``, ``first · first`` and ``other · other`` for every model."""
    first = tensors[0].flatten().double()
    for row, tensor in enumerate(tensors):
        other = tensor.flatten().double()
        products[row] += torch.stack([first @ other, first @ first, other @ other])


def _tensors(name: str, stored: Sequence[Mapping[str, StoredTensor]]) -> Iterator[Tensor]:
    for tensors in stored:
        yield read_tensor(name, tensors[name], torch.device("cpu"), None)


def _check_shapes(
    places: Sequence[Path],
    stored: Sequence[Mapping[str, StoredTensor]],
    *,
    free_axes: Mapping[str, int] | None = None,
) -> None:
    """Refuse other tensors than the first model's; of adapters one axis (the rank) may differ."""

    def shape(tensors: Mapping[str, StoredTensor], name: str) -> list[int] | None:
        if name not in tensors:
            return None
        sizes = list(tensors[name].shape)
        for part, axis in (free_axes or {}).items():
            if part in name:
                del sizes[axis]
        return sizes

    for place, tensors in zip(places, stored, strict=True):
        for name in sorted({*tensors, *stored[0]}):
            found, known = shape(tensors, name), shape(stored[0], name)
            if found != known:
                raise ModelError(
                    f"tensor {name} is {found or 'not there'}, and {known or 'not there'} "
                    f"in {places[0]}",
                    where=str(place),
                    expected="models of the same shapes",
                )


# --- Adapters -------------------------------------------------------------------------------------


class _Adapter(NamedTuple):
    rank: int
    scale: float  # of the product of its matrices
    base: str | None


def _adapter(place: Path) -> _Adapter:
    file = place / ADAPTER_CONFIG
    config = read_json_file(file)
    given = config if isinstance(config, dict) else {}
    rank, alpha = given.get("r"), given.get("lora_alpha")
    others = ("use_dora", "lora_bias", "rank_pattern", "alpha_pattern", "modules_to_save")
    plain = not any(given.get(key) for key in others)
    if (
        given.get("peft_type") != "LORA"
        or not plain
        or type(rank) is not int
        or not isinstance(alpha, int | float)
        or rank < 1
    ):
        raise ModelError(
            "an adapter whose products cannot be added",
            where=str(file),
            expected="LoRA with one rank for all layers, without DoRA and biases",
            hint="Merge the models that were saved with the adapters in their weights",
        )
    scale = alpha / math.sqrt(rank) if given.get("use_rslora") else alpha / rank
    return _Adapter(rank, scale, given.get("base_model_name_or_path"))


def _merge_adapters(places: Sequence[Path], to: Path, mix: Mix) -> None:
    if mix.method != "linear":
        raise ModelError(
            "adapters can be merged on a line only",
            where=str(places[0]),
            expected="--method linear, or models with the adapters in their weights",
        )
    adapters = [_adapter(place) for place in places]
    for place, adapter in zip(places, adapters, strict=True):
        if adapter.base != adapters[0].base:
            raise ModelError(
                f"an adapter of {adapter.base}, and of {adapters[0].base} in {places[0]}",
                where=str(place),
                expected="adapters of one base",
            )
    weights = _added(places, [adapter.scale for adapter in adapters], mix)
    rank = sum(adapter.rank for adapter in adapters)
    if mix.rank is not None and mix.rank < rank:
        rank = mix.rank
        _cut_to_rank(weights, rank)
    for name, tensor in weights.items():
        check_finite_tensor(tensor, name, where="the merged adapter")
    config = read_json_file(places[0] / ADAPTER_CONFIG)
    to.mkdir(parents=True, exist_ok=True)
    # Scales are in the matrices now, so the adapter's own is 1.
    config |= {"r": rank, "lora_alpha": rank, "use_rslora": False}
    write_json(to / ADAPTER_CONFIG, config)
    save_file(weights, to / ADAPTER, metadata={"format": "pt"})


def _added(places: Sequence[Path], scales: Sequence[float], mix: Mix) -> dict[str, Tensor]:
    """The matrices of one adapter that adds what the others add together."""
    stored = [read_header(place / ADAPTER) for place in places]
    _check_shapes(places, stored, free_axes={_A: 0, _B: 1})
    weights = {}
    for name in stored[0]:
        tensors = list(_tensors(name, stored))
        if _A in name:
            weights[name] = torch.cat(tensors)
        elif _B in name:
            factors = [share * scale for share, scale in zip(mix.shares, scales, strict=True)]
            scaled = [tensor * factor for tensor, factor in zip(tensors, factors, strict=True)]
            weights[name] = torch.cat(scaled, dim=1)
        elif "lora_" in name:
            raise ModelError(
                f"tensor {name} cannot be merged",
                where=str(places[0]),
                expected="adapters of linear layers",
            )
        else:
            weights[name] = mix.of(tensors).to(tensors[0].dtype)
    return weights


def _cut_to_rank(weights: dict[str, Tensor], rank: int) -> None:
    """Replace the matrices of an adapter by those of less rank, and tell what that leaves out."""
    left_out = []
    for name in [name for name in weights if _A in name]:
        other = name.replace(_A, _B)
        near_OK, near_KI, share = nearest_of_rank(weights[other], weights[name], rank)
        weights[name] = near_KI.to(weights[name].dtype).contiguous()
        weights[other] = near_OK.to(weights[other].dtype).contiguous()
        left_out.append(share)
    mean, most = sum(left_out) / max(len(left_out), 1), max(left_out, default=0.0)
    said = f"{mean:.2%} of what the adapters add, by squares ({most:.2%} at most)"
    hold_note(f"rank {rank} leaves out {said}")
