"""The model one token at a time: keys and values of the tokens so far are kept, not computed again.

    B batch, P prompt, S capacity, K kv heads, G = N/K, H head dim, V vocab, L layers

Rows begin in slot 0 and a token's slot is its position, so a row of n tokens lies in slots 0..n-1 and a query at
position p sees the slots s <= p. What lies behind, be it padding of a shorter prompt, is never seen: it is overwritten
when the row gets there. For rows of 3 and 1 prompt tokens, two tokens later (. is unseen):

    slot   0 1 2 3 4 5
    row 0  p p p g g .
    row 1  p g g . . .
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from panda_jax.config import Compute, Model
from panda_jax.model.attention import Visibility, attend, choose_backend
from panda_jax.model.llama import Angles, Layer, after_attention, queries_keys_values, rms_norm, rotary_angles
from panda_jax.sharding import constrain

LAYER_AXES = ("batch", "kv_heads", "sequence", "head_dim")


class Cache(NamedTuple):
    """Keys (rotated) and values in the compute dtype.

    One array [L, B, K, S, H] each under compute.layer_loop `scan`; a tuple of L arrays [B, K, S, H] under `unroll`,
    where a slice of one array would be copied at every step. Slots lie behind heads, as the products want them.
    """

    keys: jax.Array | tuple[jax.Array, ...]
    values: jax.Array | tuple[jax.Array, ...]


Prepared = dict[str, Any]


def prepare(parameters: dict[str, jax.Array], model: Model, compute: Compute) -> Prepared:
    """Return the parameters (model/parameters.py) as steps use them; those that need no change are shared, not copied.

    Matrices are cast to the compute dtype; norms, which are applied in float32, stay. Under compute.layer_loop `unroll`
    every layer becomes arrays of its own, a second copy of the layers: a slice would be copied at every step.
    """
    dtype = jnp.dtype(compute.dtype)
    cast = {
        name: value if name.endswith("norm") or value.dtype == dtype else value.astype(dtype)
        for name, value in parameters.items()
    }
    stacked = {name.partition(".")[2]: value for name, value in cast.items() if "." in name}
    layers = stacked if compute.layer_loop == "scan" else _unstack(stacked, model.num_layers)
    return {name: value for name, value in cast.items() if "." not in name} | {"layers": layers}


def _unstack(stacked: Layer, num_layers: int) -> tuple[Layer, ...]:
    """Return one dict per layer, its arrays laid out over the mesh as the whole ones are."""
    pieces = {}
    for name, value in stacked.items():
        shardings = None
        if isinstance(value.sharding, NamedSharding):
            shardings = NamedSharding(value.sharding.mesh, PartitionSpec(*value.sharding.spec[1:]))
        split = jax.jit(lambda whole: tuple(whole[i] for i in range(num_layers)), out_shardings=shardings)
        pieces[name] = split(value)
    return tuple({name: values[i] for name, values in pieces.items()} for i in range(num_layers))


class CachedLlama:
    """The network of llama.py over a cache; `weights` come from `prepare`."""

    def __init__(self, weights: Prepared, config: Model, compute: Compute) -> None:
        self.weights, self.config, self.compute = weights, config, compute

    def prefill(self, tokens: jax.Array, lengths: jax.Array, capacity: int) -> tuple[jax.Array, Cache]:
        """Return float32 logits [B, V] behind each row's last token, and the cache of `capacity` slots.

        tokens int32 [B, P], rows beginning in column 0; lengths int32 [B], 1 <= length <= P <= capacity.
        """
        num_columns = tokens.shape[1]
        columns = jnp.broadcast_to(jnp.arange(num_columns), tokens.shape)
        visibility = Visibility((columns < lengths[:, None]).astype(jnp.int32), None)
        angles = rotary_angles(columns, self.config)
        backend = choose_backend(self.config, self.compute, num_columns)

        def block(x: jax.Array, layer: Layer) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            q, k, v = queries_keys_values(x, layer, angles, self.config)
            out = attend(q, k, v, visibility, backend, self.compute.attention_block)
            return after_attention(x, out, layer, self.config), (_slots(k, capacity), _slots(v, capacity))

        x = self._embedded(tokens)
        if self.compute.layer_loop == "scan":
            x, (keys, values) = jax.lax.scan(block, x, self.weights["layers"])
            cache = Cache(keys, values)
        else:
            kept = []
            for layer in self.weights["layers"]:
                x, pair = block(x, layer)
                kept.append(pair)
            cache = Cache(tuple(k for k, _ in kept), tuple(v for _, v in kept))
        last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)
        return self._logits(last), cache

    def step(self, tokens: jax.Array, positions: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Return float32 logits [B, V] behind one more token per row, and the cache with that token in it.

        tokens int32 [B]; positions int32 [B], where each token lies in its row.
        """
        x = self._embedded(tokens[:, None])
        angles = rotary_angles(positions[:, None], self.config)
        if self.compute.layer_loop == "scan":
            x, cache = self._scanned(x, angles, positions, cache)
        else:
            keys, values = list(cache.keys), list(cache.values)
            for i, layer in enumerate(self.weights["layers"]):
                q, k, v = queries_keys_values(x, layer, angles, self.config)
                keys[i], values[i] = _put(keys[i], k, positions), _put(values[i], v, positions)
                x = after_attention(x, _attend_slots(q, keys[i], values[i], positions), layer, self.config)
            cache = Cache(tuple(keys), tuple(values))
        return self._logits(x), cache

    def _scanned(self, x: jax.Array, angles: Angles, positions: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """The layers in a loop that carries the cache: as the loop's output it would be copied at every step."""

        def block(carry, layer_and_number):
            x, cache = carry
            layer, i = layer_and_number
            q, k, v = queries_keys_values(x, layer, angles, self.config)
            pair = [
                jax.lax.dynamic_update_index_in_dim(whole, _put(whole[i], new, positions), i, axis=0)
                for whole, new in zip(cache, (k, v), strict=True)
            ]
            cache = Cache(*pair)
            out = _attend_slots(q, cache.keys[i], cache.values[i], positions)
            return (after_attention(x, out, layer, self.config), cache), None

        numbered = (self.weights["layers"], jnp.arange(self.config.num_layers))
        return jax.lax.scan(block, (x, cache), numbered)[0]

    def _embedded(self, tokens: jax.Array) -> jax.Array:
        table = constrain(self.weights["embed"], ("vocab", None))
        return constrain(table[tokens], ("batch", "sequence", "embed"))

    def _logits(self, x: jax.Array) -> jax.Array:
        """Return float32 logits [B, V] of states [B, 1, D] before the final norm."""
        hidden = rms_norm(x, self.weights["norm"], self.config.norm_eps)[:, 0]
        is_tied = self.config.tie_embeddings
        product, table = ("bd,vd->bv", "embed") if is_tied else ("bd,dv->bv", "lm_head")
        return jnp.einsum(product, hidden, self.weights[table], preferred_element_type=jnp.float32)


def _slots(x: jax.Array, capacity: int) -> jax.Array:
    """[B, P, K, H] -> [B, K, S, H], zero behind the prompts' slots."""
    x = jnp.pad(x.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, capacity - x.shape[1]), (0, 0)))
    return constrain(x, LAYER_AXES)


def _put(slots: jax.Array, new: jax.Array, positions: jax.Array) -> jax.Array:
    """Return slots [B, K, S, H] with new [B, 1, K, H] in each row's own slot, positions [B]."""
    put = jax.vmap(lambda row, token, position: jax.lax.dynamic_update_slice_in_dim(row, token, position, axis=1))
    return put(slots, new.transpose(0, 2, 1, 3), positions)


def _attend_slots(q: jax.Array, keys: jax.Array, values: jax.Array, positions: jax.Array) -> jax.Array:
    """Return the attention output [B, 1, N, H] of one query per row over the slots up to its own; float32 softmax."""
    batch, num_kv_heads, capacity, head_dim = keys.shape
    queries = q.reshape(batch, num_kv_heads, -1, head_dim)
    scores = jnp.einsum("bkgh,bksh->bkgs", queries, keys, preferred_element_type=jnp.float32)
    seen = jnp.arange(capacity) <= positions[:, None]
    scores = jnp.where(seen[:, None, None], scores * head_dim**-0.5, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = jnp.einsum("bkgs,bksh->bkgh", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    return (out / total).astype(q.dtype).reshape(q.shape)
