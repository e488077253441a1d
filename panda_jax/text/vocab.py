"""Train a fresh SentencePiece vocabulary with the settings of LLaMA's (PROTOCOLS.md §2.1)."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from panda_jax import config
from panda_jax.atomic import write_atomically
from panda_jax.errors import InputError

# Longer lines are cut here. The trainer drops lines over its limit in bytes and cannot handle words over 65,535 pieces.
LINE_CHARACTERS = 4000


def train_vocabulary(texts: Iterator[str], tokenizer: config.Tokenizer) -> None:
    """Train a byte-pair vocabulary of tokenizer.train_vocab_size pieces and write it to tokenizer.path.

    The same texts give the same file, byte for byte. At most tokenizer.train_max_bytes of text are read. Ids: <unk> 0,
    <s> 1, </s> 2, the 256 bytes, then pieces; no padding id. Raises InputError where the text is too little for the
    vocabulary, or the vocabulary too small for the text's characters, with the value that would do.
    """
    model = io.BytesIO()
    lines = _Lines(texts, tokenizer.train_max_bytes)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=tokenizer.train_vocab_size,
            character_coverage=tokenizer.character_coverage,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            add_dummy_prefix=True,
            remove_extra_whitespaces=False,
            max_sentence_length=4 * LINE_CHARACTERS,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        if lines.failure is not None:
            raise lines.failure from None
        raise InputError(_explain(str(error), tokenizer, lines.num_bytes)) from error
    Path(tokenizer.path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(Path(tokenizer.path), [model.getvalue()])


class _Lines:
    """The texts as the trainer wants them: lines of bounded length, up to a number of bytes."""

    def __init__(self, texts: Iterator[str], max_bytes: int) -> None:
        self.texts, self.max_bytes = texts, max_bytes
        self.num_bytes = 0
        self.failure: Exception | None = None  # the trainer reports what its iterator raises as a mere string

    def __iter__(self) -> Iterator[bytes]:
        try:
            yield from self._lines()
        except Exception as error:
            self.failure = error
            raise

    def _lines(self) -> Iterator[bytes]:
        for text in self.texts:
            for line in re.split(r"[\r\n\0]+", text):
                for start in range(0, len(line), LINE_CHARACTERS):
                    # A lone surrogate cannot be written in UTF-8; the reader of records counts and drops such a record.
                    encoded = line[start : start + LINE_CHARACTERS].encode("utf-8", errors="ignore")
                    if self.num_bytes + len(encoded) > self.max_bytes:
                        return
                    self.num_bytes += len(encoded)
                    yield encoded


def _explain(message: str, tokenizer: config.Tokenizer, num_bytes: int) -> str:
    """Return our one line for the trainer's complaint."""
    size = tokenizer.train_vocab_size
    if too_large := re.search(r"set it to a value <= (\d+)", message):
        return (
            f"tokenizer.train_vocab_size: {size} pieces are more than {num_bytes:,} bytes of text yield; "
            f"the largest possible value is {too_large[1]}; lower it or add text"
        )
    if too_small := re.search(r"smaller than required_chars. \d+ vs (\d+)", message):
        return (
            f"tokenizer.train_vocab_size: {size} pieces do not hold the text's characters and the bytes, "
            f"which take {too_small[1]}; raise it, or lower tokenizer.character_coverage"
        )
    if "sentences_.empty()" in message:
        return f"tokenizer.train_vocab_size: data.sources hold no text to train {tokenizer.path} on; add text"
    return f"tokenizer.train_vocab_size: SentencePiece could not train {size} pieces on {num_bytes:,} bytes: {message}"
