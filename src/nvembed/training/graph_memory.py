"""How many tokens' graphs fit into memory: measured once at the start of a run, and kept.

What a graph holds between forward and backward is counted by hooks on the tensors that autograd
saves, on one pack of texts of the full length (attention of longer texts holds more per token, so
shorter ones need less). The number is written into the run folder, because in a stage without
in-batch negatives it decides which queries are sent back together, and a resumed run must add up
floats in the same order.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, UntypedStorage
from torch.distributed.tensor import DTensor

from nvembed.core.errors import DataError
from nvembed.core.files import write_json
from nvembed.core.runs import TRAIN
from nvembed.core.text_files import read_json_object
from nvembed.model.embedder import NVEmbed
from nvembed.model.memory import free_bytes
from nvembed.model.packs import embed_pack
from nvembed.text.tokens import TokenizedText
from nvembed.training.processes import Processes

# Of what is free when a run starts: graphs are not all that a step needs (one layer's work in
# progress, gradients, moments, the loss), and others may want memory too.
FREE_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class GraphMemory:
    """What was found.

    Args:
        bytes_per_token: a graph holds per token, for texts of the full length.
        budget_bytes: for graphs.
    """

    bytes_per_token: float
    budget_bytes: int

    @property
    def tokens(self) -> int:
        """Tokens whose graphs fit."""
        return int(self.budget_bytes / self.bytes_per_token)


def settle_graph_memory(
    file: Path,
    model: NVEmbed,
    processes: Processes,
    *,
    memory_gb: float | None,
    pack_tokens: int,
) -> GraphMemory:
    """Read what the run settled on, or measure and write it; the same for all processes.

    Args:
        file: of the run folder.
        model: on its device, in training mode, in the block of the run's precision.
        processes: of the run; the first one's budget counts.
        memory_gb: for graphs, in 10⁹ bytes; ``None`` takes half of what is free now.
        pack_tokens: of one forward.
    """
    known = read_graph_memory(file)
    if processes.agree(known is None):
        known = measure_graph_memory(model, memory_gb=memory_gb, pack_tokens=pack_tokens)
        if processes.is_main:
            write_json(file, asdict(known), TRAIN)
    return GraphMemory(**processes.of_main(asdict(known)))  # type: ignore[arg-type]


def read_graph_memory(file: Path) -> GraphMemory | None:
    """Read what a run settled on; ``None`` where it did not, or the file is damaged."""
    try:
        values = read_json_object(file, "what graphs need")
        memory = GraphMemory(float(values["bytes_per_token"]), int(values["budget_bytes"]))
    except (DataError, KeyError, TypeError, ValueError, OverflowError):
        return None
    sizes = (memory.bytes_per_token, memory.budget_bytes)
    return memory if all(math.isfinite(size) and size > 0 for size in sizes) else None


def measure_graph_memory(
    model: NVEmbed, *, memory_gb: float | None, pack_tokens: int
) -> GraphMemory:
    """What a run that started now would settle on; arguments as for ``settle_graph_memory``."""
    budget = int(memory_gb * 1e9) if memory_gb else int(free_bytes(model.device) * FREE_SHARE)
    return GraphMemory(graph_bytes_per_token(model, pack_tokens), budget)


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
    """Collect all storages that graphs made in the block save, parameters left out.

    Yields:
        Storages by identity. Weights that were gathered for a layer and are given up after it have
        no bytes by the end of the block.
    """
    held: dict[int, UntypedStorage] = {}
    own = {_storage(tensor)._cdata for tensor in (*model.parameters(), *model.buffers())}

    def note(tensor: Tensor) -> Tensor:
        storage = _storage(tensor)
        if storage._cdata not in own:
            held[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield held


def _storage(tensor: Tensor) -> UntypedStorage:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.untyped_storage()


def peak_bytes(device: torch.device) -> int:
    """Most memory that this process has held on a device so far; on a CPU all of the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    import resource  # not on Windows, where only the dry run needs it

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
