"""The run's tokenizer: the file that tokenizer.path names, trained on the run's own sources if it does not exist."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from panda_jax.config import Config, Source
from panda_jax.data import corpora, files
from panda_jax.errors import InputError
from panda_jax.text.tokenizer import Tokenizer
from panda_jax.text.vocab import train_vocabulary

# Sources take turns by blocks of this size, so that a large one cannot use up tokenizer.train_max_bytes alone.
BLOCK_BYTES = 2**20


def load_or_train_tokenizer(config: Config) -> Tokenizer:
    """Return the tokenizer; where its file is missing and tokenizer.train_vocab_size is set, train and write it first.

    Raises InputError for a missing or damaged file, for a file of another size than train_vocab_size, and where the
    text does not yield a vocabulary of that size.
    """
    path, size = config.tokenizer.path, config.tokenizer.train_vocab_size
    if size is not None and not Path(path).exists():
        if size + config.tokenizer.extra_ids != config.model.vocab_size:
            raise InputError(
                f"tokenizer.train_vocab_size: {size}, but model.vocab_size is {config.model.vocab_size} and "
                f"tokenizer.extra_ids {config.tokenizer.extra_ids}; the first and the last must add up to the second"
            )
        train_vocabulary(_texts(config), config.tokenizer)
    tokenizer = Tokenizer.load(path)
    if size is not None and tokenizer.vocab_size != size:
        raise InputError(
            f"tokenizer.train_vocab_size: {size}, but {path} exists and has {tokenizer.vocab_size} pieces; "
            "delete the file to train a new one, or make the setting agree"
        )
    return tokenizer


def _texts(config: Config) -> Iterator[str]:
    """Yield the text of every segment as it is trained or conditioned on, the sources taking turns.

    Sources that are only measured (held_out: all) are left out, unless there are no others.
    """
    trained = [source for source in config.data.sources if source.held_out != "all"]
    turns = [_block_texts(source) for source in trained or config.data.sources]
    while turns:
        for turn in list(turns):
            texts = next(turn, None)
            if texts is None:
                turns.remove(turn)
            else:
                yield from texts


def _block_texts(source: Source) -> Iterator[list[str]]:
    template = corpora.template_of(source)
    for block in files.blocks(source, BLOCK_BYTES):
        yield corpora.examples(block, source, template).texts
