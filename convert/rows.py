"""Rows of the vocabulary that no text reaches, such as Panda's [PAD], and a model without them."""

from __future__ import annotations

import dataclasses

import numpy as np

from convert.delta_published import VOCABULARY
from panda_jax.errors import InputError
from panda_jax.text.tokenizer import Tokenizer
from panda_jax.weights import Lazy, Weights


def drop_pad(restored: Weights) -> Weights:
    """Return the model without the rows beyond the tokenizer's pieces, such as Panda's [PAD]."""
    if restored.tokenizer_model is None:
        raise InputError("--drop-pad: no tokenizer.model beside the weights, which says how many rows to keep")
    pieces = Tokenizer(restored.tokenizer_model, "tokenizer.model").vocab_size
    if restored.model.vocab_size < pieces:
        raise InputError(f"--drop-pad: {restored.model.vocab_size} rows, the tokenizer has {pieces} pieces")
    return without_last_rows(restored, pieces)


def without_last_rows(weights: Weights, num_rows: int) -> Weights:
    """Return the model with its vocabulary cut to `num_rows`, and without the tokens that lay beyond."""

    def cut(tensor: Lazy) -> Lazy:
        shape = (num_rows, *tensor.shape[1:])
        return Lazy(shape, tensor.dtype, lambda: np.ascontiguousarray(tensor.read()[:num_rows]))

    tensors = {name: cut(tensor) if name in VOCABULARY else tensor for name, tensor in weights.tensors.items()}
    added = {token: number for token, number in weights.added_tokens.items() if number < num_rows}
    model = dataclasses.replace(weights.model, vocab_size=num_rows)
    return dataclasses.replace(weights, model=model, tensors=tensors, added_tokens=added)
