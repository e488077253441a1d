"""Cross-entropy of the output layer, chunk by chunk: logits [B, T, V] never exist in float32.

    R groups of rows, one per data-parallel device; b rows of a group; C positions of a chunk; D width, V vocab

Where a gradient is wanted it is formed in the forward pass, while a chunk's logits are at hand; the backward pass only
scales it. That costs one matrix product less than recomputing the logits, and a third of the memory.
"""

from __future__ import annotations

from functools import partial
from math import prod
from typing import NamedTuple

import jax
import jax.numpy as jnp

from panda_jax.config import Compute
from panda_jax.sharding import LOGICAL_AXES, constrain


class Layout(NamedTuple):
    """How the work is cut; static."""

    is_tied: bool
    """The table is the embedding's [V, D] instead of [D, V]."""
    num_groups: int
    """R: rows are summed per group first, so that devices exchange the table's gradient once, not once per chunk."""
    chunk: int
    """C."""


def cross_entropy(
    hidden: jax.Array, table: jax.Array, targets: jax.Array, weights: jax.Array, is_tied: bool, compute: Compute
) -> jax.Array:
    """Return sum(weights * -log softmax(hidden @ table)[targets]), float32 [].

    hidden [B, T, D] in the compute dtype; table float32 [D, V], or [V, D] when `is_tied`; targets int32 [B, T];
    weights float32 [B, T], constants: no gradient flows to them. A position of weight 0 contributes nothing to the
    value or to a gradient, whatever its state and target are, not-a-number included.
    """
    batch, length, dim = hidden.shape
    groups = _num_groups(batch)
    most = max(1, compute.loss_chunk_tokens // (batch // groups))
    num_chunks = -(-length // most)
    chunk = -(-length // num_chunks)
    is_used = weights != 0
    hidden = jnp.where(is_used[..., None], hidden, 0)
    targets = jnp.where(is_used, targets, 0)

    def cut(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, num_chunks * chunk - length)] + [(0, 0)] * (x.ndim - 2))
        x = x.reshape(groups, batch // groups, num_chunks * chunk, *x.shape[2:])
        return constrain(x, ("batch", *(None,) * (x.ndim - 1)))

    return _sum_losses(cut(hidden), table, cut(targets), cut(weights), Layout(is_tied, groups, chunk))


def _num_groups(batch: int) -> int:
    """Return over how many devices the rows are spread."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1
    groups = prod(mesh.shape[axis] for axis in LOGICAL_AXES["batch"][1] or ())
    return groups if batch % groups == 0 else 1


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _sum_losses(hidden: jax.Array, table: jax.Array, targets: jax.Array, weights: jax.Array, layout: Layout):
    narrow = table.astype(hidden.dtype)

    def step(total: jax.Array, start: jax.Array):
        h, target, weight = (_chunk(x, start, layout) for x in (hidden, targets, weights))
        log_normalizer, target_logit = _normalize(_logits(h, narrow, layout), target)
        return total + jnp.sum((log_normalizer - target_logit) * weight), None

    return jax.lax.scan(step, jnp.float32(0), _starts(hidden, layout))[0]


def _sum_losses_forward(hidden, table, targets, weights, layout: Layout):
    """Return the loss and its gradients for hidden and table."""
    narrow = table.astype(hidden.dtype)
    to_hidden = "rbcv,vd->rbcd" if layout.is_tied else "rbcv,dv->rbcd"

    def step(carry, start: jax.Array):
        total, d_table = carry
        h, target, weight = (_chunk(x, start, layout) for x in (hidden, targets, weights))
        logits = _logits(h, narrow, layout)
        log_normalizer, target_logit = _normalize(logits, target)
        total = total + jnp.sum((log_normalizer - target_logit) * weight)
        is_target = target[..., None] == jnp.arange(logits.shape[-1])
        d_logits = (jnp.exp(logits - log_normalizer[..., None]) - is_target) * weight[..., None]
        d_logits = d_logits.astype(h.dtype)
        d_hidden = jnp.einsum(to_hidden, d_logits, narrow)
        d_table = d_table + jnp.einsum("rbcd,rbcv->rdv", h, d_logits, preferred_element_type=jnp.float32)
        return (total, constrain(d_table, ("batch", None, "vocab"))), d_hidden

    # [D, V] whether tied or not: forming [V, D] would transpose every chunk of d_logits, this transposes once.
    zeros = jnp.zeros((layout.num_groups, *(table.shape[::-1] if layout.is_tied else table.shape)), jnp.float32)
    start = (jnp.float32(0), constrain(zeros, ("batch", None, "vocab")))
    (total, d_table), d_hidden = jax.lax.scan(step, start, _starts(hidden, layout))
    d_hidden = jnp.moveaxis(d_hidden, 0, 2).reshape(hidden.shape)
    d_table = jnp.sum(d_table, axis=0)
    return total, (d_hidden, d_table.T if layout.is_tied else d_table)


def _sum_losses_backward(layout: Layout, gradients, cotangent: jax.Array):
    d_hidden, d_table = gradients
    return (d_hidden * cotangent).astype(d_hidden.dtype), d_table * cotangent, None, None


_sum_losses.defvjp(_sum_losses_forward, _sum_losses_backward)


def _starts(hidden: jax.Array, layout: Layout) -> jax.Array:
    return jnp.arange(0, hidden.shape[2], layout.chunk)


def _chunk(x: jax.Array, start: jax.Array, layout: Layout) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, layout.chunk, axis=2)


def _logits(h: jax.Array, table: jax.Array, layout: Layout) -> jax.Array:
    """Return float32 logits [R, b, C, V] of one chunk."""
    product = "rbcd,vd->rbcv" if layout.is_tied else "rbcd,dv->rbcv"
    logits = jnp.einsum(product, h, table, preferred_element_type=jnp.float32)
    return constrain(logits, ("batch", None, None, "vocab"))


def _normalize(logits: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the log of the softmax's normaliser and the target's logit, each float32 [R, b, C]."""
    largest = jnp.max(logits, axis=-1)
    log_normalizer = largest + jnp.log(jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1))
    target_logit = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
    return log_normalizer, target_logit
