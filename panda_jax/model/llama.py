"""LLaMA (arXiv:2302.13971) in Flax NNX, with grouped-query attention (arXiv:2305.13245).

    B batch, T query, S key, D width, F mlp, N heads, K kv heads, G = N/K, H head dim, V vocab, L layers

The parameters of all layers are stacked on a leading L axis; `axes` on each parameter names its logical axes, which
sharding.py maps to the mesh. Parameters are float32; they are cast to compute.dtype where they are used, and so is the
residual stream. Norms, rotary angles, softmax and loss are float32.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from panda_jax.config import Compute, Model
from panda_jax.model.attention import Visibility, attend, choose_backend
from panda_jax.sharding import constrain

Layer = dict[str, jax.Array]
Angles = tuple[jax.Array, jax.Array]

PRODUCT = "product with a weight"


class Layers(nnx.Module):
    """The parameters of every transformer block, stacked."""

    def __init__(self, config: Model, key: jax.Array):
        L, D, F = config.num_layers, config.dim, config.mlp_dim
        N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
        keys = jax.random.split(key, 7)
        matrix, std = _normal, config.init_std
        self.attn_norm = nnx.Param(jnp.ones((L, D)), axes=("layers", "embed"))
        self.wq = nnx.Param(matrix(keys[0], (L, D, N, H), std), axes=("layers", "embed", "heads", "head_dim"))
        self.wk = nnx.Param(matrix(keys[1], (L, D, K, H), std), axes=("layers", "embed", "kv_heads", "head_dim"))
        self.wv = nnx.Param(matrix(keys[2], (L, D, K, H), std), axes=("layers", "embed", "kv_heads", "head_dim"))
        self.wo = nnx.Param(matrix(keys[3], (L, N, H, D), std), axes=("layers", "heads", "head_dim", "embed"))
        self.mlp_norm = nnx.Param(jnp.ones((L, D)), axes=("layers", "embed"))
        self.w_gate = nnx.Param(matrix(keys[4], (L, D, F), std), axes=("layers", "embed", "mlp"))
        self.w_up = nnx.Param(matrix(keys[5], (L, D, F), std), axes=("layers", "embed", "mlp"))
        self.w_down = nnx.Param(matrix(keys[6], (L, F, D), std), axes=("layers", "mlp", "embed"))


class Llama(nnx.Module):
    """The model: token ids in, hidden states out; the output layer is applied by the loss, chunk by chunk."""

    def __init__(self, config: Model, key: jax.Array):
        """Draw every matrix from normal(init_std) and set every norm to one; `key` is a JAX PRNG key.

        A parameter's draw depends on `key` and on its own shape alone, not on how it is sharded.
        """
        V, D, std = config.vocab_size, config.dim, config.init_std
        embed_key, layers_key, head_key = jax.random.split(key, 3)
        self.config = config
        self.embed = nnx.Param(_normal(embed_key, (V, D), std), axes=("vocab", "embed"))
        self.layers = Layers(config, layers_key)
        self.norm = nnx.Param(jnp.ones((D,)), axes=("embed",))
        if not config.tie_embeddings:
            self.lm_head = nnx.Param(_normal(head_key, (D, V), std), axes=("embed", "vocab"))

    def hidden(
        self,
        tokens: jax.Array,
        segment_ids: jax.Array,
        positions: jax.Array,
        compute: Compute,
        branch_ids: jax.Array | None = None,
    ) -> jax.Array:
        """Return the states after the final norm, [B, T, D] in compute.dtype.

        tokens, segment_ids, positions: int32 [B, T]; segment 0 is padding and positions restart at each segment.
        branch_ids: int32 [B, T], where a segment has alternative endings (attention.py); each one's positions go on
        from the shared part. Raises InputError when compute.attention names a backend that cannot be used here.
        """
        config, dtype = self.config, jnp.dtype(compute.dtype)
        backend = choose_backend(config, compute, tokens.shape[1])
        # One gather of the rows over fsdp; otherwise the partitioner replicates the result. The rows are cast after
        # the look-up, so that the gradients of a frequent token are summed in float32.
        table = constrain(self.embed[...], ("vocab", None))
        x = constrain(table[tokens].astype(dtype), ("batch", "sequence", "embed"))
        angles = rotary_angles(positions, config)
        visibility = Visibility(segment_ids, branch_ids)

        def block(x: jax.Array, layer: Layer) -> tuple[jax.Array, None]:
            q, k, v = queries_keys_values(x, layer, angles, config)
            out = attend(q, k, v, visibility, backend, compute.attention_block)
            return after_attention(x, out, layer, config), None

        x = _run_layers(_remat(block, compute), x, nnx.to_pure_dict(nnx.state(self.layers)), compute)
        return rms_norm(x, self.norm[...], config.norm_eps)

    def output_table(self) -> jax.Array:
        """Return the float32 weights of the output layer: [D, V], or the embedding's [V, D] when they are tied."""
        return self.embed[...] if self.config.tie_embeddings else self.lm_head[...]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Return float32 logits [B, T, V] of states [B, T, D]; for evaluation, the loss never forms them whole."""
        product = "btd,vd->btv" if self.config.tie_embeddings else "btd,dv->btv"
        table = self.output_table().astype(hidden.dtype)
        return jnp.einsum(product, hidden, table, preferred_element_type=jnp.float32)


def queries_keys_values(x: jax.Array, layer: Layer, angles: Angles, config: Model) -> tuple[jax.Array, ...]:
    """Return the layer's rotated queries [B, T, N, H] and keys [B, T, K, H], and its values [B, T, K, H]."""
    h = rms_norm(x, layer["attn_norm"], config.norm_eps)
    q = rotate(project("btd,dnh->btnh", h, layer["wq"]), angles)
    k = rotate(project("btd,dkh->btkh", h, layer["wk"]), angles)
    return q, k, project("btd,dkh->btkh", h, layer["wv"])


