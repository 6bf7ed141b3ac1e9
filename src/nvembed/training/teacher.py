"""The teacher of a stage: another model's vectors of all texts that the stage will draw.

The order of a stage is a pure function of its seed, so its texts are known before it begins. Each
is embedded once, for this run and all others (``model/kept_vectors.py``), and read from the
files in the steps; where all are there the teacher is not even loaded.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import normalize

from nvembed.core.cache import cache_folder, content_hash, digest_of
from nvembed.core.errors import ConfigError
from nvembed.core.reporting import Rates, progress
from nvembed.core.runs import derive_seed
from nvembed.core.store import key_of
from nvembed.data.batch import ContrastiveBatch, GivenText
from nvembed.encoding.vector_file import VectorFile
from nvembed.interop.model_folder import check_model_name, contents_fingerprint, model_fingerprint
from nvembed.mining.ranking import settled_dtype
from nvembed.model.bulk import encode_window
from nvembed.model.embedder import NVEmbed
from nvembed.model.encoder import Encoder, computed_fingerprint, is_endpoint
from nvembed.model.kept_vectors import KeptVectors, text_keys
from nvembed.model.packing import share_packs
from nvembed.model.packs import embed_pack
from nvembed.model.tokens import TokenizedText
from nvembed.model.workers import Loader
from nvembed.training.checkpoint import WEIGHTS, tensor_shapes
from nvembed.training.distributed import DistributedContext
from nvembed.training.loss_config import TeacherConfig

FOLDER = "teachers"  # of the cache
# Texts of a file: what a killed run loses is less than one.
WINDOW_TEXTS = 2048
PROJECTION = "projection"  # its name among the trained parameters
_FITTED_PER_WIDTH, _MOST_FITTED, _RIDGE = 4, 8192, 0.1


def teacher_source(settings: TeacherConfig, base_dir: Path) -> str:
    """The folder of a teacher where there is one beside the recipe, else what it is called."""
    local = base_dir / settings.name
    return str(local) if not is_endpoint(settings.name) and local.is_dir() else settings.name


def teacher_fingerprint(settings: TeacherConfig, base_dir: Path) -> str | None:
    """Name a teacher by its contents, where these lie in files here; or say that there is none."""
    if (file := settings.file) is not None:
        return content_hash(*(digest_of(base_dir / name) for name in (file.vectors, file.texts)))
    source = teacher_source(settings, base_dir)
    if is_endpoint(source):
        return None
    check_model_name(source)
    return contents_fingerprint(source) if Path(source).is_dir() else None


class Teacher:
    """Vectors of texts, in 16 bit."""

    def __init__(self, settings: TeacherConfig, base_dir: Path) -> None:
        name, folder = teacher_source(settings, base_dir), cache_folder(FOLDER)
        self.settings = settings
        self._load: Callable[[], Encoder]
        if (file := settings.file) is not None:
            identity = teacher_fingerprint(settings, base_dir) or ""
            self._load = partial(VectorFile, base_dir / file.vectors, base_dir / file.texts)
        elif is_endpoint(name):
            identity = model_fingerprint(name, settings.endpoint_model)
            self._load = lambda: Loader(name, None, settings.endpoint_model).encoder
        else:
            dtype = settled_dtype(name, settings.dtype, folder / key_of(name), "local")
            identity = computed_fingerprint(name, dtype)
            self._load = lambda: Loader(name, dtype).encoder
        self._kept = KeptVectors(folder / key_of(identity), dtype=np.float16)

    @property
    def dimension(self) -> int:
        """Width of the vectors, once any are kept."""
        assert self._kept.dimension is not None, "prepared"
        return self._kept.dimension

    def prepare(
        self,
        given: Iterable[GivenText],
        processes: DistributedContext,
        log: Callable[[str], None],
    ) -> None:
        """Embed the texts that no file has yet, shared out over processes that all call this.

        The log has a line for every tenth of them: a run in the background shows no bar.
        """
        texts = self._missing(map(self._as_read, given))
        processes.barrier()  # all see the same ones missing, before the first of them is there
        log(f"{len(texts):,} texts to embed by {self.settings.name}")
        encoder: Encoder | None = None
        for own in (texts[processes.rank :: processes.count], texts):
            # What others made is still missing where the cache is not shared.
            if left := self._missing(own):
                encoder = encoder or self._load()
                rates, done = Rates(), 0
                with progress(len(left), "teacher") as bar:
                    for window in _windows(left):
                        self._embed(window, encoder)
                        bar.advance(len(window), **rates.add(texts=len(window)))
                        tenth, done = 10 * done // len(left), done + len(window)
                        if tenth < 10 * done // len(left):
                            log(f"{done:,} of {len(left):,} texts embedded by the teacher")
            processes.barrier()

    def vectors(self, given_U: Sequence[GivenText]) -> NDArray[np.float16]:
        """Vectors of texts that were prepared, ``(U, E)``."""
        return cast(NDArray[np.float16], self._kept.take(text_keys(map(self._as_read, given_U))))

    def rehearse(self, given: Iterable[GivenText], sample: int) -> TeacherStandIn:
        """Find out what is missing, and how long it takes; keep nothing."""
        texts, encoder = self._missing(map(self._as_read, given)), self._load()
        chosen = texts[:: max(1, len(texts) // sample)]
        started = time.perf_counter()
        for window in _windows(chosen):
            self._encode(window, encoder)
        took = time.perf_counter() - started
        characters, in_sample = (sum(len(one.text) for one in some) for some in (texts, chosen))
        seconds = took * characters / max(1, in_sample)
        return TeacherStandIn(self.settings, encoder.dimension, len(texts), seconds)

    def _missing(self, read: Iterable[GivenText]) -> list[GivenText]:
        texts = list(dict.fromkeys(read))
        keys_N = text_keys(texts)
        return [texts[row] for row in self._kept.missing(keys_N).tolist()]

    def _as_read(self, given: GivenText) -> GivenText:
        """What the teacher is told and reads."""
        settings = self.settings
        if settings.file is not None:
            return GivenText("document", None, given.text)
        is_query = given.side == "query"
        prefix = settings.query_prefix if is_query else settings.document_prefix
        instruction = given.instruction if settings.instructions else None
        return GivenText(given.side, instruction, prefix + given.text)

    def _embed(self, window: Sequence[GivenText], encoder: Encoder) -> None:
        self._kept.keep(text_keys(window), partial(self._encode, window, encoder))

    @staticmethod
    def _encode(window: Sequence[GivenText], encoder: Encoder) -> NDArray[np.float32]:
        side, task, _ = window[0]
        return encode_window(encoder, [text for _, _, text in window], side=side, task=task)


def prepared(
    settings: TeacherConfig,
    base_dir: Path,
    given: Iterable[GivenText],
    processes: DistributedContext,
    log: Callable[[str], None],
) -> Teacher | None:
    """A teacher that has the vectors of given texts; ``None`` where they do not count."""
    if not settings.of_texts:
        return None
    found = Teacher(settings, base_dir)
    found.prepare(given, processes, log)
    return found


@dataclass(frozen=True, slots=True)
class TeacherStandIn:
    """Random vectors in a teacher's place, and what it will take to have its own."""

    settings: TeacherConfig
    dimension: int
    missing: int  # texts that it will have to embed
    seconds: float  # which that will take

    def vectors(self, given_U: Sequence[GivenText]) -> NDArray[np.float16]:
        """See ``Teacher``."""
        rng = np.random.default_rng(len(given_U))
        return rng.standard_normal((len(given_U), self.dimension)).astype(np.float16)


