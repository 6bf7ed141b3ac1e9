"""An exported ONNX folder as an encoder: the graph computes, ``text/tokens.py`` tokenises."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvembed.core.errors import ModelError
from nvembed.encoding.export.onnx import FILE, OUTPUT, padded_inputs
from nvembed.interop.loading import loading
from nvembed.interop.model_folder import ONNX_FILE, read_json_file
from nvembed.text.instructions import Side, resolve_prompt, side_prompt
from nvembed.text.tokens import TextTokenizer

# Padded tokens of one run of the graph: enough to fill the cores, few enough for any memory.
_BATCH_TOKENS = 4096


class OnnxEncoder:
    """The graph of a folder behind the encoder protocol, computing in float32.

    Args:
        folder: written by ``nvembed export --format onnx``.

    Raises:
        ModelError: onnxruntime is missing, or the folder is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise ModelError(
                "an ONNX graph needs onnxruntime",
                where=str(folder),
                hint="pip install 'nvembed[onnx]'",
            ) from error
        from transformers import PreTrainedTokenizerFast

        path = Path(folder)
        with loading(str(path), expected="what nvembed export --format onnx wrote"):
            settings: dict[str, Any] = read_json_file(path / ONNX_FILE)
            special = read_json_file(path / "special_tokens_map.json")
            self._text = TextTokenizer(
                PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"), **special),
                max_tokens=settings["max_tokens"],
                style=settings["text_style"],
                add_bos=settings["add_bos"],
                add_eos=settings["add_eos"],
            )
            self.prompts: dict[str, str] = settings["prompts"]
            self._session = onnxruntime.InferenceSession(str(path / FILE))
            self._width = int(self._session.get_outputs()[0].shape[1])

    @property
    def dimension(self) -> int:
        """Width of the vectors."""
        return self._width

    def encode_query(self, texts: Sequence[str], *, task: str | None = None) -> NDArray[np.float32]:
        """Embed queries; see :class:`~nvembed.encoding.protocol.Encoder`."""
        return self._encode(texts, task, "query")

    def encode_document(
        self, texts: Sequence[str], *, task: str | None = None
    ) -> NDArray[np.float32]:
        """Embed documents; see :class:`~nvembed.encoding.protocol.Encoder`."""
        return self._encode(texts, task, "document")

    def _encode(self, texts: Sequence[str], task: str | None, side: Side) -> NDArray[np.float32]:
        prompt = resolve_prompt(task, self.prompts)
        if prompt is None:
            prompt = side_prompt(self.prompts, side)
        tokens = self._text(texts, prompt)
        vectors = np.empty((len(tokens), self._width), dtype=np.float32)
        batch: list[int] = []
        for row in sorted(range(len(tokens)), key=lambda row: -len(tokens[row])):
            # Longest first, so the first text of a batch is as wide as all of it.
            if batch and (len(batch) + 1) * len(tokens[batch[0]]) > _BATCH_TOKENS:
                vectors[batch] = self._run([tokens[place] for place in batch])
                batch = []
            batch.append(row)
        if batch:
            vectors[batch] = self._run([tokens[place] for place in batch])
        return vectors

    def _run(self, tokens: Sequence[Any]) -> NDArray[np.float32]:
        (vectors,) = self._session.run([OUTPUT], dict(padded_inputs(tokens)))
        return np.asarray(vectors, dtype=np.float32)
