"""Next-token prediction: pre-training and instruction tuning, which differ only in the loss weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from panda_jax.config import Compute
from panda_jax.model.cross_entropy import cross_entropy
from panda_jax.model.llama import Llama

Loss = tuple[jax.Array, jax.Array, dict[str, jax.Array]]


def loss(model: Llama, frozen: Any, batch: dict[str, jax.Array], rng: jax.Array, compute: Compute) -> Loss:
    """Return (sum of loss_weights * -log p(target), sum of loss_weights, no further metrics), float32 [] each.

    batch: tokens, targets, segment_ids, positions int32 [B, T] and loss_weights float32 [B, T]; targets are already
    shifted. The caller adds both sums over micro-batches and devices and divides once. `frozen` and `rng` are unused.
    """
    del frozen, rng
    hidden = model.hidden(batch["tokens"], batch["segment_ids"], batch["positions"], compute)
    weights = batch["loss_weights"].astype(jnp.float32)
    is_tied = model.config.tie_embeddings
    loss_sum = cross_entropy(hidden, model.output_table(), batch["targets"], weights, is_tied, compute)
    return loss_sum, jnp.sum(weights), {}
