"""SentencePiece: text to ids and back. BOS and EOS are ids that the caller adds; no text ever becomes one of them.

Padding has no id: it is a mask in the batch. So a tokenizer needs BOS and EOS and nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece

from panda_jax.errors import InputError


class Tokenizer:
    """A SentencePiece model with BOS and EOS.

    With a LLaMA-like model (identity normaliser, byte fallback) decode(encode(text)) == text for every text, NUL,
    runs of spaces and the literal text "</s>" included, with one exception: SentencePiece writes a space as U+2581
    ("▁"), so a U+2581 in the text comes back as a space. A model with another normaliser changes more (chinese_sp
    drops line breaks), and one without byte fallback turns what it does not know into <unk>.
    """

    def __init__(self, model_bytes: bytes, origin: str) -> None:
        """Open a serialised SentencePiece model; `origin` names it in messages. Raises InputError if it is unusable."""
        self.model_bytes = model_bytes
        self.origin = origin
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
            self.vocab_size = int(self._processor.vocab_size())
        except (RuntimeError, OSError) as error:
            raise InputError(
                f"{origin}: not a SentencePiece model (damaged, or another format); fetch it again"
            ) from error
        self.bos_id = int(self._processor.bos_id())
        self.eos_id = int(self._processor.eos_id())
        self.unk_id = int(self._processor.unk_id())
        for name, number in (("BOS", self.bos_id), ("EOS", self.eos_id)):
            if number < 0:
                raise InputError(
                    f"{origin}: the vocabulary has no {name} id, and records begin with BOS and end with EOS; "
                    f"use a model that has both, or train one with tokenizer.train_vocab_size"
                )

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Open a .model file; raises InputError where it is missing, unreadable or not a SentencePiece model."""
        try:
            model_bytes = Path(path).read_bytes()
        except OSError as error:
            raise InputError(
                f"tokenizer.path {path}: {error.strerror}; expected a SentencePiece .model file "
                f"(or set tokenizer.train_vocab_size to train one)"
            ) from error
        if not model_bytes:
            raise InputError(f"tokenizer.path {path}: the file is empty; expected a SentencePiece .model file")
        return cls(model_bytes, str(path))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the model file, in hex."""
        return hashlib.sha256(self.model_bytes).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without BOS or EOS; raises UnicodeEncodeError on a lone surrogate."""
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Return the ids (int32) of each text, without BOS or EOS, computed in the calling thread alone.

        Raises UnicodeEncodeError where a text holds a lone surrogate, which no encoding can write.
        """
        try:
            return self._processor.encode(texts, return_type="numpy", num_threads=1, add_bos=False, add_eos=False)
        except (RuntimeError, TypeError):
            for text in texts:
                text.encode("utf-8")
            raise

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of `ids`; BOS and EOS vanish, broken UTF-8 becomes U+FFFD, one leading space is dropped.

        Ids beyond the vocabulary, which a model has where tokenizer.extra_ids says so, have no text and vanish too.
        """
        return self._processor.decode([int(i) for i in ids if i < self.vocab_size])

    def pieces(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """Return the vocabulary's piece for each id, with "▁" for a space and "<0xE4>" for a byte."""
        return [self._processor.id_to_piece(int(i)) for i in ids]

    def byte_of(self, piece_id: int) -> int | None:
        """Return the byte that this id stands for, or None where it is no byte piece."""
        if piece_id >= self.vocab_size or not self._processor.is_byte(int(piece_id)):
            return None
        return int(self._processor.id_to_piece(int(piece_id))[3:5], 16)
