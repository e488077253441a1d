"""Causal self-attention that never crosses a segment, and the choice of its backend.

    B batch, T query, S key, N heads, K kv heads, G = N/K, H head dim

Every backend computes the same thing: query t sees key s when s <= t and both belong to the same segment.
For segment ids [1, 1, 2, 0] the mask, one row per query, is

    1 0 0 0
    1 1 0 0
    0 0 1 0
    0 0 0 1

so padding (segment 0) sees only padding: its rows stay finite, and no real token reads them.

Alternative endings of one text share its beginning. With branch ids [0, 0, 1, 1, 2] in one segment, branch 0 is what
they share, and 1 and 2 do not see each other:

    1 0 0 0 0
    1 1 0 0 0
    1 1 1 0 0
    1 1 1 1 0
    1 1 0 0 1
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from panda_jax.config import Compute, Model
from panda_jax.errors import InputError


class Accelerator(NamedTuple):
    """What the choice of a backend depends on."""

    platform: str
    """cpu, gpu or tpu."""
    cuda_capability: tuple[int, int] | None
    """(9, 0) on Hopper; None on anything that is not an NVIDIA GPU."""


def accelerator() -> Accelerator:
    """Return what this process computes on."""
    device = jax.local_devices()[0]
    if device.platform != "gpu" or "cuda" not in device.client.platform_version.lower():
        return Accelerator(device.platform, None)
    major, minor = device.compute_capability.split(".")
    return Accelerator(device.platform, (int(major), int(minor)))


def cudnn_obstacle(model: Model, compute: Compute, seq_len: int, machine: Accelerator) -> str | None:
    """Return why cuDNN cannot compute this model's attention with segments, or None when it can.

    The limits are cuDNN's fused attention as `jax.nn.dot_product_attention` reaches it, trained with a bias.
    """
    if machine.cuda_capability is None:
        return f"the platform is {machine.platform}, cuDNN needs an NVIDIA GPU"
    if machine.cuda_capability < (8, 0):
        return f"the GPU has compute capability {machine.cuda_capability}, cuDNN needs (8, 0), Ampere, or newer"
    if compute.dtype != "bfloat16":
        return f"compute.dtype is {compute.dtype}, cuDNN needs bfloat16"
    if model.head_dim % 8:
        return f"head size {model.head_dim} (model.dim / model.num_heads) is not a multiple of 8"
    largest = 256 if machine.cuda_capability >= (9, 0) else 128
    if model.head_dim > largest:
        return f"head size {model.head_dim} (model.dim / model.num_heads) exceeds {largest}, this GPU's limit"
    if seq_len % 2:
        return f"the rows have {seq_len} tokens, cuDNN needs an even number"
    return None


def choose_backend(model: Model, compute: Compute, seq_len: int) -> str:
    """Return the backend that computes attention on rows of `seq_len` tokens here: "xla" or "cudnn".

    `compute.attention: auto` takes cuDNN wherever it can honour segments. Raises InputError, with the reason, when
    cuDNN is asked for and cannot; nothing falls back silently.
    """
    if compute.attention == "xla":
        return "xla"
    obstacle = cudnn_obstacle(model, compute, seq_len, accelerator())
    if compute.attention == "auto":
        return "xla" if obstacle else "cudnn"
    if obstacle:
        raise InputError(f"compute.attention: cudnn cannot be used, {obstacle}; set compute.attention=auto")
    return "cudnn"


class Visibility(NamedTuple):
    """What decides, beside the order of the tokens, who sees whom: int32 [B, T] each."""

    segment_ids: jax.Array
    branch_ids: jax.Array | None
    """None where texts do not branch."""


def attend(q: jax.Array, k: jax.Array, v: jax.Array, visibility: Visibility, backend: str, block: int) -> jax.Array:
    """Return the attention output [B, T, N, H] in q's dtype.

    q [B, T, N, H], k and v [B, T, K, H] share one dtype; `backend` comes from `choose_backend`; `block` is the number
    of query rows per block of the XLA backend.
    """
    if backend == "cudnn":
        return _attend_cudnn(q, k, v, visibility)
    return _attend_blocked(q, k, v, visibility, block)


def _attend_cudnn(q: jax.Array, k: jax.Array, v: jax.Array, visibility: Visibility) -> jax.Array:
    """Attention by cuDNN's fused kernel.

    The causal mask is part of the kernel, so blocks above the diagonal are not computed. The segment mask becomes a
    dense bias of B x T x T x 2 bytes (268 MB at B 8, T 4096) that is read once per head: that is the price of packing.
    """
    reachable = _reachable(visibility, slice(None), slice(None))[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=reachable, is_causal=True, implementation="cudnn")


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend_blocked(q: jax.Array, k: jax.Array, v: jax.Array, visibility: Visibility, block: int) -> jax.Array:
    """Attention over blocks of query rows, each against the keys up to its own end: half the square is never computed.

    Scores and softmax are float32. The last block is shorter when `block` does not divide T. Nothing of size T x S is
    kept for the backward pass, which forms the weights of each block anew from the log-sum-exp of its rows
    (arXiv:2205.14135 §3.1).
    """
    return _blocked_forward(q, k, v, visibility, block)[0]


def _blocked_forward(q: jax.Array, k: jax.Array, v: jax.Array, visibility: Visibility, block: int):
    """Return the output and what the backward pass needs; the log-sum-exp is float32 [B, K, G, T]."""
    queries, keys, values = _by_head(q, k.shape[2]), _by_head(k, k.shape[2])[:, :, 0], _by_head(v, v.shape[2])[:, :, 0]
    outputs, normalizers = [], []
    for start, end in _blocks(q.shape[1], block):
        scores = _scores(queries, keys, visibility, start, end)
        largest = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        out = jnp.einsum(
            "bkgts,bksh->bkgth", weights.astype(v.dtype), values[:, :, :end], preferred_element_type=jnp.float32
        )
        outputs.append((out / total).astype(q.dtype))
        normalizers.append((largest + jnp.log(total))[..., 0])
    out = _by_position(jnp.concatenate(outputs, axis=3))
    return out, (q, k, v, visibility, out, jnp.concatenate(normalizers, axis=3))


def _blocked_backward(block: int, saved, d_out: jax.Array):
    q, k, v, visibility, out, normalizer = saved
    queries, keys, values = _by_head(q, k.shape[2]), _by_head(k, k.shape[2])[:, :, 0], _by_head(v, v.shape[2])[:, :, 0]
    d_outputs, outputs = _by_head(d_out, k.shape[2]), _by_head(out, k.shape[2])
    inner = jnp.sum(d_outputs.astype(jnp.float32) * outputs.astype(jnp.float32), axis=-1, keepdims=True)
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    d_queries = []
    d_keys, d_values = jnp.zeros(keys.shape, jnp.float32), jnp.zeros(values.shape, jnp.float32)
    for start, end in _blocks(q.shape[1], block):
        rows = (slice(None), slice(None), slice(None), slice(start, end))
        scores = _scores(queries, keys, visibility, start, end)
        weights = jnp.exp(scores - normalizer[rows][..., None])
        d_weights = product("bkgth,bksh->bkgts", d_outputs[rows], values[:, :, :end])
        d_scores = (weights * (d_weights - inner[rows]) * q.shape[-1] ** -0.5).astype(q.dtype)
        d_queries.append(product("bkgts,bksh->bkgth", d_scores, keys[:, :, :end]))
        d_key = product("bkgts,bkgth->bksh", d_scores, queries[rows])
        d_value = product("bkgts,bkgth->bksh", weights.astype(q.dtype), d_outputs[rows])
        d_keys, d_values = d_keys.at[:, :, :end].add(d_key), d_values.at[:, :, :end].add(d_value)
    d_q = _by_position(jnp.concatenate(d_queries, axis=3)).astype(q.dtype)
    d_k, d_v = (_by_position(x[:, :, None]).astype(q.dtype) for x in (d_keys, d_values))
    return d_q, d_k, d_v, None


_attend_blocked.defvjp(_blocked_forward, _blocked_backward)


def _blocks(length: int, block: int) -> list[tuple[int, int]]:
    return [(start, min(start + block, length)) for start in range(0, length, block)]


def _scores(queries: jax.Array, keys: jax.Array, visibility: Visibility, start: int, end: int) -> jax.Array:
    """Return the masked, scaled scores of one block of queries, float32 [B, K, G, end - start, end]."""
    scores = jnp.einsum(
        "bkgth,bksh->bkgts", queries[:, :, :, start:end], keys[:, :, :end], preferred_element_type=jnp.float32
    )
    visible = block_mask(visibility, start, end)[:, None, None]
    return jnp.where(visible, scores * queries.shape[-1] ** -0.5, jnp.finfo(jnp.float32).min)


def _by_head(x: jax.Array, num_kv_heads: int) -> jax.Array:
    """[B, T, N, H] -> [B, K, G, T, H]."""
    batch, length, num_heads, head_dim = x.shape
    return x.reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim).transpose(0, 2, 3, 1, 4)


def _by_position(x: jax.Array) -> jax.Array:
    """[B, K, G, T, H] -> [B, T, N, H]."""
    batch, num_kv_heads, group, length, head_dim = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(batch, length, num_kv_heads * group, head_dim)


def block_mask(visibility: Visibility, start: int, end: int) -> jax.Array:
    """Return which keys the queries start..end-1 see: bool [B, end - start, end], as drawn at the top of this file."""
    causal = jnp.arange(start, end)[:, None] >= jnp.arange(end)[None, :]
    return causal & _reachable(visibility, slice(start, end), slice(end))


def _reachable(visibility: Visibility, queries: slice, keys: slice) -> jax.Array:
    """Return which keys each query may see, whatever their order: bool [B, queries, keys]."""
    segments, branches = visibility
    same_segment = segments[:, queries, None] == segments[:, None, keys]
    if branches is None:
        return same_segment
    shared = branches[:, None, keys] == 0
    return same_segment & (shared | (branches[:, queries, None] == branches[:, None, keys]))
