"""The ids of a prompt, exactly as training would have them before its answer."""

from __future__ import annotations

from collections.abc import Sequence

from panda_jax.text.tokenizer import Tokenizer
from panda_jax.text.turns import Segment


def encode_prompt(segments: Sequence[Segment], tokenizer: Tokenizer) -> list[int]:
    """Return BOS and the ids of each segment, encoded by itself, with EOS behind those that are trained.

    So a conversation's ids are those that data/tokens.py makes of it, as far as they go:
    [("问", False), ("答", True), ("再问", False)] -> BOS 问 答 EOS 再 问
    Raises UnicodeEncodeError on a lone surrogate.
    """
    ids = [tokenizer.bos_id]
    for segment in segments:
        ids += tokenizer.encode(segment.text)
        if segment.trained:
            ids.append(tokenizer.eos_id)
    return ids
