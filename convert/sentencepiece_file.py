"""The contents of a SentencePiece .model file: its pieces, and the settings that decide how text is cut.

The file is a protocol buffer, and a reader of the few fields needed is shorter than a dependency on protobuf. Field
numbers and defaults are those of sentencepiece_model.proto.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from panda_jax.errors import InputError

BPE = 2
MODEL_TYPES = {1: "unigram", BPE: "BPE", 3: "word", 4: "char"}


class Kind(IntEnum):
    """What a piece is for."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; its id is its position."""

    text: str
    score: float
    kind: Kind


@dataclass(frozen=True)
class SentencePieceFile:
    """A parsed .model file."""

    pieces: list[Piece]
    model_type: int
    byte_fallback: bool
    whitespace_as_suffix: bool
    pad_piece: str
    has_character_map: bool
    """Whether the normaliser rewrites characters; the identity normaliser does not."""
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool
    has_denormalizer: bool


def parse_sentencepiece(model_bytes: bytes) -> SentencePieceFile:
    """Parse the bytes of a .model file; raises InputError where they are not one."""
    try:
        model = list(_fields(model_bytes))
        pieces = [_piece(value) for number, value in model if number == 1]
        trainer = dict(_fields(_last_message(model, 2)))
        normalizer = dict(_fields(_last_message(model, 3)))
        denormalizer = dict(_fields(_last_message(model, 5)))
        return SentencePieceFile(
            pieces=pieces,
            model_type=int(trainer.get(3, 1)),
            byte_fallback=bool(trainer.get(35, 0)),
            whitespace_as_suffix=bool(trainer.get(24, 0)),
            pad_piece=bytes(trainer.get(48, b"<pad>")).decode("utf-8"),
            has_character_map=bool(normalizer.get(2)),
            add_dummy_prefix=bool(normalizer.get(3, 1)),
            remove_extra_whitespaces=bool(normalizer.get(4, 1)),
            escape_whitespaces=bool(normalizer.get(5, 1)),
            has_denormalizer=bool(denormalizer.get(2)),
        )
    except (ValueError, TypeError, IndexError, struct.error) as error:
        raise InputError(
            f"tokenizer.model: not a SentencePiece model ({' '.join(str(error).split())}); fetch it again"
        ) from error


def _piece(message: bytes) -> Piece:
    fields = dict(_fields(message))
    return Piece(bytes(fields[1]).decode("utf-8") if 1 in fields else "", fields.get(2, 0.0), Kind(fields.get(3, 1)))


def _last_message(model: list[tuple[int, bytes]], number: int) -> bytes:
    return next((value for found, value in reversed(model) if found == number), b"")


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (field number, value) of a protocol buffer: int of a varint, float of 32 bits, bytes of anything long."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        match key & 7:
            case 0:
                value, at = _varint(message, at)
            case 1:
                value, at = message[at : at + 8], at + 8
            case 2:
                length, at = _varint(message, at)
                value, at = message[at : at + length], at + length
            case 5:
                (value,), at = struct.unpack_from("<f", message, at), at + 4
            case wire:
                raise ValueError(f"wire type {wire} at byte {at}")
        if at > len(message):
            raise ValueError(f"field {key >> 3} ends {at - len(message)} bytes after the file")
        yield key >> 3, value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
