"""Texts through the model in packs of a token budget: all of encoding but loading the model.

A window is as many texts as a pack has tokens; the next one is tokenised in a thread while the
model computes this one. Vectors depend on none of it. Next file: ``model/embedder.py``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from sentence_transformers.util import truncate_embeddings
from torch import Tensor
from torch.nn.functional import normalize

from nvembed.core.arguments import checked, near_matches
from nvembed.core.background import prefetch
from nvembed.core.errors import ConfigError, ModelError
from nvembed.core.reporting import Rates, progress
from nvembed.data.instructions import resolve_prompt, side_prompt
from nvembed.interop.loading import usable_device
from nvembed.model.packs import (
    CPU_PACK_TOKENS,
    CUDA_PACK_TOKENS,
    PackModel,
    embed_plan,
    plan_texts,
    rows_of,
)
from nvembed.model.settings import LongTexts, Work
from nvembed.model.tokens import Span, batches, check_strings

_CUT = LongTexts()

SmallPrecision = Literal["int8", "uint8", "binary", "ubinary"]


@dataclass(frozen=True, slots=True)
class Chunks:
    """The chunks of one text.

    Attributes:
        vectors: ``(C, D)``, rows of length 1.
        spans: first and last-plus-one character of each.
    """

    vectors: NDArray[np.float32]
    spans: tuple[Span, ...]


class EncodingModel(PackModel):
    """``encode`` and its kin over packs; ``NVEmbed`` adds loading and instructions."""

    def get_model_kwargs(self) -> list[str]:
        """What ``encode`` takes besides the options of sentence-transformers."""
        return [*super().get_model_kwargs(), "long"]

    def prepare(
        self,
        texts: Sequence[str],
        *,
        side: Literal["query", "document"],
        task: str | None = None,
        truncate_dim: int | None = None,
        long: LongTexts = _CUT,
        cuts: Sequence[Sequence[int]] | None = None,
    ) -> Work:
        """Do for some texts what comes before the model, in whatever thread.

        For callers that have the next texts while the model computes. What the work gives is what
        ``encode_query`` or ``encode_document`` gives, brought to length 1 after truncation.

        Args:
            texts: the texts, of one window: all are tokenised.
            side: whose prompt is put before them without a ``task``.
            task: see ``encode_query``.
            truncate_dim: keep the first dimensions.
            long: what becomes of texts beyond the limit.
            cuts: for late chunking the characters at which chunks of each text begin, the first 0.
        """
        prompt = resolve_prompt(task, self.prompts)
        if prompt is None:
            prompt = side_prompt(self.prompts, side, self.default_prompt_name)
        different, places = _different(texts)
        if cuts is not None:  # equal texts may be cut in other ways
            different, places = list(texts), list(range(len(texts)))
        budget = _budget(self._resolve_inference_device(None))
        plan = plan_texts(self.backbone, different, prompt, long, budget, cuts)
        rows = rows_of(places, list(map(len, plan.spans))) if plan.spans else places
        width = self.truncate_dim if truncate_dim is None else truncate_dim

        @torch.inference_mode()
        def launch() -> Callable[[], NDArray[np.float32]]:
            self.eval()
            with self.pooling.fixed_weights():
                vectors = _cut(embed_plan(self, plan), width, normalized=width is not None)
            return _to_host(vectors[torch.tensor(rows, device=vectors.device)].float())

        spans = [plan.spans[place] for place in places] if plan.spans else None
        return Work(launch, plan.tokens, spans)

    @checked
    def encode(  # type: ignore[override]  # one signature for the overloads
        self,
        inputs: Any,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: Annotated[int, Field(ge=1)] = 32,
        show_progress_bar: bool | None = None,
        output_value: Literal["sentence_embedding"] = "sentence_embedding",
        precision: Literal["float32", "int8", "uint8", "binary", "ubinary"] = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: str | torch.device | list[str | torch.device] | None = None,
        normalize_embeddings: bool = False,
        truncate_dim: Annotated[int, Field(ge=1)] | None = None,
        pool: dict[str, Any] | None = None,
        chunk_size: Annotated[int, Field(ge=1)] | None = None,
        *,
        long: LongTexts = _CUT,
        **others: Any,
    ) -> Any:
        """As in sentence-transformers; ``(N, D)``, or ``(D,)`` of one text.

        Args:
            inputs: one text or several.
            prompt_name: name of a prompt that was saved with the model.
            prompt: put before every text; wins over ``prompt_name``.
            batch_size: without meaning here, since packs have a budget of tokens.
            show_progress_bar: show one, at a terminal or in a notebook; ``None`` shows none.
            output_value: vectors of texts, which is all that packs give.
            precision: type of the numbers; 8 bits and 1 bit are made on the device.
            convert_to_numpy: return an array; else a list of tensors.
            convert_to_tensor: return one tensor.
            device: one, or several for a process on each; ``None`` is the model's.
            normalize_embeddings: bring vectors to length 1, which they have unless they are cut.
            truncate_dim: keep the first dimensions.
            pool: processes, see ``start_multi_process_pool``.
            chunk_size: texts that a process of a pool is given at once.
            long: what becomes of texts beyond the limit.
            **others: what sentence-transformers says of the kind of input, such as ``task``.

        Raises:
            ConfigError: an argument that the signature does not allow.
            DataError: something else than texts.
        """
        options = dict(locals())
        del options["self"], options["inputs"], options["others"]
        self._check_options(options, others)
        return self._encode(inputs, options | others)

    def _encode(self, inputs: Any, options: dict[str, Any]) -> Any:
        if options["prompt"] is not None:
            options["prompt_name"] = None
        encode: Any = super().encode
        several = not self.is_singular_input(inputs) and len(inputs) > 1
        if not several or options["precision"] not in get_args(SmallPrecision):
            return encode(inputs, **options)
        precision, numpy = options.pop("precision"), options.pop("convert_to_numpy")
        vectors_ND = encode(inputs, **options | {"convert_to_tensor": True})
        small_ND = quantize(vectors_ND, precision).cpu()
        if options["convert_to_tensor"]:
            return small_ND
        return small_ND.numpy() if numpy else list(small_ND)

    def _check_options(self, options: Mapping[str, Any], others: Mapping[str, Any]) -> None:
        """Refuse what the types of the signature cannot."""
        name, device, pool = options["prompt_name"], options["device"], options["pool"]
        if name is not None and name not in self.prompts:
            raise ConfigError(
                f"no prompt called {name!r}{near_matches(name, list(self.prompts))}",
                where="prompt_name",
            )
        width = self.pooling.width
        for wanted in (options["truncate_dim"], self.truncate_dim):
            if wanted is not None and not 1 <= wanted <= width:
                raise ConfigError(
                    f"{wanted} dimensions asked for", where="truncate_dim", expected=f"1 to {width}"
                )
        for place in device if isinstance(device, list) else [device]:
            if place is not None:
                usable_device(place)
        if device == [] or (pool is not None and not pool.keys() >= {"input", "processes"}):
            raise ConfigError(
                "no process to work in",
                where="encode()",
                expected="a list of devices, or a pool of start_multi_process_pool",
            )
        if unknown := sorted(others.keys() - {"task", "processing_kwargs"}):
            known = list(inspect.signature(self.encode).parameters)
            raise ConfigError(
                f"unknown argument {unknown[0]}{near_matches(unknown[0], known)}", where="encode()"
            )

    @checked
    def encode_chunks(
        self,
        texts: Sequence[str],
        *,
        task: str | None = None,
        long: LongTexts | None = None,
        show_progress_bar: bool = False,
    ) -> list[Chunks]:
        """Embed documents by late chunking: read whole, pooled chunk by chunk.

        Args:
            texts: documents of any length.
            task: the instruction, for symmetric tasks.
            long: lengths of chunks and contexts.
            show_progress_bar: as in ``encode``.

        Returns:
            One object per text, at least one chunk in each.
        """
        long = long or LongTexts("late")
        if long.way != "late":
            raise ConfigError(
                f"{long.way!r} given", where="encode_chunks(long=…)", expected="LongTexts('late')"
            )
        found: list[Chunks] = []
        windows = list(batches(texts, _budget(self._resolve_inference_device(None))))
        works = (self.prepare(w, side="document", task=task, long=long) for w in windows)
        with _told(len(texts), show_progress_bar) as done:
            for work in prefetch(works) if len(windows) > 1 else works:
                spans = work.spans or ()
                vectors = work.launch()()
                ends = np.cumsum(list(map(len, spans)))[:-1]
                found += map(Chunks, np.split(vectors, ends), spans)
                done(len(spans), work.tokens or 0)
        return found

    @torch.inference_mode()
    def _inference(  # type: ignore[override]  # as SentenceTransformer declares it
        self,
        inputs: list[Any],
        *,
        prompt: str | None,
        save_to_cpu: bool,
        normalize_embeddings: bool,
        truncate_dim: int | None,
        long: LongTexts = _CUT,
        **options: Any,
    ) -> Any:
        """Encode in packs of a token budget, longest first, equal texts once; ``encode`` calls it.

        ``batch_size`` has no meaning without padding and is ignored.
        """
        if long.way == "late":
            raise ModelError("late chunking gives several vectors", hint="Call encode_chunks")
        target = self._resolve_inference_device(options.get("device"))
        self.eval()
        different, places = _different(inputs)
        if not different:
            width = min(truncate_dim or self.dimension, self.pooling.width)
            return torch.empty((0, width), device=target)
        budget = _budget(target)
        windows = list(batches(different, budget))
        plans = (
            plan_texts(self.backbone, window, prompt or "", long, budget) for window in windows
        )
        found: list[Tensor] = []
        with (
            self.pooling.fixed_weights(),
            _told(len(different), options.get("show_progress_bar")) as done,
        ):
            for plan in prefetch(plans) if len(windows) > 1 else plans:
                rows_ND = embed_plan(self, plan, done)
                # Cut on the device, so that less has to be copied.
                rows_ND = _cut(rows_ND, truncate_dim, normalized=normalize_embeddings)
                if save_to_cpu:
                    rows_ND = rows_ND.to("cpu", non_blocking=_is_cuda(target))
                found.append(rows_ND)
        if save_to_cpu and _is_cuda(target):
            torch.cuda.synchronize(target)
        rows_ND = torch.cat(found)
        if len(different) == len(inputs):
            return rows_ND
        return rows_ND[torch.tensor(places, device=rows_ND.device)]


def quantize(
    vectors_ND: Tensor, precision: SmallPrecision, bounds: tuple[float, float] | None = None
) -> Tensor:
    """Quantise at least one vector on its device, as ``sentence_transformers.quantize_embeddings``.

    ``(N, D)`` in ``int8`` or ``uint8``; ``(N, ceil(D / 8))`` bits in ``binary`` or ``ubinary``. The
    least and greatest of 8-bit numbers are those of each dimension here, or ``bounds`` of all.
    """
    vectors_ND = vectors_ND.float()
    if precision in ("binary", "ubinary"):
        # One bit per number, the first in the highest place, as ``numpy.packbits`` has it.
        missing = -vectors_ND.shape[1] % 8
        bits = torch.nn.functional.pad((vectors_ND > 0).short(), (0, missing)).unflatten(1, (-1, 8))
        places = torch.tensor([1 << place for place in reversed(range(8))], device=bits.device)
        packed = (bits * places.short()).sum(dim=2)
        return packed.to(torch.uint8) if precision == "ubinary" else (packed - 128).to(torch.int8)
    number_ND = numbered(vectors_ND, *calibration(vectors_ND, bounds))
    return number_ND.to(torch.uint8) if precision == "uint8" else (number_ND - 128).to(torch.int8)


def calibration(
    vectors_ND: Tensor, bounds: tuple[float, float] | None = None
) -> tuple[Tensor, Tensor]:
    """Least value and step ``(D,)`` of 256, of each dimension here or by ``bounds`` of all."""
    least_D, greatest_D = (
        (vectors_ND.amin(dim=0), vectors_ND.amax(dim=0))
        if bounds is None
        else vectors_ND.new_tensor(bounds)[:, None]
    )
    step_D = (greatest_D - least_D) / 255
    return least_D, torch.where(step_D == 0, torch.ones_like(step_D), step_D)


def numbered(vectors_ND: Tensor, least_D: Tensor, step_D: Tensor) -> Tensor:
    """The step that each value lies in, 0 to 255."""
    return ((vectors_ND - least_D) / step_D).floor().clamp(0, 255)


def _cut(rows_ND: Tensor, truncate_dim: int | None, *, normalized: bool) -> Tensor:
    if truncate_dim is not None:
        rows_ND = truncate_embeddings(rows_ND, truncate_dim)
    return normalize(rows_ND, dim=1) if normalized else rows_ND


def _different(texts: Sequence[Any]) -> tuple[list[str], list[int]]:
    """Each different text once, and which of them every text is."""
    check_strings(texts)
    place_of = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    return list(place_of), [place_of[text] for text in texts]


@contextmanager
def _told(total: int, shown: bool | None) -> Iterator[Callable[[int, int], None]]:
    """Yield what is told how many texts and tokens were done: a bar, where one is wanted."""
    if not shown:
        yield lambda texts, tokens: None
        return
    rates = Rates()
    with progress(total, "encode") as bar:
        yield lambda texts, tokens: bar.advance(texts, **rates.add(texts=texts, tokens=tokens))


def _to_host(vectors: Tensor) -> Callable[[], NDArray[np.float32]]:
    """Send vectors to the host, and return what waits for them."""
    if not _is_cuda(vectors.device):
        return vectors.cpu().numpy
    copied = vectors.to("cpu", non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(vectors.device))

    def arrived() -> NDArray[np.float32]:
        event.synchronize()
        return copied.numpy()

    return arrived


def _is_cuda(device: torch.device) -> bool:
    return device.type == "cuda"


def _budget(device: torch.device) -> int:
    return CUDA_PACK_TOKENS if _is_cuda(device) else CPU_PACK_TOKENS