def after_attention(x: jax.Array, out: jax.Array, layer: Layer, config: Model) -> jax.Array:
    """Return the residual stream [B, T, D] behind the layer, given what its attention gave out [B, T, N, H]."""
    x = x + project("btnh,nhd->btd", out, layer["wo"])
    h = rms_norm(x, layer["mlp_norm"], config.norm_eps)
    gate = project("btd,df->btf", h, layer["w_gate"])
    up = project("btd,df->btf", h, layer["w_up"])
    x = x + project("btf,fd->btd", jax.nn.silu(gate) * up, layer["w_down"])
    return constrain(x, ("batch", "sequence", "embed"))


def project(product: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """Return einsum(product, x, weight) in x's dtype, under the name that compute.remat `dots` keeps.

    The gradient of the float32 weight is summed in float32, whatever x's dtype is.
    """
    return checkpoint_name(_project(product, x, weight), PRODUCT)


# Automatic differentiation would form the weight's gradient transposed, which is slow on CPU, and in x's dtype.
@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _project(product: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.einsum(product, x, weight.astype(x.dtype))


def _project_forward(product: str, x: jax.Array, weight: jax.Array):
    return _project(product, x, weight), (x, weight)


def _project_backward(product: str, saved: tuple[jax.Array, jax.Array], d_out: jax.Array):
    x, weight = saved
    operands, out = product.split("->")
    left, right = operands.split(",")
    d_x = jnp.einsum(f"{out},{right}->{left}", d_out, weight.astype(x.dtype))
    d_weight = jnp.einsum(f"{left},{out}->{right}", x, d_out, preferred_element_type=jnp.float32)
    return d_x, d_weight.astype(weight.dtype)


_project.defvjp(_project_forward, _project_backward)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Return x / rms(x) * weight over the last axis, computed in float32, in x's dtype (arXiv:1910.07467)."""
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * scale * weight).astype(x.dtype)


def rotary_angles(positions: jax.Array, config: Model) -> Angles:
    """Return the cosines and sines of the rotary angles, float32 [B, T, 1, H/2], of positions [B, T].

    Frequency i is rope_theta^(-2i/H) (arXiv:2104.09864 §3.4.2). It is rounded to float32 in the same places as in the
    published models: at position 4096 one unit in the last place would turn a head by 2e-4 radians.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = np.float32(1.0) / np.power(config.rope_theta, exponents, dtype=np.float64).astype(np.float32)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, angles: Angles) -> jax.Array:
    """Return x [B, T, N, H] with component i of each head turned together with component i + H/2 (half-split RoPE).

    For H = 4 the pairs are (0, 2) and (1, 3). Meta's files pair (0, 1) and (2, 3): converters permute, not we.
    """
    cos, sin = angles
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _normal(key: jax.Array, shape: tuple[int, ...], std: float) -> jax.Array:
    return std * jax.random.normal(key, shape, jnp.float32)


def _remat(block, compute: Compute):
    """Return the block with its backward pass recomputing what compute.remat says."""
    if compute.remat == "none":
        return block
    policy = jax.checkpoint_policies.save_only_these_names(PRODUCT) if compute.remat == "dots" else None
    return jax.checkpoint(block, prevent_cse=False, policy=policy)


def _run_layers(block, x: jax.Array, layers: Layer, compute: Compute) -> jax.Array:
    """Return x after every layer; `layers` holds the stacked parameters."""
    if compute.layer_loop == "scan":
        return jax.lax.scan(block, x, layers)[0]
    for layer in _unstack(layers):
        x, _ = block(x, layer)
    return x


def _unstack(layers: Layer) -> list[Layer]:
    """Return one dict per layer. `split` has a concatenation as its gradient; indexing would sum padded copies."""
    num_layers = len(layers["wq"])
    pieces = {name: jax.lax.split(value, (1,) * num_layers) for name, value in layers.items()}
    return [{name: jnp.squeeze(values[i], 0) for name, values in pieces.items()} for i in range(num_layers)]