def _windows(texts: Iterable[GivenText]) -> Iterable[list[GivenText]]:
    """Texts of one side and instruction each."""
    alike: dict[tuple[str, str | None], list[GivenText]] = defaultdict(list)
    for one in texts:
        alike[one.side, one.instruction].append(one)
    for own in alike.values():
        for start in range(0, len(own), WINDOW_TEXTS):
            yield own[start : start + WINDOW_TEXTS]


def is_continued(before: TeacherConfig | None, after: TeacherConfig | None) -> bool:
    """Whether a stage goes on with the projection of the one before it."""
    if before is None or after is None or after.vectors is None:
        return False
    keys = ("model", "file", "endpoint_model")
    return all(getattr(before, key) == getattr(after, key) for key in keys)


def saved_projection(checkpoint: Path, device: torch.device) -> nn.Parameter | None:
    """A projection as large as the one that a checkpoint holds, to be filled; None without one."""
    shape = tensor_shapes(checkpoint / WEIGHTS).get(PROJECTION)
    return None if shape is None else nn.Parameter(torch.zeros(shape, device=device))


def new_projection(
    teacher: Teacher | TeacherStandIn | None, model: NVEmbed, *, seed: int, stage: int
) -> nn.Parameter | None:
    """A random orthogonal map ``(E, D)`` to the teacher's width, where its vectors want one."""
    if teacher is None or teacher.settings.vectors is None or teacher.dimension == model.dimension:
        return None
    where = f"stages.{stage}.teacher"
    own, taught = model.dimension, teacher.dimension
    if not teacher.settings.projection:
        raise ConfigError(
            f"the teacher's vectors are {taught} wide, and the model's {own}",
            where=where,
            expected="equal widths without a projection",
            hint="Set projection=true, or learn similarities alone (vectors: null)",
        )
    generator = torch.Generator().manual_seed(derive_seed(seed, PROJECTION, where))
    matrix_ED = torch.empty(taught, own)
    nn.init.orthogonal_(matrix_ED, generator=generator)
    return nn.Parameter(matrix_ED.to(model.device))


