"""From one block of raw records to one shard: what a tokenising process does."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from panda_jax.config import Source
from panda_jax.data import corpora
from panda_jax.data.cache import Header, shard_path, token_dtype, write_shard
from panda_jax.data.files import Block
from panda_jax.data.tokens import tokenize_all
from panda_jax.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Job:
    """What is done to every block of one source; picklable."""

    source: Source
    seq_len: int
    model_bytes: bytes
    """The SentencePiece model."""
    folder: str
    """Where the shards go."""


def build_shard(block: Block, job: Job, tokenizer: Tokenizer) -> Header:
    """Tokenise one block and write its shard; raises InputError for bad records, OSError for a bad disk."""
    template = corpora.template_of(job.source)
    examples = corpora.examples(block, job.source, template)
    skipped = Counter(skip.reason for _, _, skip in examples.skipped)
    windows = tokenize_all(examples, tokenizer, job.source, job.seq_len)
    header = Header(
        index=block.index,
        file=block.file,
        first_record=block.first_record,
        first_line=block.first_line,
        dtype=token_dtype(tokenizer.vocab_size),
        windows=len(windows.lengths),
        tokens=len(windows.ids),
        trained=int(np.count_nonzero(windows.trained)),
        payload_bytes=len(block.payload),
        records=len({*examples.records, *(record for _, record, _ in examples.skipped)}),
        examples=len(examples) + len(examples.skipped),
        changed=dict(windows.changed),
        dropped=dict(windows.dropped + skipped),
    )
    records = np.array(examples.records, np.int64)[windows.owners]
    write_shard(shard_path(Path(job.folder), block.index), header, records, windows)
    return header
