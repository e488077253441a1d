"""SentencePiece models spelled out piece by piece, for tests that need scores no trainer gives."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

# SentencePiece's own description of its file, an independent reader and the writer of the models drawn here.
model_proto: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2").ModelProto
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def spell(
    pieces: Sequence[tuple[str, float]], user_defined: Sequence[str] = (), change: Callable[[Any], None] | None = None
) -> bytes:
    """Return a LLaMA-like model of <unk>, <s>, </s>, the bytes, and these pieces with their scores."""
    model = model_proto()
    fixed = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL), *((f"<0x{i:02X}>", BYTE) for i in range(256))]
    listed = [
        *((text, 0.0, kind) for text, kind in fixed),
        *((text, score, NORMAL) for text, score in pieces),
        *((text, 0.0, USER_DEFINED) for text in user_defined),
    ]
    for text, score, kind in listed:
        model.pieces.add(piece=text, score=score, type=kind)
    model.trainer_spec.model_type = model.trainer_spec.BPE
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.remove_extra_whitespaces = False
    if change is not None:
        change(model)
    return model.SerializeToString()


def singles(characters: str) -> list[tuple[str, float]]:
    return [(character, -1000.0 - i) for i, character in enumerate(characters)]
