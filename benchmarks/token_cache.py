"""What the token cache saves: CPU seconds of tokenising texts, and of reading them from the cache.

    python benchmarks/token_cache.py

Needs ``shared/`` beside the checkout. CPU seconds of the whole process, so that other jobs matter
little; fresh texts, the same texts with a cache on disk, and what writing it cost.
"""

from __future__ import annotations

import gzip
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from transformers import AutoTokenizer

from nvembed.text.instructions import PromptedText
from nvembed.text.token_cache import TokenCache
from nvembed.text.tokens import TextTokenizer

SHARED = Path(__file__).resolve().parents[2] / "shared"
BATCH = 256


def main() -> None:
    with gzip.open(SHARED / "data" / "train" / "squad_train.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for _, line in zip(range(20_000), file, strict=False)]
    texts: list[PromptedText] = [("", json.dumps(row)[:600]) for row in rows]
    stock = AutoTokenizer.from_pretrained(SHARED / "models" / "base-8m")
    tokenizer = TextTokenizer(stock, max_tokens=128)

    def seconds(read: Callable[[list[PromptedText]], list[object]]) -> tuple[float, int]:
        began, tokens = time.process_time(), 0
        for start in range(0, len(texts), BATCH):
            tokens += sum(map(len, read(texts[start : start + BATCH])))  # type: ignore[arg-type]
        return time.process_time() - began, tokens

    with tempfile.TemporaryDirectory() as folder:
        plain, tokens = seconds(TokenCache(None, tokenizer))
        cache = TokenCache(Path(folder), tokenizer)
        cold, _ = seconds(cache)
        began = time.process_time()
        cache.flush()
        written = time.process_time() - began
        warm, _ = seconds(TokenCache(Path(folder), tokenizer))
    print(f"{len(texts):,} texts, {tokens:,} tokens; CPU seconds, and tokens per CPU second")
    for name, value in (("no cache", plain), ("cache, cold", cold + written), ("warm", warm)):
        print(f"{name:12} {value:6.2f} {tokens / value:12,.0f}")


if __name__ == "__main__":
    main()