@torch.no_grad()
def fit_projection(
    projection_ED: nn.Parameter,
    model: NVEmbed,
    prepared: Iterable[tuple[ContrastiveBatch, Sequence[TokenizedText]]],
    pack_tokens: int,
    computing: Callable[[], AbstractContextManager[object]],
) -> None:
    """Begin with the map that brings the vectors of a model, as it is, nearest to the teacher's.

    A random one would turn the model's space around before it teaches anything. Least squares over
    the texts of the first steps, four per width of the model, with a ridge of a tenth of the mean
    eigenvalue; ``prepared`` are batches with their teacher's vectors, and the forwards are done
    in what ``computing`` gives.
    """
    width, training = projection_ED.shape[1], model.training
    wanted = min(_FITTED_PER_WIDTH * width, _MOST_FITTED)
    own, taught, count = list[Tensor](), list[Tensor](), 0
    model.eval()
    with progress(wanted, "projection to the teacher") as bar:
        for batch, texts in prepared:
            for pack in share_packs(list(map(len, texts)), pack_tokens, 1)[0]:
                with computing():
                    own.append(embed_pack(model, [texts[row] for row in pack]).float())
                assert batch.teacher_UE is not None
                taught.append(torch.as_tensor(batch.teacher_UE[pack]).float())
            bar.advance(min(len(texts), wanted - count))
            if (count := count + len(texts)) >= wanted:
                break
    model.train(training)
    own_ND = torch.cat(own)
    taught_NE = normalize(torch.cat(taught).to(own_ND.device), dim=1)
    with torch.autocast(own_ND.device.type, enabled=False):
        gram_DD = own_ND.T @ own_ND
        ridge = _RIDGE * gram_DD.diagonal().mean()
        eye_DD = torch.eye(width, device=own_ND.device)
        found_DE = torch.linalg.solve(gram_DD + ridge * eye_DD, own_ND.T @ taught_NE)
    projection_ED.copy_(found_DE.T)
