"""A tiny run whose dimensions all differ, so that a transposed or confused axis cannot pass a test."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from panda_jax.config import SGD, AdamW, Config, Data, Mesh, Model, Source, Tokenizer, Train

SEQ_LEN = 24
MODEL: dict[str, Any] = dict(
    vocab_size=96, dim=32, num_layers=3, num_heads=8, num_kv_heads=4, mlp_dim=40, norm_eps=1e-5, context_length=64
)


def config(**changes: Any) -> Config:
    """Return a run of batch 8 x 24 in float32; `train`, `mesh`, `compute`, `model` take dicts of changed fields."""
    base = Config(
        name="tiny",
        model=Model(**MODEL),
        tokenizer=Tokenizer(path="unused.model"),
        data=Data(sources=(Source(corpus="text_lines", path="unused.txt"),), seq_len=SEQ_LEN),
        optimizer=AdamW(learning_rate=1e-2),
        train=Train(global_batch_size=8),
        mesh=Mesh(data=1),
    )
    defaults = {"compute": {"dtype": "float32", "compilation_cache_dir": None}}
    for name, fields in (defaults | changes).items():
        merged = (defaults.get(name, {}) | fields) if isinstance(fields, dict) else fields
        value = dataclasses.replace(getattr(base, name), **merged) if isinstance(merged, dict) else merged
        base = dataclasses.replace(base, **{name: value})
    return base


def sgd(learning_rate: float) -> SGD:
    """Return plain gradient descent, whose update shows the gradient."""
    return SGD(kind="sgd", learning_rate=learning_rate)


def batch(seed: int, rows: int = 8) -> dict[str, np.ndarray]:
    """Return a random packed batch [rows, 24]: 2 or 3 segments a row, ragged padding, row 5 without a trained token."""
    generator = np.random.default_rng(seed)
    shape = (rows, SEQ_LEN)
    tokens = generator.integers(0, MODEL["vocab_size"], shape).astype(np.int32)
    targets = generator.integers(0, MODEL["vocab_size"], shape).astype(np.int32)
    segment_ids, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    weights = (generator.random(shape) < 0.6).astype(np.float32)
    for row in range(rows):
        ends = np.sort(generator.choice(np.arange(4, SEQ_LEN), size=generator.integers(2, 4), replace=False))
        start = 0
        for number, end in enumerate(ends, 1):
            segment_ids[row, start:end] = number
            positions[row, start:end] = np.arange(end - start)
            start = end
    real = segment_ids > 0
    weights[5 % rows] = 0
    zero = np.zeros_like(tokens)
    return {
        "tokens": np.where(real, tokens, zero),
        "targets": np.where(real, targets, zero),
        "segment_ids": segment_ids,
        "positions": positions,
        "loss_weights": weights * real,
    }
